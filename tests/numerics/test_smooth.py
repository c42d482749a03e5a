import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import stats_of
from torch import Tensor

from glmq.numerics.affine import TORCH_DTYPE
from glmq.numerics.smooth import choose_row_scales, choose_scales, fold_scales
from glmq.spec import FloatDtype, QuantType, Smoothing

DTYPES = st.sampled_from(list(FloatDtype))


@given(
    st.lists(
        st.tuples(st.floats(-(2.0**15), 2.0**15, width=16), st.floats(2.0**-10, 2.0**10, width=32)),
        min_size=1,
        max_size=20,
    ),
    DTYPES,
)
@settings(deadline=None)
def test_norm_and_scales_compose_to_the_original_norm(pairs: list[tuple[float, float]], dtype: FloatDtype) -> None:
    norm, wanted = (torch.tensor(values) for values in zip(*pairs, strict=True))
    new, effective = fold_scales(norm, wanted, dtype)
    assert new.dtype == TORCH_DTYPE[dtype]
    assert bool(new.isfinite().all())
    assert bool((effective > 0).all())
    # One float32 division: the product is the original within half a unit in the last place of the quotient.
    assert bool(((new.float() * effective - norm).abs() <= norm.abs() * 2.0**-23).all())


def test_scales_are_what_was_wanted_within_the_rounding_of_the_norm() -> None:
    norm, wanted = torch.tensor([1.0, -3.0, 0.3]), torch.tensor([3.0, 0.7, 11.0])
    for dtype, unit in ((FloatDtype.FP16, 2.0**-11), (FloatDtype.BF16, 2.0**-8)):
        _, effective = fold_scales(norm, wanted, dtype)
        assert effective.tolist() == pytest.approx(wanted.tolist(), rel=2 * unit)


def test_zero_tiny_and_huge_norms_stay_inside_the_dtype() -> None:
    norm, wanted = torch.tensor([0.0, 1e-3, 60000.0, -1e-3]), torch.tensor([5.0, 1e6, 1e-6, 1e6])
    new, effective = fold_scales(norm, wanted, FloatDtype.FP16)
    assert new.tolist() == [0.0, 2.0**-14, 65504.0, -(2.0**-14)]
    assert effective[0].item() == 1.0
    assert effective[2].item() == torch.tensor(60000.0).div(65504).item()


def outliers(tokens: int = 400, channels: int = 64) -> tuple[Tensor, list[Tensor]]:
    """Inputs with three loud channels, and two weights whose columns for them are quiet."""
    generator = torch.Generator().manual_seed(0)
    loud = torch.ones(channels)
    loud[[3, 17, 40]] = 20.0
    x = torch.randn(tokens, channels, generator=generator) * loud
    return x, [torch.randn(n, channels, generator=generator) / loud for n in (48, 16)]


@pytest.mark.parametrize(
    "quant_type", [QuantType.W8A8S, QuantType.W8A8, QuantType.W8A8_DYNAMIC, QuantType.W4A8_DYNAMIC]
)
def test_m2_balances_what_inputs_and_columns_ask_for(quant_type: QuantType) -> None:
    x, weights = outliers()
    stats = stats_of(x)
    choice = choose_scales(Smoothing.M2, stats, weights, stats.square_mean, quant_type)
    energy = torch.cat(weights).square().sum(0)
    expected = (stats.square_mean / energy).pow(0.25)
    expected /= expected.log().mean().exp()
    assert choice.label == "m2"
    assert torch.allclose(choice.scales, expected, rtol=1e-5)  # float32 powers
    assert choice.scales.log().mean().item() == pytest.approx(0.0, abs=1e-6)


def test_m2_follows_peaks_where_a_few_tokens_tower_over_the_rest() -> None:
    x, weights = outliers()
    x[5, 17] = 5000.0
    stats = stats_of(x)
    quiet = stats_of(torch.cat([x[:5], x[6:]])).square_mean
    choice = choose_scales(Smoothing.M2, stats, weights, quiet, QuantType.W8A8)
    assert choice.label.startswith("m2 (peaks ")
    closed = (quiet / torch.cat(weights).square().sum(0)).pow(0.25)
    assert float(choice.scales[17] / choice.scales[3]) > 3 * float(closed[17] / closed[3])


def test_smoothquant_divides_by_ranges_to_a_power() -> None:
    x, weights = outliers()
    stats = stats_of(x)
    choice = choose_scales(Smoothing.SMOOTHQUANT, stats, weights, stats.square_mean, QuantType.W8A8)
    strength = float(choice.label.removeprefix("smoothquant (strength ").removesuffix(")"))
    peak, top = x.abs().amax(0), torch.cat(weights).abs().amax(0)
    expected = peak**strength / top ** (1 - strength)
    assert torch.allclose(choice.scales, expected / expected.log().mean().exp(), rtol=1e-5)  # float32 powers


def test_dead_channels_and_columns_get_bounded_scales() -> None:
    x, weights = outliers()
    x[:, 5] = 0.0
    for w in weights:
        w[:, 6] = 0.0
    stats = stats_of(x)
    for kind in (Smoothing.M2, Smoothing.SMOOTHQUANT):
        scales = choose_scales(kind, stats, weights, stats.square_mean, QuantType.W8A8S).scales
        assert bool(scales.isfinite().all())
        assert 1e-4 < float(scales.min()) < float(scales.max()) < 1e4


def test_an_input_that_is_always_zero_needs_no_scales() -> None:
    stats = stats_of(torch.zeros(3, 8))
    choice = choose_scales(Smoothing.M2, stats, [torch.zeros(4, 8)], stats.square_mean, QuantType.W8A8S)
    assert choice.scales.tolist() == [1.0] * 8
    assert math.isfinite(float(choice.scales.sum()))


@pytest.mark.parametrize("quant_type", [QuantType.W8A8S, QuantType.W8A8, QuantType.W8A8_DYNAMIC])
def test_row_scales_are_powers_of_two_shared_by_the_heads_that_read_a_row(quant_type: QuantType) -> None:
    x, weights = outliers()
    stats = stats_of(x)
    scales = choose_row_scales(Smoothing.SMOOTHQUANT, stats, weights[0], quant_type, run=16, repeats=2)
    assert scales is not None
    runs = scales.reshape(2, 2, 16)  # [rows' heads, heads that read them, channels]
    assert torch.equal(runs[:, 0], runs[:, 1])
    assert torch.equal(scales.log2(), scales.log2().round())
    assert float(scales.min()) == 1.0
    typical = stats.square_mean.sqrt().reshape(2, 2, 16).amax(1)
    spread = weights[0].square().sum(0).sqrt().reshape(2, 2, 16).amax(1)
    wanted = (typical / spread).sqrt()
    wanted = (wanted / wanted.log().mean().exp()).clamp_min(1)
    # Rounding to a power of two moves a number by at most the square root of two.
    assert bool(((runs[:, 0] / wanted).log2().abs() <= 0.5 + 1e-5).all())
    assert float(runs[0, 0, 3]) >= 4


def test_rows_that_are_balanced_absorb_nothing() -> None:
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    kind = Smoothing.SMOOTHQUANT
    assert choose_row_scales(kind, stats_of(x), weight, QuantType.W8A8, run=32, repeats=1) is None
    assert choose_row_scales(kind, stats_of(0 * x), 0 * weight, QuantType.W8A8S, run=16, repeats=2) is None
