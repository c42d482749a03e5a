"""METHODS: how the weight of one linear becomes integers, one entry per Method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from glmq.numerics import lowbit, rate, w4a8
from glmq.numerics.affine import TORCH_DTYPE, quantize_weight
from glmq.numerics.gptq import round_compensated
from glmq.numerics.hessian import Factor
from glmq.numerics.metrics import count_int8, entropy_bits
from glmq.spec import INT4, INT8, FloatDtype, Method, QuantType, WeightScheme

RATE_ROWS: Final = 1024
"""Rows, evenly spaced, on which the step for a wanted entropy is found."""
FINAL_TRIES: Final = 3
FP16_SPACING: Final = 2.0**-24
"""Of float16 numbers below 2^-14."""


@dataclass(frozen=True, slots=True)
class Integers:
    """The integers of one weight with their steps."""

    q: Tensor
    """int8 [N, K]; int4 values for W4A8_DYNAMIC."""
    step: Tensor
    """float32 [N, 1]."""
    second: Tensor | None = None
    """float32 [N, K / group_size]; W4A8_DYNAMIC only."""


@dataclass(frozen=True, slots=True)
class WeightJob:
    """One weight to be rounded, and what the rounding may look at."""

    weight: Tensor
    """float32 [N, K], after smoothing."""
    scheme: WeightScheme
    dtype: FloatDtype
    """Of the checkpoint to be written."""
    factor: Factor | None
    """Of the input's second moment, after smoothing; COMPENSATED only."""
    bits: float | None
    """Entropy that a sparse weight may have, bits per weight; None means that the step rule decides."""


def plain(job: WeightJob) -> Integers:
    """Nearest integers with the rule's step, repaired so that nothing is lost; or with the step that has the wanted entropy."""
    if job.scheme.quant_type is QuantType.W4A8_DYNAMIC:
        return Integers(*w4a8.quantize_two_stage(job.weight, job.scheme.group_size))
    if job.bits is not None:
        return _with_entropy(job.weight, job.bits, lambda w, step: nearest(w, step, job.scheme))
    step = _storable(lowbit.safe_steps(job.weight, job.scheme), job)
    return Integers(nearest(job.weight, step, job.scheme), step)


def compensated(job: WeightJob) -> Integers:
    """Error-compensated integers: with the wanted entropy where given, else on the rule's (safe) steps."""
    factor = job.factor
    assert factor is not None
    if job.scheme.quant_type is QuantType.W4A8_DYNAMIC:
        step, second = w4a8.fit_second_stage(job.weight, factor.by_column(), job.scheme.group_size)
        return Integers(round_compensated(job.weight, step * second, factor, INT4), step, second)
    if job.bits is not None:
        return _with_entropy(job.weight, job.bits, lambda w, step: round_compensated(w, step, factor, INT8))
    step = _storable(lowbit.safe_steps(job.weight, job.scheme), job)
    return Integers(round_compensated(job.weight, step, factor, lowbit.grid_of(job.scheme)), step)


def reference(job: WeightJob) -> Integers:
    """The integers that the vendor's tool writes, saturation and all."""
    match job.scheme.quant_type:
        case QuantType.W4A8_DYNAMIC:
            return Integers(*w4a8.quantize_two_stage(job.weight, job.scheme.group_size))
        case QuantType.W8A8 | QuantType.W8A8_DYNAMIC:
            return Integers(*lowbit.quantize_in_storage_dtype(job.weight, job.dtype))
        case _:
            step = lowbit.rule_steps(job.weight, job.scheme)
            step = torch.where(step > 0, step, 1.0)  # the vendor divides by zero here
            return Integers(nearest(job.weight, step, job.scheme), step)


def nearest(weight: Tensor, step: Tensor, scheme: WeightScheme) -> Tensor:
    """Nearest integers, rows in chunks. float32 [N, K], float32 [N, 1] -> int8 [N, K]."""
    q = torch.empty(weight.shape, dtype=torch.int8)
    for rows in lowbit.row_chunks(weight):
        q[rows] = quantize_weight(weight[rows], step[rows], lowbit.grid_of(scheme))
    return q


def _with_entropy(weight: Tensor, bits: float, round_to: Callable[[Tensor, Tensor], Tensor]) -> Integers:
    """Balanced steps, as fine as an entropy of `bits` allows.

    The step is found on some of the rows, then all rows are rounded; should they need more bits than the sample did, the step is widened.
    """
    profile = rate.balanced_steps(weight)
    sample, sample_profile = rate.even_rows(weight, RATE_ROWS), rate.even_rows(profile, RATE_ROWS)

    def entropy_at(log_step: float) -> float:
        return entropy_bits(count_int8(round_to(sample, rate.coarse_steps(sample, sample_profile, log_step))))

    log_step = rate.solve_log_step(entropy_at, bits, start=2.0 - bits)
    for _ in range(FINAL_TRIES):
        step = rate.coarse_steps(weight, profile, log_step)
        q = round_to(weight, step)
        excess = entropy_bits(count_int8(q)) - bits
        if excess <= 0:
            break
        log_step += excess + rate.TOLERANCE_BITS
    return Integers(q, step)


def _storable(step: Tensor, job: WeightJob) -> Tensor:
    """Round steps to values that the checkpoint can hold: W8A8 types store them in the model dtype, the others in float32.

    A half-precision step may come out 1/512 smaller than asked for, which moves the largest weight by a quarter of a step. Where
    float16 is coarser than that (below 2^-14), steps are rounded up.
    """
    if job.scheme.quant_type not in (QuantType.W8A8, QuantType.W8A8_DYNAMIC):
        return step
    if job.dtype is FloatDtype.FP16:
        step = step + FP16_SPACING / 2
    return step.to(TORCH_DTYPE[job.dtype]).float()


METHODS: Final[Mapping[Method, Callable[[WeightJob], Integers]]] = {
    Method.PLAIN: plain,
    Method.COMPENSATED: compensated,
    Method.REFERENCE: reference,
}
