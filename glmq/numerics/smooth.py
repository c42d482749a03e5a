"""Column scales that move outlier channels from the inputs into the weights, and their exact fold into the norm.

    y = W x = (W * s) (x / s);   the norm's weight absorbs 1 / s, the weight's columns absorb s.

The scale part of Outlier Suppression+ (Wei et al. 2023, arXiv 2304.09145) and SmoothQuant (Xiao et al. 2022, arXiv
2211.10438) choose s_j from ranges so that int8 activations come out well. Here the weights have fewer bits than the
activations, so both kinds of noise count. With v_j the variance of x_j that a rounding error in column j meets, and
u_j^2 the mean square of column j of the weights:

    weights      step^2 sum_j v_j / s_j^2,     step^2 ~ sum_j s_j^2 u_j^2   (the step follows the scaled weights)
    activations  step^2 sum_j s_j^2 u_j^2,     step^2 ~ max_j x_j^2 / s_j^2 (the step follows the largest scaled input)

Both are products of the same two sums as long as peaks are alike, and by Cauchy-Schwarz the product is least at s_j =
sqrt(sqrt(v_j) / u_j). A coder that sees one histogram asks for the same scales: with log-spreads a_j of the inputs and
b_j of the columns, noise grows by var(a_j - t_j) and entropy by var(b_j + t_j) nats, together least at t_j = (a_j -
b_j) / 2. Where errors are compensated and outweigh those of the activations (4 bits), v_j is the curvature of column j
(hessian.py), else E[x_j^2].

An input without a norm in front may be made by rows of an earlier linear, times other things; then these rows absorb
the scales. They are powers of two, so that the fold is exact whatever dtype rows, biases and activations have.

Where a few tokens have peaks far above the rest, activations need scales that look at the peaks; the search tries them,
and takes them only for a clear gain, since peaks of few calibration tokens are poor guides to other tokens' peaks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from glmq.numerics.affine import TORCH_DTYPE
from glmq.numerics.metrics import count_int8, entropy_bits
from glmq.numerics.moments import InputStats
from glmq.numerics.rate import balanced_steps, coarse_steps
from glmq.numerics.rows import column_energy, column_max, even_rows, is_one_number, row_max
from glmq.spec import Activation, FloatDtype, QuantType, Smoothing, assert_never

SEARCH_ROWS: Final = 512
"""Rows of a linear that the search looks at, evenly spaced: candidates are compared, not measured."""
FLOOR: Final = 1e-3
"""Channels and columns quieter than this share of the root mean square are scaled as if they had it."""
PEAK_SHARES: Final = (0.25, 0.5, 0.75, 1.0)
CLEAR_GAIN: Final = 2 / 3
"""Scales that follow peaks must lower the predicted squared error to this share of what the closed form has, and m2's scales
of an input without a norm to this share of what no scales have."""
STRENGTHS: Final = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""SmoothQuant's alpha."""


@dataclass(frozen=True, slots=True)
class ScaleChoice:
    """Column scales and how they were found."""

    scales: Tensor
    """float32 [K], positive, with geometric mean 1."""
    label: str


def choose_scales(
    kind: Smoothing, stats: InputStats, weights: Sequence[Tensor], variance: Tensor, quant_type: QuantType
) -> ScaleChoice:
    """Choose the column scales of a norm group by predicted output error.

    Args:
        kind: M2 or SMOOTHQUANT.
        stats: of the group's input, unscaled.
        weights: float32 [N_i, K] of the linears that share the input.
        variance: float32 [K]: what a rounding error in column j meets, v_j above.
        quant_type: of the weights.
    """
    spread = _floored(torch.stack([column_energy(w) for w in weights]).sum(0).sqrt())
    typical = _floored(variance.sqrt())
    peak = _floored(torch.maximum(stats.maximum, stats.minimum.neg()))
    rows = [even_rows(w, SEARCH_ROWS) for w in weights]
    predict = _predictor(stats, rows, variance, quant_type)
    if kind is Smoothing.SMOOTHQUANT:
        top = _floored(torch.stack([column_max(w) for w in weights]).amax(0))
        tried = [(_centred(peak**a / top ** (1 - a)), f"smoothquant (strength {a})") for a in STRENGTHS]
        scales, label = min(tried, key=lambda t: predict(t[0]))
        return ScaleChoice(scales, label)
    closed = _centred((typical / spread).sqrt())
    tried = [(_centred((typical ** (1 - p) * peak**p / spread).sqrt()), f"m2 (peaks {p})") for p in PEAK_SHARES]
    scales, label = min(tried, key=lambda t: predict(t[0]))
    if predict(scales) < CLEAR_GAIN * predict(closed):
        return ScaleChoice(scales, label)
    return ScaleChoice(closed, "m2")


def choose_row_scales(
    kind: Smoothing, stats: InputStats, weight: Tensor, quant_type: QuantType, *, run: int, repeats: int
) -> Tensor | None:
    """Choose scales that the rows behind an input can absorb: s_j = sqrt(sqrt(v_j) / u_j) as above, v_j = E[x_j^2].

    Ranges would be poor guides here: these inputs are products, and which channels peak differs from text to text.
    For the same reason no channel is raised: scales are at least 1.

    Args:
        kind: SMOOTHQUANT takes every predicted gain, M2 a clear one: it leaves models without outliers there as they are.
        stats: of the input, unscaled, K channels: runs of `run` channels; `repeats` consecutive runs share their scales.
        weight: float32 [N, K] of the one linear that reads it.
        quant_type: of the weight.

    Returns:
        float32 [K], powers of two; None where they are all 1, or not predicted to lose so much less than that.
    """
    if kind is Smoothing.M2 and is_one_number(weight):
        return None  # scales would take it off the grid
    typical = _floored(_shared_max(stats.square_mean.sqrt(), run, repeats))
    spread = _floored(_shared_max(column_energy(weight).sqrt(), run, repeats))
    exponent = _centred((typical / spread).sqrt()).log2().round().clamp_min(0)
    scales = torch.ldexp(torch.ones_like(exponent), exponent)
    predict = _predictor(stats, [even_rows(weight, SEARCH_ROWS)], stats.square_mean, quant_type)
    share = CLEAR_GAIN if kind is Smoothing.M2 else 1.0
    return scales if predict(scales) < share * predict(torch.ones_like(scales)) else None


def _shared_max(x: Tensor, run: int, repeats: int) -> Tensor:
    """Each channel's largest among those that share its row. [K] -> [K]."""
    runs = x.reshape(-1, repeats, run)  # [K] -> [heads, repeats, run]
    return runs.amax(1, keepdim=True).expand_as(runs).reshape(-1)


def fold_scales(norm_weight: Tensor, scales: Tensor, dtype: FloatDtype) -> tuple[Tensor, Tensor]:
    """Divide a norm's weight by `scales` as far as its storage dtype allows, and say what was really divided by.

    The stored weight is chosen first, new = round_to_dtype(norm / s), then the effective scale norm / new is what the
    columns must be multiplied with, so that norm and columns compose to the original function whatever the rounding
    did.

    Args:
        norm_weight: [K], the float norm's weight, any float dtype.
        scales: float32 [K], positive: wanted.
        dtype: of the stored norm.

    Returns:
        The new norm weight [K] in the storage dtype, and the effective scales, float32 [K], positive. A channel whose
        norm weight is zero keeps scale 1: its input is always zero. Results outside the dtype's normal range are moved
            to its edge.
    """
    half = TORCH_DTYPE[dtype]
    limits = torch.finfo(half)
    original = norm_weight.float()
    magnitude = (original.abs() / scales).clamp(limits.smallest_normal, limits.max)
    new = torch.where(original == 0, 0.0, magnitude.copysign(original)).to(half)
    effective = torch.where(original == 0, 1.0, original / new.float())
    return new, effective


def _predictor(
    stats: InputStats, rows: Sequence[Tensor], variance: Tensor, quant_type: QuantType
) -> Callable[[Tensor], float]:
    """Expected squared output error over squared output, summed over linears, as a function of the scales.

    Sparse types are compared at equal entropy: H bits more are worth a step 2^H times smaller.
    """
    signals = [float((w.square() * stats.square_mean).sum().clamp_min(torch.finfo(torch.float32).tiny)) for w in rows]
    if stats.second_moment is not None:
        signals = [float(((w @ stats.second_moment) * w).sum().clamp_min(s * FLOOR)) for w, s in zip(rows, signals)]

    def predict(scales: Tensor) -> float:
        low, high = (stats.minimum / scales).min().clamp_max(0), (stats.maximum / scales).max().clamp_min(0)
        act_step = _input_step(low, high, quant_type)
        noise = (variance / scales.square()).sum()
        total = 0.0
        for w, signal in zip(rows, signals, strict=True):
            scaled = w * scales
            if quant_type.spec.is_sparse:
                step = coarse_steps(scaled, balanced_steps(scaled), -2.0)
                bits = entropy_bits(count_int8((scaled / step).round_().to(torch.int8)))
                weight_noise = float(step.square().sum() * noise) * 4 ** (bits - 4)  # at 4 bits
            else:
                weight_noise = float((row_max(scaled) / 127).square().sum() * noise)
            total += (weight_noise + float(act_step.square() * scaled.square().sum())) / 12 / signal
        return total

    return predict


def _input_step(low: Tensor, high: Tensor, quant_type: QuantType) -> Tensor:
    """The step between the values that an input in low..high can take; 0 where it stays float. All are scalars."""
    match quant_type.spec.activation:
        case Activation.STATIC:
            step = (high - low) / 255
        case Activation.PER_TOKEN:
            step = torch.maximum(high, -low) / 127
        case Activation.NONE:
            step = torch.zeros(())
        case other:
            assert_never(other)
    return step


def _floored(x: Tensor) -> Tensor:
    """Lift what is below FLOOR times the root mean square; ones where everything is zero. [K] -> [K], positive."""
    rms = x.square().mean().sqrt()
    return x.clamp_min(float(rms) * FLOOR) if rms > 0 else torch.ones_like(x)


def _centred(scales: Tensor) -> Tensor:
    """Divide by the geometric mean: only ratios matter, and the norm's weight should stay where it is."""
    return scales / scales.log().mean().exp()
