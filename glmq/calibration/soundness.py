"""What must hold between the fields of InputStats, whoever wrote them: found without a checksum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from glmq.numerics.moments import BINS, InputStats, exponents_of

ROUNDOFF: Final = 2.0**-24
"""Of float32."""
TINY: Final = 1e-37
"""Squares below this are denormal or zero in float32, which rounds them far more coarsely."""
CHUNK_ROWS: Final = 512
"""Rows of a second moment that are looked at together."""


def find_defect(stats: InputStats) -> str | None:
    """The first thing that is impossible in the statistics of an input, as the end of a sentence; None if they are sound.

    Mean, square and second moment come rounded to float32, from sums in float64 (the second moment's: in float32), so
    they are compared with that slack; everything else is exact.
    """
    return next(_defects(stats), None)


def _defects(stats: InputStats) -> Iterator[str]:
    low, high, mean, square = stats.minimum, stats.maximum, stats.mean, stats.square_mean
    for name, tensor in (("minimum", low), ("maximum", high), ("mean", mean), ("square_mean", square)):
        if not torch.isfinite(tensor).all():
            yield f"its {name} holds NaN or infinity"
            return
    reach = torch.maximum(low.abs(), high.abs())
    slack = 16 * ROUNDOFF * reach
    if (low > high).any():
        yield "its minimum is above its maximum"
    if ((mean < low - slack) | (mean > high + slack)).any():
        yield "its mean lies outside its minimum and maximum"
    if not torch.equal(stats.exponent.to(torch.int32), exponents_of(reach)):
        yield "its exponents do not fit its extremes"
        return
    # In float64, where neither a square nor a power of two ends.
    wide, least, most = square.double(), mean.double().square(), reach.double().square()
    if (wide * (1 + 64 * ROUNDOFF) + TINY < least).any():
        yield "its mean of squares is below the square of its mean"
    if (wide > most * (1 + 64 * ROUNDOFF) + TINY).any():
        yield "its mean of squares is above the square of its extremes"
    if stats.sensitivity is not None and not ((stats.sensitivity >= 0) & stats.sensitivity.isfinite()).all():
        yield "its sensitivity holds NaN, infinity or a number below 0"
    yield from _histogram_defects(stats)
    yield from _sample_defects(stats)
    if stats.second_moment is not None:
        yield from _moment_defects(stats.second_moment, wide, stats.tokens)


def _histogram_defects(stats: InputStats) -> Iterator[str]:
    counts = stats.histogram
    if (counts < 0).any() or (counts.sum(1, dtype=torch.int64) != stats.tokens).any():
        yield f"its histogram does not count its {stats.tokens} tokens"
        return
    filled = (counts > 0).to(torch.uint8)
    first, last = filled.argmax(1), BINS - 1 - filled.flip(1).argmax(1)
    if (first != _bins(stats.minimum, stats.exponent)).any() or (last != _bins(stats.maximum, stats.exponent)).any():
        yield "its histogram does not end at its extremes"


def _bins(values: Tensor, exponent: Tensor) -> Tensor:
    """The bin of one value of each channel: int64 [K]."""
    scaled = torch.ldexp(values.double(), 7 - exponent.to(torch.int32))
    return scaled.floor().long() + BINS // 2


def _sample_defects(stats: InputStats) -> Iterator[str]:
    sample = stats.sample
    if not 1 <= sample.shape[0] <= stats.tokens:
        yield f"it keeps {sample.shape[0]} of {stats.tokens} tokens"
    elif not ((sample.amin(0) >= stats.minimum) & (sample.amax(0) <= stats.maximum)).all():
        yield "a token that it keeps lies outside its minimum and maximum"


def _moment_defects(moment: Tensor, square: Tensor, tokens: int) -> Iterator[str]:
    """A sum of n products in float32, in any order, is off by at most n roundoffs of the sum of their magnitudes.

    That sum is at most the root of the product of both sums of squares (Cauchy and Schwarz), as the sum itself is.
    """
    slack = 2 * (tokens + 8) * ROUNDOFF
    diagonal = moment.diagonal().double()
    if not ((diagonal - square).abs() <= slack * square + TINY).all():
        yield "the diagonal of its second moment is not its mean of squares"
        return
    root = square.sqrt().float()
    for start in range(0, len(root), CHUNK_ROWS):
        bound = root[start : start + CHUNK_ROWS, None] * (root[start:] * (1 + slack)) + TINY
        if not (moment[start : start + CHUNK_ROWS, start:].abs() <= bound).all():  # it is symmetric
            yield "its second moment is not one of numbers"
            return
