import pytest
import torch
from reference import stats_of
from torch import Tensor

from glmq.numerics.ranges import CANDIDATES, clipped_share, histogram_range, minmax_range, scaled_values


def inputs(tokens: int = 200, channels: int = 5) -> Tensor:
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(0))
    return x * torch.tensor([1.0, 0.1, 3.0, 0.0, 20.0])[:channels] + torch.tensor([0.0, 1.0, 0.0, 0.0, -5.0])[:channels]


def expected_loss(values: Tensor, weights: Tensor, low: float, high: float) -> float:
    """Rounding inside the range, squared distance outside, term by term."""
    rounding = float(weights.sum()) * ((high - low) / 255) ** 2 / 12
    over = sum(w * max(v - high, low - v, 0.0) ** 2 for v, w in zip(values.tolist(), weights.tolist(), strict=True))
    return rounding + over


def test_minmax_covers_every_value_after_scaling() -> None:
    x = inputs()
    scales = torch.tensor([1.0, 0.5, 4.0, 1.0, 16.0])
    assert minmax_range(stats_of(x), None) == (x.min().item(), x.max().item())
    assert minmax_range(stats_of(x), scales) == ((x / scales).min().item(), (x / scales).max().item())


@pytest.mark.slow
def test_histogram_range_has_the_least_expected_loss_of_all_candidates() -> None:
    stats = stats_of(inputs(40))
    energy = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.25])
    low, high = histogram_range(stats, None, energy)
    used = stats.histogram > 0
    values = scaled_values(stats, None)[used].double()
    weights = (stats.histogram * energy[:, None])[used].double()
    best = min(
        (expected_loss(values, weights, a * float(stats.minimum.min()), b * float(stats.maximum.max())), a, b)
        for a in torch.linspace(0, 1, CANDIDATES, dtype=torch.float64).tolist()
        for b in torch.linspace(0, 1, CANDIDATES, dtype=torch.float64).tolist()
    )
    found = expected_loss(values, weights, low, high)
    assert found == pytest.approx(best[0], rel=1e-9)  # float64 sums of 200 terms in two orders
    assert low == pytest.approx(best[1] * float(stats.minimum.min()), rel=1e-12)
    assert high == pytest.approx(best[2] * float(stats.maximum.max()), rel=1e-12)


def test_scaling_by_powers_of_two_is_the_same_as_scaled_inputs() -> None:
    x, energy = inputs(), torch.ones(5)
    scales = torch.tensor([1.0, 0.5, 4.0, 2.0, 16.0])
    expected = histogram_range(stats_of(x / scales), None, energy)
    assert histogram_range(stats_of(x), scales, energy) == expected


def test_a_lone_far_value_is_cut_where_it_counts_little_and_kept_where_it_counts_much() -> None:
    x = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))
    x[17, 1] = 60.0
    cut = histogram_range(stats_of(x), None, torch.tensor([1.0, 1e-6]))
    kept = histogram_range(stats_of(x), None, torch.tensor([1e-6, 1.0]))
    assert cut[1] < 8 < 30 < kept[1]


def test_clipped_share_counts_what_lies_outside() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [-4.0]])
    assert clipped_share(stats_of(x), None, -4.0, 2.1) == 0.0
    assert clipped_share(stats_of(x), None, -3.0, 1.5) == 0.5
    assert clipped_share(stats_of(x), torch.tensor([4.0]), -1.0, 1.0) == 0.0


def test_an_input_that_is_always_zero_has_an_empty_range() -> None:
    stats = stats_of(torch.zeros(3, 4))
    assert minmax_range(stats, None) == (0.0, 0.0)
    assert histogram_range(stats, None, torch.ones(4)) == (0.0, 0.0)


def test_a_shift_is_the_same_as_shifted_inputs() -> None:
    x = inputs()
    scales = torch.tensor([1.0, 0.5, 4.0, 1.0, 16.0])
    shift = torch.tensor([0.5, -2.0, 0.0, 1.0, 0.25])
    moved = x / scales - shift
    assert minmax_range(stats_of(x), scales, shift) == (moved.min().item(), moved.max().item())
    values, plain = scaled_values(stats_of(x), scales, shift), scaled_values(stats_of(x), scales)
    assert torch.equal(values, plain - shift[:, None])
    low, high = histogram_range(stats_of(x), scales, torch.ones(5), shift)
    assert moved.min() <= low <= 0 <= high <= moved.max()
    assert clipped_share(stats_of(x), scales, float(moved.min()) - 1, float(moved.max()) + 1, shift) == 0.0
