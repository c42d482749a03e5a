import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tree
from random_w8a8s import write_stand_in, write_w8a8s
from safetensors.torch import load_file, save_file

from glmq.checkpoint.header import read_header
from glmq.compression.executor import AscendCodec
from glmq.compression.layouts import Unsharded
from glmq.compression.manifest import MANIFEST, read_manifest, record_files, write_manifest
from glmq.compression.restore import decompress_checkpoint, read_portable_manifest, restored_bytes, restored_tensors
from glmq.compression.source import open_source
from glmq.compression.stream import RankFileWritten, Step, compress_checkpoint, finish_folder, plan_ranks
from glmq.compression.weight_codec import Codec, PortableCodec
from glmq.engines import Engine
from glmq.errors import CheckpointError, CodecError

AGAIN = "the folder is damaged or incomplete, copy it again"
Q = "model.language_model.layers.0.self_attn.q_proj.weight.gqsc"


def compress(source_folder: Path, folder: Path, world: int, codec: Codec | None = None) -> Path:
    codec = codec or PortableCodec()
    layout = Unsharded.SOURCE if world == 1 else Engine.MINDIE
    folder.mkdir()
    source = open_source(source_folder)
    with source.checkpoint:
        plans = plan_ranks(source, layout, world, range(world))
        records = list(compress_checkpoint(source, plans, codec, layout, world, folder, 2))
        parts = [record.record for record in records if isinstance(record, RankFileWritten)]
        finish_folder(source, codec.kind, layout, world, parts, folder)
    return folder


def restore(folder: Path, out: Path) -> list[Step]:
    out.mkdir()
    return list(decompress_checkpoint(folder, read_portable_manifest(folder), out, 2))


@pytest.fixture
def w8a8s(tmp_path: Path) -> Path:
    return write_w8a8s(tmp_path / "w8a8s")


@pytest.fixture
def portable(w8a8s: Path, tmp_path: Path) -> Path:
    return compress(w8a8s, tmp_path / "portable", 1)


def test_one_rank_restores_what_quantize_wrote_file_by_file(tiny_seed: Path, tmp_path: Path) -> None:
    compress(tiny_seed, tmp_path / "portable", 1)
    restore(tmp_path / "portable", tmp_path / "restored")
    assert tree(tmp_path / "restored") == tree(tiny_seed)


def test_tensors_are_decoded_one_by_one_without_a_file(w8a8s: Path, tmp_path: Path) -> None:
    folder = compress(w8a8s, tmp_path / "portable", 1)
    wanted = load_file(w8a8s / "quant_model_weight_w8a8s.safetensors")
    found = dict(restored_tensors(folder, read_portable_manifest(folder), 2))
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name]), name
    folder = compress(w8a8s, tmp_path / "two", 2)
    with pytest.raises(CheckpointError) as caught:
        next(restored_tensors(folder, read_portable_manifest(folder), 2))
    assert str(caught.value) == (
        f"{folder}: holds parts of 2 ranks, not the tensors of a whole model; compress with --tp 1"
    )


def test_headers_of_other_writers_are_restored_too(w8a8s: Path, tmp_path: Path) -> None:
    path = w8a8s / "quant_model_weight_w8a8s.safetensors"
    save_file(load_file(path), path, metadata={"made": "elsewhere"})
    restore(compress(w8a8s, tmp_path / "portable", 1), tmp_path / "restored")
    assert tree(tmp_path / "restored") == tree(w8a8s)


def test_a_system_that_writes_a_few_bytes_at_a_time_is_no_damage(
    w8a8s: Path, portable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: real(handle, data[:1000], offset))
    restore(portable, tmp_path / "restored")
    assert tree(tmp_path / "restored") == tree(w8a8s)


@pytest.mark.parametrize(("world", "shard_bytes"), [(1, 200_000), (2, None), (4, 200_000)])
def test_every_number_of_parts_restores_the_un_sharded_checkpoint_bit_for_bit(
    tmp_path: Path, world: int, shard_bytes: int | None
) -> None:
    source = write_w8a8s(tmp_path / "w8a8s", shard_bytes=shard_bytes)
    assert (len(list(source.glob("*.safetensors"))) > 1) is (shard_bytes is not None)
    folder = compress(source, tmp_path / "portable", world)
    steps = restore(folder, tmp_path / "restored")
    assert tree(tmp_path / "restored") == tree(source)
    headers = map(read_header, source.glob("*.safetensors"))
    total = sum(header.file_bytes - header.data_start for header in headers)
    assert sum(step.nbytes for step in steps) == total == restored_bytes(folder, read_manifest(folder))


def test_two_parts_of_what_quantize_wrote_become_it_again(tiny_seed: Path, tmp_path: Path) -> None:
    restore(compress(tiny_seed, tmp_path / "portable", 2), tmp_path / "restored")
    assert tree(tmp_path / "restored") == tree(tiny_seed)


def test_parts_that_do_not_say_how_they_were_cut_are_refused(w8a8s: Path, tmp_path: Path) -> None:
    folder = compress(w8a8s, tmp_path / "portable", 2)
    manifest = read_manifest(folder)
    files = {name: record for name, record in manifest.files.items() if not name.startswith("glmq_source/")}
    write_manifest(folder, replace(manifest, files=files))
    assert refusal(folder) == (
        "DIR: does not say how its 2 parts were cut, an older glmq wrote it; compress the W8A8S folder again"
    )


O_PROJ = "model.language_model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("[\n0,\n128,\n64,\n128\n]", "[\n0,\n128,\n64,\n127\n]", "has not the size of what it was cut from"),
        ("[\n0,\n128,\n64,\n128\n]", "[\n0,\n128,\n65,\n129\n]", "has not the size that the source's header says"),
        (f'"{O_PROJ}"', '"elsewhere"', "belongs into no file of the source"),
        ('"parts": [', '"parts": [\n{},', "is of 3 parts, the folder has 2"),
        ('"glmq.slices/1"', '"glmq.slices/2"', "is not of the schema 'glmq.slices/1'"),
        ("[\n0,\n128,\n64,\n128\n]", "[\n0,\n128,\n0,\n64\n]", "no part has all of tensor"),
    ],
)
def test_slices_that_do_not_fit_are_refused(w8a8s: Path, tmp_path: Path, old: str, new: str, sentence: str) -> None:
    folder = compress(w8a8s, tmp_path / "portable", 2)
    manifest, name = read_manifest(folder), "glmq_source/glmq_slices.json"
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))
    files = {**manifest.files, name: record_files(folder, [])[name]}
    write_manifest(folder, replace(manifest, files=files))
    assert sentence in refusal(folder)


def weight_file(folder: Path) -> Path:
    return folder / "part0-of-1" / "glmq_weight_w8a8s.gqsc.safetensors"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def refusal(folder: Path, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        restore(folder, folder.parent / "restored")
    return str(caught.value).replace(str(folder), "DIR")


def test_an_altered_blob_names_tensor_and_tile(portable: Path) -> None:
    info = read_header(weight_file(portable)).tensors[Q]
    flip(weight_file(portable), info.end - 70)  # the last payload byte lies before the tail of 64 zeros
    assert refusal(portable, CodecError).startswith(
        f"DIR/part0-of-1/{weight_file(portable).name}: '{Q}': compressed weight: tile 0: "
    )


def test_an_altered_tail_of_a_blob_is_found_by_one_of_the_checksums(portable: Path) -> None:
    info = read_header(weight_file(portable)).tensors[Q]
    flip(weight_file(portable), info.end - 1)
    with pytest.raises((CodecError, CheckpointError), match=Q.replace(".", r"\.")):
        restore(portable, portable.parent / "restored")


def test_an_altered_float_tensor_is_named(portable: Path) -> None:
    name = "model.visual.blocks.1.mlp.up_proj.weight"
    flip(weight_file(portable), read_header(weight_file(portable)).tensors[name].start)
    assert refusal(portable) == (
        f"DIR/part0-of-1/{weight_file(portable).name}: tensor '{name}' is altered, its checksum is not the one in {MANIFEST}; "
        f"{AGAIN}"
    )


def swap_header(folder: Path) -> None:
    path = weight_file(folder)
    path.write_bytes(path.read_bytes().replace(b"layers.0.mlp.down_proj", b"layers.9.mlp.down_proj"))


def truncate(folder: Path) -> None:
    path = weight_file(folder)
    path.write_bytes(path.read_bytes()[:-5])


def alter_config(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def lose_description(folder: Path) -> None:
    (folder / "glmq_source" / "quant_model_description.json").unlink()


def lose_part(folder: Path) -> None:
    weight_file(folder).unlink()


def forget_part(folder: Path) -> None:
    manifest = read_manifest(folder)
    write_manifest(folder, type(manifest)(manifest.codec, manifest.layout, 1, manifest.source, (), manifest.files))


def forget_header(folder: Path) -> None:
    manifest = read_manifest(folder)
    files = {name: record for name, record in manifest.files.items() if not name.endswith(".header")}
    write_manifest(
        folder, type(manifest)(manifest.codec, manifest.layout, 1, manifest.source, manifest.rank_files, files)
    )


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            swap_header,
            f"DIR/part0-of-1/glmq_weight_w8a8s.gqsc.safetensors: is not the file that {MANIFEST} describes; {AGAIN}",
        ),
        (truncate, "DIR/part0-of-1/glmq_weight_w8a8s.gqsc.safetensors: the file is truncated: its tensors end at byte"),
        (alter_config, f"DIR/config.json: its checksum is not the one in {MANIFEST}; {AGAIN}"),
        (
            lose_description,
            f"DIR/glmq_source/quant_model_description.json: is no file, but the manifest lists it; {AGAIN}",
        ),
        (lose_part, "DIR/part0-of-1/glmq_weight_w8a8s.gqsc.safetensors: cannot be read (No such file or directory)"),
        (forget_part, f"DIR: {MANIFEST} does not list the parts 0 to 0; {AGAIN}"),
        (forget_header, f"DIR/part0-of-1: tensor 'lm_head.weight' belongs into no file of the source; {AGAIN}"),
    ],
)
def test_a_damaged_folder_is_refused(portable: Path, damage: Callable[[Path], None], sentence: str) -> None:
    damage(portable)
    assert refusal(portable).startswith(sentence)


def test_what_only_the_engine_reads_is_refused(w8a8s: Path, tmp_path: Path) -> None:
    folder = compress(w8a8s, tmp_path / "sc", 2, AscendCodec(write_stand_in(tmp_path)))
    assert refusal(folder) == (
        "DIR: was compressed by the vendor's program, and only the serving engine reads that; keep the W8A8S folder, or "
        "compress with --codec portable, to have a way back"
    )


def test_folders_of_others_are_refused(w8a8s: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no glmq_manifest\.json, so it was not written by `glmq compress`"):
        read_portable_manifest(w8a8s)
    with pytest.raises(CheckpointError) as caught:
        read_portable_manifest(tmp_path / "none")
    assert str(caught.value) == f"{tmp_path / 'none'}: is not a folder; give the folder that `glmq compress` wrote"


def test_a_compressed_folder_is_not_compressed_again(portable: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_source(portable)
    assert str(caught.value) == (
        f"{portable}: is compressed already (portable, world size 1); give the W8A8S folder it was made from, or restore that "
        "with --decompress"
    )
