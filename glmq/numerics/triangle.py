"""Symmetric matrices stored by their upper triangle."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

MIRROR_ROWS: Final = 512
"""Rows of a second moment that are mirrored together."""


def pack_triangle(matrix: Tensor) -> Tensor:
    """The upper triangle by rows of a symmetric [K, K]: [K * (K + 1) / 2]."""
    size = matrix.shape[0]
    packed = torch.empty(size * (size + 1) // 2, dtype=matrix.dtype)
    source, target = matrix.numpy(), packed.numpy()  # torch takes ten times as long to cut a row
    start = 0
    for row in range(size):
        target[start : start + size - row] = source[row, row:]
        start += size - row
    return packed


def unpack_triangle(packed: Tensor, size: int) -> Tensor:
    """The symmetric [K, K] whose upper triangle by rows is `packed`."""
    matrix = torch.zeros(size, size, dtype=packed.dtype)
    source, target = packed.numpy(), matrix.numpy()  # torch takes ten times as long to cut a row
    start = 0
    for row in range(size):
        target[row, row:] = source[start : start + size - row]
        start += size - row
    for begin in range(
        0, size, MIRROR_ROWS
    ):  # piece by piece: no second matrix, and the transposed reads stay in cache
        end = begin + MIRROR_ROWS
        matrix[end:, begin:end] = matrix[begin:end, end:].T
        corner = matrix[begin:end, begin:end]
        corner += corner.triu(1).T
    return matrix
