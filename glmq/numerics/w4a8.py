"""Two-stage weights of W4A8_DYNAMIC: int4 per group of columns, on top of int8 per row.

    w ~= q4 * second[n, k // group_size] * step[n],   q4 in -8..7, second a whole number from 1 to 17

The first stage is an int8 grid with 119 = 7 * 17 steps to the row's maximum; the second multiplies groups of it, so
that q4 * second stays an int8 value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glmq.numerics.rows import fill_dead_rows, row_chunks, row_max
from glmq.spec import INT4

FIRST_STAGE = 119
"""Steps from zero to a row's maximum in the first stage: 7 * 17."""
BULK = 7


def quantize_two_stage(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two-stage integers by nearest rounding, exactly as the vendor's tool makes them.

    step = max|w| / 119; w8 = round(w / step); second = round(max|w8| / 7) of each group, at least 1;
    q = clamp(round(w8 / second), -8, 7). Rounding half to even.

    Args:
        weight: float32 [N, K], K a multiple of group_size.
        group_size: columns of a group.

    Returns:
        int8 [N, K] (values -8..7), float32 [N, 1] steps, float32 [N, K / group_size] whole-numbered second scales.
    """
    n, k = weight.shape
    step = fill_dead_rows(row_max(weight) / FIRST_STAGE)
    q = torch.empty(n, k, dtype=torch.int8)
    second = torch.empty(n, k // group_size)
    for rows in row_chunks(weight):
        w8 = (weight[rows] / step[rows]).round_().reshape(-1, k // group_size, group_size)  # [n, K] -> [n, G, g]
        second[rows] = (w8.abs().amax(2) / BULK).round_().clamp_min_(1)
        q4 = (w8 / second[rows][:, :, None]).round_().clamp_(INT4.qmin, INT4.qmax)
        q[rows] = q4.reshape(-1, k).to(torch.int8)
    return q, step, second


def fit_second_stage(
    weight: Tensor, importance: Tensor, group_size: int, *, reach: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Steps of both stages with the least weighted rounding error.

    The first stage is `reach` times the row's maximum / 119; the second-stage scale of each group is the whole number among
    those from the one that just reaches the group's maximum down to its half that loses least, clamping included.

    Args:
        weight: float32 [N, K], K a multiple of group_size.
        importance: float32 [K]: cost of a squared unit of error in column k.
        group_size: columns of a group.
        reach: at most 1; the second stage still ends at 17.

    Returns:
        float32 [N, 1] steps and float32 [N, K / group_size] whole-numbered second scales.
    """
    n, k = weight.shape
    step = fill_dead_rows(row_max(weight) * reach / FIRST_STAGE)
    second = torch.empty(n, k // group_size)
    cost_of = importance.reshape(1, k // group_size, group_size)
    for rows in row_chunks(weight):
        w8 = (weight[rows] / step[rows]).reshape(-1, k // group_size, group_size)  # [n, K] -> [n, G, g]
        most = (w8.abs().amax(2) / BULK).ceil_().clamp_(1, FIRST_STAGE // BULK)
        best, least = most.clone(), torch.full_like(most, torch.inf)
        for less in range(FIRST_STAGE // BULK // 2 + 1):
            scale = (most - less).clamp_min_(1)
            q4 = (w8 / scale[:, :, None]).round_().clamp_(INT4.qmin, INT4.qmax)
            cost = q4.mul_(scale[:, :, None]).sub_(w8).square_().mul_(cost_of).sum(2)
            better = cost < least
            best, least = torch.where(better, scale, best), torch.where(better, cost, least)
        second[rows] = best
    return step, second
