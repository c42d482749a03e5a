import re

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from glmq.numerics import gptq
from glmq.numerics.gptq import round_best, round_compensated
from glmq.numerics.hessian import Factor, factor, shrunk_correlation
from glmq.spec import INT4, INT8, IntGrid

compiled = pytest.mark.skipif(not gptq.KERNELS, reason="the compiled kernels are not built")


@pytest.fixture(params=[*gptq.KERNELS, "torch"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with each kernel that this processor runs, and with torch."""
    name = str(request.param)
    monkeypatch.setattr(gptq, "KERNELS", () if name == "torch" else (name,))
    return name


def test_the_kernel_that_rounds_has_a_name(kernel: str) -> None:
    assert gptq.rounding_kernel() == kernel


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor, Factor]:
    """Weights, the second moment of correlated inputs, and its factor."""
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    moment = shrunk_correlation(x.T @ x / len(x), torch.ones(columns)) + torch.diag(x.square().mean(0))
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
    weight, _, found = problem(150, 50)
    step = torch.full((150, 1), 0.1)
    whole = round_compensated(weight, step, found, INT8)
    monkeypatch.setattr(gptq, "ROWS_AT_ONCE", gptq.STRIP)
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


def test_strips_and_wide_blocks_of_exact_numbers_have_the_integers_of_one_column_at_a_time() -> None:
    generator = torch.Generator().manual_seed(3)
    rows, columns = 130, 300  # two whole strips and a part; two wide blocks
    feedback = torch.zeros(columns, columns)
    for column in range(columns):  # halves of the last three columns' errors: all sums are exact in float32
        feedback[max(0, column - 3) : column, column] = 0.5
    found = Factor(torch.randperm(columns, generator=generator), feedback, torch.ones(columns))
    weight = torch.randint(-2000, 2000, (rows, columns), generator=generator) / 256
    step = torch.full((rows, 1), 0.125)
    error, expected = torch.zeros(rows, columns), torch.empty(rows, columns, dtype=torch.int8)
    for position, column in enumerate(found.order.tolist()):
        target = weight[:, column] + error @ feedback[:, position]
        q = torch.round(target / 0.125).clamp(-128, 127)
        expected[:, column], error[:, position] = q.to(torch.int8), weight[:, column] - q * 0.125
    assert torch.equal(round_compensated(weight, step, found, INT8), expected)


def test_a_sweep_is_coordinate_descent_in_the_same_order() -> None:
    weight, moment, found = problem(5, 33)
    step = weight.abs().amax(1, keepdim=True) / 7
    q = round_compensated(weight, step, found, INT4).double()
    wide, h = weight.double(), moment.double()
    for column in found.order.tolist():
        others = (wide - q * step) @ h[:, column] - (wide[:, column] - q[:, column] * step[:, 0]) * h[column, column]
        best = (wide[:, column] + others / h[column, column]) / step[:, 0]
        q[:, column] = torch.round(best).clamp(-8, 7)
    swept = round_best(weight, [step], found, INT4, sweeps=1).q
    assert swept.tolist() == q.long().tolist()


def test_sweeps_lose_less_and_blocks_of_any_size_give_the_same_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment, found = problem(150, 50)
    step = weight.abs().amax(1, keepdim=True) / 7
    losses = [loss(weight, round_best(weight, [step], found, INT4, sweeps=n).q, step, moment) for n in (0, 1, 2)]
    assert losses[0] > losses[1] >= losses[2]
    whole = round_best(weight, [step], found, INT4, sweeps=2).q
    monkeypatch.setattr(gptq, "ROWS_AT_ONCE", gptq.STRIP)
    monkeypatch.setattr(gptq, "WIDE", 12)
    monkeypatch.setattr(gptq, "NARROW", 5)
    assert torch.equal(round_best(weight, [step], found, INT4, sweeps=2).q, whole)


def test_each_row_takes_the_steps_that_lose_least_and_says_which() -> None:
    weight, moment, found = problem(70, 40)
    steps = [weight.abs().amax(1, keepdim=True) * share / 7 for share in (1.0, 0.9, 0.8)]
    apart = [round_compensated(weight, step, found, INT4) for step in steps]
    losses = torch.tensor([[loss(weight[i : i + 1], q[i : i + 1], s[i : i + 1], moment) for i in range(70)]
                           for q, s in zip(apart, steps, strict=True)])  # fmt: skip
    best = round_best(weight, steps, found, INT4)
    assert best.choice.tolist() == losses.argmin(0).tolist()
    assert set(best.choice.tolist()) == {0, 1, 2}
    assert torch.allclose(best.loss, losses.amin(0), rtol=1e-3)  # the factored form against the moment itself
    for row, choice in enumerate(best.choice.tolist()):
        assert torch.equal(best.q[row], apart[choice][row])


@compiled
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kernel": "avx1024"}, "no kernel avx1024 on this machine"),
        ({"rows": 48}, "there must be columns, and a multiple of 32 rows"),
        ({"rows": -64}, "there must be columns, and a multiple of 32 rows"),
        ({"columns": -2}, "there must be columns, and a multiple of 32 rows"),
        ({"target": np.zeros(3, np.float32)}, "target has 12 bytes, 512 are needed"),
        ({"feedback": np.zeros(1, np.float32)}, "feedback has 4 bytes, 16 are needed"),
        ({"steps": np.zeros(65, np.float32)}, "steps has 260 bytes, 256 are needed"),
        ({"group": np.array([0, 1], np.int32)}, "a group without a step"),
        ({"group": np.array([0, -1], np.int32)}, "a group without a step"),
        ({"weight": np.zeros(513, np.int8)[1:]}, "weight does not begin at a multiple of 4 bytes"),
        # Sizes whose product is 0, or right again, in 64 bits.
        ({"columns": 2**32, "rows": 2**32}, "weight has 512 bytes, -1 are needed"),
        ({"columns": 2**57 + 2}, "weight has 512 bytes, -1 are needed"),
        ({"columns": 2**62, "rows": 2**62}, "weight has 512 bytes, -1 are needed"),
    ],
)
def test_the_compiled_kernel_refuses_buffers_that_do_not_fit(changes: dict[str, object], sentence: str) -> None:
    block = np.ones((2, 64), np.float32)
    arguments: dict[str, object] = {
        "kernel": gptq._rounding.list_kernels()[-1],
        **{name: block.copy() for name in ("weight", "target")},
        "feedback": np.zeros((2, 2), np.float32),
        "steps": np.ones((1, 64), np.float32),
        "group": np.zeros(2, np.int32),
        "error": block.copy(),
        "q": np.zeros((2, 64), np.int8),
        **{"columns": 2, "rows": 64, "qmin": -128.0, "qmax": 127.0},
    }
    with pytest.raises(ValueError, match=re.escape(sentence)):
        gptq._rounding.round_block(*(arguments | changes).values())


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (15, 70), (200, 65)])
@pytest.mark.parametrize("kernels", [gptq.KERNELS, ()], ids=["compiled", "torch"])
def test_columns_are_put_in_order_and_taken_back(
    kernels: tuple[str, ...], rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "KERNELS", kernels)
    place = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    weight, part = torch.arange(float(rows * columns)).reshape(rows, columns), gptq._Rows(columns, 1, rows + 5)
    part.load(weight, torch.full((rows, 1), 2.0), place)
    assert torch.equal(part.weight[place, :rows], weight.T)
    assert not part.weight[:, rows:].any()
    assert part.steps.tolist() == [[2.0] * rows + [1.0] * 5]
    part.q.random_(-128, 128, generator=torch.Generator().manual_seed(rows))
    q = torch.zeros(rows, columns, dtype=torch.int8)
    part.restore(q, place)
    assert torch.equal(q, part.q[place, :rows].T)


@pytest.mark.parametrize(("threads", "rows_at_once"), [(1, 256), (3, 256), (17, 64)])
def test_rows_are_shared_among_threads_which_changes_no_integer(
    threads: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, _, found = problem(700, 300)
    step = weight.abs().amax(1, keepdim=True) / 7
    whole, taken = round_compensated(weight, step, found, INT8), []
    rows_class, before = gptq._Rows, torch.get_num_threads()

    def count_rows(columns: int, groups: int, rows: int) -> gptq._Rows:
        taken.append(rows)
        return rows_class(columns, groups, rows)

    monkeypatch.setattr(gptq, "_Rows", count_rows)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(round_compensated(weight, step, found, INT8), whole)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert taken == [rows_at_once] * min(threads, -(-700 // rows_at_once))


@compiled
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"padded": 2}, "the rows must lie within the padded ones"),
        ({"rows": -1}, "the rows must lie within the padded ones"),
        ({"columns": 3}, "plain has {plain} bytes, {wanted} are needed"),
        ({"place": np.array([0, 2])}, "a column's place is none"),
        ({"place": np.array([-1, 0])}, "a column's place is none"),
        ({"ordered": np.zeros((2, 3), np.float64)}, "ordered has 48 bytes"),
        ({"columns": 2**62, "padded": 2**62}, "plain has {plain} bytes, -1 are needed"),
    ],
)
@pytest.mark.parametrize(("name", "dtype"), [("arrange", np.float32), ("restore", np.int8)])
def test_reordering_refuses_buffers_that_do_not_fit(
    name: str, dtype: type[np.generic], changes: dict[str, object], sentence: str
) -> None:
    arguments: dict[str, object] = {
        "plain": np.zeros((3, 2), dtype),
        "place": np.arange(2),
        "ordered": np.zeros((2, 3), dtype),
        **{"rows": 3, "columns": 2, "padded": 3},
    }
    size = np.dtype(dtype).itemsize
    with pytest.raises(ValueError, match=re.escape(sentence.format(plain=6 * size, wanted=9 * size))):
        getattr(gptq._rounding, name)(*(arguments | changes).values())
