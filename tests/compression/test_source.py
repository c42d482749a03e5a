import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import edit_json, edit_tensors
from random_w8a8s import QUANTIZED, write_w8a8s
from torch import Tensor

from glmq.checkpoint.description import ASCEND_V1
from glmq.compression.source import open_source
from glmq.errors import CheckpointError, ModelError

Q = "model.language_model.layers.0.self_attn.q_proj"
HOW = "make one from the float weights with `glmq quantize --w_bit 4 --is_lowbit True --use_sigma True --torch_dtype fp16`"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_w8a8s(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "model")
    return tmp_path / "model"


def refusal(folder: Path, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        open_source(folder)
    return str(caught.value).replace(str(folder), "DIR")


def test_a_good_checkpoint_gives_its_quantized_linears(good: Path) -> None:
    source = open_source(good)
    source.checkpoint.close()
    layer = "model.language_model.layers."
    assert source.linears == tuple(
        f"{layer}{i}.{name}"
        for i in range(2)
        for name in ("mlp.gate_up_proj", *(f"self_attn.{x}_proj" for x in "koqv"))
    )


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == "DIR: is not a folder; give the folder of the W8A8S weights"


def test_a_link_out_of_the_folder_is_refused_whatever_its_name(folder: Path) -> None:
    (folder / "notes.txt").symlink_to("/etc/shadow")
    assert refusal(folder) == (
        "DIR/notes.txt: is a link to /etc/shadow, outside of its folder, so its contents are not copied into the output; "
        "put a copy of the file in its place"
    )


def test_another_model_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(model_type="llama"))
    assert "model_type is 'llama'" in refusal(folder, ModelError)


def test_float_weights_are_called_so(tiny: Path) -> None:
    assert refusal(tiny) == (
        f"DIR: holds float weights (bfloat16), it has no quant_model_description.json; W8A8S weights are needed: {HOW}"
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_quant_type": "W8A8"}, f"DIR: is W8A8, but only W8A8S can be compressed; {HOW}"),
        ({"model_quant_type": "W4A8_DYNAMIC"}, f"DIR: is W4A8_DYNAMIC, but only W8A8S can be compressed; {HOW}"),
        (
            {"model_quant_type": "W8A8SC"},
            "DIR: is W8A8SC, which is compressed already; give the W8A8S folder it was made from",
        ),
        (
            {"version": None},
            "DIR: is W8A8S in the older MindIE form; `glmq compress` takes the ascendV1 form alone; to compress, quantize "
            "without --mindie_format",
        ),
        (
            {f"{Q}.weight": None},
            f"DIR: tensor '{Q}.weight' is not in quant_model_description.json; take both from the same release",
        ),
        (
            {f"{Q}.weight": "FLOAT"},
            f"DIR: tensor '{Q}.weight' is I8 but described as FLOAT; take both from the same release",
        ),
        (
            {"lm_head.weight": "W8A8S"},
            "DIR: tensor 'lm_head.weight' is F16 but described as W8A8S; take both from the same release",
        ),
    ],
)
def test_another_description_is_refused(folder: Path, changes: dict[str, str | None], sentence: str) -> None:
    def edit(document: dict) -> None:
        document.update(changes)
        for key in [key for key, value in document.items() if value is None]:
            del document[key]

    edit_json(folder / ASCEND_V1, edit)
    assert refusal(folder) == sentence


def test_a_bfloat16_model_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(torch_dtype="bfloat16"))
    assert refusal(folder) == (
        f"DIR: config.json says 'bfloat16', but W8A8S exists in float16 only, as the engine needs it; {HOW}"
    )


def test_parts_of_ranks_are_refused(folder: Path) -> None:
    (folder / "part0-of-2").mkdir()
    assert refusal(folder) == (
        "DIR: holds the parts of single ranks; give the un-sharded W8A8S folder they were made from"
    )


def test_a_model_without_quantized_linears_is_refused(tmp_path: Path) -> None:
    folder = write_w8a8s(tmp_path, quantized=())
    assert refusal(folder) == f"DIR: is described as W8A8S, but no linear is quantized; {HOW}"


def test_truncated_weights_are_refused(folder: Path) -> None:
    path = folder / "quant_model_weight_w8a8s.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "the file is truncated" in refusal(folder)


def quantize_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = torch.ones(tensors["lm_head.weight"].shape, dtype=torch.int8)


def drop_scale(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{Q}.input_scale"]


def shorten_bias(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.quant_bias"] = tensors[f"{Q}.quant_bias"][:5].clone()


def spoil_deq_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.deq_scale"][3] = -1


def flatten_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.input_scale"] = torch.tensor(0.5)


def shorten_norm(tensors: dict[str, Tensor]) -> None:
    tensors["model.language_model.norm.weight"] = torch.ones(7).half()


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            quantize_head,
            "DIR: lm_head is quantized, but the engine takes compressed weights only for q, k, v, o, gate_up and down of the "
            "text layers; keep it float",
        ),
        (drop_scale, f"DIR: has no tensor '{Q}.input_scale'; did you mean '{Q.replace('0', '1')}.input_scale'?"),
        (shorten_bias, f"DIR: tensor '{Q}.quant_bias' has shape (5,), wanted (128,)"),
        (
            spoil_deq_scale,
            f"{Q}.deq_scale: has integers outside 1..2^31-1, which are not the bits of positive float32 numbers",
        ),
        (flatten_scale, f"DIR: tensor '{Q}.input_scale' has shape (), which no engine takes"),
        (
            shorten_norm,
            "DIR: tensor 'model.language_model.norm.weight' has shape (7,), config.json asks for (128,); take both from the "
            "same release",
        ),
    ],
)
def test_wrong_tensors_are_refused(folder: Path, edit: Callable[[dict[str, Tensor]], None], sentence: str) -> None:
    edit_tensors(folder, edit)
    if edit is quantize_head:
        edit_json(folder / ASCEND_V1, lambda document: document.update({"lm_head.weight": "W8A8S"}))
    assert refusal(folder) == sentence


def test_every_quantized_linear_of_the_random_checkpoint_is_described(good: Path) -> None:
    document = json.loads((good / ASCEND_V1).read_text())
    quantized = {name for name, kind in document.items() if kind == "W8A8S" and name.endswith("proj.weight")}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in quantized} == {*QUANTIZED, "gate_proj", "up_proj"}
