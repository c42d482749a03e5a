"""One norm group, the linears that read the same input: smooth, choose the range, round, fold the biases, report.

Pure on tensors: the same inputs give the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from glmq.numerics import affine, lowbit, metrics, ranges
from glmq.numerics.budget import rule_bits
from glmq.numerics.hessian import Factor, factor_inputs
from glmq.numerics.int8_linear import fold_bias, quantize_input, run_linear
from glmq.numerics.lowbit import row_chunks
from glmq.numerics.moments import InputStats
from glmq.numerics.rate import CURVE_ROWS, INT8_BITS, RateCurve, even_rows, mean_rule_bits, rate_curve, solve_bits
from glmq.numerics.smooth import choose_scales, fold_scales
from glmq.numerics.w4a8 import expand_steps
from glmq.progress import Stopwatch
from glmq.quantization.methods import METHODS, Integers, WeightJob, spend_bits
from glmq.records import ActivationQParams, LinearReport, QuantizedLinear, StageTime
from glmq.spec import INT4, INT8, Activation, ActRange, FloatDtype, Method, Smoothing, WeightScheme, assert_never

MIN_MAX: Final = "min-max"
HISTOGRAM: Final = "histogram"
LARGEST_BIAS = float(2**30)
"""A bias folds into at most 2^30 output steps; the integer sums need the rest of int32."""


@dataclass(frozen=True, slots=True)
class FloatLinear:
    """One linear as the float checkpoint has it."""

    name: str
    weight: Tensor
    """float32 [N, K]."""
    bias: Tensor | None
    """float32 [N], or None."""
    divisor: Tensor | None = None
    """float32 [N, 1], powers of two: what its rows absorb for a later input. Only the stored tensors are divided by it; all
    choices and numbers are of the undivided rows, which say how much each of them counts."""

    def divided(self, rows: Tensor) -> Tensor:
        """[N, ...] by row."""
        return rows if self.divisor is None else rows / self.divisor.reshape(-1, *[1] * (rows.dim() - 1))


@dataclass(frozen=True, slots=True)
class GroupScheme:
    """How the linears of one input are quantized."""

    weight: WeightScheme
    smoothing: Smoothing
    act_range: ActRange
    bias_correction: bool


@dataclass(frozen=True, slots=True)
class RowFold:
    """What rows of an earlier linear absorb for a group without a norm."""

    scales: Tensor | None
    """float32 [K]: what the input channels come out divided by; None: nothing is folded."""
    label: str
    """For the report: how the scales were found, or why there are none."""


NO_FOLD: Final = RowFold(None, "none")


@dataclass(frozen=True, slots=True)
class GroupResult:
    """The quantized linears of one group, and the norm that now goes in front of them."""

    linears: list[QuantizedLinear]
    reports: list[LinearReport]
    norm_weight: Tensor | None
    """[K] in the storage dtype; None where the group has no norm."""
    scales: Tensor | None
    """float32 [K]: what the input channels were divided by; None where nothing was scaled."""
    stages: tuple[StageTime, ...]
    """Smoothing, rounding, report."""


def quantize_group(
    linears: Sequence[FloatLinear],
    stats: InputStats,
    scheme: GroupScheme,
    *,
    norm_weight: Tensor | None,
    dtype: FloatDtype,
    fold: RowFold = NO_FOLD,
    bits: Sequence[float] | None = None,
) -> GroupResult:
    """Quantize the linears that share one input.

    Args:
        linears: one or more, all [N_i, K].
        stats: calibration statistics of their input, [K].
        scheme: how.
        norm_weight: [K], the RMSNorm in front, which absorbs channel scales; None: `fold` says what else does.
        dtype: of the checkpoint to be written.
        fold: of a group without a norm (o_proj, down_proj).
        bits: entropy that each linear may have, bits per weight; for sparse types from `solve_bits` over the whole
            model. None: plain and reference methods and other types follow the scheme's step rule, the compensated
            method divides what the rule spends on this group.

    Raises:
        StatisticsError: a second moment that is not positive definite.
    """
    started = time.perf_counter()
    clock = Stopwatch()
    with clock.stage("smoothing"):
        group = _prepare(linears, stats, scheme, norm_weight, dtype, fold)
    is_sparse = scheme.weight.quant_type.spec.is_sparse
    if bits is None and is_sparse and scheme.weight.method is Method.COMPENSATED:
        with clock.stage("rate"):
            curves = _curves(linears, stats, scheme, group)
            bits = solve_bits(curves, mean_rule_bits(curves))
    quantized, reports = [], []
    method = (
        Method.PLAIN if scheme.weight.method is Method.COMPENSATED and group.factor is None else scheme.weight.method
    )
    weights = [linear.weight if group.scales is None else linear.weight * group.scales for linear in linears]
    with clock.stage("rounding"):
        if bits is None or not is_sparse:
            jobs = [
                WeightJob(linear.divided(weight), scheme.weight, dtype, group.factor, limit)
                for linear, weight, limit in zip(linears, weights, bits or [INT8_BITS] * len(linears), strict=True)
            ]
            rounded = [METHODS[method](job) for job in jobs]
        else:
            spent = spend_bits(weights, bits, group.factor)
            rounded = [Integers(i.q, linear.divided(i.step)) for linear, i in zip(linears, spent, strict=True)]
    if group.factor is not None:
        clock.count("rounding", flops=sum(weight.numel() * weight.shape[1] for weight in weights))
    for linear, weight, integers in zip(linears, weights, rounded, strict=True):
        with clock.stage("rounding"):
            result = _assemble(linear, linear.divided(weight), integers, stats, scheme, group)
        quantized.append(result)
        seconds, started = time.perf_counter() - started, time.perf_counter()
        with clock.stage("report"):
            reports.append(_report(linear, weight, result, stats, scheme, group, method, seconds))
        clock.count("report", flops=4 * stats.sample.shape[0] * weight.numel())
    return GroupResult(quantized, reports, group.norm_weight, group.scales, clock.take())


def rate_curves(
    linears: Sequence[FloatLinear],
    stats: InputStats,
    scheme: GroupScheme,
    *,
    norm_weight: Tensor | None,
    dtype: FloatDtype,
    fold: RowFold = NO_FOLD,
) -> list[RateCurve]:
    """What each linear of a group loses at how many bits, and how many bits the flags' rule would spend.

    The first pass over a sparse model: give the curves of all groups to `solve_bits`. Arguments as for `quantize_group`.
    """
    return _curves(linears, stats, scheme, _prepare(linears, stats, scheme, norm_weight, dtype, fold))


@dataclass(frozen=True, slots=True)
class _Smoothed:
    """A group's channel scales, folded into what is in front of it."""

    norm_weight: Tensor | None
    scales: Tensor | None
    label: str


@dataclass(frozen=True, slots=True)
class _Group:
    """What the linears of a group share."""

    norm_weight: Tensor | None
    scales: Tensor | None
    label: str
    activation: ActivationQParams | None
    input_range: str
    """How the activation's range was chosen; empty without one."""
    factor: Factor | None
    """None: no compensation asked for, or no second moment to do it with."""


def _prepare(
    linears: Sequence[FloatLinear],
    stats: InputStats,
    scheme: GroupScheme,
    norm_weight: Tensor | None,
    dtype: FloatDtype,
    fold: RowFold,
) -> _Group:
    found = factor_inputs(stats) if scheme.weight.method is Method.COMPENSATED else None
    smoothed = _smooth(linears, stats, scheme, norm_weight, dtype, found, fold)
    scales = smoothed.scales
    activation: ActivationQParams | None
    match scheme.weight.quant_type.spec.activation:
        case Activation.STATIC:
            weights = [linear.weight for linear in linears]
            activation, input_range = _activation(weights, stats, scheme, scales, dtype)
        case Activation.PER_TOKEN | Activation.NONE:
            activation, input_range = None, ""
        case other:
            assert_never(other)
    if found is not None and scales is not None:
        found = found.scaled(1 / scales)
    return _Group(smoothed.norm_weight, scales, smoothed.label, activation, input_range, found)


def _smooth(
    linears: Sequence[FloatLinear],
    stats: InputStats,
    scheme: GroupScheme,
    norm_weight: Tensor | None,
    dtype: FloatDtype,
    factor: Factor | None,
    fold: RowFold,
) -> _Smoothed:
    """Choose the channel scales and fold them into the norm, if there is one and smoothing is on."""
    if norm_weight is None:
        return _Smoothed(None, fold.scales, fold.label)
    if scheme.smoothing is Smoothing.NONE:
        return _Smoothed(norm_weight.to(affine.TORCH_DTYPE[dtype]), None, "none")
    # With 8-bit weights the noise of the activations counts as much, and that cannot be compensated.
    few_bits = scheme.weight.quant_type.spec.weight_bits < 8
    variance = stats.square_mean if factor is None or not few_bits else factor.by_column()
    weights = [linear.weight for linear in linears]
    choice = choose_scales(scheme.smoothing, stats, weights, variance, scheme.weight.quant_type)
    new_norm, scales = fold_scales(norm_weight, choice.scales, dtype)
    label = f"{choice.label}, {float(scales.min()):.2g} to {float(scales.max()):.2g}"
    return _Smoothed(new_norm, scales, label)


def _curves(linears: Sequence[FloatLinear], stats: InputStats, scheme: GroupScheme, group: _Group) -> list[RateCurve]:
    """Curves of a group's linears."""
    scales = group.scales
    mean_square = stats.square_mean if scales is None else stats.square_mean / scales.square()
    cost = mean_square if group.factor is None else group.factor.by_column()
    smoothed = group.norm_weight is not None and scales is not None  # the vendor folds into norms alone
    budgets = rule_bits([linear.weight for linear in linears], stats, scheme.weight, smoothed=smoothed)
    moment = torch.diag(stats.square_mean) if stats.second_moment is None else stats.second_moment
    curves = []
    for linear, budget in zip(linears, budgets, strict=True):
        rows = even_rows(linear.weight, CURVE_ROWS)
        signal = float(((rows @ moment) * rows).sum(1).mean())
        scaled = rows if scales is None else rows * scales
        curve = rate_curve(linear.name, scaled, cost, weights=linear.weight.numel(), signal=signal, rule_bits=budget)
        curves.append(curve)
    return curves


def _activation(
    weights: Sequence[Tensor], stats: InputStats, scheme: GroupScheme, scales: Tensor | None, dtype: FloatDtype
) -> tuple[ActivationQParams, str]:
    """The one activation scale and offset that all linears of the group share, and how its range was chosen."""
    extremes = affine.activation_qparams(*ranges.minmax_range(stats, scales), dtype=dtype)
    if scheme.act_range is ActRange.MINMAX:
        return extremes, MIN_MAX
    energy = torch.stack([lowbit.column_energy(w) for w in weights]).sum(0)
    scaled_energy = energy if scales is None else energy * scales.square()
    low, high = ranges.histogram_range(stats, scales, scaled_energy)
    if scheme.act_range is ActRange.MIXED:
        sample = stats.sample if scales is None else stats.sample / scales
        optimal = affine.activation_qparams(low, high, dtype=dtype)
        if _input_loss(sample, extremes, weights, scales) < _input_loss(sample, optimal, weights, scales):
            return extremes, MIN_MAX
    return affine.activation_qparams(ranges.HEADROOM * low, ranges.HEADROOM * high, dtype=dtype), HISTOGRAM


def _input_loss(sample: Tensor, params: ActivationQParams, weights: Sequence[Tensor], scales: Tensor | None) -> float:
    """Squared output error on the token sample that quantizing only the input causes."""
    error = (quantize_input(sample, params).float() - params.offset) * params.scale - sample
    unscaled = error if scales is None else error * scales
    return sum(float((unscaled @ w.T).square().sum()) for w in weights)


def _assemble(
    linear: FloatLinear, weight: Tensor, integers: Integers, stats: InputStats, scheme: GroupScheme, group: _Group
) -> QuantizedLinear:
    """Put integers, steps and biases together; deq_scale in float32, quant_bias within int32."""
    deq_scale = quant_bias = None
    own_bias = None if linear.bias is None else linear.divided(linear.bias)
    if group.activation is not None:
        integers = _lift_steps(weight, integers, own_bias, group.activation)
        deq_scale = (integers.step * group.activation.scale).reshape(-1)
        bias = own_bias
        if scheme.bias_correction:
            missing = _mean_error(weight, integers, stats.mean if group.scales is None else stats.mean / group.scales)
            bias = missing if bias is None else bias + missing
        quant_bias = fold_bias(integers.q, bias, deq_scale, group.activation.offset)
    return QuantizedLinear(
        quant_type=scheme.weight.quant_type,
        weight=integers.q,
        weight_scale=integers.step,
        bias=own_bias,
        activation=group.activation,
        deq_scale=deq_scale,
        quant_bias=quant_bias,
        weight_scale_second=integers.second,
    )


def _lift_steps(weight: Tensor, integers: Integers, bias: Tensor | None, activation: ActivationQParams) -> Integers:
    """Widen the steps of rows so quiet that their bias would leave int32, and round these rows anew."""
    if bias is None:
        return integers
    least = (bias.abs() / (LARGEST_BIAS * activation.scale))[:, None]
    low = (integers.step < least)[:, 0]
    if not bool(low.any()):
        return integers
    q, step = integers.q.clone(), torch.maximum(integers.step, least)
    q[low] = affine.quantize_weight(weight[low], step[low], INT8)
    return Integers(q, step)


def _mean_error(weight: Tensor, integers: Integers, mean: Tensor) -> Tensor:
    """(weight - q * step) mean: what the mean output lacks, float32 [N]."""
    parts = [
        weight[rows] @ mean - (integers.q[rows].float() @ mean) * integers.step[rows, 0] for rows in row_chunks(weight)
    ]
    return torch.cat(parts)


def _report(
    linear: FloatLinear,
    weight: Tensor,
    result: QuantizedLinear,
    stats: InputStats,
    scheme: GroupScheme,
    group: _Group,
    method: Method,
    seconds: float,
) -> LinearReport:
    """Measure one quantized linear against its float original."""
    counts = metrics.count_int8(result.weight)
    total = max(1, result.weight.numel())
    values = torch.arange(-128, 128)
    times = torch.ones(()).expand(weight.shape[0], 1) if linear.divisor is None else linear.divisor
    noise = signal = 0.0
    saturated = 0
    grid = INT4 if result.weight_scale_second is not None else lowbit.grid_of(scheme.weight)
    for rows in row_chunks(weight):
        step = _steps_of(result, rows, scheme.weight.group_size) * times[rows]
        error = result.weight[rows].float().mul_(step).sub_(weight[rows])
        noise += error.square().sum().item()
        signal += weight[rows].square().sum().item()
        saturated += int(
            (weight[rows] > (grid.qmax + 0.5) * step).sum() + (weight[rows] < (grid.qmin - 0.5) * step).sum()
        )
    sample = stats.sample if group.scales is None else stats.sample / group.scales
    low = high = clipped = 0.0
    shift = 0
    if result.activation is not None:
        shift = _bias_shift(result) if scheme.bias_correction else 0
        low, high = affine.covered_range(result.activation)
        reach = result.activation.scale / 2  # a value half a step outside still rounds to the last integer
        clipped = ranges.clipped_share(stats, group.scales, low - reach, high + reach)
    y = torch.nn.functional.linear(stats.sample, linear.weight, linear.bias)
    output_error = metrics.relative_l2(run_linear(sample, result) * times[:, 0], y)
    return LinearReport(
        name=linear.name,
        quant_type=result.quant_type,
        rows=weight.shape[0],
        cols=weight.shape[1],
        method=method.value,
        step_min=float(result.weight_scale.min()),
        step_max=float(result.weight_scale.max()),
        entropy_bits=metrics.entropy_bits(counts),
        outlier_share=counts[values.abs() > lowbit.BULK].sum().item() / total,
        zero_share=counts[128].item() / total,
        saturated=saturated,
        weight_error=(noise / signal) ** 0.5 if signal else 0.0,
        output_error=output_error,
        sqnr_db=metrics.sqnr_db(output_error),
        input_low=low,
        input_high=high,
        input_range=group.input_range,
        clipped_share=clipped,
        bias_shift=shift,
        smoothing=group.label,
        seconds=seconds,
    )


def _bias_shift(result: QuantizedLinear) -> int:
    """How far the farthest entry of quant_bias is from the one that the bias and the offset alone would give."""
    assert result.activation is not None
    assert result.quant_bias is not None
    assert result.deq_scale is not None
    plain = fold_bias(result.weight, result.bias, result.deq_scale, result.activation.offset)
    return int((result.quant_bias.long() - plain.long()).abs().max())


def _steps_of(result: QuantizedLinear, rows: slice, group_size: int) -> Tensor:
    """The step of every weight of some rows: [n, 1], or [n, K] for two-stage types."""
    step = result.weight_scale[rows]
    if result.weight_scale_second is None:
        return step
    return expand_steps(step, result.weight_scale_second[rows], group_size)
