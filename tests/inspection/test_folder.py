"""What a folder is, from its headers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import quantize
from random_w8a8s import write_stand_in
from safetensors.torch import load_file, save_file

import glmq
from glmq.engines import Engine
from glmq.errors import CheckpointError, UsageError
from glmq.inspection.folder import Kind, layer_of, role_of, scan_folder
from glmq.inspection.listing import (
    choose_rows,
    describe_folder,
    describe_layers,
    group_rows,
    tensor_rows,
    totals_by_area,
)
from glmq.verification.engines.check import check_lookups, describe_engines


def test_a_float_checkpoint_is_known_by_its_dtype(small: Path) -> None:
    folder = scan_folder(small)
    assert (folder.kind, folder.quant_type, folder.form) == (Kind.FLOAT, None, None)
    assert describe_folder(folder) == "float checkpoint, bfloat16 floats"
    assert folder.problems == ()
    assert folder.nbytes == sum(tensor.info.nbytes for tensor in folder.tensors)


def test_a_quantized_checkpoint_is_known_by_its_description(tiny_seed: Path) -> None:
    folder = scan_folder(tiny_seed)
    assert describe_folder(folder) == "quantized checkpoint, W8A8S (ascendV1), float16 floats"
    assert describe_engines(folder) == "the input of `glmq compress`; as it is, MindIE on the Atlas 300I Duo"
    types = {tensor.name: tensor.quant_type for tensor in folder.tensors}
    assert types["model.language_model.layers.0.self_attn.q_proj.weight"] == "W8A8S"
    assert types["model.language_model.layers.0.self_attn.q_proj.bias"] == "FLOAT"


def test_statistics_are_known(small_stats: Path) -> None:
    folder = scan_folder(small_stats)
    assert (folder.kind, describe_folder(folder)) == (Kind.STATISTICS, "calibration statistics")
    assert {tensor.quant_type for tensor in folder.tensors} == {"statistics"}
    assert {row.layer for row in tensor_rows(folder)} >= {"layers.0", "layers.1", "visual.blocks.0", "lm_head"}


def test_portable_parts_are_known(tiny_seed: Path, tmp_path: Path) -> None:
    glmq.compress(tiny_seed, out=tmp_path / "sc", codec="portable")
    folder = scan_folder(tmp_path / "sc")
    assert folder.kind is Kind.PORTABLE
    assert describe_engines(folder) == "no engine; `glmq compress --decompress` restores the W8A8S weights"


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        scan_folder(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: has neither safetensors files nor part folders with some; is this the right folder?"
    )


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        scan_folder(tmp_path / "none")
    assert str(error.value) == (
        f"{tmp_path / 'none'}: is not a folder; give the folder that holds config.json and the weights"
    )


def test_what_cannot_be_read_is_a_problem_and_not_an_end(small_copy: Path) -> None:
    (small_copy / "config.json").write_text("{")
    (small_copy / "torn.safetensors").write_bytes(b"123")
    problems = scan_folder(small_copy).problems
    assert [problem.partition(": ")[0] for problem in problems] == [
        str(small_copy / "config.json"),
        str(small_copy / "torn.safetensors"),
    ]


def test_a_tensor_in_two_files_and_a_missing_config_are_problems(small_copy: Path) -> None:
    (first, *_) = sorted(small_copy.glob("*.safetensors"))
    name = "lm_head.weight"
    save_file(
        {name: load_file(first)[name] if name in load_file(first) else torch.zeros(1)}, small_copy / "z.safetensors"
    )
    (small_copy / "config.json").unlink()
    problems = scan_folder(small_copy).problems
    assert (
        problems[0] == f"{small_copy}: has no config.json, so no engine can load it; copy it from the float checkpoint"
    )
    assert problems[1] == f"z.safetensors: has 'lm_head.weight', which is also in {first.name}; engines refuse that"


def test_a_folder_with_missing_weight_files_names_them_and_is_for_nothing(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "float"))
    assert scan_folder(folder).is_whole
    index, lost = folder / "model.safetensors.index.json", "model-00002-of-00002.safetensors"
    (folder / lost).unlink()
    found = scan_folder(folder)
    assert found.problems == (f"{index}: names {lost}, which is not in the folder; download the missing file",)
    assert not found.is_whole
    assert describe_engines(found) == "nothing as it is; the errors say why"


def test_a_dangling_link_in_place_of_the_weights_is_a_problem(small_copy: Path) -> None:
    for path in small_copy.glob("*.safetensors*"):
        path.unlink()
    (small_copy / "model.safetensors").symlink_to("gone")
    found = scan_folder(small_copy)
    assert found.problems == (
        f"{small_copy / 'model.safetensors'}: is a link to gone, which is not there; mount or copy what it leads to as well "
        "(cp -rL copies the files themselves)",
    )
    assert describe_engines(found) == "nothing as it is; the errors say why"


def test_nothing_is_looked_up_for_engines_in_quantized_weights_that_are_not_whole(
    small: Path, small_stats: Path, tmp_path: Path
) -> None:
    folder = quantize(small, small_stats, tmp_path / "w8a8", shard_bytes=2**18)
    lost, other, *_ = sorted(path.name for path in folder.glob("*.safetensors"))
    (folder / lost).unlink()
    (folder / other).unlink()
    sentence = (
        f"{folder / 'quant_model_weight_w8a8.safetensors.index.json'}: names {lost}, {other}, which are not in the folder; "
        "download the missing files"
    )
    for engine in (Engine.MINDIE, Engine.VLLM_ASCEND):
        assert [found.message for found in check_lookups(scan_folder(folder), engine)] == [sentence]


def test_one_ranks_part_is_said_to_be_one(small_seed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = write_stand_in(tmp_path)
    codec = glmq.CompressionOptions(executor=program)
    out = glmq.compress(small_seed, out=tmp_path / "parts", tp=2, codec="ascend", options=codec).folder
    assert scan_folder(out).is_whole
    part = scan_folder(out / "part1-of-2")
    sentence = f"{out / 'part1-of-2'}: is one rank's part of a model; inspect the folder above it"
    assert part.problems == (sentence,)
    assert [found.message for found in check_lookups(part, Engine.MINDIE)] == [sentence]
    monkeypatch.chdir(out / "part1-of-2")
    assert scan_folder(Path()).problems == (".: is one rank's part of a model; inspect the folder above it",)


def test_integers_without_a_description_are_a_problem(tiny_seed: Path, tmp_path: Path) -> None:
    for path in tiny_seed.iterdir():
        if path.name != "quant_model_description.json":
            (tmp_path / path.name).symlink_to(path)
    folder = scan_folder(tmp_path)
    assert (folder.kind, folder.form) == (Kind.QUANTIZED, None)
    assert folder.problems == (
        f"{tmp_path}: has int8 tensors but no quant_model_description.json; engines take it for float",
    )


@pytest.mark.parametrize(
    ("name", "layer", "role"),
    [
        ("model.language_model.layers.12.self_attn.q_proj.deq_scale", "layers.12", "self_attn.q_proj"),
        ("model.language_model.layers.1.input_layernorm.weight", "layers.1", "input_layernorm"),
        ("model.language_model.norm.weight", "norm", "norm"),
        ("model.visual.blocks.3.attn.qkv.weight", "visual.blocks.3", "attn.qkv"),
        ("model.visual.merger.gate_proj.weight", "visual.merger", "gate_proj"),
        ("lm_head.weight", "lm_head", "lm_head"),
        ("part1-of-2/language_model.layers.0.mlp.gate_up_proj.info", "part1-of-2/layers.0", "mlp.gate_up_proj"),
    ],
)
def test_a_name_tells_layer_and_role(name: str, layer: str, role: str) -> None:
    assert (layer_of(name), role_of(name)) == (layer, role)


def test_rows_are_chosen_by_layer_and_name_and_ordered(tiny_seed: Path) -> None:
    rows = tensor_rows(scan_folder(tiny_seed))
    chosen = choose_rows(rows, layer="3", name="_proj.*eight", sort="bytes")
    assert [row.role for row in chosen] == [
        "mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    ]  # fmt: skip
    assert {row.layer for row in choose_rows(rows, layer="visual.blocks.*", name=None, sort="name")} == {
        f"visual.blocks.{index}" for index in range(3)
    }


def test_patterns_that_match_nothing_are_refused(small: Path) -> None:
    rows = tensor_rows(scan_folder(small))
    with pytest.raises(UsageError) as error:
        choose_rows(rows, layer="9", name=None, sort="name")
    assert str(error.value).startswith(
        "--layer 9: matches no layer; there are embed_tokens, layers.0, layers.1, lm_head"
    )
    with pytest.raises(UsageError) as error:
        choose_rows(rows, layer=None, name="q_prj", sort="name")
    assert str(error.value) == f"--name q_prj: matches none of {len(rows)} tensors; try a part of a name or use *"


def test_layers_that_are_alike_share_a_line(tiny: Path) -> None:
    lines = group_rows(tensor_rows(scan_folder(tiny)))
    (q,) = [line for line in lines if line.role == "self_attn.q_proj"]
    assert (describe_layers(q.layers), q.dtypes, q.shape) == ("layers.0-5", "bias BF16, weight BF16", (192, 192))
    assert q.nbytes == 2 * (192 * 192 + 192)
    assert describe_layers(["layers.0", "layers.1", "layers.4"]) == "layers.0-1, 4"


def test_totals_add_up_to_all_bytes(tiny_seed: Path) -> None:
    folder = scan_folder(tiny_seed)
    totals = totals_by_area(tensor_rows(folder))
    assert sum(total.nbytes for total in totals) == folder.nbytes
    assert sum(total.tensors for total in totals) == len(folder.tensors)
    assert [total.label for total in totals] == [
        "text linears", "down_proj", "vision tower", "embeddings and lm_head", "text norms",
    ]  # fmt: skip


def test_a_description_in_two_forms_is_a_problem(tiny_seed: Path, tmp_path: Path) -> None:
    for path in tiny_seed.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "quant_model_description_w8a8.json").write_text("{}")
    assert scan_folder(tmp_path).problems == (
        f"{tmp_path}: has 2 descriptions; engines take the one without a type in its name",
    )


@pytest.mark.parametrize(
    ("name", "dtype", "method", "title", "engines"),
    [
        (
            "q_proj.weight",
            torch.float8_e4m3fn,
            "fp8",
            "FP8",
            "engines that read FP8; `glmq quantize --dequantize` takes it",
        ),
        ("q_proj.qweight", torch.int32, "awq", "AWQ", "engines that read AWQ; not for glmq, which needs float weights"),
    ],
)
def test_what_another_tool_has_quantized_is_no_float_checkpoint(
    name: str, dtype: torch.dtype, method: str, title: str, engines: str, tmp_path: Path
) -> None:
    save_file(
        {f"model.language_model.layers.0.self_attn.{name}": torch.zeros(4, 4).to(dtype)}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(f'{{"quantization_config": {{"quant_method": "{method}"}}}}')
    folder = scan_folder(tmp_path)
    assert folder.kind is Kind.FOREIGN
    assert describe_folder(folder) == f"checkpoint that another tool has quantized ({title})"
    assert describe_engines(folder) == engines


@pytest.mark.parametrize(("code", "nbytes"), [("F4", 32), ("F6_E2M3", 48), ("F8_E8M0", 64), ("C64", 512)])
def test_every_dtype_of_the_format_is_listed(code: str, nbytes: int, tmp_path: Path) -> None:
    header = json.dumps({"a.weight": {"dtype": code, "shape": [64], "data_offsets": [0, nbytes]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(nbytes))
    (row,) = tensor_rows(scan_folder(tmp_path))
    assert (row.dtype, row.shape, row.nbytes) == (code, (64,), nbytes)
