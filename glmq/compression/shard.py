"""The tensor-parallel split as data: each tensor of a rank is a stack of slices of the un-sharded checkpoint's tensors.

`layouts.py` says which slices stand under which name for each serving engine. Here is what a slice is, which world sizes a
model allows, and how the values of a tensor are read: by row ranges, a few dozen MiB at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glmq.checkpoint.header import DTYPE_BYTES
from glmq.checkpoint.layout import TensorSpec
from glmq.checkpoint.reader import PIECE_BYTES, Checkpoint, torch_dtype
from glmq.engines import Engine
from glmq.errors import CheckpointError, ModelError, UsageError
from glmq.model.config import ModelConfig

_CODES: Final = {"deq_scale": "I64", "quant_bias": "I32", "input_offset": "I8"}
"""Stored dtype by suffix; a quantized `.weight` is I8, everything else F16."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A block of a source tensor seen as [rows, columns], dimensions after the first flattened; or a block of zeros."""

    name: str | None
    """Of the source tensor; None for zeros."""
    row_start: int
    row_stop: int
    col_start: int
    col_stop: int

    @property
    def rows(self) -> int:
        return self.row_stop - self.row_start

    @property
    def cols(self) -> int:
        return self.col_stop - self.col_start


@dataclass(frozen=True, slots=True)
class RankTensor:
    """One tensor of one rank, before compression."""

    spec: TensorSpec
    slices: tuple[Slice, ...]
    """Stacked along dimension 0; the values are cast to the spec's dtype."""

    @property
    def is_matrix(self) -> bool:
        """The weight of a quantized linear: what the codec compresses."""
        return self.spec.dtype == "I8" and self.spec.name.endswith(".weight")

    @property
    def source(self) -> str:
        """The first source tensor that the values come from; empty if they are all zeros."""
        return next((part.name for part in self.slices if part.name is not None), "")


def check_world(config: ModelConfig, world: int, engine: Engine) -> None:
    """Raise UsageError unless the model can be split over `world` ranks of that engine.

    The sentence has the numbers and what works.
    """
    problem = _world_problem(config, world, engine)
    if problem is not None:
        allowed = ", ".join(
            str(size) for size in engine.spec.world_sizes if _world_problem(config, size, engine) is None
        )
        raise UsageError(f"--tp {world}: {problem}; world sizes that work for this model: {allowed}")


def _world_problem(config: ModelConfig, world: int, engine: Engine) -> str | None:
    if world not in engine.spec.world_sizes:
        return f"{world} is not a world size that the serving engine is known to load"
    counts = {
        "attention heads": config.heads,
        "rows of the vocabulary": config.vocab_size,
        "rows of gate and up": config.intermediate_size,
        "vision heads": vision_heads(config),
        "rows of the vision tower's gate and up": config.vision_out,
        "rows of the merger's gate and up": config.vision_intermediate,
    }
    for what, count in counts.items():
        if count % world:
            return f"{count} {what} do not divide by {world}"
    if config.kv_heads % world and world % config.kv_heads:
        return f"{config.kv_heads} key-value heads can neither be dealt out nor be repeated over {world} ranks"
    return None


def vision_heads(config: ModelConfig) -> int:
    """Attention heads of the vision tower. Raises ModelError if config.json does not say."""
    vision = config.nested["vision_config"]
    heads = vision.get("num_heads") if isinstance(vision, dict) else None
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise ModelError(
            f"config.json: vision_config.num_heads is {heads!r}, a positive integer is needed; restore the file"
        )
    return heads


class RankSplit:
    """Cuts the tensors of one rank out of a checkpoint and keeps account of the source tensors.

    Args:
        source: the un-sharded checkpoint; its shapes agree with config.json and its numbers divide by `world`.
        rank: 0 to world - 1.
        world: number of ranks.
    """

    def __init__(self, source: Checkpoint, rank: int, world: int) -> None:
        self.source: Final = source
        self.rank: Final = rank
        self.world: Final = world
        self.tensors: Final[list[RankTensor]] = []
        self._unused = set(source)

    def whole(self, name: str) -> Slice:
        """All of a tensor."""
        rows, cols = self._size(name)
        return Slice(name, 0, rows, 0, cols)

    def rows(self, name: str, part: int = 0, parts: int = 1) -> Slice:
        """This rank's equal block of rows, of part `part` of `parts` equal ones (gate and up, or q, k and v, in one tensor)."""
        rows, cols = self._size(name)
        step = rows // parts // self.world
        start = part * (rows // parts) + self.rank * step
        return Slice(name, start, start + step, 0, cols)

    def row_range(self, name: str, start: int, stop: int) -> Slice:
        """Rows start..stop, cut at the last row; the same on every rank."""
        rows, cols = self._size(name)
        return Slice(name, min(start, rows), min(stop, rows), 0, cols)

    def heads(self, name: str, head_dim: int) -> Slice:
        """This rank's heads: an equal share of them, or where there are fewer heads than ranks, one for several ranks."""
        rows, cols = self._size(name)
        count = rows // head_dim
        share = max(count // self.world, 1)
        first = self.rank * count // self.world
        return Slice(name, first * head_dim, (first + share) * head_dim, 0, cols)

    def cols(self, name: str) -> Slice:
        """This rank's equal block of columns."""
        rows, cols = self._size(name)
        step = cols // self.world
        return Slice(name, 0, rows, self.rank * step, (self.rank + 1) * step)

    def put(self, target: str, *slices: Slice, shape: tuple[int, ...] | None = None) -> None:
        """Add the tensor `target`.

        Args:
            target: its name in the part.
            slices: stacked along dimension 0; at least one is not zeros.
            shape: of the tensor, where the slices are a whole tensor with more than two dimensions.

        Raises:
            CheckpointError: a source tensor's dtype cannot become the stored one.
        """
        names = [part.name for part in slices if part.name is not None]
        if shape is None:
            rows = sum(part.rows for part in slices)
            flat = len(self.source.info(names[0]).shape) == 1 if names else slices[0].cols == 1
            shape = (rows,) if flat else (rows, slices[0].cols)
        code = self._code(target, names)
        self._unused.difference_update(names)
        self.tensors.append(RankTensor(TensorSpec(target, code, shape), slices))

    def drop(self, *names: str) -> None:
        """Leave out tensors that the engine does not want from this rank."""
        self._unused.difference_update(names)

    def drop_zeros(self, name: str) -> None:
        """Leave out a norm bias that the engine does not read. Raises CheckpointError if it is not zero."""
        if name in self.source:
            if bool(self.source.read(name).count_nonzero()):
                raise CheckpointError(
                    f"{self.source.file_of(name).name}: {name!r} is not zero, but the engine ignores this bias; "
                    "quantize again with `glmq quantize`"
                )
            self.drop(name)

    def drop_equal(self, name: str, other: str) -> None:
        """Leave out a tensor because `other` says the same. Raises CheckpointError if it does not."""
        if not torch.equal(self.source.read(name), self.source.read(other)):
            raise CheckpointError(
                f"{self.source.file_of(name).name}: {name!r} differs from {other!r}, but q, k and v read one input, "
                "so the engine needs one value; quantize again with `glmq quantize`"
            )
        self.drop(name)

    def finish(self) -> list[RankTensor]:
        """Every tensor of the rank. Raises CheckpointError if a source tensor was neither placed nor left out on purpose."""
        if self._unused:
            first = min(self._unused)
            raise CheckpointError(
                f"{self.source.directory}: {len(self._unused)} tensors have no place in the engine's layout, the first is "
                f"{first!r}; is this a GLM-4.1V or GLM-4.6V-Flash in the ascendV1 form?"
            )
        return self.tensors

    def _size(self, name: str) -> tuple[int, int]:
        """Rows and columns of a source tensor with the dimensions after the first flattened."""
        shape = self.source.info(name).shape
        return shape[0], int(np.prod(shape[1:]))

    def _code(self, target: str, names: list[str]) -> str:
        """The stored dtype of `target`; checks that every source tensor's dtype can become it."""
        found = {self.source.info(name).dtype for name in names}
        suffix = target.rpartition(".")[2]
        code = "I8" if suffix == "weight" and found == {"I8"} else _CODES.get(suffix, "F16")
        castable = {"F16": {"F16", "F32"}, "I8": {"F16", "F32", "I8"} if suffix == "input_offset" else {"I8"}}
        wrong = found - castable.get(code, {code})
        if wrong:
            raise CheckpointError(
                f"{self.source.directory}: {names[0]!r} is {wrong.pop()}, but {code} is needed (W8A8S models are float16 and "
                "q, k, v of a layer are quantized together); quantize again with --torch_dtype fp16"
            )
        return code


def zeros(rows: int, cols: int = 1) -> Slice:
    """A block of zeros."""
    return Slice(None, 0, rows, 0, cols)


def read_pieces(source: Checkpoint, tensor: RankTensor) -> Iterator[Tensor]:
    """The values of a rank's tensor as blocks of dimension 0, in order, cast to the stored dtype.

    Raises:
        CheckpointError: a value that the stored dtype cannot hold.
    """
    code, trailing = tensor.spec.dtype, tensor.spec.shape[1:]
    for part in tensor.slices:
        for block in _read_slice(source, part, code):
            yield _cast(source, tensor.spec, block).reshape(block.shape[0], *trailing).contiguous()


def read_matrix(source: Checkpoint, tensor: RankTensor) -> NDArray[np.int8]:
    """The whole weight of a quantized linear: int8 [N, K], contiguous."""
    matrix = torch.empty(tensor.spec.shape, dtype=torch.int8)
    at = 0
    for block in read_pieces(source, tensor):
        matrix[at : at + block.shape[0]] = block
        at += block.shape[0]
    return matrix.numpy()


def read_sample(source: Checkpoint, tensor: RankTensor, rows: int) -> NDArray[np.int8]:
    """About `rows` rows of the weight of a quantized linear, evenly spread over it: int8 [rows, K], contiguous."""
    step = max(tensor.spec.shape[0] // rows, 1)
    found = [
        source.read_rows(part.name, row, row + 1)[:, part.col_start : part.col_stop]
        for part in tensor.slices
        if part.name is not None
        for row in range(part.row_start, part.row_stop, step)
    ]
    return torch.cat(found).contiguous().numpy()


def _read_slice(source: Checkpoint, part: Slice, code: str) -> Iterator[Tensor]:
    """Blocks [rows, columns] of a slice; of zeros in dtype `code`."""
    if part.name is None:
        step = max(1, PIECE_BYTES // (part.cols * DTYPE_BYTES[code]))
        for start in range(0, part.rows, step):
            yield torch.zeros(min(step, part.rows - start), part.cols, dtype=torch_dtype(code))
    else:
        for _, piece in source.pieces(part.name, part.row_start, part.row_stop):
            yield piece.reshape(piece.shape[0], -1)[:, part.col_start : part.col_stop]


def _cast(source: Checkpoint, spec: TensorSpec, values: Tensor) -> Tensor:
    """`values` in the stored dtype, rounded half to even; refuses what the dtype cannot hold."""
    wanted = torch_dtype(spec.dtype)
    if values.dtype == wanted:
        return values
    stored = values.to(wanted)
    if wanted == torch.int8:
        fits = bool((stored.to(values.dtype) == values).all())
    else:
        fits = bool(stored.isfinite().all()) and not (spec.name.endswith(".input_scale") and bool((stored <= 0).any()))
    if not fits:
        raise CheckpointError(
            f"{source.directory}: {spec.name!r} holds {float(values.reshape(-1)[0]):g}, which {wanted} cannot hold as the "
            "engine needs it; calibrate again with other images"
        )
    return stored
