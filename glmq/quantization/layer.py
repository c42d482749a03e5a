"""The linears that read one input, together: quantize_group() prepares, rounds and folds the biases, measure_group() reports.

Pure on tensors: the same inputs give the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glmq.numerics import affine
from glmq.numerics.budget import rule_bits
from glmq.numerics.drift import Drift
from glmq.numerics.hessian import Factor
from glmq.numerics.int8_linear import fold_bias
from glmq.numerics.moments import InputStats
from glmq.numerics.rate import CURVE_ROWS, INT8_BITS, CurveRows, RateCurve, mean_rule_bits, rate_curve, solve_bits
from glmq.numerics.rows import LEAST_STEP, even_rows, row_chunks, row_max
from glmq.progress import Stopwatch
from glmq.quantization.group import (
    NO_FOLD,
    FloatLinear,
    GroupScheme,
    PreparedGroup,
    RowFold,
    factor_group,
    prepare_group,
)
from glmq.quantization.linear_report import report_linear
from glmq.quantization.methods import FP16_SPACING, METHODS, Integers, WeightJob, spend_bits
from glmq.records import ActivationQParams, LinearReport, QuantizedLinear, StageTime
from glmq.spec import INT8, FloatDtype, Method, WeightScheme

LARGEST_BIAS = float(2**30)
"""Largest bias, in output steps (deq_scale), that goes into quant_bias: the integer sums need the rest of int32."""
FINE_BIAS = float(2**23)
"""The most output steps that the bias of a row of zeros gets, and at least half of them: what float32 holds exactly."""


@dataclass(frozen=True, slots=True)
class GroupResult:
    """The quantized linears of one group, and the norm that now goes in front of them."""

    linears: list[QuantizedLinear]
    norm_weight: Tensor | None
    """[K] in the storage dtype; None where the group has no norm."""
    norm_bias: Tensor | None
    """float32 [K]: what the norm adds to its output; None: nothing."""
    scales: Tensor | None
    """float32 [K]: what the input channels were divided by; None where nothing was scaled."""
    stages: tuple[StageTime, ...]
    """Smoothing, rounding, and once it is measured report."""
    prepared: PreparedGroup
    """What was chosen."""
    smoothed: Sequence[Tensor]
    """float32 [N_i, K]: the weights that the integers stand for, before the rows' divisors."""
    method: Method
    """That made the integers."""
    seconds: Sequence[float]
    """Of each linear; the first has what all share."""
    reports: Sequence[LinearReport] = ()
    """The error of each linear, once it is measured."""


def quantize_group(
    linears: Sequence[FloatLinear],
    stats: InputStats,
    scheme: GroupScheme,
    *,
    norm_weight: Tensor | None,
    dtype: FloatDtype,
    fold: RowFold = NO_FOLD,
    bits: Sequence[float] | None = None,
    known: PreparedGroup | None = None,
) -> GroupResult:
    """Quantize the linears that share one input.

    Args:
        linears: one or more, all [N_i, K].
        stats: calibration statistics of their input, [K].
        scheme: how.
        norm_weight: [K], of the RMSNorm in front, which is divided by the channel scales; None: `fold` has the scales.
        dtype: of the checkpoint to be written.
        fold: of a group without a norm (o_proj, down_proj).
        bits: entropy that the integers of each linear may have, bits per weight, from `spread_bits` over the whole model.
            None: no limit for types that are not sparse. Sparse linears then get the steps of the scheme's rule with the
            plain and reference methods, and with the compensated method share what the rule would spend on this group.
        known: `prepared` of an earlier result for the same arguments: nothing is chosen anew.

    Raises:
        StatisticsError: a second moment that is not positive definite.
    """
    started = time.perf_counter()
    clock = Stopwatch()
    with clock.stage("smoothing"):
        group = prepare_group(linears, stats, scheme, norm_weight, dtype, fold) if known is None else known
        factor = factor_group(stats, group)
    if bits is None and scheme.weight.quant_type.spec.is_sparse and scheme.weight.method is Method.COMPENSATED:
        with clock.stage("rate"):
            curves = _curves(linears, stats, scheme, group)
            bits = solve_bits(curves, mean_rule_bits(curves))
    quantized, seconds = [], []
    method = Method.PLAIN if scheme.weight.method is Method.COMPENSATED and factor is None else scheme.weight.method
    weights = [linear.weight if group.scales is None else linear.weight * group.scales for linear in linears]
    with clock.stage("rounding"):
        aims = (
            weights if group.drift is None else [_aim(linear.weight, group.drift, group.scales) for linear in linears]
        )
        rounded = _round(linears, aims, scheme.weight, factor, dtype, method, bits)
    if factor is not None:
        clock.count("rounding", flops=sum(weight.numel() * weight.shape[1] for weight in weights))
    for linear, aim, integers in zip(linears, aims, rounded, strict=True):
        with clock.stage("rounding"):
            result = _assemble(linear, linear.divided(aim), integers, stats, scheme, group, dtype)
        quantized.append(result)
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    return GroupResult(
        quantized,
        group.norm_weight,
        None if group.shift is None else -group.shift,
        group.scales,
        clock.take(),
        group,
        weights,
        method,
        seconds,
    )


def measure_group(
    linears: Sequence[FloatLinear], stats: InputStats, scheme: GroupScheme, result: GroupResult
) -> GroupResult:
    """The result with the error of each linear; the other arguments are those that `quantize_group` made it from."""
    clock = Stopwatch()
    reports = []
    for linear, weight, quantized, seconds in zip(
        linears, result.smoothed, result.linears, result.seconds, strict=True
    ):
        with clock.stage("report"):
            reports.append(
                report_linear(linear, weight, quantized, stats, scheme, result.prepared, result.method, seconds)
            )
        clock.count("report", flops=4 * stats.sample.shape[0] * weight.numel())
    return replace(result, reports=reports, stages=(*result.stages, *clock.take()))


def _aim(weight: Tensor, drift: Drift, scales: Tensor | None) -> Tensor:
    """The smoothed weights that rounding comes near to, where it makes up for drifted inputs."""
    aim = drift.aim(weight)
    return aim if scales is None else aim.mul_(scales)


def _round(
    linears: Sequence[FloatLinear],
    weights: Sequence[Tensor],
    scheme: WeightScheme,
    factor: Factor | None,
    dtype: FloatDtype,
    method: Method,
    bits: Sequence[float] | None,
) -> list[Integers]:
    """Integers and steps of the smoothed weights; the steps are divided by the rows' divisors, the integers stay."""
    if bits is None or not scheme.quant_type.spec.is_sparse:
        jobs = [
            WeightJob(linear.divided(weight), scheme, dtype, factor, limit)
            for linear, weight, limit in zip(linears, weights, bits or [INT8_BITS] * len(linears), strict=True)
        ]
        return [METHODS[method](job) for job in jobs]
    spent = spend_bits(weights, bits, factor, [linear.sensitivity for linear in linears])
    return [Integers(i.q, linear.divided(i.step)) for linear, i in zip(linears, spent, strict=True)]


def rate_curves(
    linears: Sequence[FloatLinear],
    stats: InputStats,
    scheme: GroupScheme,
    *,
    norm_weight: Tensor | None,
    dtype: FloatDtype,
    fold: RowFold = NO_FOLD,
) -> tuple[list[RateCurve], PreparedGroup]:
    """What each linear of a group loses at how many bits, and how many bits the flags' rule would spend.

    The first pass over a sparse model: give the curves of all groups to `solve_bits`. Arguments as for `quantize_group`.

    Returns:
        The curve of each linear, and what was chosen for the group.
    """
    group = prepare_group(linears, stats, scheme, norm_weight, dtype, fold)
    return _curves(linears, stats, scheme, group), group


def _curves(
    linears: Sequence[FloatLinear], stats: InputStats, scheme: GroupScheme, group: PreparedGroup
) -> list[RateCurve]:
    """The rate curve of each linear of a prepared group."""
    scales = group.scales
    mean_square = stats.square_mean if scales is None else stats.square_mean / scales.square()
    cost = mean_square if group.order is None else group.order.by_column()
    smoothed = group.norm_weight is not None and scales is not None  # the vendor folds into norms alone
    budgets = rule_bits([linear.weight for linear in linears], stats, scheme.weight, smoothed=smoothed)
    moment = torch.diag(stats.square_mean) if stats.second_moment is None else stats.second_moment
    curves = []
    for linear, budget in zip(linears, budgets, strict=True):
        rows = even_rows(linear.weight, CURVE_ROWS)
        some = CurveRows(
            rows if scales is None else rows * scales,
            signal=float(((rows @ moment) * rows).sum(1).mean()),
            sensitivity=None if linear.sensitivity is None else even_rows(linear.sensitivity, CURVE_ROWS),
        )
        curves.append(rate_curve(linear.name, some, cost, weights=linear.weight.numel(), rule_bits=budget))
    return curves


def _assemble(
    linear: FloatLinear,
    weight: Tensor,
    integers: Integers,
    stats: InputStats,
    scheme: GroupScheme,
    group: PreparedGroup,
    dtype: FloatDtype,
) -> QuantizedLinear:
    """Compute deq_scale and quant_bias, where the type has them, and put all parts of the linear together.

    `weight` is what the integers stand for: smoothed, and divided by the rows' divisors.
    """
    deq_scale = quant_bias = None
    own_bias = None if linear.bias is None else linear.divided(linear.bias)
    if group.activation is not None:
        if own_bias is not None:
            integers = _lift_steps(weight, integers, own_bias, group.activation)
            if scheme.weight.method is not Method.REFERENCE:  # whose steps are the vendor's
                is_half = scheme.weight.quant_type.spec.step_in_model_dtype and dtype is FloatDtype.FP16
                least = FP16_SPACING if is_half else LEAST_STEP
                integers = _free_steps(weight, integers, own_bias, group.activation, least)
        deq_scale = (integers.step * group.activation.scale).reshape(-1)
        bias = own_bias
        if scheme.bias_correction:
            missing = _mean_error(weight, integers, stats.mean if group.scales is None else stats.mean / group.scales)
            bias = missing if bias is None else bias + missing
        quant_bias = fold_bias(integers.q, bias, deq_scale, group.activation.offset, group.shift_in_steps)
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


def _lift_steps(weight: Tensor, integers: Integers, bias: Tensor, activation: ActivationQParams) -> Integers:
    """Widen the steps of rows with such small weights that their bias, in output steps, would exceed int32; round them anew."""
    least = (bias.abs() / (LARGEST_BIAS * activation.scale))[:, None]
    low = (integers.step < least)[:, 0]
    if not bool(low.any()):
        return integers
    q, step = integers.q.clone(), torch.maximum(integers.step, least)
    q[low] = affine.quantize_weight(weight[low], step[low], INT8)
    return Integers(q, step)


def _free_steps(
    weight: Tensor, integers: Integers, bias: Tensor, activation: ActivationQParams, least: float
) -> Integers:
    """Narrow the steps of rows whose integers are all 0 until their bias, all that such a row gives, is many output steps.

    The steps are powers of two, which every dtype stores as they are, and so wide that the row still rounds to zeros.

    Args:
        weight: float32 [N, K].
        integers: of it.
        bias: float32 [N].
        activation: of the input.
        least: the smallest step that the checkpoint holds.
    """
    idle = (bias != 0) & (integers.q.amin(1) == 0) & (integers.q.amax(1) == 0)
    if not bool(idle.any()):
        return integers
    fine = bias[idle, None].abs() / (FINE_BIAS * activation.scale)
    wanted = torch.maximum(fine, 2 * row_max(weight[idle])).clamp_min(least)
    step = integers.step.clone()
    step[idle] = torch.minimum(step[idle], wanted / torch.frexp(wanted).mantissa)  # the next power of two
    return replace(integers, step=step)


def _mean_error(weight: Tensor, integers: Integers, mean: Tensor) -> Tensor:
    """The mean output that is lost: (weight - q * step) times the mean input. float32 [N]."""
    parts = [
        weight[rows] @ mean - (integers.q[rows].float() @ mean) * integers.step[rows, 0] for rows in row_chunks(weight)
    ]
    return torch.cat(parts)
