"""Column scales that move outlier channels from the activations into the weights, and their exact fold into the norm in front.

    y = W x = (W * s) (x / s);   the norm's weight absorbs 1 / s, the weight's columns absorb s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from glmq.numerics.affine import TORCH_DTYPE, quantize_weight
from glmq.numerics.lowbit import grid_of, safe_steps
from glmq.numerics.metrics import count_int8, entropy_bits
from glmq.numerics.moments import InputStats
from glmq.spec import FloatDtype, QuantType, WeightScheme

SEARCH_ROWS: Final = 512
"""Rows of a linear that the search looks at, evenly spaced: candidates are compared, not measured."""
THRESHOLDS: Final = 24
EXPONENTS: Final = (0.25, 0.5, 0.75)
SMALLEST: Final = 1e-8


@dataclass(frozen=True, slots=True)
class ScaleChoice:
    """Column scales and how they were found."""

    scales: Tensor
    """float32 [K], positive."""
    label: str


def search_rows(weight: Tensor) -> Tensor:
    """At most SEARCH_ROWS evenly spaced rows of a weight. [N, K] -> [<= SEARCH_ROWS, K]."""
    return weight[torch.linspace(0, weight.shape[0] - 1, min(SEARCH_ROWS, weight.shape[0])).round().long()]


def choose_m2_scales(stats: InputStats, weights: Sequence[Tensor], scheme: WeightScheme) -> ScaleChoice:
    """Search s_j = h_j^a / w_j^(1-a) for channels with h_j above a threshold, else 1, by predicted output error.

    h_j is half the range of input channel j and w_j the largest weight of its columns. Follows Outlier Suppression+
    (Wei et al. 2023, arXiv 2304.09145), the scale part only, with all samples and the quantized group's own error as the objective.

    Args:
        stats: of the group's input, unscaled.
        weights: float32 [N_i, K] of the linears that share the input.
        scheme: how the weights will be quantized.
    """
    rows = [search_rows(w) for w in weights]
    half_range = ((stats.maximum - stats.minimum) / 2).clamp_min(SMALLEST)
    top = torch.stack([w.abs().amax(0) for w in weights]).amax(0).clamp_min(SMALLEST)
    ordered = half_range.sort(descending=True).values
    picks = torch.linspace(0, 1, THRESHOLDS).pow(2).mul(ordered.numel() - 1).round().long().unique()
    best = ScaleChoice(torch.ones_like(top), "none")
    least = predicted_error(stats, rows, best.scales, scheme)
    for index in picks.tolist():
        threshold = float(ordered[index])
        for exponent in EXPONENTS:
            wanted = half_range**exponent / top ** (1 - exponent)
            chosen = half_range >= threshold
            scales = torch.where(chosen, wanted, 1.0)
            error = predicted_error(stats, rows, scales, scheme)
            if error < least:
                least = error
                label = f"m2 (threshold {threshold:.3g}, exponent {exponent}, {index + 1} channels)"
                best = ScaleChoice(scales, label)
    return best


def predicted_error(stats: InputStats, rows: Sequence[Tensor], scales: Tensor, scheme: WeightScheme) -> float:
    """Expected squared output error over squared output, summed over linears, for nearest rounding at equal bits per weight.

    Weights lose step^2 / 12 * sum_j E[x_j^2] / s_j^2 per row, activations step^2 / 12 * sum_j s_j^2 W_j^2. Sparse types are
    compared at equal entropy: an entropy of H bits more is worth a step 2^H times smaller.
    """
    low, high = (stats.minimum / scales).min().clamp_max(0), (stats.maximum / scales).max().clamp_min(0)
    static = scheme.quant_type.is_static
    act_step = (high - low) / 255 if static else torch.maximum(high, -low) / 127
    noise = (stats.square_mean / scales.square()).sum()
    total = 0.0
    for w in rows:
        scaled = w * scales
        signal = float((w.square() * stats.square_mean).sum()) if stats.second_moment is None else float(
            ((w @ stats.second_moment) * w).sum()
        )
        step = safe_steps(scaled, scheme)
        weight_loss = float(step.square().sum() * noise) / 12
        if scheme.quant_type is QuantType.W8A8S:
            weight_loss *= 4 ** entropy_bits(count_int8(quantize_weight(scaled, step, grid_of(scheme))))
            weight_loss /= 4**4
        act_loss = float(act_step.square() * scaled.square().sum()) / 12
        total += (weight_loss + act_loss) / max(signal, math.ulp(0.0))
    return total


def fold_scales(norm_weight: Tensor, scales: Tensor, dtype: FloatDtype) -> tuple[Tensor, Tensor]:
    """Divide a norm's weight by `scales` as far as its storage dtype allows, and say what was really divided by.

    The stored weight is chosen first, new = round_to_dtype(norm / s), then the effective scale norm / new is what the columns
    must be multiplied with, so that norm and columns compose to the original function whatever the rounding did.

    Args:
        norm_weight: [K], the float norm's weight, any float dtype.
        scales: float32 [K], positive: wanted.
        dtype: of the stored norm.

    Returns:
        The new norm weight [K] in the storage dtype, and the effective scales, float32 [K], positive. A channel whose
        norm weight is zero keeps scale 1: its input is always zero. Results outside the dtype's normal range are moved to its edge.
    """
    half = TORCH_DTYPE[dtype]
    limits = torch.finfo(half)
    original = norm_weight.float()
    magnitude = (original.abs() / scales).clamp(limits.smallest_normal, limits.max)
    new = torch.where(original == 0, 0.0, magnitude.copysign(original)).to(half)
    effective = torch.where(original == 0, 1.0, original / new.float())
    return new, effective
