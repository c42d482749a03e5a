import pytest
import torch
from torch import Tensor

from glmq.numerics import grouped, rows
from glmq.numerics.grouped import expand_groups, fit_group_steps, group_max_steps, round_groups
from glmq.spec import INT4, INT8, IntGrid


def weights(n: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(n, k, generator=generator)
    weight[0, :64] = 0  # a dead group
    weight[1, 5] = 40  # an outlier
    return weight


@pytest.mark.parametrize("grid", [INT4, INT8], ids=["int4", "int8"])
def test_on_steps_that_reach_the_maximum_no_weight_is_off_by_more_than_half_a_step(grid: IntGrid) -> None:
    weight = weights(8, 128)
    steps = group_max_steps(weight, 64, grid)
    assert steps.shape == (8, 2)
    assert steps[0, 0] == 1  # any step does for zeros, but it must be positive
    assert steps[1, 0] == torch.tensor(40.0) / (7.5 if grid is INT4 else 127.5)
    q = round_groups(weight, steps, grid)
    assert (int(q.min()), int(q.max())) == (grid.qmin, grid.qmax)
    wide = expand_groups(steps, 128)
    # 2^-20: the division and the product round once each, of at most 128 steps.
    assert float(((q * wide - weight) / wide).abs().max()) <= 0.5 + 2.0**-16


def test_fitted_steps_never_lose_more_than_those_of_the_maximum() -> None:
    weight = weights(16, 256)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1))

    def loss(steps: Tensor) -> Tensor:
        """Weighted squared error of nearest rounding, per row and group."""
        error = round_groups(weight, steps, INT4) * expand_groups(steps, 256) - weight
        return (error.square() * importance).reshape(16, 4, 64).sum(2)

    fitted, plain = loss(fit_group_steps(weight, importance, 64, INT4)), loss(group_max_steps(weight, 64, INT4))
    assert bool((fitted <= plain * (1 + 1e-5)).all())
    assert float(fitted.sum()) < 0.95 * float(plain.sum())


def test_rows_that_are_handled_in_pieces_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = weights(9, 128), torch.ones(128)
    whole = fit_group_steps(weight, importance, 32, INT4)
    q = round_groups(weight, whole, INT4)
    monkeypatch.setattr(rows, "CHUNK_WEIGHTS", 256)
    assert torch.equal(fit_group_steps(weight, importance, 32, INT4), whole)
    assert torch.equal(round_groups(weight, whole, INT4), q)
    assert grouped.SHRINKS[0] == 1
