"""Whether statistics have settled: those of one half of the samples against those of all.

For samples drawn alike and independently, half and whole differ as much as the whole differs from what endless samples
would give: with means a and b of the halves, half - whole = (a - b) / 2, whose variance is (v + v) / 4 = v / 2 for the
halves' variance v, and that is the variance of the whole. So the relative difference of a second moment estimates its
own relative error. A maximum has no such rule; how far the range of half the samples falls short says how far twice as
many might widen it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import torch
from torch import Tensor

from glmq.calibration.samples import Sample
from glmq.model.config import FAMILY
from glmq.numerics.moments import InputAccumulator

MAX_RANGE: Final = 0.07
MAX_DIAGONAL: Final = 0.09
MAX_CORRELATION: Final = 0.2
"""Medians over the text inputs above these mean: not settled.

Measured on the embedded model, error of its W8A8S on held-out pictures against calibration with all 16 pictures: 4 pictures
gave 12 % more, with answers 15 %, at medians of 0.09, 0.12, 0.22 (with answers 0.09, 0.10, 0.23); 8 pictures gave 4 % more
in both cases, at 0.05, 0.09, 0.18 (0.05, 0.06, 0.17).
"""
WORST_SITES: Final = 3
ROWS_AT_ONCE: Final = 16
"""Rows of a second moment that are compared at a time."""


@dataclass(frozen=True, slots=True)
class Convergence:
    """How much one input's statistics changed with the second half of the samples; 0 is not at all."""

    range_gap: float
    """Mean over channels of 1 - (max - min of the first half) / (max - min of all)."""
    diagonal: float
    """||d_half - d|| / ||d|| over channels for the mean squares, each channel's divided by the whole's: d = 1."""
    correlation: float | None
    """||M_half - M|| / ||M||, Frobenius, both scaled to the whole's unit diagonal; None without a second moment."""


def convergence_order(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Every other of the user's samples from the first on, then the rest of them, then the texts that come with glmq.

    So the halves are alike even if kinds of samples lie in a row.
    """
    own = [sample for sample in samples if not sample.is_builtin]
    return (*own[0::2], *own[1::2], *(sample for sample in samples if sample.is_builtin))


class Halfway:
    """One input after the first half of the user's samples against the same after all of these.

    The texts that come with glmq come last and do not count: no more of them can be had. With several ranks each keeps the
    extremes of its own samples and its own bands of the second moment; `merge` combines them, with the result of one rank.

    Args:
        accumulator: of the input; asked before it is given the next sample.
        own: the number of the user's samples; fewer than two have no halves.
    """

    def __init__(self, accumulator: InputAccumulator, own: int) -> None:
        self._accumulator = accumulator
        self._ends = ((own + 1) // 2, own) if own > 1 else (0, 0)
        width = accumulator.state()[1].numel()
        self._sums = torch.zeros(2, width, dtype=torch.float64)  # of x^2, of the half and of all
        self._low = torch.full((2, width), torch.inf)
        self._high = torch.full((2, width), -torch.inf)
        self._tokens = [0, 0]
        self._bands: dict[int, Tensor] = {}
        self._products: dict[int, Tensor] | None = None

    def observe(self, index: int, x: Tensor) -> None:
        """Add the input `x`, [T, K], of this rank's sample `index` to the extremes and counts of its half."""
        if index < self._ends[1]:
            low, high = x.amin(0).float().cpu(), x.amax(0).float().cpu()
            for part in range(int(index >= self._ends[0]), 2):
                self._low[part] = torch.minimum(self._low[part], low)
                self._high[part] = torch.maximum(self._high[part], high)
                self._tokens[part] += x.shape[0]

    def accumulate(self, index: int, sums: Tensor | None) -> None:
        """Add the sums of a sample of any rank, just before the accumulator adds them.

        Args:
            index: of the sample.
            sums: float64 [2, K]: sums of x and of x^2 over its tokens; None for a sample that does not reach this input.
        """
        half, end = self._ends
        if index == half < end:
            self._bands = {start: band.clone() for start, band in _bands_of(self._accumulator).items()}
        if index == end:
            self._multiply()
        if sums is not None:
            for part in range(int(index >= half), 2 if index < end else 0):
                self._sums[part] += sums[1]

    def state(self) -> list[Tensor]:
        """This rank's share for `merge`: tokens [2], minima and maxima [2, K], sums of squares [2, K], the first rows of its
        bands [B], and their products [B, 3]."""
        products = self._multiply()
        rows = torch.tensor(list(products), dtype=torch.int64)
        stacked = torch.stack(list(products.values())) if products else torch.zeros(0, 3, dtype=torch.float64)
        return [torch.tensor(self._tokens), self._low, self._high, self._sums, rows, stacked]

    @staticmethod
    def merge(parts: Sequence[Sequence[Tensor]]) -> Convergence | None:
        """The change at the input, from the `state` of every rank; None if either half had no token there."""
        half_tokens, tokens = sum((part[0] for part in parts), torch.zeros(2, dtype=torch.int64)).tolist()
        if not 0 < half_tokens < tokens:
            return None
        low, high = (torch.stack([part[i] for part in parts]) for i in (1, 2))
        half_spread, spread = high.amax(0) - low.amin(0)
        squares = parts[0][3]  # every rank adds up the samples of all
        products = {row: p for part in parts for row, p in zip(part[4].tolist(), part[5], strict=True)}
        moving, alive = spread > 0, squares[1] > 0
        short = 1 - half_spread[moving] / spread[moving]
        ratio = tokens / half_tokens
        change = ratio * squares[0][alive] / squares[1][alive] - 1
        correlation = None
        if products:
            aa, ab, bb = torch.stack([products[row] for row in sorted(products)]).sum(0).tolist()
            correlation = math.sqrt(max(0.0, ratio * ratio * aa - 2 * ratio * ab + bb) / bb) if bb > 0 else 0.0
        return Convergence(
            range_gap=float(short.mean()) if moving.any() else 0.0,
            diagonal=float(change.square().mean().sqrt()) if alive.any() else 0.0,
            correlation=correlation,
        )

    def _multiply(self) -> dict[int, Tensor]:
        """By band: a.a, a.b, b.b of the half's sums a and those of all, b, scaled to the unit diagonal of all."""
        if self._products is None:
            halves, self._bands = self._bands, {}
            scale = self._sums[1].clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
            whole = _bands_of(self._accumulator)
            self._products = {start: _products(half, whole[start], start, scale) for start, half in halves.items()}
        return self._products


def _bands_of(accumulator: InputAccumulator) -> dict[int, Tensor]:
    """This rank's bands of the second moment's sum as they are now, by first row; not copied."""
    starts, _, _, _, _, *bands = accumulator.state()
    return dict(zip(starts.tolist()[1:], bands, strict=True))


def _products(half: Tensor, whole: Tensor, start: int, scale: Tensor) -> Tensor:
    """Products over the rows and columns of the symmetric matrix that a band [rows, K - start] stands for: float64 [3]."""
    rows = half.shape[0]
    total = torch.zeros(3, dtype=torch.float64)
    for first in range(0, rows, ROWS_AT_ONCE):  # a few at a time: no third matrix
        cut = slice(first, min(first + ROWS_AT_ONCE, rows))
        factor = scale[start:][cut, None] * scale[start:]
        a, b = half[cut].double().mul_(factor), whole[cut].double().mul_(factor)
        pairs = ((a, a), (a, b), (b, b))
        # Mirrored; within its first columns the band is square and holds both sides.
        total += torch.stack([2 * (x.flatten() @ y.flatten()) - (x[:, :rows] * y[:, :rows]).sum() for x, y in pairs])
    return total


@dataclass(frozen=True, slots=True)
class Assessment:
    """How far the statistics of all text inputs have settled."""

    inputs: int
    """Text inputs that both halves of the samples reach."""
    typical: Convergence
    """Medians over them."""
    worst: tuple[tuple[str, Convergence], ...]
    """The sites that changed most, against what is allowed; at most WORST_SITES."""
    is_settled: bool


def assess(settled: Mapping[str, Convergence]) -> Assessment | None:
    """Judge the text inputs by their medians; None if there are none, as with a single sample."""
    text = {site: change for site, change in settled.items() if not site.startswith(FAMILY.vision)}
    if not text:
        return None
    correlations = [change.correlation for change in text.values() if change.correlation is not None]
    typical = Convergence(
        median(change.range_gap for change in text.values()),
        median(change.diagonal for change in text.values()),
        median(correlations) if correlations else None,
    )
    worst = sorted(text.items(), key=lambda item: -_against_limits(item[1]))[:WORST_SITES]
    return Assessment(len(text), typical, tuple(worst), _against_limits(typical) <= 1)


def _against_limits(change: Convergence) -> float:
    """The largest change in units of what is allowed."""
    return max(
        change.range_gap / MAX_RANGE, change.diagonal / MAX_DIAGONAL, (change.correlation or 0.0) / MAX_CORRELATION
    )
