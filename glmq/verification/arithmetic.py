"""The numbers of each integer linear: can its sums overflow, do its weights stand for the float ones, are they as reported.

`check_structure` recomputes quant_bias and the steps; here the integers themselves are examined, row by row and column by
column, against the float checkpoint with the smoothing undone, and against what glmq's own report beside the weights says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from glmq.checkpoint.ascend import decode_deq_scale
from glmq.checkpoint.json_file import JsonValue
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import CheckpointError
from glmq.inspection.scaling import UNSCALED, Scaling
from glmq.inspection.weights import CACHE_ELEMENTS, StoredMatrix, row_ranges
from glmq.model.family import InputGroup
from glmq.numerics.int8_linear import INT32_LIMIT
from glmq.numerics.metrics import count_int8, entropy_bits
from glmq.spec import INT4, INT8, IntGrid
from glmq.threads import run_ahead
from glmq.verification.files import row_of
from glmq.verification.findings import Check, Finding

FP16_LIMIT: Final = 65504.0
GAIN_FLOORS: Final = {"F16": (0.006, 0.004), "BF16": (0.016, 0.012)}
"""By how much the gain of a row or column, and that of a whole linear, may be off because scales and norms are stored in
this dtype. Half a unit in the last place is 2^-12 and 2^-9 of a number; a norm, a step and an input scale meet."""
GAIN_DEVIATIONS: Final = 12.0
"""A gain <q, u> / <u, u> of n integers q for weights of u steps is uncertain by r / sqrt(<u, u>), r^2 being the mean of
(q - gain u)^2. Steps as wide as the weights, 2 bits a weight, reach 8 such deviations, finer ones 4; more are no rounding."""
NOISE_SPREAD: Final = 1.5
"""The error of a row or column counts up to this many times the root mean square of the whole linear."""
FARTHEST_STEPS: Final = {"INT8": (16.0, 30.0), "INT4": (4.0, 10.0)}
"""How many steps a single weight may lie from the float one: a number and a multiple of the linear's root mean square.
Nearest rounding stays within 0.5 at 0.29, error compensation within 7 at 0.6. A flip of the highest bit moves an int8
weight by 128 steps and an int4 weight by 8."""


@dataclass(frozen=True, slots=True)
class LinearArithmetic:
    """One integer linear."""

    name: str
    type: str
    """INT8 or INT4."""
    entropy_bits: float
    """Zero-order entropy of the integers, bits per weight."""
    zero_share: float
    outlier_share: float
    """Share of integers with |q| > 7."""
    accumulator_share: float
    """Largest possible |int32 sum|, quant_bias included, over 2^31; 1 or more can overflow. 0 for two-stage types."""
    bias_output: float
    """Largest |quant_bias * deq_scale|: what a rank's partial sum carries beside its products. 0 for dynamic types."""
    result_bound: float
    """|y| that no int8 input can exceed; reached only if every channel is at its worst at once. 0 for dynamic types."""
    against: WeightDistance | None
    """None without a float checkpoint."""


@dataclass(frozen=True, slots=True)
class WeightDistance:
    """How integers with their steps stand to the float weight, columns and rows scaled as smoothing did."""

    relative_l2: float
    """||W_q - W|| / ||W||."""
    rms_steps: float
    """Root mean square of W_q - W in steps of its row (and group)."""
    farthest_steps: float
    """Largest |W_q - W| in such steps."""
    row_gain: tuple[int, float, float]
    """The row whose gain <q, u> / <u, u>, q its integers and u its float weights in steps, is farthest from what rounding
    gives, measured by what is allowed: index, gain, allowed distance from 1."""
    column_gain: tuple[int, float, float]
    """The same of the columns."""
    gain: tuple[float, float]
    """Of the whole linear, and its allowed distance from 1."""


def measure_linears(
    candidate: Checkpoint, reference: Checkpoint | None, scalings: Mapping[str, Scaling]
) -> Iterator[LinearArithmetic | Finding]:
    """Every integer linear of `candidate`, a few megabytes in memory.

    Args:
        candidate: un-sharded, not compressed.
        reference: the float checkpoint it was made from, or None.
        scalings: what smoothing did to each linear, from `find_scalings`.

    Yields:
        Its numbers, or a finding that says why they cannot be computed.
    """
    for weight in candidate:
        name = weight.removesuffix(".weight")
        if name == weight or candidate[weight].dtype != "I8" or len(candidate[weight].shape) != 2:
            continue
        try:
            yield _measure(name, candidate, reference, scalings.get(name, UNSCALED))
        except CheckpointError as error:
            yield Check.INTEGERS.error(name, f"cannot be computed with: {error}")


def check_shifts(candidate: Checkpoint, groups: Iterable[InputGroup]) -> Iterator[Finding]:
    """A norm bias moves the input of its linears, and with plain biases behind it nothing takes that back.

    Args:
        candidate: un-sharded; its quant_bias tensors are held to the float biases by check 11.
        groups: of the model.
    """
    for norm in sorted({group.norm for group in groups if group.norm is not None}):
        name = f"{norm}.bias"
        if name in candidate and bool(candidate.read(name).any()):
            yield Check.INTEGERS.error(name, "is not zero, which shifts the input of the linears behind it")


def check_norms(candidate: Checkpoint, source: Checkpoint, groups: Iterable[InputGroup]) -> Iterator[Finding]:
    """Check 15: smoothing divides the channels of a norm by positive numbers, so that none becomes or stops being zero.

    Args:
        candidate: un-sharded.
        source: the float checkpoint it was made from.
        groups: of the model.
    """
    for name in sorted({f"{group.norm}.weight" for group in groups if group.norm is not None}):
        if name not in candidate or name not in source or candidate[name].shape != source[name].shape:
            continue
        found, wanted = candidate.read(name).float(), source.read(name).float()
        wrong = (found.sign() != wanted.sign()).nonzero().flatten()
        if wrong.numel():
            channel = int(wrong[0])
            yield Check.NORMS.error(
                name,
                f"is {float(found[channel]):g} in channel {channel} where the float norm is {float(wanted[channel]):g}; "
                f"no smoothing does that, and {wrong.numel()} channels of {found.numel()} are so",
            )


def judge_linear(numbers: LinearArithmetic, *, is_fp16: bool) -> Iterator[Finding]:
    """What is wrong with the numbers of one linear."""

    def finding(suffix: str, message: str) -> Finding:
        return Check.INTEGERS.error(f"{numbers.name}.{suffix}", message)

    if numbers.accumulator_share >= 1:
        yield finding(
            "quant_bias", f"lets int32 sums reach {numbers.accumulator_share:.3g} times what an int32 can hold"
        )
    if is_fp16 and numbers.bias_output > FP16_LIMIT:
        yield finding("quant_bias", f"stands for {numbers.bias_output:.4g}, float16 results end at {FP16_LIMIT:g}")
    distance = numbers.against
    if distance is None:
        return
    base, factor = FARTHEST_STEPS[numbers.type]
    limit = base + factor * distance.rms_steps
    if not distance.farthest_steps <= limit:
        yield finding(
            "weight",
            f"has a weight {distance.farthest_steps:.3g} steps from the float one, wanted at most {limit:.3g} "
            f"where the root mean square is {distance.rms_steps:.2g}: was a bit flipped?",
        )
    for what, (index, gain, allowed), cause in (
        ("row", distance.row_gain, "its step"),
        ("column", distance.column_gain, "the norm in front"),
    ):
        if not abs(gain - 1) <= allowed:
            yield finding(
                "weight",
                f"{what} {index} is {gain:.3g} times the float {what}, wanted 1 within {allowed:.2g}; "
                f"{cause} or the {what} is wrong",
            )
    gain, allowed = distance.gain
    if not abs(gain - 1) <= allowed:
        yield finding(
            "weight",
            f"is {gain:.4g} times the float weight, wanted 1 within {allowed:.2g}; its steps or the norm in front are wrong",
        )


def judge_against_report(numbers: LinearArithmetic, report: Mapping[str, JsonValue]) -> Iterator[Finding]:
    """Whether the integers are those that glmq_report.json was written for: any changed integer moves their counts.

    Args:
        numbers: of one linear.
        report: contents of glmq_report.json.
    """
    row = row_of(report, numbers.name)
    for key, found in (
        ("entropy_bits", numbers.entropy_bits),
        ("zero_share", numbers.zero_share),
        ("outlier_share", numbers.outlier_share),
    ):
        wanted = row.get(key)
        # The report holds the same sums of the same counts, so only another order of summing may differ, by some ulps.
        if isinstance(wanted, float) and abs(found - wanted) > 1e-12 * max(1.0, abs(wanted)):
            message = f"has {key} {found:.9g}, glmq_report.json says {wanted:.9g}: the integers were changed since"
            yield Check.REPORT.error(f"{numbers.name}.weight", message)
            return


class _Gains:
    """How integers q stand to float weights of u steps in some vectors: rows, columns, or all of a linear as one."""

    def __init__(self, vectors: int) -> None:
        self._dot, self._signal, self._square, self._nearest = (
            torch.zeros(vectors, dtype=torch.float64) for _ in range(4)
        )

    def add(self, cut: slice, dot: Tensor, signal: Tensor, square: Tensor, nearest: Tensor) -> None:
        """Sums of q u, u u, q q and round(u) u over one piece, for the vectors in `cut`."""
        self._dot[cut] += dot
        self._signal[cut] += signal
        self._square[cut] += square
        self._nearest[cut] += nearest

    def worst(self, length: int, rms: float, floor: float) -> tuple[int, float, float]:
        """Index, gain and allowed distance from 1 of the vector of `length` weights that exceeds what is allowed the most.

        Wide steps shrink or stretch a vector on their own: nearest rounding by a known factor, error compensation by
        something between that and 1.
        """
        alive = self._signal > 0
        if not bool(alive.any()):
            return 0, 1.0, floor
        signal = torch.where(alive, self._signal, 1.0)
        gain = torch.where(alive, self._dot / signal, 1.0)
        nearest = torch.where(alive, self._nearest / signal, 1.0)
        left = (self._square - gain.square() * signal).clamp_min(0) / max(1, length)  # mean of (q - gain u)^2
        left = left.clamp_max((NOISE_SPREAD * rms) ** 2)  # so that a foreign vector is not excused by its own error
        slack = GAIN_DEVIATIONS * (left / signal).sqrt() + floor
        below, above = (1 - nearest).clamp_min(0) + slack, (nearest - 1).clamp_min(0) + slack
        allowed = torch.where(gain < 1, below, above)
        excess = torch.where(alive, ((gain - 1).abs() / allowed).nan_to_num(math.inf), 0.0)
        index = int(excess.argmax())
        return index, float(gain[index]), float(allowed[index])


class _Distance:
    """Sums towards a WeightDistance.

    Args:
        rows, cols: of the linear.
        grid: its integers.
        floors: of GAIN_FLOORS.
    """

    def __init__(self, rows: int, cols: int, grid: IntGrid, floors: tuple[float, float]) -> None:
        self._rows, self._cols, self._all = _Gains(rows), _Gains(cols), _Gains(1)
        self._size, self._grid, self._floors = (rows, cols), grid, floors
        self._noise = self._signal = self._square_steps = self._farthest = 0.0

    def add(self, start: int, q: Tensor, wanted: Tensor, steps: Tensor) -> None:
        """Rows from `start` on: integers and float weights, float32 [n, K] each; steps broadcast to them."""
        self._noise += float((q * steps).sub_(wanted).square_().sum())
        self._signal += float(wanted.square().sum())
        in_steps = wanted / steps
        nearest = in_steps.round().clamp_(self._grid.qmin, self._grid.qmax)
        products = q * in_steps, in_steps.square(), q.square(), nearest.mul_(in_steps)
        self._rows.add(slice(start, start + q.shape[0]), *(product.sum(1) for product in products))
        self._cols.add(slice(None), *(product.sum(0) for product in products))
        self._all.add(slice(None), *(product.sum(dtype=torch.float64) for product in products))
        error = q - in_steps
        self._square_steps += float(error.square().sum())
        self._farthest = max(self._farthest, float(error.abs().max()))

    def finish(self) -> WeightDistance:
        (rows, cols), (floor, floor_of_all) = self._size, self._floors
        ratio = self._noise / self._signal if self._signal else (0.0 if self._noise == 0 else math.inf)
        rms = math.sqrt(self._square_steps / max(1, rows * cols))
        row, column = self._rows.worst(cols, rms, floor), self._cols.worst(rows, rms, floor)
        _, gain, allowed = self._all.worst(rows * cols, rms, floor_of_all)
        return WeightDistance(math.sqrt(ratio), rms, self._farthest, row, column, (gain, allowed))


def _measure(name: str, candidate: Checkpoint, reference: Checkpoint | None, scaling: Scaling) -> LinearArithmetic:
    matrix = StoredMatrix(candidate, name)
    source = _source(name, matrix, reference)
    grid, floors = INT8 if matrix.second is None else INT4, GAIN_FLOORS[_stored_dtype(name, candidate)]
    distance = None if source is None else _Distance(matrix.rows, matrix.cols, grid, floors)
    counts = torch.zeros(256, dtype=torch.int64)
    positive, negative = (torch.zeros(matrix.rows, dtype=torch.int64) for _ in range(2))
    reads = [partial(_read, matrix, source, start, stop) for start, stop in matrix.pieces()]
    for start, q, original in run_ahead(reads, 1):
        cut = slice(start, start + q.shape[0])
        counts += count_int8(q)
        positive[cut] = q.clamp_min(0).sum(1, dtype=torch.int64)
        negative[cut] = q.clamp_max(0).sum(1, dtype=torch.int64)
        if distance is None or original is None or source is None:
            continue
        for first, last in row_ranges(0, q.shape[0], matrix.cols, CACHE_ELEMENTS):
            row = start + first
            wanted = scaling.applied(source.values(original[first:last], row), row)
            distance.add(row, q[first:last].float(), wanted, _steps(matrix, slice(row, start + last)))
    share, bias_output, bound = _bounds(name, candidate, positive, negative)
    values = torch.arange(-128, 128)
    total = max(1, int(counts.sum()))
    return LinearArithmetic(
        name=name,
        type="INT8" if matrix.second is None else "INT4",
        entropy_bits=entropy_bits(counts),
        zero_share=int(counts[128]) / total,
        outlier_share=int(counts[values.abs() > 7].sum()) / total,
        accumulator_share=share if matrix.second is None else 0.0,
        bias_output=bias_output,
        result_bound=bound,
        against=None if distance is None else distance.finish(),
    )


def _stored_dtype(name: str, candidate: Checkpoint) -> str:
    """F16 or BF16: what the scales of a linear are stored in."""
    if f"{name}.deq_scale" in candidate:
        return "F16" if candidate[f"{name}.deq_scale"].dtype == "I64" else "BF16"
    return "F16" if candidate[f"{name}.weight_scale"].dtype == "F16" else "BF16"


def _source(name: str, matrix: StoredMatrix, reference: Checkpoint | None) -> StoredMatrix | None:
    """The float weight, if there is one of the same shape; another shape is a finding of the structure."""
    if reference is None or f"{name}.weight" not in reference:
        return None
    source = StoredMatrix(reference, name)
    return source if (source.rows, source.cols) == (matrix.rows, matrix.cols) else None


def _read(
    matrix: StoredMatrix, source: StoredMatrix | None, start: int, stop: int
) -> tuple[int, Tensor, Tensor | None]:
    return start, matrix.stored(start, stop), None if source is None else source.stored(start, stop)


def _steps(matrix: StoredMatrix, cut: slice) -> Tensor:
    assert matrix.step is not None
    if matrix.second is None:
        return matrix.step[cut]
    return (matrix.second[cut] * matrix.step[cut]).repeat_interleave(matrix.cols // matrix.second.shape[1], dim=1)


def _bounds(name: str, candidate: Checkpoint, positive: Tensor, negative: Tensor) -> tuple[float, float, float]:
    """(largest |int32 sum| / 2^31, largest |quant_bias * deq_scale|, largest |y|) over all int8 inputs."""
    high, low = 127 * positive - 128 * negative, 127 * negative - 128 * positive  # int64 [N]
    largest = torch.maximum(high, -low)
    if f"{name}.quant_bias" not in candidate or f"{name}.deq_scale" not in candidate:
        return float(largest.max()) / (INT32_LIMIT + 1), 0.0, 0.0
    bias = candidate.read(f"{name}.quant_bias").long()
    deq = decode_deq_scale(f"{name}.deq_scale", candidate.read(f"{name}.deq_scale")).double()
    if bias.shape != high.shape or deq.shape != high.shape:
        raise CheckpointError(f"{name}: quant_bias and deq_scale have not one entry for each of {high.numel()} rows")
    ends = torch.maximum((high + bias).abs(), (low + bias).abs())
    share = float(torch.maximum(ends, largest).max()) / (INT32_LIMIT + 1)
    return share, float((bias.double() * deq).abs().max()), float((ends.double() * deq).max())
