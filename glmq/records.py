"""What the engines yield and hand to each other: frozen records, a unit under each field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

from glmq.spec import QuantType

if TYPE_CHECKING:
    from torch import Tensor

REPORT: Final = "glmq_report"
"""Stem of the files beside the weights that say what quantizing did."""
COMPRESS_REPORT: Final = "glmq_compress_report"
"""Of those that say what compressing did."""


@dataclass(frozen=True, slots=True)
class ActivationQParams:
    """Per-tensor asymmetric int8 activation: xq = clamp(round(x / scale + offset), -128, 127)."""

    scale: float
    """Positive; exactly representable in float32."""
    offset: int
    """In -128..127."""


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """One quantized linear, before it is written in an engine's format."""

    quant_type: QuantType
    weight: Tensor
    """int8 [N, K]: the integers; of 4-bit types the int4 values, one per byte."""
    weight_scale: Tensor
    """float32 [N, 1]: step of a row (first stage for W4A8_DYNAMIC); [N, K / group_size] where groups have their own."""
    bias: Tensor | None
    """float32 [N]: the float layer's own bias, its rows divided by what they absorb, or None."""
    activation: ActivationQParams | None = None
    """Static types only."""
    deq_scale: Tensor | None = None
    """float32 [N] = input scale * weight scale; static types only."""
    quant_bias: Tensor | None = None
    """int32 [N] = round(bias / deq_scale - offset * rowsum(weight)), plus bias correction if asked; static types only, and
    None where the checkpoint stores none."""
    weight_scale_second: Tensor | None = None
    """float32 [N, K / group_size]; W4A8_DYNAMIC only."""

    def cut(self, rows: slice) -> QuantizedLinear:
        """The linear of some of the rows, which are its outputs."""
        return replace(
            self,
            weight=self.weight[rows],
            weight_scale=self.weight_scale[rows],
            bias=None if self.bias is None else self.bias[rows],
            deq_scale=None if self.deq_scale is None else self.deq_scale[rows],
            quant_bias=None if self.quant_bias is None else self.quant_bias[rows],
            weight_scale_second=None if self.weight_scale_second is None else self.weight_scale_second[rows],
        )


@dataclass(frozen=True, slots=True)
class LinearReport:
    """What quantizing one linear did: a row of the error table."""

    name: str
    quant_type: QuantType
    rows: int
    cols: int
    method: str
    """How the integers were made: plain, compensated, reference."""
    step_min: float
    step_max: float
    """Smallest and largest weight step of the rows, in weight units after smoothing."""
    entropy_bits: float
    """Zero-order entropy of the stored integers, bits per weight."""
    outlier_share: float
    """Share of integers with |q| > 7."""
    zero_share: float
    """Share of integers that are 0."""
    saturated: int
    """Weights cut by the integer grid (off by more than half a step)."""
    weight_error: float
    """||W_q - W|| / ||W||, on the smoothed weight."""
    output_error: float
    """||y_q - y|| / ||y|| on the token sample, in the NPU's arithmetic."""
    sqnr_db: float
    """-20 log10(output_error), decibels."""
    input_low: float
    input_high: float
    """The range that the int8 activation covers, in input units after smoothing; both 0 for dynamic types."""
    input_range: str
    """How that range was chosen: `min-max` or `histogram`; empty for dynamic types."""
    clipped_share: float
    """Share of calibration input values outside that range."""
    bias_shift: int
    """Largest change that bias correction made to an entry of quant_bias; 0 without it."""
    smoothing: str
    """How the input channels were scaled, e.g. `m2 (threshold 3.1, 12 channels)`, or `none`."""
    seconds: float
    first_integer: int = 0
    """Smallest of the stored integers."""
    integers: tuple[int, ...] = ()
    """How often each occurs, from the smallest to the largest; empty in what an older glmq left to be resumed."""


def report_row(report: LinearReport) -> dict[str, str | int | float | list[int] | None]:
    """A report as JSON values. The decibels of a perfect linear, infinity, become None."""
    row = {field.name: getattr(report, field.name) for field in fields(report)}
    row |= {"quant_type": report.quant_type.value, "integers": list(report.integers)}
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def parse_row(row: Mapping[str, Any]) -> LinearReport:
    """The inverse of report_row."""
    values: dict[str, Any] = {key: math.inf if value is None else value for key, value in row.items()}
    values["quant_type"] = QuantType(row["quant_type"])
    values["integers"] = tuple(row.get("integers", ()))
    return LinearReport(**values)


@dataclass(frozen=True, slots=True)
class StageTime:
    """One kind of work in a run."""

    stage: str
    """E.g. read, forward, statistics, rounding, write."""
    seconds: float
    flops: int
    """Floating point operations of its matrix products, two for each multiplication; 0 where it has none worth counting."""
    nbytes: int
    """Bytes that it read from files or wrote into them."""


@dataclass(frozen=True, slots=True)
class PassTime:
    """One pass over the model, e.g. calibrate, rate, quantize."""

    title: str
    seconds: float
    peak_bytes: int
    """The most memory that the process has held until the pass ended."""
    stages: tuple[StageTime, ...]


@dataclass(frozen=True, slots=True)
class BytesDone:
    """Some bytes are finished: a step of the progress bar."""

    name: str
    """The tensor that they belong to."""
    nbytes: int
    """Of this step."""
    resident_bytes: int
    """Resident memory of the process after it."""


@dataclass(frozen=True, slots=True)
class BlockDone:
    """One block of a streamed run is finished: a step of the progress bar."""

    name: str
    """The block's module name."""
    index: int
    """Of this block among all, from 0."""
    total: int
    seconds: float
    resident_bytes: int
    """Resident memory of the process after the block."""
    stages: tuple[StageTime, ...] = ()
    """Where the seconds went, as far as it was measured."""
