"""What the quantization type itself allows: without checksums and report, damages of few per cent are errors."""

import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import edit_tensors, quantize
from torch import Tensor

from glmq.verification.checks import verify_files
from glmq.verification.findings import Check, Finding

pytestmark = pytest.mark.slow  # three checkpoints of trained layers

RECIPES: dict[str, dict[str, object]] = {"W8A8": {}, "W8A8_DYNAMIC": {"is_dynamic": True}}
LABELS = ["W8A8S", *RECIPES]
LAYER = "model.language_model.layers.1"
NORM = f"{LAYER}.input_layernorm.weight"
Q, O, GATE_UP = f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.gate_up_proj"
LINEARS = (Q, O, GATE_UP)


@pytest.fixture(scope="module")
def outputs(half: Path, half_stats: Path, half_seed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As another tool would have written them: without checksums and report."""
    root = tmp_path_factory.mktemp("bounds")
    shutil.copytree(half_seed, root / "W8A8S")
    for name, options in RECIPES.items():
        quantize(half, half_stats, root / name, **options)
    for name in LABELS:
        for own in ("glmq_checksums.json", "glmq_report.json", "glmq_report.csv"):
            (root / name / own).unlink()
    return {name: root / name for name in LABELS}


FACTORS = {"W8A8S": 1.03, "W8A8": 1.02}
"""Of the scales of a whole linear, beyond what rounding does at its steps."""


def errors(folder: Path, reference: Path) -> list[Finding]:
    return [f for f in verify_files(folder, reference, []) if isinstance(f, Finding) and f.severity == "error"]


def times(name: str, factor: float) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)

    return edit


def channel(factor: float) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[NORM][7] *= factor

    return edit


def steps(tensors: dict[str, Tensor]) -> None:
    """All steps of a linear times 1.02; of a static one with the deq_scale that belongs to them."""
    for name in (f"{Q}.weight_scale", f"{Q}.deq_scale"):
        if name in tensors:
            scaled(name, 1.02)(tensors)


def scaled(name: str, factor: float) -> Callable[[dict[str, Tensor]], None]:
    """As `times`, also of a deq_scale that is stored as the bits of float32 numbers."""

    def edit(tensors: dict[str, Tensor]) -> None:
        stored = tensors[name]
        if stored.dtype == torch.int64:
            tensors[name] = (stored.int().view(torch.float32) * factor).view(torch.int32).long()
        else:
            times(name, factor)(tensors)

    return edit


def more(name: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name] += 1

    return edit


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], None], Check, str]] = {
    "a norm of zeros": (times(NORM, 0.0), Check.NORMS, NORM),
    "a channel of a norm zeroed": (channel(0.0), Check.NORMS, NORM),
    "a channel of a norm negated": (channel(-1.0), Check.NORMS, NORM),
    "a channel of a norm doubled": (channel(2.0), Check.INTEGERS, "column 7 is"),
    "a channel of a norm halved": (channel(0.5), Check.INTEGERS, "column 7 is"),
    "a norm moved by a channel": (
        lambda tensors: tensors.update({NORM: tensors[NORM].roll(1)}),
        Check.INTEGERS,
        "column",
    ),
    "a norm times 1.02": (times(NORM, 1.02), Check.INTEGERS, "times the float weight"),
    "steps times 1.02": (steps, Check.INTEGERS, f"{Q}.weight is 1.02"),
}


def in_layer(tensors: dict[str, Tensor], layer: str, damage: Callable[[dict[str, Tensor]], None]) -> None:
    """Do to this layer what `damage` does to LAYER."""
    own = {name.replace(f"{layer}.", f"{LAYER}."): tensors[name] for name in tensors if name.startswith(f"{layer}.")}
    damage(own)
    tensors.update({name.replace(f"{LAYER}.", f"{layer}."): tensor for name, tensor in own.items()})


@pytest.mark.parametrize(
    "labels", [list(DAMAGES)[:3], list(DAMAGES)[3:6], list(DAMAGES)[6:]], ids=["first", "more", "last"]
)
@pytest.mark.parametrize("recipe", LABELS)
def test_a_small_damage_is_an_error_without_checksums(
    outputs: dict[str, Path], half: Path, tmp_path: Path, recipe: str, labels: list[str]
) -> None:
    """One damage a layer."""
    folder = Path(shutil.copytree(outputs[recipe], tmp_path / "damaged"))
    layers = {label: f"model.language_model.layers.{index}" for index, label in enumerate(labels)}

    def edit(tensors: dict[str, Tensor]) -> None:
        for label, layer in layers.items():
            in_layer(tensors, layer, DAMAGES[label][0])

    edit_tensors(folder, edit)
    found = errors(folder, half)
    for label, layer in layers.items():
        _, check, named = DAMAGES[label]
        said = [f"{f.tensor} {f.message}" for f in found if f.check is check and f.tensor.startswith(f"{layer}.")]
        assert any(named.replace(LAYER, layer) in sentence for sentence in said), (label, found)
    assert {f.tensor.partition(".self_attn")[0].partition(".mlp")[0].partition(".input")[0] for f in found} == {
        *layers.values()
    }


def edit_linears(folder: Path, edit: Callable[[str], Callable[[dict[str, Tensor]], None]]) -> None:
    def edit_all(tensors: dict[str, Tensor]) -> None:
        for linear in LINEARS:
            edit(linear)(tensors)

    edit_tensors(folder, edit_all)


@pytest.mark.parametrize("recipe", ["W8A8S", "W8A8"])
def test_a_quant_bias_off_by_one_everywhere_is_an_error(
    outputs: dict[str, Path], half: Path, tmp_path: Path, recipe: str
) -> None:
    folder = Path(shutil.copytree(outputs[recipe], tmp_path / "damaged"))
    edit_linears(folder, lambda linear: more(f"{linear}.quant_bias"))
    found = errors(folder, half)
    assert {f.tensor for f in found} == {f"{linear}.quant_bias" for linear in LINEARS}
    sentence = r"is \+(1|0\.9\d) from bias / deq_scale - input_offset \* rowsum on average, rounding gives 0"
    assert all(f.check is Check.RECOMPUTED and re.fullmatch(sentence, f.message) for f in found), found


@pytest.mark.parametrize("suffix", ["deq_scale", "input_scale", "input_offset"])
@pytest.mark.parametrize("recipe", ["W8A8S", "W8A8"])
def test_a_number_of_a_static_linear_that_is_changed_alone_is_an_error(
    outputs: dict[str, Path], half: Path, tmp_path: Path, recipe: str, suffix: str
) -> None:
    """It contradicts the others, or the float weights."""
    folder = Path(shutil.copytree(outputs[recipe], tmp_path / "damaged"))
    change = more if suffix == "input_offset" else functools.partial(scaled, factor=FACTORS[recipe])
    edit_linears(folder, lambda linear: change(f"{linear}.{suffix}"))
    found = errors(folder, half)
    for linear in LINEARS:
        assert any(finding.tensor.startswith(f"{linear}.") for finding in found), found


@pytest.mark.parametrize("recipe", LABELS)
def test_an_undamaged_output_has_no_findings(outputs: dict[str, Path], half: Path, recipe: str) -> None:
    assert [f for f in verify_files(outputs[recipe], half, []) if isinstance(f, Finding)] == []
