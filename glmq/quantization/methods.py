"""How weights become integers. Two ways lead there, and quantize_group (layer.py) chooses:

METHODS, one entry per Method, rounds one linear on steps that follow from its scheme: linears of every type that is not
sparse, and sparse ones by the vendor's rule itself (plain and reference, where no target of bits is given).

`spend_bits` rounds the sparse linears of one input together, on steps as fine as given entropies allow: always with the
compensated method, and with plain rounding towards a target of bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from glmq.numerics import grouped, lowbit, rate, w4a8
from glmq.numerics.affine import TORCH_DTYPE, quantize_weight
from glmq.numerics.gptq import Rounded, round_best, round_compensated
from glmq.numerics.hessian import Factor
from glmq.numerics.metrics import count_int8, entropy_bits
from glmq.numerics.rows import LEAST_STEP, even_rows, fill_dead_rows, row_chunks, row_max
from glmq.spec import INT4, INT8, FloatDtype, IntGrid, Method, WeightScheme

RATE_ROWS: Final = 512
"""Rows, evenly spaced, on which the step for a wanted entropy is found."""
SAMPLE_MARGIN: Final = 0.01
"""Bits left unspent on the sample, so that all rows seldom need more than was found there: a second pass costs far more."""
FINAL_TRIES: Final = 3
REACHES: Final = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85)
"""Shares of a row's maximum that the first of two stages may reach."""
SWEEPS: Final = 1
"""Of coordinate descent over 4-bit integers."""
WIDENING_TRIES: Final = 4
FP16_SPACING: Final = 2.0**-24
"""Of float16 numbers below 2^-14."""


@dataclass(frozen=True, slots=True)
class Integers:
    """The integers of one weight with their steps."""

    q: Tensor
    """int8 [N, K]; int4 values for two-stage types."""
    step: Tensor
    """float32 [N, 1]; [N, K / group_size] of a type with groups in one stage."""
    second: Tensor | None = None
    """float32 [N, K / group_size]; two-stage types only."""


@dataclass(frozen=True, slots=True)
class WeightJob:
    """One weight to round, with everything that its rounding depends on."""

    weight: Tensor
    """float32 [N, K], after smoothing."""
    scheme: WeightScheme
    dtype: FloatDtype
    """Of the checkpoint to be written."""
    factor: Factor | None
    """Of the input's second moment, after smoothing; COMPENSATED only."""
    bits: float = rate.INT8_BITS
    """Entropy in bits per weight that the integers should not exceed; COMPENSATED only."""


def plain(job: WeightJob) -> Integers:
    """Nearest integers with the rule's step, widened where it would cut a weight (`safe_steps`)."""
    if job.scheme.quant_type.spec.two_stage:
        return Integers(*w4a8.quantize_two_stage(job.weight, job.scheme.group_size))
    if job.scheme.group_size:
        grid = lowbit.grid_of(job.scheme)
        step = _storable(grouped.group_max_steps(job.weight, job.scheme.group_size, grid), job)
        return Integers(grouped.round_groups(job.weight, step, grid), step)
    step = _storable(lowbit.safe_steps(job.weight, job.scheme), job)
    return Integers(nearest(job.weight, step, job.scheme), step)


def compensated(job: WeightJob) -> Integers:
    """Error-compensated integers on steps that reach each row's maximum, widened until they have no more than the job's bits.

    Not for sparse types, whose linears `spend_bits` rounds.
    """
    factor = job.factor
    assert factor is not None
    assert not job.scheme.quant_type.spec.is_sparse
    if job.scheme.quant_type.spec.two_stage:
        return _in_two_stages(job, factor)
    if job.scheme.group_size:
        return _in_groups(job, factor)
    step = lowbit.safe_steps(job.weight, job.scheme)
    rows, steps = even_rows(job.weight, RATE_ROWS), even_rows(step, RATE_ROWS)
    wider = _widening(job.bits, lambda wider: round_compensated(rows, steps * wider, factor, INT8))
    step = _storable(step * wider, job)
    return Integers(round_compensated(job.weight, step, factor, INT8), step)


def _in_groups(job: WeightJob, factor: Factor) -> Integers:
    """Integers on steps of their own for each group of columns."""
    grid = lowbit.grid_of(job.scheme)
    step = grouped.fit_group_steps(job.weight, factor.by_column(), job.scheme.group_size, grid)
    sweeps = SWEEPS if grid == INT4 else 0

    def round_rows(weight: Tensor, steps: Tensor) -> Tensor:
        return round_best(weight, [steps], factor, grid, sweeps=sweeps).q

    rows, steps = even_rows(job.weight, RATE_ROWS), even_rows(step, RATE_ROWS)
    step = _storable(step * _widening(job.bits, lambda wider: round_rows(rows, steps * wider)), job)
    return Integers(round_rows(job.weight, step), step)


def _in_two_stages(job: WeightJob, factor: Factor) -> Integers:
    """Integers of both stages; each row's first stage reaches its maximum or, if that loses less, a little short of it.

    How the weights of a group come to lie on so coarse a grid is chance, and two chances are better than one. Which second
    reach to try is found on some of the rows.
    """

    def fit(weight: Tensor, reach: float) -> tuple[Tensor, Tensor]:
        return w4a8.fit_second_stage(weight, factor.by_column(), job.scheme.group_size, reach=reach)

    def round_rows(weight: Tensor, fitted: Sequence[tuple[Tensor, Tensor]], wider: float, *, sweeps: int) -> Rounded:
        return round_best(weight, [s * wider * second for s, second in fitted], factor, INT4, sweeps=sweeps, weigh=True)

    rows = even_rows(job.weight, RATE_ROWS)
    sampled = [fit(rows, reach) for reach in REACHES]
    whole, *shorter = (round_rows(rows, [one], 1.0, sweeps=0).loss for one in sampled)
    best = 1 + int(torch.stack([torch.minimum(whole, loss).sum() for loss in shorter]).argmin())
    tried = [sampled[0], sampled[best]]
    wider = _widening(job.bits, lambda wider: round_rows(rows, tried, wider, sweeps=SWEEPS).q)
    fitted = [fit(job.weight, reach) for reach in (REACHES[0], REACHES[best])]
    found = round_rows(job.weight, fitted, wider, sweeps=SWEEPS)
    steps, seconds = (torch.stack(both) for both in zip(*fitted, strict=True))
    each = torch.arange(len(job.weight))
    return Integers(found.q, steps[found.choice, each] * wider, seconds[found.choice, each])


def _widening(limit: float, round_at: Callable[[float], Tensor]) -> float:
    """The factor by which steps must grow for the integers to have at most that entropy; 1 if they have so already.

    A doubled step saves about one bit.

    Args:
        limit: bits per weight.
        round_at: the integers of some of the rows, int8, on steps that many times as wide.
    """
    if limit >= rate.INT8_BITS:
        return 1.0
    log_step = 0.0
    for _ in range(WIDENING_TRIES):
        excess = entropy_bits(count_int8(round_at(2.0**log_step))) - (limit - SAMPLE_MARGIN)
        if excess <= 0:
            break
        log_step += excess
    return float(2.0**log_step)


def reference(job: WeightJob) -> Integers:
    """The integers that the vendor's tool writes, which cuts what lies beyond the grid."""
    spec = job.scheme.quant_type.spec
    if spec.two_stage:
        return Integers(*w4a8.quantize_two_stage(job.weight, job.scheme.group_size))
    if spec.step_in_model_dtype:
        return Integers(*lowbit.quantize_in_storage_dtype(job.weight, job.dtype))
    step = lowbit.rule_steps(job.weight, job.scheme)
    # A row without a bulk has step 0, and the vendor divides by it. Its own maximum keeps the row.
    step = torch.where(step > 0, step, row_max(job.weight) / lowbit.BULK)
    step = torch.where(step >= LEAST_STEP, step, 1.0)
    return Integers(nearest(job.weight, step, job.scheme), step)


def nearest(weight: Tensor, step: Tensor, scheme: WeightScheme) -> Tensor:
    """Nearest integers of the scheme's grid. float32 [N, K], float32 [N, 1] -> int8 [N, K]."""
    return _nearest_on(weight, step, lowbit.grid_of(scheme))


def _nearest_on(weight: Tensor, step: Tensor, grid: IntGrid) -> Tensor:
    """Nearest integers of a grid, rows in chunks."""
    q = torch.empty(weight.shape, dtype=torch.int8)
    for rows in row_chunks(weight):
        q[rows] = quantize_weight(weight[rows], step[rows], grid)
    return q


def spend_bits(
    weights: Sequence[Tensor], bits: Sequence[float], factor: Factor | None, sensitivities: Sequence[Tensor | None]
) -> list[Integers]:
    """Integers of the sparse linears of one group, with balanced steps (rate.py) as fine as the given entropies allow.

    The steps are found on some of the rows, then all rows are rounded; a linear that needs more bits than its sample did
    gets a wider step. The linears are rounded together: their rows do not see each other, and one pass costs less than three.

    Args:
        weights: float32 [N_i, K], after smoothing.
        bits: entropy that each may have, bits per weight.
        factor: of the input's second moment, after smoothing; None rounds to nearest.
        sensitivities: float32 [N_i] of each, or None: all rows count alike.
    """
    profiles = [rate.balanced_steps(w, s) for w, s in zip(weights, sensitivities, strict=True)]
    samples = [even_rows(weight, RATE_ROWS) for weight in weights]
    sample_profiles = [even_rows(profile, RATE_ROWS) for profile in profiles]

    def sample_entropies(log_steps: Sequence[float], factor: Factor | None) -> list[float]:
        steps = [rate.coarse_steps(w, p, s) for w, p, s in zip(samples, sample_profiles, log_steps, strict=True)]
        return [entropy_bits(count_int8(q)) for q in _round_together(samples, steps, factor)]

    wanted = [b - (SAMPLE_MARGIN if w.shape[0] > RATE_ROWS else 0.0) for w, b in zip(weights, bits, strict=True)]
    log_steps = rate.solve_log_steps(lambda steps: sample_entropies(steps, None), wanted, [2.0 - b for b in bits])
    if factor is not None:  # what nearest rounding needs is a close first guess
        log_steps = rate.solve_log_steps(lambda steps: sample_entropies(steps, factor), wanted, log_steps)
    found: dict[int, Integers] = {}
    for last in (False,) * (FINAL_TRIES - 1) + (True,):
        open_ones = [i for i in range(len(weights)) if i not in found]
        steps = [rate.coarse_steps(weights[i], profiles[i], log_steps[i]) for i in open_ones]
        rounded = _round_together([weights[i] for i in open_ones], steps, factor)
        for i, q, step in zip(open_ones, rounded, steps, strict=True):
            excess = entropy_bits(count_int8(q)) - bits[i]
            if excess <= 0 or last:
                found[i] = Integers(q, step) if bool(q.any()) else _kept(weights[i], factor)
            log_steps[i] += excess + rate.TOLERANCE_BITS
        if len(found) == len(weights):
            break
    return [found[i] for i in range(len(weights))]


def _kept(weight: Tensor, factor: Factor | None) -> Integers:
    """A linear of which no weight is left for its bits, with each row's largest weight at the end of the bulk instead.

    Weights of one magnitude and sign have an entropy of 0 bits at any step, and no step is too wide for that.
    """
    step = fill_dead_rows(row_max(weight) / lowbit.BULK)
    (q,) = _round_together([weight], [step], factor)
    return Integers(q, step)


def _round_together(weights: Sequence[Tensor], steps: Sequence[Tensor], factor: Factor | None) -> list[Tensor]:
    """int8 [N_i, K] of each weight, in one pass over the columns."""
    if factor is None:
        return [_nearest_on(weight, step, INT8) for weight, step in zip(weights, steps, strict=True)]
    if len(weights) == 1:
        return [round_compensated(weights[0], steps[0], factor, INT8)]
    q = round_compensated(torch.cat(list(weights)), torch.cat(list(steps)), factor, INT8)
    return list(q.split([weight.shape[0] for weight in weights]))


def _storable(step: Tensor, job: WeightJob) -> Tensor:
    """Round steps to what the checkpoint can hold: some types store them in the model dtype, the others in float32.

    A half-precision step may come out 1/512 smaller than asked for, which moves the largest weight by a quarter of a
    step. Where float16 is coarser than that (below 2^-14), steps are rounded up.
    """
    if not job.scheme.quant_type.spec.step_in_model_dtype:
        return step
    if job.dtype is FloatDtype.FP16:
        step = (step + FP16_SPACING / 2).clamp_min(FP16_SPACING)  # half a spacing alone would be rounded down, to 0
    return step.to(TORCH_DTYPE[job.dtype]).float()


METHODS: Final[Mapping[Method, Callable[[WeightJob], Integers]]] = {
    Method.PLAIN: plain,
    Method.COMPENSATED: compensated,
    Method.REFERENCE: reference,
}
