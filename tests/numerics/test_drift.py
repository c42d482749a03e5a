import pytest
import torch
from torch import Tensor

from glmq.errors import StatisticsError
from glmq.numerics.drift import ROWS_AT_ONCE, Drift, DriftAccumulator
from glmq.numerics.hessian import SHRINKAGE
from glmq.numerics.moments import InputAccumulator, InputStats

WIDTH = 12


def inputs(tokens: int = 4000) -> tuple[Tensor, Tensor]:
    """Correlated inputs, and what noise and a mixing of channels make of them."""
    torch.manual_seed(0)
    x = torch.randn(tokens, WIDTH) @ (torch.eye(WIDTH) + 0.3 * torch.randn(WIDTH, WIDTH))
    mixing = torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH)
    return x, x @ mixing + 0.2 * torch.randn(tokens, WIDTH)


def stats_of(x: Tensor) -> InputStats:
    accumulator = InputAccumulator("q_proj", WIDTH, with_moment=True)
    accumulator.accumulate(accumulator.observe(x, keep_rows=4))
    return accumulator.finish()


def drift(x: Tensor, moved: Tensor, strength: float) -> Drift:
    sums = DriftAccumulator(WIDTH)
    for part, its in zip(x.split(1500), moved.split(1500), strict=True):
        sums.observe(part, its)
    return sums.finish("q_proj", strength)


def test_the_aim_is_the_regression_on_the_moved_inputs_shrunk_towards_their_diagonal() -> None:
    x, y = inputs()
    weight = torch.randn(5, WIDTH)
    wide, moved = x.double(), y.double()
    moment = moved.T @ moved / len(moved)
    shrunk = (1 - SHRINKAGE) * moment + SHRINKAGE * moment.diagonal().diag()
    wanted = weight + 0.4 * weight.double() @ ((wide - moved).T @ moved / len(moved)) @ shrunk.inverse()
    assert torch.allclose(drift(x, y, 0.4).aim(weight).double(), wanted, atol=1e-5)


def test_at_full_strength_more_of_the_drift_is_made_up_for_than_at_half() -> None:
    x, y = inputs()
    weight = torch.randn(5, WIDTH)

    def lost(strength: float) -> float:
        return float((y @ drift(x, y, strength).aim(weight).T - x @ weight.T).square().sum())

    none, half, full = (lost(strength) for strength in (0.0, 0.5, 1.0))
    assert full < half < none
    assert full < 0.4 * none


def test_without_drift_the_aim_is_the_weight_to_the_bit() -> None:
    x, _ = inputs()
    weight = torch.randn(ROWS_AT_ONCE + 3, WIDTH)
    assert torch.equal(drift(x, x, 0.5).aim(weight), weight)


def test_errors_are_weighed_by_the_moved_inputs_and_all_else_stays() -> None:
    x, y = inputs()
    seen = drift(x, y, 0.5).applied(stats_of(x))
    assert seen.second_moment is not None
    assert torch.allclose(seen.second_moment, y.T @ y / len(y), rtol=1e-4, atol=1e-4)
    assert torch.equal(seen.square_mean, seen.second_moment.diagonal())
    known = stats_of(x)
    assert torch.equal(seen.maximum, known.maximum)
    assert torch.equal(seen.sample, known.sample)


def test_inputs_that_are_not_finite_any_more_are_named() -> None:
    x, y = inputs()
    y[7, 3] = float("nan")
    with pytest.raises(StatisticsError) as caught:
        drift(x, y, 0.5)
    assert str(caught.value) == (
        "q_proj: its inputs have no positive definite second moment once the linears before it are integers; leave "
        "--propagation out, or keep the layers before it float (--keep-float)"
    )


def test_channels_that_are_never_used_do_no_harm() -> None:
    x, y = inputs()
    x[:, 2] = y[:, 2] = 0
    assert torch.isfinite(drift(x, y, 1.0).correction).all()
