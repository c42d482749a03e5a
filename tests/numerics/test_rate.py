import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glmq.errors import UsageError
from glmq.numerics.metrics import count_int8, entropy_bits
from glmq.numerics.rate import (
    FEWER_BITS,
    MORE_BITS,
    TOLERANCE_BITS,
    CurveRows,
    RateCurve,
    balanced_steps,
    coarse_steps,
    mean_rule_bits,
    rate_curve,
    solve_bits,
    solve_log_steps,
)


def ideal(name: str, weights: int, loss_at_4: float) -> RateCurve:
    """A linear that loses four times less with each bit, as fine quantization does."""
    bits = tuple(8.0 - i / 2 for i in range(16))
    return RateCurve(name, weights, bits, tuple(loss_at_4 * 4.0 ** (4 - b) for b in bits), 4.0)


def normals(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).add(0.5)


def test_equal_slopes_mean_losses_in_proportion_to_the_weights() -> None:
    curves = [ideal("q", 4000, 1e-3), ideal("k", 500, 2e-3), ideal("v", 500, 5e-4)]
    bits = solve_bits(curves, 4.0)
    per_weight = [c.loss[0] * 4.0 ** (c.bits[0] - b) / c.weights for c, b in zip(curves, bits, strict=True)]
    # Bits lie on a grid of 4096 points over 3 bits: a step of 0.0007 bits moves a loss by 0.1 %.
    assert max(per_weight) / min(per_weight) < 1.003


@pytest.mark.slow
@given(st.floats(1.6, 5.0), st.lists(st.tuples(st.integers(1, 10**8), st.floats(1e-6, 1e-1)), min_size=1, max_size=6))
@settings(deadline=None)
def test_the_mean_is_the_target_and_no_linear_leaves_its_window(target: float, kinds: list[tuple[int, float]]) -> None:
    curves = [ideal(str(i), weights, loss) for i, (weights, loss) in enumerate(kinds)]
    bits = solve_bits(curves, target)
    mean = sum(b * c.weights for b, c in zip(bits, curves, strict=True)) / sum(c.weights for c in curves)
    assert mean <= target + 1e-9  # float64
    assert mean >= target - 3 / 4095  # the linear that is decided last moves by one grid step
    assert all(target - FEWER_BITS - 1e-9 <= b <= target + MORE_BITS + 1e-9 for b in bits)


def test_a_target_that_the_curves_do_not_reach_is_refused() -> None:
    curve = RateCurve("q", 100, (7.0, 5.0, 3.0), (0.1, 0.2, 0.4), 4.0)
    for target, least in ((1.5, 3.0), (8.5, 7.0)):
        with pytest.raises(UsageError) as caught:
            solve_bits([curve], target)
        assert str(caught.value) == (
            f"a mean of {target:.3f} bits per weight was asked for, "
            f"but these linears can have {min(least, 7.0):.3f} to 8"
        )


def test_more_bits_than_any_step_spends_are_not_spent() -> None:
    assert solve_bits([RateCurve("q", 100, (6.0, 4.0), (0.1, 0.2), 4.0)], 7.5) == [6.0]


def test_a_linear_with_one_entropy_whatever_the_step_keeps_it() -> None:
    zero = RateCurve("zero", 100, (0.0,) * 5, (0.0,) * 5, 0.0)
    bits = solve_bits([zero, ideal("q", 100, 1e-3)], 2.0)
    assert bits[0] == 0.0
    assert bits[1] == pytest.approx(4.0, abs=0.001)  # a grid step


def test_the_budget_is_the_mean_over_weights() -> None:
    curves = [RateCurve("a", 300, (4.0,), (0.1,), 4.0), RateCurve("b", 100, (4.0,), (0.1,), 2.0)]
    assert mean_rule_bits(curves) == 3.5


def test_steps_follow_the_square_root_of_the_spread() -> None:
    weight = torch.tensor([[1.0, -1.0], [4.0, 4.0], [0.0, 0.0]])
    typical = 1.0  # the lower median of the rows that are not zero
    expected = [math.sqrt(1 * typical), math.sqrt(4 * typical)]
    assert balanced_steps(weight)[:, 0].tolist() == pytest.approx([*expected, expected[1]], rel=1e-6)  # float32


def test_one_huge_row_does_not_move_the_steps_of_the_others() -> None:
    weight = normals(9, 50)
    before = balanced_steps(weight)
    weight[8] = 1e4
    assert torch.allclose(balanced_steps(weight)[:8], before[:8], rtol=0.2)  # the median may move by one row


def test_balanced_steps_lose_least_at_equal_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(64, 1, generator=generator).mul(0.4).exp()
    weight = torch.randn(64, 2000, generator=generator) * spread

    def loss(steps: Tensor) -> float:
        """Mean squared error, made comparable: a bit is worth a factor of 4."""
        q = torch.round(weight / steps)
        return float((q * steps - weight).square().mean()) * 4 ** entropy_bits(count_int8(q.to(torch.int8)))

    balanced = loss(balanced_steps(weight) / 4)
    assert balanced < 0.95 * loss(spread / 4)
    assert balanced < 0.95 * loss(torch.full_like(spread, 0.25))


def test_no_weight_lies_beyond_127_steps() -> None:
    weight = normals(4, 100)
    weight[2, 3] = 1000.0
    step = coarse_steps(weight, torch.ones(4, 1), -3.0)
    assert step[:, 0].tolist() == [0.125, 0.125, torch.tensor(1000.0).div(127).item(), 0.125]


def test_a_curve_measures_nearest_rounding_under_the_curvature() -> None:
    weight, curvature = normals(8, 50), torch.linspace(1, 3, 50)
    rows = CurveRows(weight, signal=2.0, sensitivity=None)
    curve = rate_curve("q", rows, curvature, weights=4000, rule_bits=3.5)
    assert (curve.name, curve.weights, curve.rule_bits) == ("q", 4000, 3.5)
    assert list(curve.bits) == sorted(curve.bits, reverse=True)
    assert list(curve.loss) == sorted(curve.loss)
    step = coarse_steps(weight, balanced_steps(weight), -2.0)
    q = torch.round(weight / step)
    index = 4  # log2 step -2
    assert curve.bits[index] == entropy_bits(count_int8(q.to(torch.int8)))
    noise = float(((q * step - weight).double().square().mean(0) * curvature).sum())
    assert curve.loss[index] == pytest.approx(noise / 2.0, rel=1e-5)  # float32 sums of 400 terms


@given(st.lists(st.tuples(st.floats(1.0, 6.0), st.floats(-2.0, 2.0)), min_size=1, max_size=4))
@settings(deadline=None)
def test_the_steps_for_entropies_are_found_from_below(wanted: list[tuple[float, float]]) -> None:
    def entropies_at(log_steps: Sequence[float]) -> list[float]:
        return [4.0 - (0.8 + 0.1 * i) * s for i, s in enumerate(log_steps)]  # not one bit for each doubling

    targets, starts = zip(*wanted, strict=True)
    found = entropies_at(solve_log_steps(entropies_at, targets, starts))
    assert all(target - TOLERANCE_BITS <= bits <= target for target, bits in zip(targets, found, strict=True))


def test_an_entropy_that_no_step_exceeds_ends_with_the_finest_tried() -> None:
    assert solve_log_steps(lambda steps: [1.0 for _ in steps], [4.0], [0.0])[0] < -30


def test_rows_that_count_more_get_finer_steps_by_the_fourth_root_of_the_root_of_their_share() -> None:
    weight = normals(6, 64)
    counts = torch.tensor([1.0, 1.0, 1.0, 1.0, 16.0, 1 / 16])
    plain, weighed = balanced_steps(weight), balanced_steps(weight, counts)
    ratio = (weighed / plain)[:, 0]
    # (16 / mean)^(-1/8) for the row that counts 16 times as much, and all rows share one median.
    assert torch.allclose(ratio[4] / ratio[0], torch.tensor(16.0 ** (-1 / 8)))
    assert torch.allclose(ratio[5] / ratio[0], torch.tensor(16.0 ** (1 / 8)))


def test_rows_that_all_count_nothing_or_alike_change_no_step() -> None:
    weight = normals(6, 64)
    for counts in (torch.zeros(6), torch.full((6,), 7.0)):
        assert torch.equal(balanced_steps(weight, counts), balanced_steps(weight))


def test_a_curve_with_sensitivities_is_the_geometric_mean_of_relative_error_and_effect() -> None:
    weight, curvature, counts = normals(8, 50), torch.linspace(1, 3, 50), torch.linspace(0.5, 4, 8)
    curve = rate_curve("q", CurveRows(weight, 2.0, counts), curvature, weights=4000, rule_bits=3.5)
    step = coarse_steps(weight, balanced_steps(weight, counts), -2.0)
    noise = ((torch.round(weight / step) * step - weight).double().square() * curvature).sum(1)  # by row
    effect = 80 * float((noise * counts).mean())  # 4000 weights in rows of 50
    assert curve.loss[4] == pytest.approx(math.sqrt(float(noise.mean()) / 2.0 * effect), rel=1e-5)
