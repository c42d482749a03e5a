from collections.abc import Callable

import numpy as np
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
    steady_qparams,
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
        (0.0, 0.0, ActivationQParams(257 * 2.0**-24, -128)),
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
    scale = torch.tensor((np.float32(high) - np.float32(low)) / np.float32(255)).clamp_min(2.0**-23).bfloat16().float()
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


@given(VALUES, VALUES, st.sampled_from(FloatDtype))
@settings(deadline=None)
def test_a_steady_scale_is_near_the_wanted_one_and_its_product_with_its_reciprocal_nearer_to_1(
    a: float, b: float, dtype: FloatDtype
) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    half = torch.float16 if dtype is FloatDtype.FP16 else torch.bfloat16
    wanted = activation_qparams(low, high, dtype=dtype)
    params = steady_qparams(low, high, dtype=dtype)
    if not 2.0**-13 <= wanted.scale <= 2.0**15:  # float16 ends there, or its reciprocal does
        return
    scale = torch.tensor(params.scale)
    assert torch.equal(scale.to(half).float(), scale)

    def gain(s: torch.Tensor) -> float:
        stored = s.to(half).float()
        return abs(float(stored * (1 / stored).to(half).float()) - 1)

    assert gain(scale) <= gain(torch.tensor(wanted.scale))
    assert -3 * 2.0**-7 <= params.scale / wanted.scale - 1 <= 3.5 * 2.0**-7  # steps of bfloat16, and of rounding to it
    assert params.offset == torch.round(-128 - torch.tensor(low) / scale).clamp(-128, 127).item()


def test_a_steady_scale_of_bfloat16_ends_a_gain_of_a_third_percent() -> None:
    wanted = 0.0693359375  # 1 / it is 14.4225, in bfloat16 14.4375
    assert activation_qparams(0.0, 255 * wanted, dtype=FloatDtype.BF16).scale == wanted
    params = steady_qparams(0.0, 255 * wanted, dtype=FloatDtype.BF16)
    reciprocal = float((1 / torch.tensor(params.scale)).bfloat16())
    assert abs(params.scale * reciprocal - 1) < 2e-4 < 1e-3 < abs(wanted * 14.4375 - 1)


@pytest.mark.parametrize("choose", [activation_qparams, steady_qparams])
@pytest.mark.parametrize("dtype", FloatDtype)
@pytest.mark.parametrize("high", [0.0, 1e-8, 1e-3])
def test_an_input_of_zeros_times_the_reciprocal_is_a_number_in_every_engine(
    choose: Callable[..., ActivationQParams], dtype: FloatDtype, high: float
) -> None:
    params = choose(0.0, high, dtype=dtype)
    half = torch.float16 if dtype is FloatDtype.FP16 else torch.bfloat16
    stored = torch.tensor(params.scale).to(half)
    assert params.offset == -128
    assert float(stored) > 0
    assert (1 / stored).isfinite()
