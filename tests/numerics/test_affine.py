import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmq.numerics.affine import (
    activation_qparams,
    covered_range,
    dequantize,
    quantize,
    quantize_weight,
)
from glmq.records import ActivationQParams
from glmq.spec import INT4, INT8, INT8_SYMMETRIC, FloatDtype

VALUES = st.floats(-(2.0**40), 2.0**40, width=32)
SCALES = st.floats(2.0**-20, 2.0**20, width=32)


@given(VALUES, VALUES)
@settings(deadline=None)
def test_scale_and_offset_equal_the_formula(a: float, b: float) -> None:
    params = activation_qparams(min(a, b), max(a, b))
    assert (params.scale, params.offset) == reference.activation_qparams(min(a, b), max(a, b))


@given(VALUES, VALUES)
@settings(deadline=None)
def test_zero_is_always_representable(a: float, b: float) -> None:
    params = activation_qparams(min(a, b), max(a, b))
    low, high = covered_range(params)
    assert low <= 0 <= high
    q = quantize(torch.zeros(1), torch.tensor(params.scale), torch.tensor(float(params.offset)), INT8)
    assert int(q) == params.offset


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 0.0, ActivationQParams(2.0**-23, -128)),
        (0.0, 255.0, ActivationQParams(1.0, -128)),
        (3.0, 255.0, ActivationQParams(1.0, -128)),
        (-255.0, -3.0, ActivationQParams(1.0, 127)),
        (-128.0, 127.0, ActivationQParams(1.0, 0)),
        (-126.5, 128.5, ActivationQParams(1.0, -2)),  # -128 + 126.5 = -1.5, half to even
    ],
)
def test_known_ranges_give_known_parameters(low: float, high: float, expected: ActivationQParams) -> None:
    assert activation_qparams(low, high) == expected


@given(VALUES, VALUES)
@settings(deadline=None)
def test_bfloat16_scale_is_rounded_before_the_offset_is_chosen(a: float, b: float) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    params = activation_qparams(low, high, dtype=FloatDtype.BF16)
    scale = torch.tensor(activation_qparams(low, high).scale).bfloat16().float()
    assert params.scale == scale.item()
    assert params.offset == torch.round(-128 - torch.tensor(low) / scale).clamp(-128, 127).item()


@given(st.lists(VALUES, min_size=1, max_size=20), SCALES, st.integers(-128, 127))
@settings(deadline=None)
def test_quantize_equals_one_value_at_a_time(values: list[float], scale: float, zero: int) -> None:
    for grid in (INT8, INT8_SYMMETRIC, INT4):
        q = quantize(torch.tensor(values), torch.tensor(scale), torch.tensor(float(zero)), grid)
        assert q.tolist() == [reference.quantize(v, scale, zero, grid.qmin, grid.qmax) for v in values]


def test_halves_round_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert quantize(x, torch.ones(()), torch.zeros(()), INT8).tolist() == [0, 2, 2, 0, -2]


def test_scaling_divides_and_does_not_multiply_with_the_reciprocal() -> None:
    # 2.25 / 0.3 is just below 7.5 in float32, 2.25 * (1 / 0.3) is 7.5 and would round up to 8.
    assert quantize_weight(torch.tensor([[2.25]]), torch.tensor([[0.3]]), INT8).tolist() == [[7]]


@pytest.mark.parametrize("shape", [(1, 1), (7, 33)])
def test_round_trip_error_is_at_most_half_a_step(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    step = x.abs().amax(1, keepdim=True) / 127
    q = quantize_weight(x, step, INT8)
    # Half a step, and two float32 roundings of values up to 127 steps (2^-24 each): 127 * 2^-23 < 2^-15 steps.
    assert bool(((dequantize(q, step, torch.zeros(())) - x).abs() <= (0.5 + 2.0**-15) * step).all())


def test_dequantize_takes_the_offset_off() -> None:
    q = torch.tensor([-128, 0, 127], dtype=torch.int8)
    assert dequantize(q, torch.tensor(0.5), torch.tensor(-3.0)).tolist() == [-62.5, 1.5, 65.0]
