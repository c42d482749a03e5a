"""Where every tensor of a checkpoint will lie: safetensors files laid out before the first tensor exists.

Every header and offset follows from the tensors' names, dtypes and shapes. The bytes are those of the format's own writer:
dtypes in the reverse order of its list, then names; header padded with spaces to a multiple of 8. No torch needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from glmq.checkpoint.header import DTYPE_BYTES, MAX_HEADER_BYTES, TensorInfo
from glmq.checkpoint.weight_files import shard_names
from glmq.errors import CheckpointError

_DTYPE_ORDER: Final = {code: order for order, code in enumerate(DTYPE_BYTES)}
_METADATA_KEY: Final = "__metadata__"
_METADATA: Final = {"format": "pt"}
_EMPTY_FILE_BYTES: Final = 8 + len('{"__metadata__":{"format":"pt"}}') + 7
"""The length of a header, one without tensors, and padding."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What will be stored under a name."""

    name: str
    dtype: str
    """Safetensors code, e.g. "F16"."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One weight file to be written."""

    name: str
    header: bytes
    """Length prefix, JSON and padding."""
    tensors: tuple[TensorInfo, ...]
    """In offset order; offsets are absolute."""

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return self.tensors[-1].end if self.tensors else len(self.header)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Every file of one checkpoint's weights."""

    stem: str
    """E.g. `quant_model_weight_w8a8s`."""
    files: tuple[PlannedFile, ...]
    is_numbered: bool
    """Shards were asked for: numbered names and an index."""

    @property
    def nbytes(self) -> int:
        """Size of all files together, headers included."""
        return sum(file.nbytes for file in self.files)

    @property
    def tensor_bytes(self) -> int:
        """Size of the tensors' data, headers excluded."""
        return sum(info.nbytes for file in self.files for info in file.tensors)


def plan_shards(specs: Sequence[TensorSpec], stem: str, shard_bytes: int | None) -> ShardPlan:
    """Distribute tensors over files in the given order and lay out each file.

    Args:
        specs: every tensor, in the order in which shards are filled.
        stem: file name without number and suffix.
        shard_bytes: None for the single file `{stem}.safetensors`; else names are numbered (even if one is enough),
            and a new file starts before a tensor that would bring the current one, header included, to `shard_bytes` or more.

    Raises:
        CheckpointError: a name occurs twice or is the format's own, or a header would be larger than readers accept.
    """
    shards: list[list[TensorSpec]] = [[]]
    names: set[str] = set()
    filled = _EMPTY_FILE_BYTES
    for spec in specs:
        if spec.name in names:
            raise CheckpointError(f"tensor {spec.name!r} is planned twice; each tensor is written once")
        if spec.name == _METADATA_KEY:
            raise CheckpointError(
                f"no tensor can be called {_METADATA_KEY}: a safetensors header keeps its own notes there"
            )
        names.add(spec.name)
        needed = 0 if shard_bytes is None else spec.nbytes + _most_header_bytes(spec, shard_bytes)
        if shard_bytes is not None and shards[-1] and filled + needed >= shard_bytes:
            shards.append([])
            filled = _EMPTY_FILE_BYTES
        shards[-1].append(spec)
        filled += needed
    file_names = [f"{stem}.safetensors"] if shard_bytes is None else shard_names(stem, len(shards))
    files = tuple(_lay_out(name, shard) for name, shard in zip(file_names, shards))
    return ShardPlan(stem, files, is_numbered=shard_bytes is not None)


def lay_out_bare(specs: Iterable[TensorSpec]) -> tuple[bytes, list[TensorSpec]]:
    """The header of a safetensors file without metadata, and the order in which the tensors follow it."""
    ordered = _in_order(specs)
    return _make_header(ordered, {}), ordered


def bare_file_bytes(specs: Iterable[TensorSpec]) -> int:
    """Size of a safetensors file of these tensors without metadata."""
    header, ordered = lay_out_bare(specs)
    return len(header) + sum(spec.nbytes for spec in ordered)


def _lay_out(file_name: str, specs: Iterable[TensorSpec]) -> PlannedFile:
    ordered = _in_order(specs)
    header = _make_header(ordered, {_METADATA_KEY: _METADATA})
    if len(header) - 8 > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file_name}: its header needs {len(header) - 8} bytes, readers stop at {MAX_HEADER_BYTES}; use shards"
        )
    tensors, at = [], len(header)
    for spec in ordered:
        tensors.append(TensorInfo(spec.name, spec.dtype, spec.shape, at, at + spec.nbytes))
        at += spec.nbytes
    return PlannedFile(file_name, header, tuple(tensors))


def _most_header_bytes(spec: TensorSpec, file_bytes: int) -> int:
    """What a tensor takes at most of the header of a file of `file_bytes`: its offsets are not known yet."""
    end = max(file_bytes, spec.nbytes)
    entry = {spec.name: {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [end, end]}}
    return len(_json(entry)) - len("{}") + len(",")


def _in_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The order in which the format's own writer puts tensors."""
    return sorted(specs, key=lambda spec: (-_DTYPE_ORDER[spec.dtype], spec.name))


def _make_header(ordered: Sequence[TensorSpec], entries: dict[str, object]) -> bytes:
    """Length, JSON of `entries` and those of the tensors, and padding."""
    at = 0
    for spec in ordered:
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [at, at + spec.nbytes]}
        at += spec.nbytes
    text = _json(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _json(entries: Mapping[str, object]) -> bytes:
    return json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
