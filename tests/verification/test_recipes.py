"""What quantize writes by any documented option passes verify, with and without the files that tell what it wrote."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import W8A8S, calibrate, edit_tensors, quantize

import glmq
from glmq.checkpoint.reader import Checkpoint
from glmq.verification.checks import verify_files
from glmq.verification.findings import Check, Finding

pytestmark = pytest.mark.slow  # some 60 checkpoints are written and verified

DYNAMIC = {"is_dynamic": True}
W4A8 = {"w_bit": 4, "is_lowbit": True, "is_dynamic": True}
LOWBIT = {"w_bit": 4, "is_lowbit": True, "torch_dtype": "fp16"}
TYPES = {"W8A8": {}, "W8A8S": W8A8S, "W8A8_DYNAMIC": DYNAMIC, "W4A8_DYNAMIC": W4A8}
STATIC = {"W8A8": {}, "W8A8S": W8A8S}
DOWN_PROJ = {"layer": ("*.mlp.down_proj=W8A8",)}
ALL_DYNAMIC = {**DYNAMIC, "layer": ("*=W8A8_DYNAMIC",)}
O_PROJ = "model.language_model.layers.0.self_attn.o_proj"
GATE_UP = "model.language_model.layers.0.mlp.gate_up_proj.weight"

RECIPES: dict[str, dict[str, object]] = {
    **TYPES,
    **{f"{name}, no smoothing": {**options, "anti_method": "none"} for name, options in TYPES.items()},
    **{f"{name}, {method}": {**options, "method": method} for name, options in TYPES.items()
       for method in ("plain", "reference")},
    **{f"{name}, MindIE's form": {**options, "mindie_format": True} for name, options in TYPES.items()},
    **{f"{name}, float16": {**options, "torch_dtype": "fp16"} for name, options in TYPES.items() if name != "W8A8S"},
    **{f"{name}, do_smooth": {**options, "do_smooth": True} for name, options in STATIC.items()},
    **{f"{name}, act_method {m}": {**options, "act_method": m} for name, options in STATIC.items() for m in (1, 3)},
    **{f"{name}, bias correction": {**options, "bias_correction": True} for name, options in STATIC.items()},
    **{f"{name}, channel shift": {**options, "channel_shift": True} for name, options in STATIC.items()},
    "W8A8, channel shift, MindIE's form, bias correction": {
        "channel_shift": True, "mindie_format": True, "bias_correction": True, "torch_dtype": "fp16",
    },
    "W8A8, plain, bias correction": {"method": "plain", "bias_correction": True},
    "W8A8, two bits": {"target_bits": 2.0},
    "W8A8, keep_float": {"keep_float": ("*.o_proj",)},
    "W8A8, numbered files": {"shard_bytes": 2**18},
    **{f"{name}, two worst groups float": {**options, "fallback_topk": 2} for name, options in TYPES.items()},
    "W8A8S, groups of large errors float": {**W8A8S, "max_error": 0.05},
    "W8A8S, a target ratio": {**W8A8S, "target_ratio": 0.3},
    "W8A8S, one bit": {**W8A8S, "target_bits": 1.0},
    "W8A8S, two bits": {**W8A8S, "target_bits": 2.0},
    "W8A8S, two bits, plain": {**W8A8S, "target_bits": 2.0, "method": "plain"},
    "W8A8S, fraction": LOWBIT,
    "W8A8S, the largest fraction": {**LOWBIT, "fraction": 0.1},
    "W8A8S, co_sparse": {"w_bit": 4, "co_sparse": True, "torch_dtype": "fp16"},
    "W8A8S, one sigma": {**W8A8S, "sigma_factor": 1.0},
    "W8A8S, no outliers": {**W8A8S, "open_outlier": False},
    "W8A8_DYNAMIC, three bits": {**DYNAMIC, "target_bits": 3.0},
    "W4A8_DYNAMIC, two bits": {**W4A8, "target_bits": 2.0},
    "a type of its own for down_proj": DOWN_PROJ,
    "every linear dynamic": ALL_DYNAMIC,
}  # fmt: skip
TRAINED = {
    "W8A8S, no smoothing": {**W8A8S, "anti_method": "none"},
    "W4A8_DYNAMIC, no smoothing": {**W4A8, "anti_method": "none"},
    "W8A8S, one bit": {**W8A8S, "target_bits": 1.0},
    "W8A8S, reference": {**W8A8S, "method": "reference"},
    "W8A8_DYNAMIC, three bits": {**DYNAMIC, "target_bits": 3.0},
    "a type of its own for down_proj": DOWN_PROJ,
    "every linear dynamic": ALL_DYNAMIC,
}
"""On weights of a trained model error compensation moves more: its inputs are alike."""


def wrong(folder: Path, reference: Path) -> list[Finding]:
    """Findings as if another tool had written it: the report and the checksums excuse nothing and hide nothing."""
    for own in ("glmq_checksums.json", "glmq_report.json", "glmq_report.csv"):
        (folder / own).unlink()
    findings = [found for found in verify_files(folder, reference, []) if isinstance(found, Finding)]
    return [
        found for found in findings if "--channel-shift" not in found.message
    ]  # what it relies on, not what is wrong


@pytest.fixture(scope="module")
def wide(small: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the small model with the second moments of wide inputs."""
    return calibrate(small, tmp_path_factory.mktemp("wide") / "stats", pictures, limit=2, wide_moments=True)


@pytest.fixture(scope="module")
def tiny_wide(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the trained model."""
    return calibrate(tiny, tmp_path_factory.mktemp("wide") / "stats", pictures, limit=3, wide_moments=True)


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
def test_every_documented_option_passes(small: Path, wide: Path, tmp_path: Path, options: dict[str, object]) -> None:
    out = quantize(small, wide, tmp_path / "out", **options)
    found = glmq.verify(out, reference=small)
    assert found.passed, found.findings
    if not options.get("bias_correction"):  # of that only the report tells
        assert wrong(out, small) == []


@pytest.mark.parametrize("options", TRAINED.values(), ids=TRAINED)
def test_the_coarsest_options_pass_on_a_trained_model(
    tiny: Path, tiny_wide: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    assert wrong(quantize(tiny, tiny_wide, tmp_path / "out", **options), tiny) == []


@pytest.fixture(scope="module")
def odd(small: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with ten dead columns in gate_up and an o_proj of one number, and its statistics."""
    root = tmp_path_factory.mktemp("odd")
    model = Path(shutil.copytree(small, root / "model"))

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[GATE_UP][:, 3:13] = 0
        tensors[f"{O_PROJ}.weight"][:] = 0.02

    edit_tensors(model, edit)
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
    assert [(f.tensor, f.message) for f in wrong(out, model)] == []


@pytest.mark.parametrize("options", TYPES.values(), ids=TYPES)
def test_a_zeroed_matrix_is_found(small: Path, wide: Path, tmp_path: Path, options: dict[str, object]) -> None:
    out = quantize(small, wide, tmp_path / "out", **options)

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        for suffix in ("weight", "scale_bias", "quant_bias"):
            if f"{O_PROJ}.{suffix}" in tensors:
                tensors[f"{O_PROJ}.{suffix}"][:] = 0

    edit_tensors(out, zero)
    found = wrong(out, small)
    assert [f.message for f in found if f.check is Check.WEIGHT_DISTANCE] == ["is all zeros, the float weight is not"]


@pytest.mark.parametrize("form", [{}, {"mindie_format": True}], ids=["ascendV1", "MindIE"])
def test_a_doubled_second_scale_is_found_by_the_weights(
    small: Path, wide: Path, tmp_path: Path, form: dict[str, object]
) -> None:
    out = quantize(small, wide, tmp_path / "out", **W4A8, **form)

    def double(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{O_PROJ}.weight_scale_second"][6, 0] *= 2

    edit_tensors(out, double)
    found = [finding for finding in wrong(out, small) if finding.check is Check.INTEGERS]
    assert [f.tensor for f in found] == [f"{O_PROJ}.weight"] * len(found)
    assert any(f.message.startswith("group 6 is") for f in found), found
