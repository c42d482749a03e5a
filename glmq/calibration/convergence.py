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
MAX_CORRELATION: Final = 0.2
MAX_DIAGONAL: Final = 0.09
"""Medians over the text inputs above these mean that twice as many samples could change a result noticeably: bring the output
error of sparse weights down by more than a tenth. Mean squares count where an input has no second moment; where it has one they
are its diagonal, and rounding uses the whole.

Measured by 46 calibrations on 2 to 18 samples, drawn at random, against twice as many (of 12 and 18 samples against all 16 or
24, scaled), by the output error on held-out pictures of W8A8S: the embedded model on photographs and on drawn pictures with
answers, a random one of width 1024 on photographs. All 14 that gained more than a tenth lay above a limit, and the 4 within
gained 6 to 10 %. Above are also 28 that gained less: the limits warn too often rather than too seldom. Mean squares beside
correlations told nothing: at 6 % and at 17 % the gain was 10 % and 7 %. W8A8 gained at most 6 % in any of the 46, 1.9 % in the
mean, so dense 8-bit weights are judged by the ranges alone, of which static scales are made.
"""
FEWEST_SAMPLES: Final = 16
"""That show whether sparse weights have enough, the 8 texts that come with glmq among them: of fewer, the halves are alike by
chance. Three sets of 6 photographs each had correlations of 0.13 to 0.35, and gained 6 to 20 %."""
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

    def observe(self, index: int) -> None:
        """Add this rank's sample `index`, which the accumulator has observed last, to the extremes and counts of its half."""
        if index < self._ends[1]:
            seen = self._accumulator.latest
            assert seen is not None
            for part in range(int(index >= self._ends[0]), 2):
                self._low[part] = torch.minimum(self._low[part], seen.low)
                self._high[part] = torch.maximum(self._high[part], seen.high)
                self._tokens[part] += seen.tokens

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
    has_settled_ranges: bool
    """Enough for dense 8-bit weights."""
    is_settled: bool
    """Enough for sparse and 4-bit weights too."""

    def suffices(self, *, is_dense: bool) -> bool:
        """Whether more samples would hardly change the result: of dense 8-bit weights, or of any."""
        return self.is_settled or (is_dense and self.has_settled_ranges)

    @property
    def in_words(self) -> str:
        """Which results more samples would hardly change."""
        if self.is_settled:
            return "settled"
        return "settled for dense 8-bit weights" if self.has_settled_ranges else "not settled"


def assess(settled: Mapping[str, Convergence], *, samples: int) -> Assessment | None:
    """Judge the text inputs by their medians.

    Args:
        settled: how much each input changed.
        samples: of the calibration, the texts that come with glmq included.

    Returns:
        None if there are no such inputs, as with a single sample.
    """
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
    return Assessment(
        len(text),
        typical,
        tuple(worst),
        has_settled_ranges=typical.range_gap <= MAX_RANGE,
        is_settled=samples >= FEWEST_SAMPLES and _against_limits(typical) <= 1,
    )


def _against_limits(change: Convergence) -> float:
    """The larger change in units of what is allowed."""
    squares = change.diagonal / MAX_DIAGONAL if change.correlation is None else change.correlation / MAX_CORRELATION
    return max(change.range_gap / MAX_RANGE, squares)
