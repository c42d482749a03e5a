"""The range that a static int8 activation covers, from calibration statistics and channel scales.

MINMAX covers every value seen. HISTOGRAM minimises the expected squared error that quantizing the input causes in the
output,

    sum over channels j of ||W_j||^2 * E[(x_j - xq_j)^2],

where W_j is a column of the weight: a value inside the range loses step^2 / 12, a value outside loses its distance to
the range. Both ends are searched together over a grid, from the per-channel histograms, after scaling; nothing is
truncated to integers. What is best for the calibration tokens should then be widened by HEADROOM: tokens met later
reach further, and a value that is cut costs far more than the slightly coarser step.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from glmq.numerics.moments import InputStats, bin_centers
from glmq.spec import INT8

CANDIDATES: Final = 129
"""Candidate ends on each side, from the extreme down to zero in equal steps."""
STEPS: Final = INT8.qmax - INT8.qmin
HEADROOM: Final = 1.05
"""How much wider than best for the calibration tokens."""


def minmax_range(stats: InputStats, scales: Tensor | None, shift: Tensor | None = None) -> tuple[float, float]:
    """The smallest and the largest value over all samples and channels, channel j divided by scales[j], less shift[j]."""
    low, high = stats.minimum, stats.maximum
    if scales is not None:
        low, high = low / scales, high / scales
    if shift is not None:
        low, high = low - shift, high - shift
    return float(low.min()), float(high.max())


def scaled_values(stats: InputStats, scales: Tensor | None, shift: Tensor | None = None) -> Tensor:
    """The value that stands for each histogram bin, after scaling and shifting: float32 [K, BINS].

    A bin's centre, moved inside the channel's true extremes, so that no bin lies outside what was seen.
    """
    centers = bin_centers(stats.exponent)
    values = torch.minimum(torch.maximum(centers, stats.minimum[:, None]), stats.maximum[:, None])
    scaled = values if scales is None else values / scales[:, None]
    return scaled if shift is None else scaled - shift[:, None]


def histogram_range(
    stats: InputStats, scales: Tensor | None, column_energy: Tensor, shift: Tensor | None = None
) -> tuple[float, float]:
    """The range with the least expected output error over the calibration tokens.

    Args:
        stats: of the unscaled input.
        scales: float32 [K], the input of channel j is divided by scales[j]; None for ones.
        column_energy: float32 [K]: squared norm of column j of all linears that read the input, after scaling.
        shift: float32 [K], taken off the scaled input; None for zeros.

    Returns:
        low <= 0 <= high.
    """
    low, high = minmax_range(stats, scales, shift)
    low, high = min(low, 0.0), max(high, 0.0)
    values = scaled_values(stats, scales, shift).double().reshape(-1)
    weights = (stats.histogram.double() * column_energy.double()[:, None]).reshape(-1)
    filled = weights > 0  # most bins are empty
    values, weights = values[filled], weights[filled]
    share = torch.linspace(1.0, 0.0, CANDIDATES, dtype=torch.float64)
    highs, lows = share * high, share * low
    loss_high = _overshoot(values, weights, highs)
    loss_low = _overshoot(-values, weights, -lows)
    rounding = weights.sum() * ((highs[None, :] - lows[:, None]) / STEPS).square() / 12
    loss = rounding + loss_high[None, :] + loss_low[:, None]  # [low candidate, high candidate]
    best = int(loss.argmin())
    return float(lows[best // CANDIDATES]), float(highs[best % CANDIDATES])


def clipped_share(
    stats: InputStats, scales: Tensor | None, low: float, high: float, shift: Tensor | None = None
) -> float:
    """Share of the calibration values outside low..high, after scaling and shifting, as far as the histogram resolves it."""
    values = scaled_values(stats, scales, shift)
    outside = stats.histogram[(values < low) | (values > high)].sum().item()
    return outside / max(1, stats.histogram.sum().item())


def _overshoot(values: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """sum of weight * (value - end)^2 over the values beyond each end, in one pass over the sorted values.

    values, weights float64 [M]; ends float64 [C], each >= 0. Returns float64 [C].
    """
    order = values.argsort()
    v, w = values[order], weights[order]
    tail = [torch.cat([x.flip(0).cumsum(0).flip(0), x.new_zeros(1)]) for x in (w, w * v, w * v * v)]
    first = torch.searchsorted(v, ends, right=True)
    mass, moment, square = (t[first] for t in tail)
    return (square - 2 * ends * moment + ends.square() * mass).clamp_min(0.0)
