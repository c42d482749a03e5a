from dataclasses import replace

import pytest
import torch
from reference import stats_of
from torch import Tensor

from glmq.errors import StatisticsError
from glmq.numerics import hessian
from glmq.numerics.hessian import (
    DIAGONAL_FLOOR,
    SHRINKAGE,
    Factor,
    factor,
    factor_inputs,
    order_inputs,
    rounding_order,
    shrunk_correlation,
)
from glmq.numerics.moments import InputStats


def correlated(tokens: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    mix = torch.randn(channels, channels, generator=generator)
    return torch.randn(tokens, channels, generator=generator) @ mix * torch.linspace(0.1, 3, channels)


def moment_of(x: Tensor) -> Tensor:
    """A second moment that is safely positive definite."""
    return shrunk_correlation(x.T @ x / len(x), torch.ones(x.shape[1])) + torch.diag(x.square().mean(0))


def test_shrinkage_keeps_ones_on_the_diagonal_and_scales_the_rest() -> None:
    x = correlated(50, 6)
    second, deviation = x.T @ x / 50, torch.tensor([1.0, 2.0, 0.5, 4.0, 1.0, 8.0])
    expected = second / deviation[:, None] / deviation * (1 - SHRINKAGE)
    expected.diagonal().fill_(1.0)
    assert torch.equal(shrunk_correlation(second, deviation), expected)


def factored(stats: InputStats) -> Factor:
    order = order_inputs(stats)
    assert order is not None
    return factor_inputs(stats, order)


def test_channels_that_were_never_used_still_cost_something() -> None:
    x = correlated(50, 4)
    x[:, 2] = 0.0
    found = factored(stats_of(x))
    least = DIAGONAL_FLOOR * float(x.square().mean(0).mean())
    assert found.by_column()[2].item() == pytest.approx(least, rel=1e-5)  # float32
    assert not found.feedback[found.order.tolist().index(2)].any()
    silent = factored(stats_of(torch.zeros(3, 4)))
    assert torch.equal(silent.curvature, torch.ones(4))


def test_statistics_without_a_second_moment_have_no_order() -> None:
    assert order_inputs(replace(stats_of(correlated(50, 4)), second_moment=None)) is None


def test_the_factor_of_inputs_multiplies_back_to_their_shrunk_moment_whatever_the_scales() -> None:
    x, ratio = correlated(300, 24), 2.0 ** (torch.arange(24) % 5 - 2)
    stats = stats_of(x)
    found = factored(stats)
    assert stats.second_moment is not None
    found = found.scaled(ratio)
    upper = (torch.eye(24) + found.feedback).double()
    product = upper @ torch.diag(found.curvature.double()) @ upper.T
    wanted = stats.second_moment * (1 - SHRINKAGE) + SHRINKAGE * torch.diag(stats.second_moment.diagonal())
    wanted = (wanted * ratio[:, None] * ratio)[found.order][:, found.order].double()
    size = wanted.diagonal().sqrt()
    # The Cholesky factor in float32 is backward stable for unit channels: errors are below K * 2^-23 of their product.
    assert float(((product - wanted) / size[:, None] / size).abs().max()) <= 24 * 2.0**-23


@pytest.mark.parametrize("channels", [1, 2, 31, 33, 80])
def test_the_factor_multiplies_back_to_the_ordered_moment(channels: int) -> None:
    moment = moment_of(correlated(200, channels))
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
    moment = moment_of(correlated(500, 12))
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
    moment = moment_of(correlated(500, 20))
    left, remaining, last = moment.double().clone(), list(range(20)), []
    while remaining:  # 20 channels: blocks of one, so the greedy choice is exact
        pick = min(remaining, key=lambda j: float(left[j, j]))
        last.append(pick)
        remaining.remove(pick)
        left = left - left[:, [pick]] @ left[[pick]] / left[pick, pick]
    assert rounding_order(moment).columns.tolist() == last[::-1]


def test_the_greedy_order_has_less_total_curvature_than_the_order_of_the_columns() -> None:
    moment = moment_of(correlated(500, 64))
    backwards = torch.linalg.cholesky(moment.flip(0, 1)).diagonal().square()
    assert float(factor(moment).curvature.sum()) < 0.9 * float(backwards.sum())


@pytest.mark.parametrize("channels", [1, 31, 33, 200])
def test_the_order_has_the_curvatures_of_the_factor(channels: int) -> None:
    stats = stats_of(correlated(500, channels))
    found, order = factored(stats), order_inputs(stats)
    assert order is not None
    assert torch.equal(order.columns, found.order)
    assert torch.allclose(order.curvature, found.curvature, rtol=2.0**-18)  # condition numbers below 2^5
    assert torch.equal(order.by_column()[order.columns], order.curvature)
    ratio = 2.0 ** (torch.arange(channels) % 5 - 2)
    assert torch.equal(order.scaled(ratio).by_column(), order.by_column() * ratio.square())


def test_carrying_finished_columns_along_does_not_change_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = moment_of(correlated(500, 100))
    orders = []
    for share in (0.0, 0.8, 1.1):
        monkeypatch.setattr(hessian, "COMPACT_AT", share)
        orders.append(rounding_order(moment).columns.tolist())
    assert orders[0] == orders[1] == orders[2]


def test_curvatures_do_not_depend_on_the_units_of_the_channels() -> None:
    x, units = correlated(300, 40), 2.0 ** (torch.arange(40) % 7)
    before, after = (factored(stats_of(v)) for v in (x, x * units))
    # float32 sums over 300 tokens, factor of 40
    assert torch.allclose(after.by_column(), before.by_column() * units.square(), rtol=1e-4)


def test_a_moment_with_nan_is_refused() -> None:
    moment = torch.eye(3)
    moment[1, 2] = moment[2, 1] = torch.nan
    with pytest.raises(StatisticsError) as caught:
        factor(moment)
    assert str(caught.value) == (
        "the second moment of an input with 3 channels is not positive definite: calibrate again"
    )


@pytest.mark.parametrize("damage", ["NaN", "indefinite"])
@pytest.mark.parametrize("channel", [5, 590])
def test_a_moment_without_a_root_is_refused_wherever_it_breaks(damage: str, channel: int) -> None:
    moment = torch.eye(600)
    moment[channel, channel] = torch.nan if damage == "NaN" else -1.0
    sentence = "the second moment of an input with 600 channels is not positive definite: calibrate again"
    with pytest.raises(StatisticsError, match=sentence):
        factor(moment, torch.arange(600))


def test_a_large_factor_gives_the_moment_back() -> None:
    x = torch.randn(2000, 700, generator=torch.Generator().manual_seed(3))
    moment = shrunk_correlation(x.T @ x / 2000, x.square().mean(0).sqrt())
    found = factor(moment)
    whole = torch.eye(700) + found.feedback
    back = (whole * found.curvature) @ whole.T
    assert torch.equal(found.feedback.tril(), torch.zeros(700, 700))
    assert torch.allclose(back, moment[found.order][:, found.order], atol=2e-6)
