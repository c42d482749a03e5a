import pytest
import reference
import torch
from reference import stats_of
from torch import Tensor

from glmq.numerics import gptq
from glmq.numerics.gptq import round_compensated
from glmq.numerics.hessian import Factor, factor, shrunk_moment
from glmq.spec import INT4, INT8, IntGrid


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor, Factor]:
    """Weights, the second moment of correlated inputs, and its factor."""
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    moment = shrunk_moment(stats_of(x))
    assert moment is not None
    return torch.randn(rows, columns, generator=generator), moment, factor(moment)


def loss(weight: Tensor, q: Tensor, step: Tensor, moment: Tensor) -> float:
    error = (weight - q.float() * step).double()
    return float(((error @ moment.double()) * error).sum())


@pytest.mark.parametrize("grid", [INT8, INT4])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 15), (3, 16), (4, 33), (2, 60)])
def test_integers_equal_the_papers_algorithm(rows: int, columns: int, grid: IntGrid) -> None:
    weight, moment, found = problem(rows, columns)
    step = weight.abs().amax(1, keepdim=True) / (7 if grid is INT4 else 20)
    expected = reference.compensated(weight, step.expand_as(weight), moment, found.order.tolist(), grid.qmin, grid.qmax)
    assert round_compensated(weight, step, found, grid).tolist() == expected


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_of_columns_have_their_own_steps(groups: int) -> None:
    weight, moment, found = problem(4, 32)
    step = weight.abs().reshape(4, groups, -1).amax(2) / 7
    expanded = step.repeat_interleave(32 // groups, 1)
    expected = reference.compensated(weight, expanded, moment, found.order.tolist(), -8, 7)
    assert round_compensated(weight, step, found, INT4).tolist() == expected


def test_blocks_of_any_size_give_the_same_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, found = problem(9, 50)
    step = torch.full((9, 1), 0.1)
    whole = round_compensated(weight, step, found, INT8)
    monkeypatch.setattr(gptq, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(gptq, "WIDE", 12)
    monkeypatch.setattr(gptq, "NARROW", 5)
    assert torch.equal(round_compensated(weight, step, found, INT8), whole)


def test_uncorrelated_inputs_give_the_nearest_integers() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    step = weight.abs().amax(1, keepdim=True) / 31
    found = factor(torch.diag(torch.linspace(1, 9, 40)))
    assert torch.equal(round_compensated(weight, step, found, INT8), torch.round(weight / step).to(torch.int8))


def test_halves_are_rounded_to_even() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -2.5, 126.5]])
    found = factor(torch.eye(6))
    assert round_compensated(weight, torch.ones(1, 1), found, INT8).tolist() == [[0, 2, 2, 0, -2, 126]]


def test_compensation_loses_less_than_nearest_rounding() -> None:
    weight, moment, found = problem(20, 64)
    step = weight.abs().amax(1, keepdim=True) / 15
    nearest = torch.round(weight / step)
    compensated = round_compensated(weight, step, found, INT8)
    assert loss(weight, compensated, step, moment) < 0.6 * loss(weight, nearest, step, moment)


def test_what_the_grid_cuts_is_made_up_for_in_other_columns() -> None:
    moment = torch.tensor([[1.0, 0.99], [0.99, 0.999]])  # column 1 has less variance: last
    weight = torch.tensor([[200.0, 0.0]])
    found = factor(moment)
    q = round_compensated(weight, torch.ones(1, 1), found, INT8)
    assert q[0, 0].item() == 127
    assert q[0, 1].item() == 72  # 73 * 0.99 / 0.999 = 72.3


def test_integers_need_no_update_where_the_weight_is_on_the_grid() -> None:
    _, _, found = problem(3, 24)
    q = torch.randint(-128, 128, (3, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    step = torch.tensor([[0.5], [0.25], [2.0]])
    assert torch.equal(round_compensated(q.float() * step, step, found, INT8), q)
