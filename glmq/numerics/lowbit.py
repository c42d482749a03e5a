"""The weight step of each row: the rules of the vendor's tool, exactly, and in a form that loses no weight.

A sparse (W8A8S) row keeps its bulk in -7..7 and its outliers in larger integers of the same step. What differs is where
the bulk ends:

    SIGMA            largest |w| <= sigma_factor * std(|w|) of the row (sample standard deviation)
    FRACTION         k-th largest |w| of the row, k = int(fraction * K)
    TENSOR_FRACTION  largest |w| of the row up to the k-th largest |w| of the tensor, k = int(fraction * N * K)
    ROW_MAX          largest |w| of the row, spread over 127 steps instead of 7

The exact rules give a zero step to rows without a bulk and cut outliers beyond 127 steps; the safe form repairs both.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from glmq.errors import UsageError
from glmq.numerics.affine import TORCH_DTYPE, quantize_weight
from glmq.numerics.rows import LEAST_STEP, fill_dead_rows, row_chunks, row_max
from glmq.spec import INT4, INT8, INT8_SYMMETRIC, FloatDtype, IntGrid, StepRule, WeightScheme

BULK: Final = 7
"""Largest magnitude of the integers of a row's bulk."""


def kth_largest(x: Tensor, k: int) -> float:
    """The k-th largest (k >= 1) of the magnitudes of `x`, exactly, in two counting passes over the bits.

    Non-negative float32 numbers order as their bit patterns do, so the upper 16 bits are counted first, then the lower
    16 bits within the one bucket that holds the answer. A sort of a large matrix would need gigabytes.

    Args:
        x: float32 [N, K].
        k: 1..N*K.
    """
    upper = torch.zeros(1 << 16, dtype=torch.int64)
    for rows in row_chunks(x):
        upper += torch.bincount(x[rows].abs().view(torch.int32).reshape(-1) >> 16, minlength=1 << 16)
    above = upper.flip(0).cumsum(0).flip(0)  # above[i]: how many lie in bucket i or higher
    bucket = int((above >= k).nonzero()[-1])
    rest = k - (int(above[bucket]) - int(upper[bucket]))
    lower = torch.zeros(1 << 16, dtype=torch.int64)
    for rows in row_chunks(x):
        bits = x[rows].abs().view(torch.int32).reshape(-1)
        lower += torch.bincount(bits[bits >> 16 == bucket] & 0xFFFF, minlength=1 << 16)
    above = lower.flip(0).cumsum(0).flip(0)
    low_bits = int((above >= rest).nonzero()[-1])
    return float(torch.tensor([bucket << 16 | low_bits], dtype=torch.int32).view(torch.float32))


def rule_steps(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """The step of every row, exactly by the scheme's rule; zero where the rule finds no bulk.

    Args:
        weight: float32 [N, K], after smoothing.
        scheme: which rule, with its numbers.

    Returns:
        float32 [N, 1].

    Raises:
        UsageError: FRACTION of a row (or tensor) so short that int(fraction * size) is 0.
    """
    if scheme.step_rule is StepRule.ROW_MAX:
        return row_max(weight) / INT8.qmax
    if not scheme.keep_outliers:
        return row_max(weight) / BULK
    steps = torch.empty(weight.shape[0], 1)
    match scheme.step_rule:
        case StepRule.SIGMA:
            for rows in row_chunks(weight):
                a = weight[rows].abs()
                threshold = scheme.sigma_factor * a.std(1, keepdim=True)
                steps[rows] = _largest_up_to(a, threshold) / BULK
        case StepRule.FRACTION:
            k = _share(scheme.fraction, weight.shape[1], "a row")
            for rows in row_chunks(weight):
                steps[rows] = weight[rows].abs().topk(k, dim=1).values[:, -1:] / BULK
        case StepRule.TENSOR_FRACTION:
            threshold = torch.tensor(kth_largest(weight, _share(scheme.fraction, weight.numel(), "a tensor")))
            for rows in row_chunks(weight):
                steps[rows] = _largest_up_to(weight[rows].abs(), threshold) / BULK
    return steps


def safe_steps(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """The step of every row by the scheme's rule, repaired: never zero, and no weight beyond 127 steps.

    A row in which the rule finds no bulk (constant magnitude, one huge weight) takes its own maximum as the bulk; a row
    whose largest weight lies beyond 127 steps gets the step that reaches it; an all-zero row gets the largest step of
    the tensor, or 1 where the whole tensor is zero.

    Args:
        weight: float32 [N, K], after smoothing.
        scheme: which rule, with its numbers.

    Returns:
        float32 [N, 1], positive.
    """
    top = row_max(weight)
    short = int(scheme.fraction * weight.shape[1]) == 0
    if scheme.step_rule is StepRule.FRACTION and scheme.keep_outliers and short:
        steps = top / BULK  # rows shorter than 1 / fraction have no outliers to spare
    else:
        steps = rule_steps(weight, scheme)
    steps = torch.where(steps > 0, steps, top / BULK)
    return fill_dead_rows(torch.maximum(steps, top / INT8.qmax))


def grid_of(scheme: WeightScheme) -> IntGrid:
    """The integers of the scheme, in one stage: those of 4 bits, or the vendor's int8 (co_sparse never writes -128)."""
    if scheme.quant_type.spec.weight_bits < 8 and not scheme.quant_type.spec.is_sparse:
        return INT4
    return INT8_SYMMETRIC if scheme.step_rule is StepRule.TENSOR_FRACTION else INT8


def quantize_in_storage_dtype(weight: Tensor, dtype: FloatDtype) -> tuple[Tensor, Tensor]:
    """W8A8 exactly as the vendor's tool makes it: step = max|w| / 127 in the model dtype, and the division in it too.

    Args:
        weight: float32 [N, K], after smoothing.
        dtype: the model dtype.

    Returns:
        int8 [N, K] and the float32 [N, 1] steps (values of the model dtype); an all-zero row has step 0 replaced by 1.
    """
    half = weight.to(TORCH_DTYPE[dtype])
    step = half.abs().amax(1, keepdim=True) / INT8.qmax
    step = torch.where(step.float() >= LEAST_STEP, step, torch.ones_like(step))
    return quantize_weight(half, step, INT8), step.float()


def _largest_up_to(a: Tensor, threshold: Tensor) -> Tensor:
    """Largest magnitude of each row that is not above the threshold, else 0: [N, K] -> [N, 1]."""
    return torch.where(a <= threshold, a, 0.0).amax(1, keepdim=True)


def _share(fraction: float, size: int, what: str) -> int:
    k = int(fraction * size)
    if k == 0:
        raise UsageError(
            f"fraction {fraction} of {what} of {size} weights is less than one weight: use a larger fraction, "
            "or another method"
        )
    return k
