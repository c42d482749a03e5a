"""Sums over pieces of two stored weights: how far the real weights are apart, how many integers differ.

Without a compiler at installation torch does what the kernel in _sums.c does, in several passes.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glmq.inspection.scaling import Scaling
from glmq.inspection.weights import CACHE_ELEMENTS, StoredMatrix, row_ranges
from glmq.numerics.metrics import count_int8

try:
    from glmq.inspection import _sums
except ImportError:  # installed without a compiler
    _kernels: tuple[str, ...] = ()
else:
    _kernels = _sums.list_kernels()

KERNELS: Final = _kernels
"""The compiled kernels that this processor runs, fastest first; empty without a compiler."""

LARGEST: Final = torch.finfo(torch.float32).max
_KINDS: Final = {torch.int8: 0, torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""What the kernel calls them."""


class Sums:
    """Sums over rows of one tensor: float32 within a few values, float64 between them."""

    def __init__(self) -> None:
        self.noise = self.a = self.b = self.max_abs = 0.0
        self.changed = 0
        """Integers that differ."""
        self.identical = True
        """All bytes are equal."""
        self.counts = torch.zeros(2, 256, dtype=torch.int64)
        """How often each int8 value occurs on either side; entry i counts the value i - 128."""

    def add(self, a: Tensor, b: Tensor) -> None:
        """Two float32 pieces of one shape; `b` is overwritten."""
        x, y = a.reshape(-1), b.reshape(-1)
        self.a += float(torch.dot(x, x))
        self.b += float(torch.dot(y, y))
        y -= x
        self.noise += float(torch.dot(y, y))
        low, high = torch.aminmax(y)
        self.max_abs = max(self.max_abs, -float(low), float(high))

    def add_any(self, a: Tensor, b: Tensor) -> None:
        """Two float64 pieces of one shape, of any numbers: what `add` cannot sum.

        Equal infinities, and NaN on both sides, do not differ. Any other difference that float32 cannot hold is infinite;
        values that it cannot hold count in no other sum.
        """
        same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(same, 0.0, (b - a).abs())
        difference = torch.where(difference <= LARGEST, difference, math.inf)  # NaN is not <= either
        self.a += float(torch.where(a.abs() <= LARGEST, a, 0.0).square().sum())
        self.b += float(torch.where(b.abs() <= LARGEST, b, 0.0).square().sum())
        self.noise += float(difference.square().sum())
        self.max_abs = max(self.max_abs, float(difference.max()) if difference.numel() else 0.0)

    @property
    def is_finite(self) -> bool:
        """No NaN or infinity was met, and no square left float32; else what was added belongs into `add_any`."""
        return all(map(math.isfinite, (self.noise, self.a, self.b, self.max_abs)))

    def merge(self, other: Sums) -> None:
        """Add the sums over other rows."""
        self.noise += other.noise
        self.a += other.a
        self.b += other.b
        self.max_abs = max(self.max_abs, other.max_abs)
        self.changed += other.changed
        self.identical = self.identical and other.identical
        self.counts += other.counts

    @property
    def cosine(self) -> float:
        """a . b = (a . a + b . b - d . d) / 2; 1 where both vanish, 0 where one does or the difference is infinite."""
        if math.isinf(self.noise):
            return 0.0
        norms = math.sqrt(self.a) * math.sqrt(self.b)
        if norms == 0:
            return 1.0 if self.a == self.b else 0.0
        return min(1.0, (self.a + self.b - self.noise) / 2 / norms)


def sum_rows(a: StoredMatrix, b: StoredMatrix, scaling: Scaling, rows: tuple[int, int]) -> Sums:
    """Read rows first..last (last excluded) of both and sum over them, the scaling taken out of the second.

    May run in several threads at once.
    """
    x, y = a.stored(*rows), b.stored(*rows)
    if KERNELS and x.dtype in _KINDS and y.dtype in _KINDS and _match(a.second, b.second):
        sums = _sum_compiled(a, b, scaling, rows[0], x, y)
    else:
        sums = sum_by_torch(a, b, scaling, rows[0], x, y)
    if not sums.is_finite:
        sums.noise = sums.a = sums.b = sums.max_abs = 0.0
        for start, stop in row_ranges(0, x.shape[0], a.cols, CACHE_ELEMENTS):
            others = _any_values(b, y[start:stop], rows[0] + start)
            sums.add_any(_any_values(a, x[start:stop], rows[0] + start), scaling.undone(others, rows[0] + start))
    return sums


def _any_values(matrix: StoredMatrix, stored: Tensor, first: int) -> Tensor:
    """float64, of float64 weights too, which float32 may not hold."""
    return stored.double() if matrix.step is None else matrix.values(stored, first).double()


def sum_by_torch(a: StoredMatrix, b: StoredMatrix, scaling: Scaling, first: int, x: Tensor, y: Tensor) -> Sums:
    """As `sum_rows`, of rows `x` and `y` that were read from row `first` on."""
    sums = Sums()
    different = int(np.count_nonzero(_bytes(x) != _bytes(y))) if x.dtype == y.dtype else None
    sums.identical = different == 0
    sums.changed = different if different is not None and a.is_integer else 0
    for counts, integers, matrix in zip(sums.counts, (x, y), (a, b), strict=True):
        if matrix.is_integer:
            counts += count_int8(integers)
    for start, stop in row_ranges(0, x.shape[0], a.cols, CACHE_ELEMENTS):
        others = b.values(y[start:stop], first + start)
        sums.add(a.values(x[start:stop], first + start), scaling.undone(others, first + start))
    return sums


def _sum_compiled(a: StoredMatrix, b: StoredMatrix, scaling: Scaling, first: int, x: Tensor, y: Tensor) -> Sums:
    sums, cut = Sums(), slice(first, first + x.shape[0])
    steps_a, steps_b = (None if matrix.step is None else matrix.steps(cut) for matrix in (a, b))
    rows = None if scaling.rows is None else scaling.rows[cut]
    sums.a, sums.b, sums.noise, sums.max_abs, changed = _sums.sum_pair(
        KERNELS[0],
        _bytes(x),
        _KINDS[x.dtype],
        _optional(steps_a),
        1 if steps_a is None else steps_a.shape[1],
        _bytes(y),
        _KINDS[y.dtype],
        _optional(steps_b),
        1 if steps_b is None else steps_b.shape[1],
        _optional(scaling.columns),
        _optional(rows),
        sums.counts.numpy(),
        *x.shape,
    )
    sums.changed = changed if a.is_integer and b.is_integer else 0
    sums.identical = x.dtype == y.dtype and changed == 0
    return sums


def _match(a: Tensor | None, b: Tensor | None) -> bool:
    """The kernel takes groups of one size on both sides, or on one."""
    return a is None or b is None or a.shape == b.shape


def _bytes(values: Tensor) -> NDArray[np.uint8]:
    """The bytes of a contiguous tensor. numpy compares bytes many times faster than torch compares half-precision numbers."""
    return values.reshape(-1).view(torch.uint8).numpy()


def _optional(values: Tensor | None) -> NDArray[np.uint8] | None:
    return None if values is None else _bytes(values.contiguous())
