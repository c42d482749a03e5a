"""What quantize writes of a trained model and of odd weights passes verify without the files that tell what it wrote.

Every documented option passes in tests/cli/test_own_verify.py.
"""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import W8A8S, calibrate, edit_tensors, findings_as_of_another_tool, quantize, with_all_texts

from glmq.checkpoint.reader import Checkpoint
from glmq.verification.findings import Check

pytestmark = pytest.mark.slow  # some 20 checkpoints are written and verified

DYNAMIC = {"is_dynamic": True}
W4A8 = {"w_bit": 4, "is_lowbit": True, "is_dynamic": True}
LOWBIT = {"w_bit": 4, "is_lowbit": True, "torch_dtype": "fp16"}
TYPES = {"W8A8": {}, "W8A8S": W8A8S, "W8A8_DYNAMIC": DYNAMIC, "W4A8_DYNAMIC": W4A8}
DOWN_PROJ = {"layer": ("*.mlp.down_proj=W8A8",)}
ALL_DYNAMIC = {**DYNAMIC, "layer": ("*=W8A8_DYNAMIC",)}
O_PROJ = "model.language_model.layers.0.self_attn.o_proj"
GATE_UP = "model.language_model.layers.0.mlp.gate_up_proj.weight"

TRAINED = {
    "W8A8S, no smoothing": {**W8A8S, "anti_method": "none"},
    "W4A8_DYNAMIC, no smoothing": {**W4A8, "anti_method": "none"},
    "W8A8S, reference": {**W8A8S, "method": "reference"},
    "W8A8_DYNAMIC, three bits": {**DYNAMIC, "target_bits": 3.0},
    "W8A8S, half a bit": {**W8A8S, "target_bits": 0.5},
    "a type of its own for down_proj": DOWN_PROJ,
    "every linear dynamic": ALL_DYNAMIC,
}
"""On weights of a trained model error compensation moves more: its inputs are alike."""


@pytest.fixture(scope="module")
def wide(small: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the small model with the second moments of wide inputs."""
    return calibrate(small, tmp_path_factory.mktemp("wide") / "stats", pictures, limit=2, wide_moments=True)


@pytest.mark.parametrize("options", TRAINED.values(), ids=TRAINED)
def test_the_coarsest_options_pass_on_a_trained_model(
    half: Path, half_stats: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    assert findings_as_of_another_tool(quantize(half, half_stats, tmp_path / "out", **options), half) == []


@pytest.fixture(scope="module")
def odd(small: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with ten dead columns in gate_up and an o_proj of one number, and its statistics."""
    root = tmp_path_factory.mktemp("odd")
    model = Path(shutil.copytree(small, root / "model"))

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[GATE_UP][:, 3:13] = 0
        tensors[f"{O_PROJ}.weight"][:] = 0.02

    edit_tensors(model, edit)
    with with_all_texts():
        return model, calibrate(model, root / "stats", pictures, limit=2)


@pytest.mark.parametrize(
    "options",
    [
        *TYPES.values(),
        LOWBIT,
        {**W8A8S, "method": "reference"},
        {**W8A8S, "method": "plain"},
        {**W8A8S, "target_bits": 2.0},
    ],
    ids=str,
)
def test_dead_columns_pass_and_a_matrix_of_one_number_keeps_it(
    odd: tuple[Path, Path], tmp_path: Path, options: dict[str, object]
) -> None:
    model, stats = odd
    out = quantize(model, stats, tmp_path / "out", **options)
    with Checkpoint.open(out) as written:
        assert bool((written.read(f"{O_PROJ}.weight") != 0).all())
    assert [(f.tensor, f.message) for f in findings_as_of_another_tool(out, model)] == []


@pytest.fixture(scope="module")
def outputs(small: Path, wide: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("types")
    return {name: quantize(small, wide, root / name, **options) for name, options in TYPES.items()}


@pytest.mark.parametrize("kind", TYPES)
def test_a_zeroed_matrix_is_found(small: Path, outputs: dict[str, Path], tmp_path: Path, kind: str) -> None:
    out = Path(shutil.copytree(outputs[kind], tmp_path / "out"))

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        for suffix in ("weight", "scale_bias", "quant_bias"):
            if f"{O_PROJ}.{suffix}" in tensors:
                tensors[f"{O_PROJ}.{suffix}"][:] = 0

    edit_tensors(out, zero)
    found = findings_as_of_another_tool(out, small)
    assert [f.message for f in found if f.check is Check.WEIGHT_DISTANCE] == ["is all zeros, the float weight is not"]


@pytest.mark.parametrize("form", ["ascendV1", "MindIE"])
def test_a_doubled_second_scale_is_found_by_the_weights(
    small: Path, wide: Path, outputs: dict[str, Path], tmp_path: Path, form: str
) -> None:
    if form == "MindIE":
        out = quantize(small, wide, tmp_path / "out", mindie_format=True, **W4A8)
    else:
        out = Path(shutil.copytree(outputs["W4A8_DYNAMIC"], tmp_path / "out"))

    def double(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{O_PROJ}.weight_scale_second"][6, 0] *= 2

    edit_tensors(out, double)
    found = [finding for finding in findings_as_of_another_tool(out, small) if finding.check is Check.INTEGERS]
    assert [f.tensor for f in found] == [f"{O_PROJ}.weight"] * len(found)
    assert any(f.message.startswith("group 6 is") for f in found), found
