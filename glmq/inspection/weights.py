"""The real weights of a linear, float or integer, a few rows at a time; and what the norm in front does to its columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from glmq.checkpoint.ascend import decode_deq_scale, unpack_int4
from glmq.checkpoint.compressed_tensors import WORD_BITS, packed_bits, unpack_words
from glmq.checkpoint.linears import stored_weight
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import CheckpointError

PIECE_ELEMENTS: Final = 2**20
"""Elements that are read at a time."""
CACHE_ELEMENTS: Final = 2**17
"""Elements that are computed with at a time: a few float32 arrays of them fit into the processor's cache."""


class StoredMatrix:
    """A 2-D weight of a checkpoint, float or integer with steps.

    Args:
        checkpoint: not compressed.
        name: of the linear (or embedding), without `.weight`.

    Raises:
        CheckpointError: the tensors of an integer weight are missing or contradict each other.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, stored_weight(name, checkpoint)
        info = checkpoint.info(self._name)
        self._words: Final = self._name.endswith(".weight_packed")
        self.is_integer: Final = info.dtype == "I8" or self._words
        if len(info.shape) != 2:
            raise CheckpointError(f"{self._name}: has shape {list(info.shape)}, a matrix is wanted")
        self.dtype: Final = info.dtype
        self.rows, self.cols = info.shape
        self.step: Tensor | None = None
        """float32 [rows, 1] of an integer weight."""
        self.second: Tensor | None = None
        """float32 [rows, groups] of a weight with steps by group: what `step` is multiplied by."""
        self.bits = 8
        """Of an integer weight: 8 or 4."""
        self._packed = False
        if self.is_integer:
            self._read_steps(name)

    def _read_steps(self, name: str) -> None:
        checkpoint = self._checkpoint
        if self._words:
            self._read_words(name)
            return
        if f"{name}.deq_scale" in checkpoint:
            deq = decode_deq_scale(f"{name}.deq_scale", checkpoint.read(f"{name}.deq_scale"))
            scale = checkpoint.read(f"{name}.input_scale").float()
            if scale.numel() != 1:
                raise CheckpointError(f"{name}.input_scale: has shape {list(scale.shape)}, one number is wanted")
            self.step = (deq / scale).reshape(-1, 1)
        else:
            self.step = checkpoint.read(f"{name}.weight_scale").float().reshape(-1, 1)
        if f"{name}.weight_scale_second" in checkpoint:
            self.second, self.bits = checkpoint.read(f"{name}.weight_scale_second").float(), 4
        self._packed = self.second is not None and 2 * self.rows == self.step.shape[0]
        self.rows *= 2 if self._packed else 1
        if self.step.shape[0] != self.rows or (self.second is not None and not self._is_grouped(self.second)):
            raise CheckpointError(
                f"{self._name}: {self.rows} x {self.cols} integers have {self.step.shape[0]} row steps"
                + ("" if self.second is None else f" and second-stage scales {list(self.second.shape)}")
            )

    def _read_words(self, name: str) -> None:
        self.bits = packed_bits(name, self._checkpoint)
        self.cols = self.cols * WORD_BITS // self.bits
        self.step, self.second = torch.ones(self.rows, 1), self._checkpoint.read(f"{name}.weight_scale").float()
        if not self._is_grouped(self.second):
            raise CheckpointError(
                f"{self._name}: {self.rows} x {self.cols} integers have steps {list(self.second.shape)}, wanted one for each "
                "row or for equal groups of its columns"
            )

    def _is_grouped(self, scales: Tensor) -> bool:
        """Whether these are numbers for equal groups of the columns of each row."""
        if scales.dim() != 2 or scales.shape[0] != self.rows:
            return False
        groups = scales.shape[1]
        return groups > 0 and self.cols % groups == 0

    def stored(self, start: int, stop: int) -> Tensor:
        """Rows as integers or floats: packed ones unpacked, one int8 a weight; `start` and `stop` even."""
        if self._words:
            return unpack_words(self._checkpoint.read_rows(self._name, start, stop), self.bits)
        if self._packed:
            return unpack_int4(self._checkpoint.read_rows(self._name, start // 2, stop // 2))
        return self._checkpoint.read_rows(self._name, start, stop)

    def values(self, stored: Tensor, start: int) -> Tensor:
        """Real weights, a fresh float32 [n, cols], of `stored` rows that begin at `start`."""
        if self.step is None:
            return stored.float().clone() if stored.dtype == torch.float32 else stored.float()
        steps = self.steps(slice(start, start + stored.shape[0]))
        if self.second is None:
            return stored.float().mul_(steps)
        grouped = stored.float().reshape(stored.shape[0], steps.shape[1], -1)  # [n, K] -> [n, G, g]
        return grouped.mul_(steps[:, :, None]).reshape(stored.shape)

    def steps(self, rows: slice) -> Tensor:
        """float32 [n, G] of an integer weight: what its integers are multiplied by, one step for each group of columns."""
        assert self.step is not None
        return self.step[rows] if self.second is None else self.second[rows] * self.step[rows]

    def pieces(self) -> list[tuple[int, int]]:
        """Row ranges of about PIECE_ELEMENTS elements, their borders even."""
        return list(row_ranges(0, self.rows, self.cols, PIECE_ELEMENTS))


def row_ranges(start: int, stop: int, cols: int, elements: int) -> Iterator[tuple[int, int]]:
    """Cuts of the rows start..stop of about that many elements each; their borders are an even number of rows apart."""
    height = max(2, elements // max(1, cols) // 2 * 2)
    return ((row, min(row + height, stop)) for row in range(start, stop, height))


def column_scales(before: Checkpoint, after: Checkpoint, norm: str | None) -> Tensor | None:
    """What smoothing multiplied the columns of `after`'s linears by: norm of `before` / norm of `after`.

    Returns:
        float32 [K]; 1 where either norm is zero or not finite; None where there is no norm or nothing was scaled.
    """
    name = f"{norm}.weight"
    if norm is None or name not in before or name not in after:
        return None
    old, new = before.read(name).float(), after.read(name).float()
    if old.shape != new.shape or is_same(old, new):
        return None
    return torch.where(tells_scale(old) & tells_scale(new), old / new, 1.0)


def tells_scale(norm: Tensor) -> Tensor:
    """Whether each value of a norm can be divided by another: bool, false where it is zero or not finite."""
    return (norm != 0) & norm.isfinite()


def is_same(a: Tensor, b: Tensor) -> bool:
    """Both hold the same bytes, NaN among them or not."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))
