"""How the integers of a linear stand to the float weight they were made from, and what rounding itself allows.

Weights are measured in steps: u = W / step, smoothing applied. Integers q made by rounding differ from them by half a step,
by more where errors are compensated, and by what the ends of the grid cut off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from glmq.spec import IntGrid

UNIT_ROUNDOFF: Final = {"F16": 2.0**-11, "BF16": 2.0**-8}
"""By how much of itself a number changes at most when it is rounded to this dtype."""
ROUNDED_FACTORS: Final = 4
"""Numbers of that dtype in which a row or a column may be off: norm, weight_scale, input_scale, deq_scale."""
ROW_DEVIATIONS: Final = 6.0
"""A gain <q, u> / <u, u> of n integers q for weights of u steps is uncertain by r / sqrt(<u, u>), r^2 being the mean of
(q - gain u)^2, as the errors of a row do not know its weights. Normal numbers reach 6 deviations once in 10^9; rows of
everything that quantize writes stay below 4."""
NOISE_SPREAD: Final = 2.0
"""The errors of a vector count up to this many times the root mean square of those of all, lest a foreign vector be
excused by its own. Error compensation moves weight between columns that are alike, so that the errors of a column may be
parallel to it: by Cauchy and Schwarz they change its gain by no more than their share of it."""
FINE_ENOUGH: Final = 0.5
"""Root mean square in steps below which a vector tells nothing: rounding to nearest makes it zeros."""
GAIN_OF_NOISE: Final = 1 / 3
"""Coarse steps, 2 to 4 bits a weight, stretch or shrink a whole linear by a part of (noise / signal), as errors depend on
weights in the second order. Everything that quantize and the vendor's tool write stays below a quarter."""
FARTHEST_DEVIATIONS: Final = 12.0
"""How many times the root mean square error of the other weights of its column a single weight may be off. Rounding
reaches 5, that of int4 groups 6.3."""
FARTHEST_STEPS: Final = 2.0
"""Up to so many steps a single weight is never called wrong."""


@dataclass(frozen=True, slots=True)
class WeightDistance:
    """How integers with their steps stand to the float weight, columns and rows scaled as smoothing did."""

    relative_l2: float
    """||W_q - W|| / ||W||."""
    rms_steps: float
    """Root mean square of W_q - W in steps of its row (and group)."""
    size_steps: float
    """That of W."""
    outlier: tuple[int, int, float, float]
    """The weight that is farthest off, measured by the others of its column: row, column, |W_q - W| in steps beyond what
    the ends of the grid cut off, and what is allowed. Steps are those of its group, or if these are larger the root mean square
    of its row's."""
    row_gain: tuple[int, float, float]
    """The row whose gain <q, u> / <u, u>, q its integers and u its float weights in steps, is farthest from what rounding
    gives, measured by what is allowed: index, gain, allowed distance from 1."""
    column_gain: tuple[int, float, float]
    """The same of the columns."""
    group_gain: tuple[int, float, float] | None
    """The same of the groups of a two-stage linear, counted along the rows; None for others."""
    gain: tuple[float, float]
    """Of the whole linear, and its allowed distance from 1."""
    is_zeroed: bool
    """All integers are 0, and a float weight is a whole step or more."""


class _Gains:
    """How integers q stand to float weights of u steps in some vectors: rows, columns, or all of a linear as one."""

    def __init__(self, vectors: int) -> None:
        self._dot, self._signal, self._square, self._nearest = (
            torch.zeros(vectors, dtype=torch.float64) for _ in range(4)
        )

    def add(self, cut: slice, dot: Tensor, signal: Tensor, square: Tensor, nearest: Tensor) -> None:
        """Sums of q u, u u, q q and round(u) u over one piece, for the vectors in `cut`."""
        self._dot[cut] += dot
        self._signal[cut] += signal
        self._square[cut] += square
        self._nearest[cut] += nearest

    @property
    def signal(self) -> float:
        """Sum of u u over all vectors."""
        return float(self._signal.sum())

    @property
    def square(self) -> float:
        """Sum of q q over all vectors."""
        return float(self._square.sum())

    def worst(
        self, length: int, noise: Callable[[Tensor, Tensor, float], Tensor], floor: float
    ) -> tuple[int, float, float]:
        """Index, gain and allowed distance from 1 of the vector of `length` weights that exceeds what is allowed the most.

        Wide steps shrink or stretch a vector on their own: nearest rounding by a known factor, error compensation by
        something between that and 1, and beside it as the noise allows.

        Args:
            length: weights in each vector.
            noise: what the errors allow: of the root mean squares of q - gain u and of u in each vector, and of the most
                that the former counts.
            floor: what the rounding of the scales allows.
        """
        size = (self._signal / max(1, length)).sqrt()
        alive = size >= FINE_ENOUGH
        if not bool(alive.any()):
            return 0, 1.0, floor
        signal = torch.where(alive, self._signal, 1.0)
        gain = torch.where(alive, self._dot / signal, 1.0)
        nearest = torch.where(alive, self._nearest / signal, 1.0)
        left = ((self._square - gain.square() * signal).clamp_min(0) / max(1, length)).sqrt()
        # What a wrong gain adds to q - u is not in q - gain u, so that many wrong vectors do not excuse each other.
        most = NOISE_SPREAD * float(left[alive].square().mean().sqrt())
        slack = noise(left, torch.where(alive, size, 1.0), most) + floor
        allowed = torch.where(gain < 1, 1 - nearest, nearest - 1).clamp_min(0) + slack
        excess = torch.where(alive, ((gain - 1).abs() / allowed).nan_to_num(math.inf), 0.0)
        index = int(excess.argmax())
        return index, float(gain[index]), float(allowed[index])


class Distance:
    """Sums towards a WeightDistance.

    Args:
        rows, cols: of the linear.
        groups: scales of a row, where groups of columns have their own; else 0.
        grid: the integers.
        dtype: F16 or BF16, what its scales are stored in.
    """

    def __init__(self, rows: int, cols: int, groups: int, grid: IntGrid, dtype: str) -> None:
        self._rows, self._cols, self._all = _Gains(rows), _Gains(cols), _Gains(1)
        self._groups = _Gains(rows * groups) if groups else None
        self._size, self._grid = (rows, cols, groups), grid
        self._floor = ROUNDED_FACTORS * UNIT_ROUNDOFF[dtype]
        self._noise = self._signal = self._square_steps = self._largest_unwritten = 0.0
        self._squares = torch.zeros(cols, dtype=torch.float64)
        self._largest, self._largest_row = torch.zeros(cols), torch.zeros(cols, dtype=torch.int64)

    def add(self, start: int, q: Tensor, wanted: Tensor, steps: Tensor) -> None:
        """Rows from `start` on: integers and float weights, float32 [n, K] each; steps broadcast to them."""
        self._noise += float((q * steps).sub_(wanted).square_().sum())
        self._signal += float(wanted.square().sum())
        in_steps, grid = wanted / steps, self._grid
        nearest = in_steps.round().clamp_(grid.qmin, grid.qmax)
        products = q * in_steps, in_steps.square(), q.square(), nearest.mul_(in_steps)
        self._rows.add(slice(start, start + q.shape[0]), *(product.sum(1) for product in products))
        self._cols.add(slice(None), *(product.sum(0) for product in products))
        self._all.add(slice(None), *(product.sum(dtype=torch.float64) for product in products))
        if self._groups is not None:
            groups = self._size[2]
            cut = slice(start * groups, (start + q.shape[0]) * groups)
            self._groups.add(cut, *(product.reshape(cut.stop - cut.start, -1).sum(1) for product in products))
        self._square_steps += float((q - in_steps).square_().sum())
        if not bool(q.any()):
            self._largest_unwritten = max(self._largest_unwritten, float(in_steps.abs().max()))
        # What the grid cannot reach is no error of a single weight.
        error = (q - in_steps.clamp_(grid.qmin - 0.5, grid.qmax + 0.5)).abs_()
        if steps.shape[1] > 1:  # errors of groups with coarse steps are made up for in those with fine ones
            error *= (steps / steps.square().mean(1, keepdim=True).sqrt()).clamp_max_(1.0)
        self._squares += error.square().sum(0)
        largest, row = error.max(0)
        self._largest_row = torch.where(largest > self._largest, row + start, self._largest_row)
        self._largest = torch.maximum(largest, self._largest)

    def finish(self) -> WeightDistance:
        (rows, cols, groups), floor = self._size, self._floor
        ratio = self._noise / self._signal if self._signal else (0.0 if self._noise == 0 else math.inf)
        rms, size = (math.sqrt(total / max(1, rows * cols)) for total in (self._square_steps, self._all.signal))

        def in_row(left: Tensor, size: Tensor, most: float) -> Tensor:
            return ROW_DEVIATIONS / math.sqrt(cols) * left.clamp_max(most) / size

        def parallel(_: Tensor, size: Tensor, most: float) -> Tensor:
            return most / size

        def in_all(left: Tensor, size: Tensor, most: float) -> Tensor:
            share = left.clamp_max(most) / size
            return ROW_DEVIATIONS / math.sqrt(rows * cols) * share + GAIN_OF_NOISE * share.square()

        _, gain, allowed = self._all.worst(rows * cols, in_all, floor)
        return WeightDistance(
            relative_l2=math.sqrt(ratio),
            rms_steps=rms,
            size_steps=size,
            outlier=self._outlier(),
            row_gain=self._rows.worst(cols, in_row, floor),
            column_gain=self._cols.worst(rows, parallel, floor),
            group_gain=None if self._groups is None else self._groups.worst(cols // groups, parallel, floor),
            gain=(gain, allowed),
            is_zeroed=self._all.square == 0 and self._largest_unwritten >= 1,
        )

    def _outlier(self) -> tuple[int, int, float, float]:
        others = (self._squares - self._largest.double().square()).clamp_min(0) / max(1, self._size[0] - 1)
        allowed = (FARTHEST_DEVIATIONS * others.sqrt()).clamp_min(FARTHEST_STEPS)
        column = int((self._largest / allowed).nan_to_num(math.inf).argmax())
        return int(self._largest_row[column]), column, float(self._largest[column]), float(allowed[column])
