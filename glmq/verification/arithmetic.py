"""The numbers of each integer linear: can its sums overflow, do its weights stand for the float ones, are they as reported.

`check_structure` recomputes quant_bias and the steps; here the integers themselves are examined, row by row and column by
column, against the float checkpoint with the smoothing undone, and against what glmq's own report beside the weights says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from glmq.checkpoint.ascend import decode_deq_scale
from glmq.checkpoint.json_file import JsonValue
from glmq.checkpoint.linears import integer_linears, stored_weight
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import CheckpointError
from glmq.inspection.scaling import UNSCALED, Scaling
from glmq.inspection.weights import CACHE_ELEMENTS, StoredMatrix, row_ranges
from glmq.model.family import InputGroup
from glmq.numerics.int8_linear import INT32_LIMIT
from glmq.numerics.metrics import count_int8, entropy_bits
from glmq.spec import INT4, INT8
from glmq.threads import run_ahead
from glmq.verification.distance import Distance, WeightDistance
from glmq.verification.files import row_of
from glmq.verification.findings import Check, Finding
from glmq.verification.origin import Origin

FP16_LIMIT: Final = 65504.0
LARGEST_RMS_STEPS: Final = 1.0
"""Root mean square of (W_q - W) / step up to which a linear is at most coarse: rounding to nearest gives 0.29, error
compensation usually up to 0.8, whatever the steps."""
UNRELATED: Final = 0.7
"""Where it is larger, the share of the weights' own root mean square that is wrong. Unrelated weights give 1.4; error
compensation for inputs that are nearly parallel moves weights by many steps, up to 0.3 of their size."""


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
    """Largest possible |int32 sum|, quant_bias included, over 2^31; 1 or more can overflow. 0 where steps are by group."""
    bias_output: float
    """Largest |quant_bias * deq_scale|: what a rank's partial sum carries beside its products. 0 for dynamic types."""
    result_bound: float
    """|y| that no int8 input can exceed; reached only if every channel is at its worst at once. 0 for dynamic types."""
    against: WeightDistance | None
    """None without a float checkpoint."""


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
    for name in integer_linears(candidate):
        if len(candidate[stored_weight(name, candidate)].shape) != 2:
            continue
        try:
            yield _measure(name, candidate, reference, scalings.get(name, UNSCALED))
        except CheckpointError as error:
            yield Check.INTEGERS.error(name, f"cannot be computed with: {error}")


def check_shifts(candidate: Checkpoint, groups: Iterable[InputGroup]) -> Iterator[Finding]:
    """A norm bias moves the input of its linears, which only the quant_bias of static ones can take back.

    Args:
        candidate: un-sharded; its quant_bias tensors are held to the float biases and the norms' by check 11.
        groups: of the model.
    """
    for group in sorted((group for group in groups if group.norm is not None), key=lambda group: str(group.norm)):
        name = f"{group.norm}.bias"
        if name not in candidate or not bool(candidate.read(name).any()):
            continue
        if all(f"{linear.name}.quant_bias" in candidate for linear in group.linears):
            yield Check.NORMS.warning(
                name,
                "is not zero (--channel-shift): answers are right only where the engine adds it; not yet run on hardware",
            )
        else:
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
    """Check 30: can its sums or its bias overflow?"""
    name = f"{numbers.name}.quant_bias"
    if numbers.accumulator_share >= 1:
        message = f"lets int32 sums reach {numbers.accumulator_share:.3g} times what an int32 can hold"
        yield Check.INTEGERS.error(name, message)
    if is_fp16 and numbers.bias_output > FP16_LIMIT:
        message = f"stands for {numbers.bias_output:.4g}, float16 results end at {FP16_LIMIT:g}"
        yield Check.INTEGERS.error(name, message)


def judge_distance(linear: str, distance: WeightDistance, origin: Origin) -> Iterator[Finding]:
    """Checks 16 and 30: do the integers stand for the float weight? No more than a warning where quantizing left them so."""
    if distance.is_zeroed:
        yield Check.WEIGHT_DISTANCE.error(f"{linear}.weight", "is all zeros, the float weight is not")
        return
    for check, fact, cause in _strange(distance):
        finding = check.warning if origin is Origin.OWN else check.error
        yield finding(f"{linear}.weight", f"{fact}; {origin.value or cause}")


def _strange(distance: WeightDistance) -> Iterator[tuple[Check, str, str]]:
    """What rounding does not do, as check, fact and likely cause."""
    if not distance.rms_steps <= max(LARGEST_RMS_STEPS, UNRELATED * distance.size_steps):
        yield (
            Check.WEIGHT_DISTANCE,
            f"is {distance.rms_steps:.3g} steps from the float weight, root mean square, which itself is "
            f"{distance.size_steps:.3g} steps: rounding to nearest gives 0.29",
            "it is another weight, or its steps are wrong",
        )
    for what, worst, cause in (
        ("row", distance.row_gain, "its step"),
        ("column", distance.column_gain, "the norm in front"),
        ("group", distance.group_gain, "its second scale"),
    ):
        index, gain, allowed = worst or (0, 1.0, 0.0)
        if not abs(gain - 1) <= allowed:
            yield (
                Check.INTEGERS,
                f"{what} {index} is {gain:.3g} times the float {what}, wanted 1 within {allowed:.2g}",
                f"{cause} or the {what} is wrong",
            )
    gain, allowed = distance.gain
    if not abs(gain - 1) <= allowed:
        fact = f"is {gain:.4g} times the float weight, wanted 1 within {allowed:.2g}"
        yield Check.INTEGERS, fact, "its steps or the norm in front are wrong"
    row, column, steps, limit = distance.outlier
    if not steps <= limit:
        yield (
            Check.INTEGERS,
            f"has a weight {steps:.3g} steps from the float one in row {row}, column {column}, wanted at most {limit:.3g} "
            "in that column",
            "was a bit flipped?",
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


def _measure(name: str, candidate: Checkpoint, reference: Checkpoint | None, scaling: Scaling) -> LinearArithmetic:
    matrix = StoredMatrix(candidate, name)
    source = _source(name, matrix, reference)
    groups, dtype = 0 if matrix.second is None else matrix.second.shape[1], _stored_dtype(name, candidate)
    distance = (
        None
        if source is None
        else Distance(matrix.rows, matrix.cols, groups, INT4 if matrix.bits == 4 else INT8, dtype)
    )
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
        type=f"INT{matrix.bits}",
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
