from dataclasses import replace

import pytest
import torch
from reference import stats_of
from torch import Tensor

from glmq.errors import StatisticsError
from glmq.numerics.hessian import DIAGONAL_FLOOR, SHRINKAGE, factor, meeting_variance, rounding_order, shrunk_moment


def correlated(tokens: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    mix = torch.randn(channels, channels, generator=generator)
    return torch.randn(tokens, channels, generator=generator) @ mix * torch.linspace(0.1, 3, channels)


def test_shrinkage_keeps_the_diagonal_and_scales_the_rest() -> None:
    stats = stats_of(correlated(50, 6))
    scales = torch.tensor([1.0, 2.0, 0.5, 4.0, 1.0, 8.0])
    moment, second = shrunk_moment(stats, scales), stats.second_moment
    assert moment is not None
    assert second is not None
    scaled = second / (scales[:, None] * scales)
    expected = scaled * (1 - SHRINKAGE)
    expected.diagonal().copy_(scaled.diagonal())
    assert torch.equal(moment, expected)


def test_channels_that_were_never_used_still_cost_something() -> None:
    x = correlated(50, 4)
    x[:, 2] = 0.0
    moment = shrunk_moment(stats_of(x))
    assert moment is not None
    assert moment[2, 2].item() == pytest.approx(DIAGONAL_FLOOR * float(x.square().mean(0).mean()), rel=1e-5)  # float32
    silent = shrunk_moment(stats_of(torch.zeros(3, 4)))
    assert silent is not None
    assert torch.equal(silent, torch.eye(4))


def test_statistics_without_a_second_moment_have_no_form() -> None:
    stats = replace(stats_of(correlated(50, 4)), second_moment=None)
    assert shrunk_moment(stats) is None
    assert torch.equal(meeting_variance(stats, compensated=True), stats.square_mean)


@pytest.mark.parametrize("channels", [1, 2, 31, 33, 80])
def test_the_factor_multiplies_back_to_the_ordered_moment(channels: int) -> None:
    moment = shrunk_moment(stats_of(correlated(200, channels)))
    assert moment is not None
    found = factor(moment)
    assert sorted(found.order.tolist()) == list(range(channels))
    assert torch.equal(found.feedback, found.feedback.triu(1))
    upper = (torch.eye(channels) + found.feedback).double()
    product = upper @ torch.diag(found.curvature.double()) @ upper.T
    ordered = moment[found.order][:, found.order].double()
    # Cholesky in float32 is backward stable: the error is below K * 2^-23 of the largest diagonal entry.
    assert float((product - ordered).abs().max()) <= channels * 2.0**-23 * float(moment.diagonal().max())
    assert torch.equal(found.by_column()[found.order], found.curvature)


def test_curvature_is_the_variance_that_later_columns_cannot_imitate() -> None:
    moment = shrunk_moment(stats_of(correlated(500, 12)))
    assert moment is not None
    found = factor(moment)
    order, h = found.order.tolist(), moment.double()
    for position, column in enumerate(order):
        later = order[position + 1 :]
        rest = h[column, column]
        if later:
            rest = rest - h[column, later] @ torch.linalg.solve(h[later][:, later], h[later, column])
        # The condition number is below 2^12 here, so float32 keeps 12 bits of each Schur complement.
        assert found.curvature[position].item() == pytest.approx(float(rest), rel=2.0**-11)


def test_the_order_takes_the_least_remaining_variance_last() -> None:
    moment = shrunk_moment(stats_of(correlated(500, 20)))
    assert moment is not None
    left, remaining, last = moment.double().clone(), list(range(20)), []
    while remaining:  # 20 channels: blocks of one, so the greedy choice is exact
        pick = min(remaining, key=lambda j: float(left[j, j]))
        last.append(pick)
        remaining.remove(pick)
        left = left - left[:, [pick]] @ left[[pick]] / left[pick, pick]
    assert rounding_order(moment).tolist() == last[::-1]


def test_the_greedy_order_has_less_total_curvature_than_the_order_of_the_columns() -> None:
    moment = shrunk_moment(stats_of(correlated(500, 64)))
    assert moment is not None
    backwards = torch.linalg.cholesky(moment.flip(0, 1)).diagonal().square()
    assert float(factor(moment).curvature.sum()) < 0.9 * float(backwards.sum())


def test_meeting_variance_does_not_depend_on_the_units_of_the_channels() -> None:
    x, units = correlated(300, 40), 2.0 ** (torch.arange(40) % 7)
    before, after = (meeting_variance(stats_of(v), compensated=True) for v in (x, x * units))
    assert torch.allclose(after, before * units.square(), rtol=1e-4)  # float32 sums over 300 tokens, factor of 40
    assert torch.equal(meeting_variance(stats_of(x), compensated=False), stats_of(x).square_mean)


def test_a_moment_with_nan_is_refused() -> None:
    moment = torch.eye(3)
    moment[1, 2] = moment[2, 1] = torch.nan
    with pytest.raises(StatisticsError) as caught:
        factor(moment)
    assert str(caught.value) == (
        "the second moment of an input with 3 channels is not positive definite: calibrate again"
    )
