"""What the quantization type itself allows: without checksums and report, damages of few per cent are errors."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import W8A8S, edit_tensors, quantize
from torch import Tensor

from glmq.verification.checks import verify_files
from glmq.verification.findings import Check, Finding

RECIPES: dict[str, dict[str, object]] = {"W8A8S": W8A8S, "W8A8": {}, "W8A8_DYNAMIC": {"is_dynamic": True}}
LAYER = "model.language_model.layers.1"
NORM = f"{LAYER}.input_layernorm.weight"
Q, O, GATE_UP = f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.gate_up_proj"


@pytest.fixture(scope="module")
def outputs(tiny: Path, tiny_stats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As another tool would have written them: without checksums and report."""
    root = tmp_path_factory.mktemp("bounds")
    for name, options in RECIPES.items():
        quantize(tiny, tiny_stats, root / name, **options)
        for own in ("glmq_checksums.json", "glmq_report.json", "glmq_report.csv"):
            (root / name / own).unlink()
    return {name: root / name for name in RECIPES}


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


@pytest.mark.parametrize(("damage", "check", "named"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_small_damage_is_an_error_without_checksums(
    outputs: dict[str, Path], tiny: Path, tmp_path: Path, recipe: str, damage: Callable, check: Check, named: str
) -> None:
    folder = Path(shutil.copytree(outputs[recipe], tmp_path / "damaged"))
    edit_tensors(folder, damage)
    found = [f"{finding.tensor} {finding.message}" for finding in errors(folder, tiny) if finding.check is check]
    assert any(named in sentence for sentence in found), errors(folder, tiny)


@pytest.mark.parametrize("linear", [Q, O, GATE_UP])
@pytest.mark.parametrize("recipe", ["W8A8S", "W8A8"])
def test_a_quant_bias_off_by_one_everywhere_is_an_error(
    outputs: dict[str, Path], tiny: Path, tmp_path: Path, recipe: str, linear: str
) -> None:
    folder = Path(shutil.copytree(outputs[recipe], tmp_path / "damaged"))
    edit_tensors(folder, more(f"{linear}.quant_bias"))
    (finding,) = errors(folder, tiny)
    assert (finding.check, finding.tensor) == (Check.RECOMPUTED, f"{linear}.quant_bias")
    sentence = r"is \+(1|0\.9\d) from bias / deq_scale - input_offset \* rowsum on average, rounding gives 0"
    assert re.fullmatch(sentence, finding.message)


@pytest.mark.parametrize("suffix", ["deq_scale", "input_scale", "input_offset"])
@pytest.mark.parametrize("linear", [Q, O, GATE_UP])
@pytest.mark.parametrize("recipe", ["W8A8S", "W8A8"])
def test_a_number_of_a_static_linear_that_is_changed_alone_is_an_error(
    outputs: dict[str, Path], tiny: Path, tmp_path: Path, recipe: str, linear: str, suffix: str
) -> None:
    """It contradicts the others, or the float weights."""
    folder = Path(shutil.copytree(outputs[recipe], tmp_path / "damaged"))
    name = f"{linear}.{suffix}"
    edit_tensors(folder, more(name) if suffix == "input_offset" else scaled(name, FACTORS[recipe]))
    assert any(finding.tensor.startswith(f"{linear}.") for finding in errors(folder, tiny)), errors(folder, tiny)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_undamaged_output_has_no_findings(outputs: dict[str, Path], tiny: Path, recipe: str) -> None:
    assert [f for f in verify_files(outputs[recipe], tiny, []) if isinstance(f, Finding)] == []
