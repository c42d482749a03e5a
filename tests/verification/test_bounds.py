"""What the quantization type itself allows: without checksums and report, damages of few per cent are errors, and nothing
that quantize writes by a documented option is one."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import W8A8S, edit_tensors, quantize
from torch import Tensor

import glmq
from glmq.verification.checks import verify_files
from glmq.verification.findings import Check, Finding

RECIPES: dict[str, dict[str, object]] = {"W8A8S": W8A8S, "W8A8": {}, "W8A8_DYNAMIC": {"is_dynamic": True}}
LAYER = "model.language_model.layers.1"
NORM = f"{LAYER}.input_layernorm.weight"
Q, GATE_UP = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.gate_up_proj"


@pytest.fixture(scope="module")
def outputs(tiny: Path, tiny_stats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As another tool would have written them: without checksums and report."""
    root = tmp_path_factory.mktemp("bounds")
    for name, options in RECIPES.items():
        quantize(tiny, tiny_stats, root / name, **options)
        for own in ("glmq_checksums.json", "glmq_report.json", "glmq_report.csv"):
            (root / name / own).unlink()
    return {name: root / name for name in RECIPES}


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
    """All steps of a linear times 1.02; of a static one with the quant_bias that belongs to them."""
    for name in (f"{Q}.weight_scale", f"{Q}.deq_scale"):
        if name not in tensors:
            continue
        stored = tensors[name]
        if stored.dtype == torch.int64:
            tensors[name] = (stored.int().view(torch.float32) * 1.02).view(torch.int32).long()
        else:
            tensors[name] = (stored.float() * 1.02).to(stored.dtype)


def bias(tensors: dict[str, Tensor]) -> None:
    tensors[f"{GATE_UP}.quant_bias"] += 1


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


@pytest.mark.parametrize("recipe", ["W8A8S", "W8A8"])
def test_a_quant_bias_off_by_one_everywhere_is_an_error(
    outputs: dict[str, Path], tiny: Path, tmp_path: Path, recipe: str
) -> None:
    folder = Path(shutil.copytree(outputs[recipe], tmp_path / "damaged"))
    edit_tensors(folder, bias)
    (finding,) = errors(folder, tiny)
    assert (finding.check, finding.tensor) == (Check.RECOMPUTED, f"{GATE_UP}.quant_bias")
    assert finding.message == "is +1 from bias / deq_scale - input_offset * rowsum on average, rounding gives 0"


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_undamaged_output_has_no_findings(outputs: dict[str, Path], tiny: Path, recipe: str) -> None:
    assert [f for f in verify_files(outputs[recipe], tiny, []) if isinstance(f, Finding)] == []


DOCUMENTED: dict[str, dict[str, object]] = {
    "a linear of its own type": {"layer": ("*.mlp.down_proj=W8A8",)},
    "sparse, a target ratio": {**W8A8S, "target_ratio": 0.3},
    "sparse, two bits": {**W8A8S, "target_bits": 2.0},
    "dynamic, three bits": {"is_dynamic": True, "target_bits": 3.0},
    "every linear dynamic": {"is_dynamic": True, "layer": ("*=W8A8_DYNAMIC",)},
    "four bits": {"w_bit": 4, "is_lowbit": True, "is_dynamic": True},
    "as the vendor rounds": {**W8A8S, "method": "reference"},
    "to the nearest": {**W8A8S, "method": "plain"},
    "by fraction": {"w_bit": 4, "is_lowbit": True, "torch_dtype": "fp16"},
    "MindIE's form": {**W8A8S, "mindie_format": True},
    "float16": {"torch_dtype": "fp16"},
}


@pytest.mark.parametrize("options", DOCUMENTED.values(), ids=DOCUMENTED)
def test_what_quantize_writes_by_a_documented_option_passes(
    tiny: Path, tiny_stats: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    out = tmp_path / "out"
    quantize(tiny, tiny_stats, out, **options)
    found = glmq.verify(out, reference=tiny)
    assert found.passed, found.findings
