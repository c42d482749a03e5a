"""Bits against error: where the bits of a sparse checkpoint go, and the step that spends exactly that many.

A sparse weight is stored as int8 but compressed by an entropy coder, so its size is its zero-order entropy, and the
step is free. The loss of a linear is its squared output error over its squared output, expected from the curvatures;
where it is known what that error counts for the answer (sensitivity.py), the geometric mean of both. Relative errors alone
count five linears of a layer alike, which they are not; the estimate alone trusts a few assumptions too much: the mean
gets nearly all of the gain at a fraction of the cost in output error.
Over a whole model the sum of the losses at a given total of bits is least where all linears have the same slope, -d
loss / d (bits * weights) (Shoham & Gersho 1988): a small linear (k_proj, v_proj) buys much accuracy for few bits.

Within a linear, two facts, both derived for rounding noise step^2 / 12 and a coder that sees one histogram per linear:
- Rows. With log-spreads of variance v over rows, steps that follow the spread lose v nats to the inequality of the
  arithmetic and the geometric mean, equal steps lose v nats to the mixed histogram (Gaussian rows, to second order).
  Steps that follow the square root of the spread lose half of that, which is the least.
- Columns. See smooth.py.

Rounding that also weighs code lengths (zero preferred where it is cheap) was measured and left out: at equal entropy it
gains less than 0.3 % of the error above 2 bits and 2 % at 1.5 bits, as theory says of entropy-coded scalar
quantization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from glmq.errors import UsageError
from glmq.numerics.metrics import count_int8, entropy_bits
from glmq.numerics.rows import fill_dead_rows, row_energy, row_max
from glmq.spec import INT8

CURVE_ROWS: Final = 512
"""Rows that a curve looks at, evenly spaced."""
CURVE_LOG_STEPS: Final = tuple(i / 2 for i in range(-8, 5))
"""Steps of a curve's points, as log2 of the step over the root mean square of the weight."""
TOLERANCE_BITS: Final = 0.002
FEWER_BITS: Final = 1.0
MORE_BITS: Final = 2.0
INT8_BITS: Final = 8
GRID: Final = 4096
"""Points of a window: fine enough that rounding to them leaves less than a thousandth of a bit unspent."""


@dataclass(frozen=True, slots=True)
class RateCurve:
    """What one linear loses at how many bits."""

    name: str
    weights: int
    bits: tuple[float, ...]
    """Entropy in bits per weight, falling."""
    loss: tuple[float, ...]
    """Expected squared output error over squared output, or that weighed by what it counts; rising."""
    rule_bits: float
    """Bits per weight that the step rule of the flags would spend."""


def balanced_steps(weight: Tensor, sensitivity: Tensor | None = None) -> Tensor:
    """The profile of steps over rows: the square root of each row's root mean square, scaled to that of the median row.

    One huge row must not make the steps of all others coarse, hence the median. Rows whose errors count more get finer
    steps: with `sensitivity`, float32 [N], a row's mean square is divided by the root of its share.

    float32 [N, K] -> float32 [N, 1], positive.
    """
    mean_square = row_energy(weight) / weight.shape[1]
    if sensitivity is not None:
        mean_square = mean_square / _shares(sensitivity).sqrt()[:, None]
    alive = mean_square[mean_square > 0]
    typical = alive.median() if len(alive) else torch.ones(())
    return fill_dead_rows((mean_square * typical).pow(0.25))


def _shares(sensitivity: Tensor) -> Tensor:
    """Each row's sensitivity over that of the mean row: [N] -> [N], ones where nothing counts."""
    mean = float(sensitivity.mean())
    return sensitivity / mean if mean > 0 else torch.ones_like(sensitivity)


def coarse_steps(weight: Tensor, profile: Tensor, log_step: float) -> Tensor:
    """profile * 2^log_step, but no row's largest weight beyond 127 steps. float32 [N, 1]."""
    return torch.maximum(profile * 2.0**log_step, row_max(weight) / INT8.qmax)


@dataclass(frozen=True, slots=True)
class CurveRows:
    """Some rows of a linear, to stand for all."""

    weight: Tensor
    """float32 [n, K], after smoothing."""
    signal: float
    """Mean over the rows of the squared output, E[(w x)^2]."""
    sensitivity: Tensor | None
    """float32 [n], or None: losses are relative errors alone."""


def rate_curve(name: str, rows: CurveRows, curvature: Tensor, *, weights: int, rule_bits: float) -> RateCurve:
    """Entropy and expected loss of nearest rounding over a range of steps.

    The loss is the squared output error over the squared output; with sensitivities, the root of the product of that and
    of what the error counts for the answer.

    Args:
        name: of the linear.
        rows: some of the linear's rows.
        curvature: float32 [K]: cost of a squared unit of error in column k.
        weights: of the whole linear.
        rule_bits: what the flags' rule would spend.
    """
    profile = balanced_steps(rows.weight, rows.sensitivity)
    all_rows = weights // rows.weight.shape[1]
    bits, loss = [], []
    for log_step in CURVE_LOG_STEPS:
        step = coarse_steps(rows.weight, profile, log_step)
        rounded = (rows.weight / step).round_()
        bits.append(entropy_bits(count_int8(rounded.to(torch.int8))))
        noise = rounded.mul_(step).sub_(rows.weight).square_() @ curvature  # [n]
        relative = float(noise.mean()) / max(rows.signal, torch.finfo(torch.float32).tiny)
        if rows.sensitivity is None:
            loss.append(relative)
        else:
            loss.append(math.sqrt(relative * all_rows * float((noise * rows.sensitivity).mean())))
    return RateCurve(name, weights, tuple(bits), tuple(loss), rule_bits)


def mean_rule_bits(curves: Sequence[RateCurve]) -> float:
    """Mean bits per weight that the flags' rule spends on these linears: the budget where no target is given."""
    return sum(c.rule_bits * c.weights for c in curves) / sum(c.weights for c in curves)


def solve_bits(curves: Sequence[RateCurve], target_bits: float) -> list[float]:
    """Bits per weight of each linear, so that the mean over all weights is the target and the sum of losses is least.

    Curves are read as straight lines of log(loss) over bits between their points; the common slope is found by
    bisection. No linear goes further than FEWER_BITS below or MORE_BITS above the target: the loss of a linear whose
    output is dominated by a few huge tokens looks small, and starving it on that evidence fails on other text.

    Args:
        curves: one per linear.
        target_bits: mean bits per weight over all linears.

    Returns:
        One number per curve; their weighted mean is at most the target, and less where no step spends that much.

    Raises:
        UsageError: the target is less than these linears can reach, or more than an int8 holds.
    """
    weights = torch.tensor([c.weights for c in curves], dtype=torch.float64)
    bits, loss = (torch.stack(x) for x in zip(*(_window(c, target_bits) for c in curves), strict=True))
    share = (weights / weights.sum())[:, None]
    least = float((share * bits.amin(1, keepdim=True)).sum())
    if not least <= target_bits <= INT8_BITS:
        raise UsageError(
            f"a mean of {target_bits:.3f} bits per weight was asked for, "
            f"but these linears can have {least:.3f} to {INT8_BITS}"
        )

    def choose(log_slope: float) -> Tensor:
        return bits.gather(1, (loss + 2.0**log_slope * share * bits).argmin(1, keepdim=True))

    low, high = -100.0, 100.0  # log2 of the slope: at `high` every linear has the fewest bits of its window
    for _ in range(60):
        middle = (low + high) / 2
        if float((share * choose(middle)).sum()) > target_bits:
            low = middle
        else:
            high = middle
    return [float(b) for b in choose(high)]


def solve_log_steps(
    entropies_at: Callable[[Sequence[float]], Sequence[float]], target_bits: Sequence[float], starts: Sequence[float]
) -> list[float]:
    """The log2 steps at which several falling entropies are within TOLERANCE_BITS below their targets.

    Secant with slope -1 (one bit per doubling of the step), kept inside a bracket by bisection. All are tried in
    lockstep, so that one call rounds all linears of a group.

    Args:
        entropies_at: entropy in bits of each linear's integers at its log2 step; falling up to sampling noise.
        target_bits: not to be exceeded, one per linear.
        starts: first guesses, one per linear.

    Returns:
        The smallest tried log2 steps whose entropies do not exceed the targets; at most 12 tries.
    """
    searches = [_Search(start) for start in starts]
    for _ in range(12):
        entropies = entropies_at([search.log_step for search in searches])
        for search, entropy, target in zip(searches, entropies, target_bits, strict=True):
            search.learn(entropy - target)
        if all(search.is_done for search in searches):
            break
    return [search.log_step if search.below is None else search.below for search in searches]


class _Search:
    """One bracketed secant search of solve_log_steps."""

    def __init__(self, start: float) -> None:
        self.log_step = start
        self.below: float | None = None
        """The smallest step whose entropy was not above the target."""
        self._above: float | None = None
        self.is_done = False

    def learn(self, excess: float) -> None:
        """Take the entropy at `log_step`, less its target, and move on."""
        if self.is_done:
            return
        if excess <= 0:
            self.below = self.log_step if self.below is None else min(self.below, self.log_step)
            self.is_done = excess >= -TOLERANCE_BITS
            if self.is_done:
                return
        else:
            self._above = self.log_step if self._above is None else max(self._above, self.log_step)
        self.log_step += excess + TOLERANCE_BITS / 2
        if self.below is not None and self._above is not None and not self._above < self.log_step < self.below:
            self.log_step = (self._above + self.below) / 2


def _window(curve: RateCurve, target_bits: float) -> tuple[Tensor, Tensor]:
    """The part of a curve around the target, at GRID equal steps of bits: float64 bits and loss."""
    points = sorted(dict(zip(curve.bits, curve.loss, strict=True)).items())
    b = torch.tensor([p[0] for p in points], dtype=torch.float64)
    log_loss = torch.tensor([p[1] for p in points], dtype=torch.float64).clamp_min(1e-30).log()
    fewest = min(max(target_bits - FEWER_BITS, points[0][0]), points[-1][0])
    most = max(min(target_bits + MORE_BITS, points[-1][0]), fewest)
    grid = torch.linspace(fewest, most, GRID, dtype=torch.float64)
    if len(points) == 1:  # all weights equal: one entropy whatever the step
        return grid, log_loss.exp().expand(GRID)
    right = torch.searchsorted(b, grid).clamp(1, len(b) - 1)
    t = (grid - b[right - 1]) / (b[right] - b[right - 1])
    return grid, torch.lerp(log_loss[right - 1], log_loss[right], t).exp()
