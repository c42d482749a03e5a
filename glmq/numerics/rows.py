"""The rows and columns of a weight: pieces that a processor's cache holds, extremes and squared norms, an even sample."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_WEIGHTS = 1 << 20
"""Weights handled at once, so that temporaries stay in the processor's cache however large the matrix: 4 MiB in float32."""
LEAST_STEP = 2.0**-100
"""A row with a smaller step counts as zeros: times the smallest input scale, 2^-23, it must be a normal float32 number."""


def row_chunks(weight: Tensor) -> Iterator[slice]:
    """Cut the rows of a [N, K] tensor into slices of at most CHUNK_WEIGHTS elements (at least one row)."""
    rows = max(1, CHUNK_WEIGHTS // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        yield slice(start, min(start + rows, weight.shape[0]))


def even_rows(weight: Tensor, count: int) -> Tensor:
    """At most `count` evenly spaced rows. [N, K] -> [<= count, K]."""
    rows = weight.shape[0]
    return weight if rows <= count else weight[torch.linspace(0, rows - 1, count).round().long()]


def row_max(weight: Tensor) -> Tensor:
    """Largest magnitude of each row: [N, K] -> float32 [N, 1]."""
    return torch.maximum(weight.amin(1, keepdim=True).neg(), weight.amax(1, keepdim=True))  # twice as fast as abs()


def column_max(weight: Tensor) -> Tensor:
    """Largest magnitude of each column: [N, K] -> float32 [K]."""
    return torch.maximum(weight.amin(0).neg(), weight.amax(0))


def is_one_number(weight: Tensor) -> bool:
    """Whether all weights are the same: such a matrix is exact on every row's own grid. [N, K]."""
    return bool((weight[0] == weight[0, 0]).all()) and bool((weight == weight[0, 0]).all())


def row_energy(weight: Tensor) -> Tensor:
    """Squared norm of each row, rows in chunks: [N, K] -> float32 [N, 1]."""
    return torch.cat([weight[rows].square().sum(1, keepdim=True) for rows in row_chunks(weight)])


def column_energy(weight: Tensor) -> Tensor:
    """Squared norm of each column, rows in chunks: [N, K] -> float32 [K]."""
    return torch.stack([weight[rows].square().sum(0) for rows in row_chunks(weight)]).sum(0)


def fill_dead_rows(steps: Tensor) -> Tensor:
    """Give rows with a step below LEAST_STEP (all-zero rows) the largest of the others, or 1 if there is none. [N, 1], both."""
    largest = steps.max()
    return torch.where(steps >= LEAST_STEP, steps, largest if largest >= LEAST_STEP else torch.ones(()))
