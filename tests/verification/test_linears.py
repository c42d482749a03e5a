"""Shapes, dtypes and values of quantized linears, and their distance from the float weights."""

import re
from pathlib import Path

import pytest
import torch
from handmade import GATE_UP, LAYER, Make, O, Q, alter, found, stored

from glmq.checkpoint.reader import Checkpoint
from glmq.verification.checks import verify_files
from glmq.verification.findings import Check, Finding


@pytest.mark.parametrize(
    ("label", "name", "shape", "message"),
    [
        ("w8a8", f"{Q}.weight", (128, 64), "has shape [128, 64], wanted [128, 128]"),
        ("w8a8", f"{Q}.bias", (128, 1), "has shape [128, 1], wanted [128]"),
        ("w8a8", f"{Q}.input_scale", (), "has shape [], wanted [1]"),
        ("w8a8", f"{Q}.input_scale", (0,), "has shape [0], wanted [1]"),
        ("w8a8", f"{Q}.input_offset", (2,), "has shape [2], wanted [1]"),
        ("w8a8", f"{Q}.quant_bias", (128, 1), "has shape [128, 1], wanted [128]"),
        ("w8a8", f"{Q}.deq_scale", (64,), "has shape [64], wanted [128]"),
        ("w8a8", f"{Q}.weight_scale", (128,), "has shape [128], wanted [128, 1]"),
        ("w8a8", f"{Q}.weight_offset", (128,), "has shape [128], wanted [128, 1]"),
        ("w4a8", f"{Q}.weight", (128, 128), "has shape [128, 128], wanted [64, 128]"),
        ("w4a8", f"{Q}.weight_scale_second", (128, 4), "has shape [128, 4], wanted [128, 2]"),
        ("w4a8", f"{Q}.weight_offset_second", (128,), "has shape [128], wanted [128, 2]"),
        ("w4a8", f"{Q}.scale_bias", (128, 16), "has shape [128, 16], wanted [128, 1]"),
        ("w4a8", f"{O}.scale_bias", (128, 1), "has shape [128, 1], wanted [128, 16]"),
        ("w4a8-mindie", f"{O}.weight", (64, 128), "has shape [64, 128], wanted [128, 128]"),
        ("w8a8", "model.language_model.norm.weight", (64,), "has shape [64], wanted [128]"),
    ],
)
def test_wrong_shapes_are_found(
    make: Make, source: Checkpoint, label: str, name: str, shape: tuple[int, ...], message: str
) -> None:
    directory = make(label)
    alter(directory, {name: torch.zeros(shape, dtype=stored(directory, name).dtype)})
    assert (8, name, message) in found(directory, source)


def test_a_weight_that_is_no_matrix_is_found(make: Make) -> None:
    directory = make("w8a8")
    alter(directory, {f"{O}.weight": torch.zeros(5, dtype=torch.int8)})
    assert found(directory, None) == [(8, f"{O}.weight", "has no rows and columns to compare with")]


@pytest.mark.parametrize(
    ("label", "name", "dtype", "message"),
    [
        ("w8a8", f"{O}.weight", torch.float16, "has dtype F16, wanted I8"),
        ("w8a8", f"{Q}.bias", torch.float32, "has dtype F32, wanted F16"),
        ("w8a8-bf16", f"{Q}.bias", torch.float16, "has dtype F16, wanted BF16"),
        ("w8a8", f"{O}.quant_bias", torch.int64, "has dtype I64, wanted I32"),
        ("w8a8", f"{O}.deq_scale", torch.float32, "has dtype F32, wanted I64"),
        ("w8a8-bf16", f"{O}.deq_scale", torch.int64, "has dtype I64, wanted F32"),
        ("w8a8", f"{O}.input_scale", torch.int8, "has dtype I8, wanted F16 or BF16 or F32 or F64"),
        ("w8a8", f"{O}.weight_scale", torch.int8, "has dtype I8, wanted F16 or BF16 or F32 or F64"),
        ("w4a8", f"{O}.scale_bias", torch.float16, "has dtype F16, wanted F32"),
        ("w8a8", "lm_head.weight", torch.bfloat16, "has dtype BF16, wanted F16"),
        ("w8a8", "lm_head.weight", torch.float32, "has dtype F32, wanted F16"),
        ("w8a8", f"{LAYER}.input_layernorm.bias", torch.float64, "has dtype F64, wanted F16 or F32"),
    ],
)
def test_wrong_dtypes_are_found(
    make: Make, source: Checkpoint, label: str, name: str, dtype: torch.dtype, message: str
) -> None:
    directory = make(label)
    alter(directory, {name: stored(directory, name).to(dtype)})
    assert found(directory, source) == [(9, name, message)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_float_dtype_of_scales_is_free(make: Make, dtype: torch.dtype) -> None:
    directory = make("w8a8-bf16")
    names = [f"{O}.{suffix}" for suffix in ("input_scale", "input_offset", "weight_scale", "weight_offset")]
    alter(directory, {name: stored(directory, name).to(dtype) for name in names})
    assert found(directory, None) == []


@pytest.mark.parametrize(
    ("label", "name", "value", "message"),
    [
        ("w8a8", f"{O}.input_scale", 0.0, "must be positive, its smallest value is 0"),
        ("w8a8", f"{O}.input_scale", float("nan"), "holds NaN or infinity"),
        ("w8a8", f"{O}.input_offset", 0.5, "is 0.5, wanted an integer in -128..127"),
        ("w8a8", f"{O}.input_offset", 128.0, "is 128, wanted an integer in -128..127"),
        ("w8a8", f"{O}.weight_scale", -1.0, "must be positive, its smallest value is -1"),
        ("w8a8", f"{O}.weight_offset", 1.0, "must be zero, it reaches 1"),
        ("w8a8-bf16", f"{O}.deq_scale", 0.0, "must be positive, its smallest value is 0"),
        ("w8a8-bf16", f"{O}.deq_scale", float("inf"), "holds NaN or infinity"),
        ("w8a8", f"{O}.deq_scale", 0x7F800000, "holds NaN or infinity"),
        (
            "w8a8",
            f"{O}.deq_scale",
            0,
            f"{O}.deq_scale: has integers outside 1..2^31-1, which are not the bits of positive float32 numbers",
        ),
        ("w4a8", f"{O}.weight_scale_second", 0.0, "must be positive, its smallest value is 0"),
        ("w4a8", f"{O}.weight_offset_second", 2, "must be zero, it reaches 2"),
        ("w4a8", f"{O}.scale_bias", float("nan"), "holds NaN or infinity"),
        ("dynamic", f"{Q}.bias", float("inf"), "holds NaN or infinity"),
        ("w8a8", "lm_head.weight", float("inf"), "holds 1 NaN or infinite values"),
    ],
)
def test_wrong_values_are_found(make: Make, label: str, name: str, value: float, message: str) -> None:
    directory = make(label)
    tensor = stored(directory, name)
    tensor.view(-1)[0] = value
    alter(directory, {name: tensor})
    assert found(directory, None) == [(10, name, message)]


def test_a_quant_bias_off_by_more_than_one_is_found(make: Make, source: Checkpoint) -> None:
    directory = make("w8a8s")
    name = f"{Q}.quant_bias"
    tensor = stored(directory, name)
    tensor[3] += 1
    alter(directory, {name: tensor})
    # The stored integer is the rounded one, so one more is still within the tolerance, and two more are not.
    assert found(directory, source) == []
    tensor[3] += 1
    tensor[5] -= 7
    alter(directory, {name: tensor})
    message = "differs from bias / deq_scale - input_offset * rowsum in 2 rows, by 7 in row 5"
    assert found(directory, source) == [(11, name, message)]
    assert found(directory, None) == [(11, name, message)]


def test_a_weight_scale_that_contradicts_deq_scale_is_found(make: Make) -> None:
    directory = make("w8a8")
    name = f"{O}.weight_scale"
    alter(directory, {name: stored(directory, name) * 0.996})
    assert found(directory, None) == []
    alter(directory, {name: stored(directory, name) * 0.5})
    [(check, tensor, message)] = found(directory, None)
    assert (check, tensor) == (11, name)
    assert message == "differs from deq_scale / input_scale by up to 1e+02 %"


@pytest.mark.parametrize("linear", [Q, O])
def test_a_scale_bias_that_is_not_the_sum_of_the_weights_is_found(make: Make, linear: str) -> None:
    directory = make("w4a8")
    name = f"{linear}.scale_bias"
    tensor = stored(directory, name)
    tensor[70, -1] += 32
    alter(directory, {name: tensor})
    assert found(directory, None) == [(11, name, "differs from 8 * sum(int4 * scales) by up to 32")]


@pytest.mark.parametrize("name", ["lm_head.weight", f"{Q}.bias", "model.visual.blocks.0.norm1.weight"])
def test_a_float_tensor_that_is_not_the_sources_is_found(make: Make, source: Checkpoint, name: str) -> None:
    directory = make("dynamic")
    tensor = stored(directory, name)
    tensor.view(-1)[-2:] += 1
    alter(directory, {name: tensor})
    assert found(directory, source) == [(6, name, "differs from the source, cast to its dtype, in 2 values")]
    assert found(directory, None) == []


def distant(directory: Path, source: Checkpoint) -> list[tuple[int, str, str]]:
    """What verify finds by checks 6 and 16."""
    records = [r for r in verify_files(directory, source.directory, []) if isinstance(r, Finding)]
    return [
        (r.check.number, r.tensor, r.message)
        for r in records
        if r.check in (Check.FLOAT_TENSORS, Check.WEIGHT_DISTANCE)
    ]


@pytest.mark.parametrize("label", ["w8a8", "w8a8s", "dynamic", "w4a8-mindie"])
def test_a_weight_far_from_the_float_one_is_found(make: Make, source: Checkpoint, label: str) -> None:
    directory = make(label)
    tensor = stored(directory, f"{GATE_UP}.weight").roll(1, dims=1)  # columns in the wrong order, row sums unchanged
    alter(directory, {f"{GATE_UP}.weight": tensor})
    [(check, name, message)] = distant(directory, source)
    assert (check, name) == (16, f"{GATE_UP}.weight")
    # Unrelated entries lie sqrt(2) of their own size apart: rows whose largest of 128 weights is 127 or 7 steps.
    assert float(message.split()[1]) > (2 if label.startswith("w4a8") else 30)
    end = "rounding to nearest gives 0.29; it is another weight, or its steps are wrong"
    size = float(re.search(rf"which itself is (\S+) steps: {end}$", message)[1])  # type: ignore[index]
    assert float(message.split()[1]) / size == pytest.approx(2**0.5, rel=0.1)


def test_a_norm_that_does_not_undo_the_smoothing_is_found(make: Make, source: Checkpoint) -> None:
    directory = make("w8a8")
    name = f"{LAYER}.post_attention_layernorm.weight"
    alter(directory, {name: source.read(name).half()})
    assert [(check, tensor) for check, tensor, _ in distant(directory, source)] == [(16, f"{GATE_UP}.weight")]


def test_a_missing_norm_does_not_stop_the_comparison(make: Make, source: Checkpoint) -> None:
    directory = make("w8a8")
    name = f"{LAYER}.post_attention_layernorm.weight"
    alter(directory, {name: None})
    assert [(check, tensor) for check, tensor, _ in distant(directory, source)] == [
        (6, name),
        (16, f"{GATE_UP}.weight"),
    ]
