import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tree
from numpy.typing import NDArray
from random_w8a8s import write_stand_in, write_w8a8s
from safetensors.torch import load_file

from glmq.checkpoint.checksums import digest_of
from glmq.checkpoint.header import read_header
from glmq.codec.codec import decode
from glmq.compression.executor import AscendCodec
from glmq.compression.layouts import Layout, Unsharded
from glmq.compression.manifest import CodecKind, read_manifest
from glmq.compression.shard import read_pieces
from glmq.compression.source import Source, open_source
from glmq.compression.stream import (
    CompressedLinear,
    RankFileWritten,
    Record,
    Step,
    choose_layout,
    compress_checkpoint,
    finish_folder,
    plan_ranks,
    planned_bytes,
)
from glmq.compression.weight_codec import Codec, Compressed, PortableCodec
from glmq.engines import Engine
from glmq.errors import CodecError, UsageError


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    opened = open_source(write_w8a8s(tmp_path / "w8a8s"))
    with opened.checkpoint:
        yield opened


def run(source: Source, codec: Codec, layout: Layout, world: int, folder: Path, jobs: int = 2) -> list[Record]:
    folder.mkdir()
    plans = plan_ranks(source, layout, world, range(world))
    records = list(compress_checkpoint(source, plans, codec, layout, world, folder, jobs))
    parts = [record.record for record in records if isinstance(record, RankFileWritten)]
    finish_folder(source, codec.kind, layout, world, parts, folder)
    return records


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_mindie_folder_has_exactly_the_files_and_tensors_of_the_format(
    source: Source, tmp_path: Path, world: int
) -> None:
    run(source, AscendCodec(write_stand_in(tmp_path)), Engine.MINDIE, world, tmp_path / "out")
    sides = {
        "chat_template.jinja", "generation_config.json", "preprocessor_config.json", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json", "video_preprocessor_config.json",
    }  # fmt: skip
    weights = {f"part{rank}-of-{world}/quant_model_weight_w8a8sc.safetensors" for rank in range(world)}
    descriptions = {f"part{rank}-of-{world}/quant_model_description.json" for rank in range(world)}
    files = {name for name, digest in tree(tmp_path / "out").items() if digest}
    assert files == {"config.json", "glmq_manifest.json", *sides, *weights, *descriptions}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["text_config"]["dtype"] == "float16"
    assert not {"quantize", "quantization_config"} & set(config)
    for rank, tensors in plan_ranks(source, Engine.MINDIE, world, range(world)).items():
        part = tmp_path / "out" / f"part{rank}-of-{world}"
        stored = load_file(part / "quant_model_weight_w8a8sc.safetensors")
        description = json.loads((part / "quant_model_description.json").read_text())
        assert (description.pop("model_quant_type"), description.pop("version")) == ("W8A8SC", "1.0.0")
        assert set(description) == set(stored)
        for tensor in tensors:
            name = tensor.spec.name
            found = stored.pop(name)
            if tensor.is_matrix:
                rows, cols = tensor.spec.shape
                base = name.removesuffix(".weight")
                assert (found.dtype, found.dim()) == (torch.int8, 1)
                assert stored.pop(f"{base}.info").tolist() == [8, 8, cols, rows, 1]
                index = stored.pop(f"{base}.index")
                assert (index.dtype, len(index)) == (torch.int8, 8 * -(-rows // 128) * -(-cols // 256))
                assert {description[f"{base}.{x}"] for x in ("weight", "index", "info")} == {"W8A8SC"}
                assert description[f"{base}.deq_scale"] == description[f"{base}.input_scale"] == "W8A8S"
            else:
                assert torch.equal(found, torch.cat(list(read_pieces(source.checkpoint, tensor)))), name
        assert not stored


def test_a_vllm_folder_has_one_file_per_rank_and_one_description(source: Source, tmp_path: Path) -> None:
    run(source, AscendCodec(write_stand_in(tmp_path)), Engine.VLLM_ASCEND, 2, tmp_path / "out")
    files = {name for name in tree(tmp_path / "out") if "safetensors" in name or "description" in name}
    assert files == {
        "model-rank-0-part-0.safetensors", "model-rank-1-part-0.safetensors", "quant_model_description.json"
    }  # fmt: skip
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    layer = "model.language_model.layers.0"
    assert description["model_quant_type"] == "W8A8SC"
    assert {description[f"{layer}.self_attn.{x}_proj.weight"] for x in "qkvo"} == {"W8A8SC"}
    assert description[f"{layer}.mlp.gate_proj.weight"] == "W8A8SC"
    assert description[f"{layer}.self_attn.q_proj.deq_scale"] == "W8A8S"
    assert description[f"{layer}.mlp.down_proj.weight"] == "FLOAT"
    stored = [load_file(tmp_path / "out" / f"model-rank-{rank}-part-0.safetensors") for rank in range(2)]
    biases = [tensors["language_model.model.layers.0.self_attn.o_proj.quant_bias"] for tensors in stored]
    assert torch.equal(*biases)
    assert bool(biases[0].count_nonzero())


@pytest.mark.parametrize(("world", "layout"), [(1, Unsharded.SOURCE), (2, Engine.MINDIE)])
def test_a_portable_folder_cannot_be_mistaken_for_an_engines(
    source: Source, tmp_path: Path, world: int, layout: Layout
) -> None:
    run(source, PortableCodec(), layout, world, tmp_path / "out")
    files = [name for name in tree(tmp_path / "out") if name.endswith((".safetensors", "description.json"))]
    kept = ["glmq_source/quant_model_description.json"]
    assert files == kept + [f"part{rank}-of-{world}/glmq_weight_w8a8s.gqsc.safetensors" for rank in range(world)]
    stored = load_file(tmp_path / "out" / files[-1])
    for tensor in plan_ranks(source, layout, world, [world - 1])[world - 1]:
        if tensor.is_matrix:
            assert tensor.spec.name not in stored
            blob = stored[f"{tensor.spec.name}.gqsc"]
            assert blob.dtype == torch.uint8
            assert bytes(blob[:4].numpy()) == b"GQSC"
            expected = torch.cat(list(read_pieces(source.checkpoint, tensor)))
            assert torch.equal(torch.from_numpy(decode(blob.numpy())), expected)
    assert read_manifest(tmp_path / "out").codec is CodecKind.PORTABLE


def test_the_manifest_has_a_checksum_of_every_byte(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run(source, AscendCodec(write_stand_in(tmp_path)), Engine.MINDIE, 2, folder)
    manifest = read_manifest(folder)
    covered = {part.file for part in manifest.rank_files} | set(manifest.files) | {"glmq_manifest.json"}
    assert covered == {name for name, digest in tree(folder).items() if digest}
    for name, record in manifest.files.items():
        content = (folder / name).read_bytes()
        assert (record.nbytes, record.digest) == (len(content), digest_of(content))
    for part in manifest.rank_files:
        content = (folder / part.file).read_bytes()
        header = read_header(folder / part.file)
        assert (part.nbytes, part.header) == (len(content), digest_of(content[: header.data_start]))
        assert part.tensors == {name: digest_of(content[t.start : t.end]) for name, t in header.tensors.items()}
    assert manifest.source == source.checkpoint.fingerprint()


def test_records_count_every_byte_once_and_measure_every_linear(source: Source, tmp_path: Path) -> None:
    records = run(source, PortableCodec(), Engine.MINDIE, 2, tmp_path / "out")
    plans = plan_ranks(source, Engine.MINDIE, 2, range(2))
    linears = [record for record in records if isinstance(record, CompressedLinear)]
    steps = [record for record in records if isinstance(record, Step)]
    parts = [record for record in records if isinstance(record, RankFileWritten)]
    assert sum(step.nbytes for step in steps) + sum(linear.weights for linear in linears) == planned_bytes(plans)
    assert [(linear.rank, linear.name) for linear in linears] == [
        (rank, tensor.spec.name.removesuffix(".weight")) for rank in plans for tensor in plans[rank] if tensor.is_matrix
    ]
    assert sum(sum(part.before.values()) for part in parts) == planned_bytes(plans)
    for part, rank in zip(parts, plans, strict=True):
        header = read_header(tmp_path / "out" / part.record.file)
        assert part.record.rank == rank
        assert sum(part.after.values()) == header.file_bytes - header.data_start
        for linear in (linear for linear in linears if linear.rank == rank):
            stored = header.tensors[f"{linear.name}.weight.gqsc"].nbytes
            assert linear.stored_bytes == stored
            assert linear.ratio == linear.rows * linear.cols / stored
            assert linear.bits_per_weight == 8 * stored / (linear.rows * linear.cols)


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_number_of_jobs_changes_no_byte(source: Source, tmp_path: Path, jobs: int) -> None:
    run(source, PortableCodec(), Engine.MINDIE, 2, tmp_path / "out", jobs=2)
    run(source, PortableCodec(), Engine.MINDIE, 2, tmp_path / "other", jobs=jobs)
    assert tree(tmp_path / "out") == tree(tmp_path / "other")


def test_an_error_in_one_weight_stops_the_others(source: Source, tmp_path: Path) -> None:
    class Failing(PortableCodec):
        stopped = False

        def compress(self, name: str, matrix: NDArray[np.int8], folder: Path) -> Compressed:
            if "layers.1" in name:
                raise ValueError(name)
            return super().compress(name, matrix, folder)

        def stop(self) -> None:
            self.stopped = True

    codec = Failing()
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.query_key_value"):
        run(source, codec, Engine.MINDIE, 2, tmp_path / "out")
    assert codec.stopped


def test_a_weight_that_is_too_large_is_refused_before_anything_is_written(source: Source, tmp_path: Path) -> None:
    class Small(PortableCodec):
        def check(self, name: str, rows: int, cols: int) -> None:
            if (rows, cols) == (88, 128):
                raise CodecError(name)

    with pytest.raises(CodecError, match=r"^language_model\.layers\.0\.mlp\.gate_up_proj$"):
        run(source, Small(), Engine.MINDIE, 2, tmp_path / "out")
    assert not tree(tmp_path / "out")


def test_the_portable_codec_takes_one_rank_as_it_is_and_no_vllm_layout() -> None:
    assert choose_layout(CodecKind.PORTABLE, Engine.MINDIE, 1) is Unsharded.SOURCE
    assert choose_layout(CodecKind.PORTABLE, Engine.MINDIE, 2) is Engine.MINDIE
    assert choose_layout(CodecKind.ASCEND, Engine.MINDIE, 1) is Engine.MINDIE
    assert choose_layout(CodecKind.ASCEND, Engine.VLLM_ASCEND, 2) is Engine.VLLM_ASCEND
    with pytest.raises(UsageError) as caught:
        choose_layout(CodecKind.PORTABLE, Engine.VLLM_ASCEND, 2)
    assert str(caught.value) == (
        "--layout vllm-ascend: exists only with --codec ascend; no engine reads the portable form"
    )
