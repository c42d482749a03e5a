"""One quantized linear measured against its float original: a row of the error table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from glmq.numerics import affine, lowbit, metrics
from glmq.numerics.grouped import expand_groups
from glmq.numerics.int8_linear import fold_bias, run_linear
from glmq.numerics.lone_threads import map_alone
from glmq.numerics.moments import InputStats
from glmq.numerics.rows import row_chunks
from glmq.quantization.group import FloatLinear, GroupScheme, PreparedGroup, moved_input
from glmq.records import LinearReport, QuantizedLinear
from glmq.spec import IntGrid, Method

ROWS_AT_ONCE: Final = 1024
"""Rows that one thread measures together: their weights and outputs stay near it, quantizing the inputs costs little."""


def report_linear(
    linear: FloatLinear,
    weight: Tensor,
    result: QuantizedLinear,
    stats: InputStats,
    scheme: GroupScheme,
    group: PreparedGroup,
    method: Method,
    seconds: float,
) -> LinearReport:
    """Measure one quantized linear against its float original."""
    moved = moved_input(stats.sample, group.scales, group.shift)
    measured = _measure(linear, weight, result, (stats.sample, moved), lowbit.grid_of(scheme.weight))
    counts = measured.counts
    values = torch.arange(-128, 128)
    total = max(1, result.weight.numel())
    low = high = 0.0
    shift = 0
    if result.activation is not None:
        shift = _bias_shift(result, group) if scheme.bias_correction else 0
        low, high = affine.covered_range(result.activation)
    output_error = metrics.error_of_energies(measured.output_noise, measured.output_signal)
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
        saturated=measured.saturated,
        weight_error=metrics.error_of_energies(measured.weight_noise, measured.weight_signal),
        output_error=output_error,
        sqnr_db=metrics.sqnr_db(output_error),
        input_low=low,
        input_high=high,
        input_range=group.input_range,
        clipped_share=group.clipped_share,
        bias_shift=shift,
        smoothing=group.label,
        seconds=seconds,
        first_integer=int(values[counts > 0].min()),
        integers=tuple(int(count) for count in counts[counts.nonzero().min() : counts.nonzero().max() + 1]),
    )


@dataclass(frozen=True, slots=True)
class _Measured:
    """Some rows of a linear measured."""

    counts: Tensor
    """int64 [256]: how often each integer occurs, from -128 on."""
    saturated: int
    weight_noise: float
    weight_signal: float
    """Sums of squares of the weights' errors, and of the weights, after smoothing."""
    output_noise: float
    output_signal: float
    """The same of the outputs on the token sample."""

    def __add__(self, other: _Measured) -> _Measured:
        return _Measured(
            self.counts + other.counts,
            self.saturated + other.saturated,
            self.weight_noise + other.weight_noise,
            self.weight_signal + other.weight_signal,
            self.output_noise + other.output_noise,
            self.output_signal + other.output_signal,
        )


def _measure(
    linear: FloatLinear, weight: Tensor, result: QuantizedLinear, inputs: tuple[Tensor, Tensor], grid: IntGrid
) -> _Measured:
    """All rows measured, as many at a time as a core keeps near it.

    Args:
        weight: float32 [N, K], after smoothing.
        inputs: float32 [T, K] twice: the token sample as the float linear gets it, and as the quantized one does.
        grid: the integers.
    """
    times = torch.ones(()).expand(weight.shape[0], 1) if linear.divisor is None else linear.divisor
    plain, moved = inputs

    def measure(rows: slice) -> _Measured:
        part, cut = weight[rows], result.cut(rows)
        noise = signal = 0.0
        saturated = 0
        for few in row_chunks(part):
            step = steps_of(cut, few) * times[rows][few]
            noise += _energy(cut.weight[few].float().mul_(step).sub_(part[few]))
            signal += _energy(part[few])
            saturated += _count_beyond(part[few], (grid.qmin - 0.5) * step, (grid.qmax + 0.5) * step)
        bias = None if linear.bias is None else linear.bias[rows]
        y = torch.nn.functional.linear(plain, linear.weight[rows], bias)
        yq = run_linear(moved, cut).mul_(times[rows][:, 0])
        counts = metrics.count_int8(cut.weight)
        return _Measured(counts, saturated, noise, signal, *metrics.error_energies(yq, y))

    cuts = [slice(first, first + ROWS_AT_ONCE) for first in range(0, weight.shape[0], ROWS_AT_ONCE)]
    first, *others = map_alone(measure, cuts)
    return sum(others, start=first)


def _energy(x: Tensor) -> float:
    """Sum of squares, without a matrix of them."""
    return torch.dot(x.reshape(-1), x.reshape(-1)).item()


def _count_beyond(part: Tensor, low: Tensor, high: Tensor) -> int:
    """How many weights of [n, K] lie outside of [low, high], each [n, 1] or [n, K]."""
    if low.shape[1] == 1 and bool(
        (part.amin(1, keepdim=True) >= low).all() & (part.amax(1, keepdim=True) <= high).all()
    ):
        return 0  # as nearly always, and two reductions cost less than two comparisons and their sums
    return int((part > high).sum() + (part < low).sum())


def _bias_shift(result: QuantizedLinear, group: PreparedGroup) -> int:
    """How far the farthest entry of quant_bias is from the one that the bias and the offset alone would give."""
    assert result.activation is not None
    assert result.quant_bias is not None
    assert result.deq_scale is not None
    plain = fold_bias(result.weight, result.bias, result.deq_scale, result.activation.offset, group.shift_in_steps)
    return int((result.quant_bias.long() - plain.long()).abs().max())


def steps_of(result: QuantizedLinear, rows: slice) -> Tensor:
    """The step of every weight of some rows: [n, 1], or [n, K] where groups of columns have steps of their own."""
    step, columns = result.weight_scale[rows], result.weight.shape[1]
    if result.weight_scale_second is None:
        return expand_groups(step, columns)
    return expand_groups(step * result.weight_scale_second[rows], columns)
