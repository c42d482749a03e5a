"""A checkpoint whose FP8 weights are read as the float numbers that they stand for.

weight = FP8 value * scale, in float32. A scale is one for the whole weight, one for each row, or one for each block of rows
and columns (of DeepSeek's tools and transformers' `fp8` method: https://huggingface.co/docs/transformers/quantization/finegrained_fp8).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from glmq.checkpoint.reader import Checkpoint
from glmq.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Scales:
    """What one FP8 weight, [rows, columns], is multiplied by."""

    values: Tensor
    """float32 [ceil(rows / block_rows), ceil(columns / block_cols)]."""
    block_rows: int
    block_cols: int

    def rows(self, start: int, stop: int, cols: int) -> Tensor:
        """float32 [stop - start, cols]: the scale of each element in those rows."""
        blocks = torch.arange(start, stop) // self.block_rows
        return self.values[blocks].repeat_interleave(self.block_cols, 1)[:, :cols]


class DequantizedCheckpoint(Checkpoint):
    """A checkpoint of which `read`, `read_rows` and `pieces` give FP8 weights in float32, multiplied by their scales.

    What headers say (`info`, sizes) stays as it is stored, and so does what is hashed.

    Args:
        stored: the checkpoint as it is stored; it may be closed.
        scales: of every FP8 weight, by name.
    """

    def __init__(self, stored: Checkpoint, scales: Mapping[str, Scales]) -> None:
        super().__init__(stored.directory, {path: stored.header(path) for path in stored.files()})
        self._scales = dict(scales)

    def dtype_read(self, name: str) -> str:
        return "F32" if name in self._scales else super().dtype_read(name)

    def read(self, name: str) -> Tensor:
        return self._scaled(name, 0, super().read(name))

    def read_rows(self, name: str, start: int, stop: int, room: Tensor | None = None) -> Tensor:
        return self._scaled(name, start, super().read_rows(name, start, stop, room))

    def _scaled(self, name: str, start: int, values: Tensor) -> Tensor:
        if name not in self._scales:
            return values
        rows, cols = values.shape
        return values.float() * self._scales[name].rows(start, start + rows, cols)


def read_scales(source: Checkpoint, name: str, scale_name: str, block: tuple[int, int]) -> Scales:
    """The scales of FP8 weight `name`.

    Args:
        source: holds both.
        name: of the weight, [N, K].
        scale_name: of its scales.
        block: rows and columns of a block, where they are stored by block.

    Raises:
        CheckpointError: their shape fits none of the three ways, or one is not a positive number.
    """
    rows, cols = source.info(name).shape
    values = source.read(scale_name).float()
    per_block = (-(-rows // block[0]), -(-cols // block[1]))
    if values.numel() == 1:
        found = Scales(values.reshape(1, 1), rows, cols)
    elif tuple(values.shape) == per_block:
        found = Scales(values, *block)
    elif values.numel() == rows and values.shape[0] == rows:
        found = Scales(values.reshape(rows, 1), 1, cols)
    else:
        raise CheckpointError(
            f"{source.file_of(scale_name).name}: tensor {scale_name!r} has shape {tuple(values.shape)}, but {name!r} of "
            f"{rows} x {cols} needs one scale, {rows}, or {per_block[0]} x {per_block[1]}; download the checkpoint again"
        )
    if not bool((values.isfinite() & (values > 0)).all()):
        raise CheckpointError(
            f"{source.file_of(scale_name).name}: tensor {scale_name!r} holds scales that are not positive numbers; "
            "download the checkpoint again"
        )
    return found
