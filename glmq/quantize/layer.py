"""One norm group: linears that read the same input. Smooth, choose the range, round the weights, fold the biases, report.

Pure on tensors: the same inputs give the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glmq.numerics import affine, lowbit, metrics, ranges, smooth
from glmq.numerics.int8_linear import fold_bias, run_linear
from glmq.numerics.moments import InputStats
from glmq.numerics.w4a8 import expand_steps
from glmq.quantize.methods import METHODS, Integers
from glmq.records import ActivationQParams, LinearReport, QuantizedLinear
from glmq.spec import INT4, ActRange, FloatDtype, Smoothing, WeightScheme

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


@dataclass(frozen=True, slots=True)
class GroupScheme:
    """How the linears of one input are quantized."""

    weight: WeightScheme
    smoothing: Smoothing
    act_range: ActRange
    bias_correction: bool


@dataclass(frozen=True, slots=True)
class GroupResult:
    """The quantized linears of one group, and the norm that now goes in front of them."""

    linears: list[QuantizedLinear]
    reports: list[LinearReport]
    norm_weight: Tensor | None
    """[K] in the storage dtype; None where the group has no norm."""
    scales: Tensor | None
    """float32 [K]: what the input channels were divided by; None where nothing was scaled."""


def quantize_group(
    linears: Sequence[FloatLinear],
    stats: InputStats,
    scheme: GroupScheme,
    *,
    norm_weight: Tensor | None,
    dtype: FloatDtype,
) -> GroupResult:
    """Quantize the linears that share one input.

    Args:
        linears: one or more, all [N_i, K].
        stats: calibration statistics of their input, [K].
        scheme: how.
        norm_weight: [K], the RMSNorm in front, which absorbs channel scales; None (o_proj, down_proj) means no smoothing.
        dtype: of the checkpoint to be written.
    """
    new_norm, scales, label = _smooth(linears, stats, scheme, norm_weight, dtype)
    started = time.perf_counter()
    activation = _activation(linears, stats, scheme, scales, dtype) if scheme.weight.quant_type.is_static else None
    sample = stats.sample if scales is None else stats.sample / scales
    quantized, reports = [], []
    for linear in linears:
        weight = linear.weight if scales is None else linear.weight * scales
        integers = METHODS[scheme.weight.method](weight, scheme.weight, dtype)
        result = _assemble(linear, integers, scheme, activation)
        quantized.append(result)
        seconds, started = time.perf_counter() - started, time.perf_counter()
        reports.append(_report(linear, weight, result, stats, scheme, scales, sample, label, seconds))
    return GroupResult(quantized, reports, new_norm, scales)


def _smooth(
    linears: Sequence[FloatLinear],
    stats: InputStats,
    scheme: GroupScheme,
    norm_weight: Tensor | None,
    dtype: FloatDtype,
) -> tuple[Tensor | None, Tensor | None, str]:
    """The new norm weight, the effective scales and a label."""
    if norm_weight is None:
        return None, None, "none"
    if scheme.smoothing is Smoothing.NONE:
        return norm_weight.to(affine.TORCH_DTYPE[dtype]), None, "none"
    choice = smooth.choose_m2_scales(stats, [linear.weight for linear in linears], scheme.weight)
    new_norm, effective = smooth.fold_scales(norm_weight, choice.scales, dtype)
    return new_norm, effective, choice.label


def _activation(
    linears: Sequence[FloatLinear], stats: InputStats, scheme: GroupScheme, scales: Tensor | None, dtype: FloatDtype
) -> ActivationQParams:
    """The one activation scale and offset that all linears of the group share."""
    if scheme.act_range is ActRange.MINMAX:
        low, high = ranges.minmax_range(stats, scales)
    else:
        energy = torch.stack([linear.weight.square().sum(0) for linear in linears]).sum(0)
        low, high = ranges.histogram_range(stats, scales, energy if scales is None else energy * scales.square())
    return affine.activation_qparams(low, high, dtype=dtype)


def _assemble(
    linear: FloatLinear, integers: Integers, scheme: GroupScheme, activation: ActivationQParams | None
) -> QuantizedLinear:
    """Put integers, steps and biases together; FORMAT of the static types: deq_scale and quant_bias in float32 and int32."""
    deq_scale = quant_bias = None
    if activation is not None:
        deq_scale = (integers.step * activation.scale).reshape(-1)
        quant_bias = fold_bias(integers.q, linear.bias, deq_scale, activation.offset)
    return QuantizedLinear(
        quant_type=scheme.weight.quant_type,
        weight=integers.q,
        weight_scale=integers.step,
        bias=linear.bias,
        activation=activation,
        deq_scale=deq_scale,
        quant_bias=quant_bias,
        weight_scale_second=integers.second,
    )


def _report(
    linear: FloatLinear,
    weight: Tensor,
    result: QuantizedLinear,
    stats: InputStats,
    scheme: GroupScheme,
    scales: Tensor | None,
    sample: Tensor,
    label: str,
    seconds: float,
) -> LinearReport:
    """Measure one quantized linear against its float original."""
    counts = metrics.count_int8(result.weight)
    total = max(1, result.weight.numel())
    values = torch.arange(-128, 128)
    noise = signal = 0.0
    saturated = 0
    grid = INT4 if result.weight_scale_second is not None else lowbit.grid_of(scheme.weight)
    for rows in lowbit.row_chunks(weight):
        step = _steps_of(result, rows, scheme.weight.group_size)
        error = result.weight[rows].float().mul_(step).sub_(weight[rows])
        noise += error.square().sum().item()
        signal += weight[rows].square().sum().item()
        edge = (result.weight[rows] == grid.qmin) | (result.weight[rows] == grid.qmax)
        saturated += int((edge & (error.abs() > 0.5001 * step)).sum())
    low, high = (0.0, 0.0) if result.activation is None else affine.covered_range(result.activation)
    y = torch.nn.functional.linear(stats.sample, linear.weight, linear.bias)
    output_error = metrics.relative_l2(run_linear(sample, result), y)
    return LinearReport(
        name=linear.name,
        quant_type=result.quant_type,
        rows=weight.shape[0],
        cols=weight.shape[1],
        method=scheme.weight.method.value,
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
        clipped_share=0.0 if result.activation is None else ranges.clipped_share(stats, scales, low, high),
        smoothing=label,
        seconds=seconds,
    )


def _steps_of(result: QuantizedLinear, rows: slice, group_size: int) -> Tensor:
    """The step of every weight of some rows: [n, 1], or [n, K] for two-stage types."""
    step = result.weight_scale[rows]
    if result.weight_scale_second is None:
        return step
    return expand_steps(step, result.weight_scale_second[rows], group_size)
