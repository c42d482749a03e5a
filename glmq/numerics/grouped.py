"""Steps of weight-only types: one for each group of a row's input columns.

    w ~= q * step[n, k // group_size],   q in -8..7 or -128..127

The grids have one integer more below zero than above, so steps divide the largest magnitude by 7.5 or 127.5: on either side
it is off by half a step at most. compressed-tensors chooses symmetric scales in the same way.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from glmq.numerics.rows import LEAST_STEP, row_chunks
from glmq.spec import IntGrid

SHRINKS: Final = tuple(1 - less / 20 for less in range(5))
"""The shares of the step that reaches a group's maximum that are tried: cutting one weight may make all others finer.

On the embedded model in 4 bits and groups of 64, with error compensation: mean output error 0.0228 against 0.0232 on the
whole steps (0.0521 rounded to nearest), and smaller shares gain nothing more. 8 bits do not need it."""


def group_max_steps(weight: Tensor, group_size: int, grid: IntGrid) -> Tensor:
    """The step that just reaches the largest magnitude of each group; 1 for a group of zeros, or below LEAST_STEP.

    Args:
        weight: float32 [N, K], K a multiple of group_size.
        group_size: columns of a group.
        grid: the integers.

    Returns:
        float32 [N, K / group_size], positive.
    """
    low, high = weight.reshape(weight.shape[0], -1, group_size).aminmax(dim=2)  # [N, K] -> [N, G, g] -> [N, G]
    steps = torch.maximum(-low, high) / ((grid.qmax - grid.qmin) / 2)
    return torch.where(steps >= LEAST_STEP, steps, 1.0)


def fit_group_steps(weight: Tensor, importance: Tensor, group_size: int, grid: IntGrid) -> Tensor:
    """The steps with the least weighted rounding error, among SHRINKS of those that reach the groups' maxima.

    Args:
        weight: float32 [N, K], K a multiple of group_size.
        importance: float32 [K]: cost of a squared unit of error in column k.
        group_size: columns of a group.
        grid: the integers.

    Returns:
        float32 [N, K / group_size], positive.
    """
    best = group_max_steps(weight, group_size, grid)
    cost_of = importance.reshape(1, -1, group_size)
    for rows in row_chunks(weight):
        grouped = weight[rows].reshape(-1, best.shape[1], group_size)
        reach = best[rows].clone()
        least = torch.full_like(reach, torch.inf)
        for shrink in SHRINKS:
            step = (reach * shrink)[:, :, None]
            q = (grouped / step).round_().clamp_(grid.qmin, grid.qmax)
            cost = q.mul_(step).sub_(grouped).square_().mul_(cost_of).sum(2)
            better = cost < least
            best[rows] = torch.where(better, step[:, :, 0], best[rows])
            least = torch.where(better, cost, least)
    return best


def round_groups(weight: Tensor, step: Tensor, grid: IntGrid) -> Tensor:
    """Nearest integers, rows in chunks. float32 [N, K], float32 [N, G] -> int8 [N, K]."""
    q = torch.empty(weight.shape, dtype=torch.int8)
    for rows in row_chunks(weight):
        q[rows] = (weight[rows] / expand_groups(step[rows], weight.shape[1])).round_().clamp_(grid.qmin, grid.qmax)
    return q


def expand_groups(step: Tensor, columns: int) -> Tensor:
    """The step of every column: [N, G] -> [N, columns]; one group broadcasts, so it stays [N, 1]."""
    return step if step.shape[1] == 1 else step.repeat_interleave(columns // step.shape[1], dim=1)
