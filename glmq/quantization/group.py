"""What the linears of one input share: their scheme, channel scales, activation range, and factor for compensation.

Pure on tensors: the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from glmq.numerics import affine, ranges
from glmq.numerics.drift import Drift
from glmq.numerics.hessian import Factor, Order, factor_inputs, order_inputs
from glmq.numerics.int8_linear import quantize_input
from glmq.numerics.moments import InputStats
from glmq.numerics.rows import column_energy
from glmq.numerics.smooth import choose_scales, fold_scales
from glmq.records import ActivationQParams
from glmq.spec import Activation, ActRange, FloatDtype, Method, Smoothing, WeightScheme, assert_never

MIN_MAX: Final = "min-max"
HISTOGRAM: Final = "histogram"


@dataclass(frozen=True, slots=True)
class FloatLinear:
    """One linear as the float checkpoint has it."""

    name: str
    weight: Tensor
    """float32 [N, K]."""
    bias: Tensor | None
    """float32 [N], or None."""
    divisor: Tensor | None = None
    """float32 [N, 1], powers of two: the smoothing scales of a later input whose channels these rows make (fold.py).

    Only the stored tensors are divided by it. Choices and measurements use the undivided rows: their magnitudes say how much
    each row counts.
    """
    sensitivity: Tensor | None = None
    """float32 [N]: what a squared error in each row's output counts for the answer (sensitivity.py); None: all alike, and bits
    are dealt out by relative errors."""

    def divided(self, rows: Tensor) -> Tensor:
        """`rows`, [N, ...], each divided by its divisor."""
        return rows if self.divisor is None else rows / self.divisor.reshape(-1, *[1] * (rows.dim() - 1))


@dataclass(frozen=True, slots=True)
class GroupScheme:
    """How the linears of one input are quantized."""

    weight: WeightScheme
    smoothing: Smoothing
    act_range: ActRange
    bias_correction: bool
    channel_shift: bool = False
    """The norm in front takes the middle of each channel's range off the input; static activations only."""


@dataclass(frozen=True, slots=True)
class RowFold:
    """Smoothing of an input without a norm: rows of an earlier linear are divided by the scales of the channels they make."""

    scales: Tensor | None
    """float32 [K], by input channel; None: the input is not smoothed."""
    label: str
    """For the report: how the scales were found, or why there are none."""


NO_FOLD: Final = RowFold(None, "none")


@dataclass(frozen=True, slots=True)
class PreparedGroup:
    """What the linears of a group share: all that is chosen before any weight is rounded."""

    norm_weight: Tensor | None
    """[K] in the storage dtype, divided by the scales; None where the group has no norm."""
    scales: Tensor | None
    """float32 [K]: the input channels are divided by these, the weights' columns multiplied; None without smoothing."""
    label: str
    """How the scales were found, for the report."""
    activation: ActivationQParams | None
    """Of types with a stored activation range."""
    input_range: str
    """How the activation's range was chosen; empty without one."""
    order: Order | None
    """In which order the columns are rounded; None: no compensation asked for, or no second moment to do it with."""
    clipped_share: float
    """Share of the calibration values that round to an end of the activation's range; 0 without one."""
    shift: Tensor | None
    """float32 [K]: what is taken off the scaled input by the norm's bias; None: nothing."""
    drift: Drift | None = None
    """What linears that are integers already have done to the input, which rounding makes up for; None: nothing is known."""

    @property
    def shift_in_steps(self) -> Tensor | None:
        """float64 [K]: the same in steps of the activation, which there must be. quant_bias sums thousands of them."""
        assert self.activation is not None
        return None if self.shift is None else self.shift.double() / self.activation.scale


def prepare_group(
    linears: Sequence[FloatLinear],
    stats: InputStats,
    scheme: GroupScheme,
    norm_weight: Tensor | None,
    dtype: FloatDtype,
    fold: RowFold,
) -> PreparedGroup:
    """Choose the channel scales, the activation's range, and the order of rounding if errors are compensated.

    Args:
        linears: one or more, all [N_i, K].
        stats: calibration statistics of their input, [K].
        scheme: how they are quantized.
        norm_weight: [K], of the RMSNorm in front, or None.
        dtype: of the checkpoint to be written.
        fold: of a group without a norm.

    Raises:
        StatisticsError: a second moment that is not positive definite.
    """
    order = order_inputs(stats) if scheme.weight.method is Method.COMPENSATED else None
    shift: Tensor | None = None
    seen = stats
    is_static = scheme.weight.quant_type.spec.activation is Activation.STATIC
    if scheme.channel_shift and norm_weight is not None and is_static:
        shift = (stats.minimum + stats.maximum) / 2
        seen = replace(stats, minimum=stats.minimum - shift, maximum=stats.maximum - shift)
    smoothed = _smooth(linears, seen, scheme, norm_weight, dtype, order, fold)
    scales = smoothed.scales
    if shift is not None:  # as the engine has it, which computes norms in the run dtype
        shift = (shift if scales is None else shift / scales).to(affine.TORCH_DTYPE[dtype]).float()
    activation: ActivationQParams | None
    match scheme.weight.quant_type.spec.activation:
        case Activation.STATIC:
            weights = [linear.weight for linear in linears]
            activation, input_range = _activation(weights, stats, scheme, scales, shift, dtype)
            low, high = affine.covered_range(activation)
            reach = activation.scale / 2  # a value half a step outside still rounds to the last integer
            clipped = ranges.clipped_share(stats, scales, low - reach, high + reach, shift)
        case Activation.PER_TOKEN | Activation.NONE:
            activation, input_range, clipped = None, "", 0.0
        case other:
            assert_never(other)
    label = smoothed.label if shift is None else f"{smoothed.label}, shifted"
    return PreparedGroup(
        norm_weight=smoothed.norm_weight,
        scales=scales,
        label=label,
        activation=activation,
        input_range=input_range,
        order=order if order is None or scales is None else order.scaled(1 / scales),
        clipped_share=clipped,
        shift=shift,
    )


def factor_group(stats: InputStats, group: PreparedGroup) -> Factor | None:
    """The factor of the input whose channels are divided by the scales; None where errors are not compensated.

    Raises:
        StatisticsError: a second moment that is not positive definite.
    """
    if group.order is None:
        return None
    factor = factor_inputs(stats if group.drift is None else group.drift.applied(stats), group.order)
    return factor if group.scales is None else factor.scaled(1 / group.scales)


@dataclass(frozen=True, slots=True)
class _Smoothed:
    """Channel scales and the norm that was divided by them; fields as in PreparedGroup."""

    norm_weight: Tensor | None
    scales: Tensor | None
    label: str


def _smooth(
    linears: Sequence[FloatLinear],
    stats: InputStats,
    scheme: GroupScheme,
    norm_weight: Tensor | None,
    dtype: FloatDtype,
    order: Order | None,
    fold: RowFold,
) -> _Smoothed:
    """Choose the channel scales and fold them into the norm, if there is one and smoothing is on."""
    if norm_weight is None:
        return _Smoothed(None, fold.scales, fold.label)
    if scheme.smoothing is Smoothing.NONE:
        return _Smoothed(norm_weight.to(affine.TORCH_DTYPE[dtype]), None, "none")
    # With 8-bit weights the noise of the activations counts as much, and that cannot be compensated.
    few_bits = scheme.weight.quant_type.spec.weight_bits < 8
    variance = stats.square_mean if order is None or not few_bits else order.by_column()
    weights = [linear.weight for linear in linears]
    choice = choose_scales(scheme.smoothing, stats, weights, variance, scheme.weight.quant_type)
    new_norm, scales = fold_scales(norm_weight, choice.scales, dtype)
    label = f"{choice.label}, {float(scales.min()):.2g} to {float(scales.max()):.2g}"
    return _Smoothed(new_norm, scales, label)


def _activation(
    weights: Sequence[Tensor],
    stats: InputStats,
    scheme: GroupScheme,
    scales: Tensor | None,
    shift: Tensor | None,
    dtype: FloatDtype,
) -> tuple[ActivationQParams, str]:
    """The activation scale and offset that all linears of the group share, and how the range was chosen (for the report)."""
    extremes = affine.activation_qparams(*ranges.minmax_range(stats, scales, shift), dtype=dtype)
    if scheme.act_range is ActRange.MINMAX:
        return extremes, MIN_MAX
    energy = torch.stack([column_energy(w) for w in weights]).sum(0)
    scaled_energy = energy if scales is None else energy * scales.square()
    low, high = ranges.histogram_range(stats, scales, scaled_energy, shift)
    if scheme.act_range is ActRange.MIXED:
        sample = moved_input(stats.sample, scales, shift)
        optimal = affine.activation_qparams(low, high, dtype=dtype)
        if _input_loss(sample, extremes, weights, scales) < _input_loss(sample, optimal, weights, scales):
            return extremes, MIN_MAX
    return affine.steady_qparams(ranges.HEADROOM * low, ranges.HEADROOM * high, dtype=dtype), HISTOGRAM


def moved_input(x: Tensor, scales: Tensor | None, shift: Tensor | None) -> Tensor:
    """What the norm gives instead of x, [T, K]: x / scales - shift."""
    scaled = x if scales is None else x / scales
    return scaled if shift is None else scaled - shift


def _input_loss(sample: Tensor, params: ActivationQParams, weights: Sequence[Tensor], scales: Tensor | None) -> float:
    """Squared output error on the token sample that quantizing only the input causes."""
    error = (quantize_input(sample, params).float() - params.offset) * params.scale - sample
    unscaled = error if scales is None else error * scales
    return sum(float((unscaled @ w.T).square().sum()) for w in weights)
