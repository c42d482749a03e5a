"""Write safetensors shards whose layout is known before the first tensor exists.

Every header and offset follows from the tensors' names, dtypes and shapes, so the files are laid out first and tensors
are written in any order. The bytes are those of the format's own writer: dtypes in the reverse order of its list, then
names; header padded with spaces to a multiple of 8.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

import torch
import xxhash
from torch import Tensor

from glmq.checkpoint.header import DTYPE_BYTES, MAX_HEADER_BYTES, TensorInfo
from glmq.checkpoint.json_file import DIRECTORY_MODE, DISK_FULL, FILE_MODE, JsonObject, write_json
from glmq.checkpoint.reader import INDEX_SUFFIX, dtype_code
from glmq.errors import CheckpointError, SpaceError

_DTYPE_ORDER: Final = {code: order for order, code in enumerate(DTYPE_BYTES)}
_METADATA: Final = {"format": "pt"}


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
    """Parts were asked for: numbered names and an index."""

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
        specs: every tensor, in the order in which parts are filled.
        stem: file name without number and suffix.
        shard_bytes: None for the single file `{stem}.safetensors`; else names are numbered (even if one is enough),
            and a new file starts before a tensor that would bring the tensor bytes of the current one to `shard_bytes`
            or more.

    Raises:
        CheckpointError: a name occurs twice, or a header would be larger than readers accept.
    """
    parts: list[list[TensorSpec]] = [[]]
    names: set[str] = set()
    filled = 0
    for spec in specs:
        if spec.name in names:
            raise CheckpointError(f"tensor {spec.name!r} is planned twice; each tensor is written once")
        names.add(spec.name)
        if shard_bytes is not None and parts[-1] and filled + spec.nbytes >= shard_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(spec)
        filled += spec.nbytes
    if shard_bytes is None:
        file_names = [f"{stem}.safetensors"]
    else:
        file_names = [f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    files = tuple(_lay_out(name, part) for name, part in zip(file_names, parts))
    return ShardPlan(stem, files, is_numbered=shard_bytes is not None)


def _lay_out(file_name: str, specs: Iterable[TensorSpec]) -> PlannedFile:
    ordered = sorted(specs, key=lambda spec: (-_DTYPE_ORDER[spec.dtype], spec.name))
    entries: dict[str, object] = {"__metadata__": _METADATA}
    at = 0
    for spec in ordered:
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [at, at + spec.nbytes]}
        at += spec.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file_name}: its header needs {len(text)} bytes, readers stop at {MAX_HEADER_BYTES}; use parts"
        )
    header = len(text).to_bytes(8, "little") + text
    tensors, at = [], len(header)
    for spec in ordered:
        tensors.append(TensorInfo(spec.name, spec.dtype, spec.shape, at, at + spec.nbytes))
        at += spec.nbytes
    return PlannedFile(file_name, header, tuple(tensors))


def free_bytes(directory: Path) -> int:
    """Free bytes on the disk of `directory`, which need not exist yet."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def check_room(directory: Path, bytes_needed: int) -> None:
    """Raise SpaceError unless the disk of `directory` has `bytes_needed` bytes free."""
    free = free_bytes(directory)
    if free < bytes_needed:
        raise _no_space(directory, bytes_needed, free)


def _no_space(directory: Path, wanted: int, free: int) -> SpaceError:
    return SpaceError(
        f"{directory}: {wanted} bytes are to be written, but its disk has {free} free; make room or choose another disk"
    )


def make_directory(directory: Path) -> None:
    """Create `directory` (and its parents) with mode 0750; an existing one is left as it is."""
    if not directory.is_dir():
        directory.mkdir(parents=True)
        directory.chmod(DIRECTORY_MODE)


class ShardWriter:
    """Writes the files of a plan: tensors in any order, final names only when everything is there, the index last.

    Used as a context manager. Leaving it normally finishes; leaving it by an exception removes the unfinished files, or
    keeps them under their temporary names (`.{file}.partial`) for a resume.

    Args:
        plan: from plan_shards.
        directory: created if missing.
        resume: continue partial files of exactly this plan; which tensors they hold is told with `mark_written`.
        keep_partial: keep the partial files after an exception.

    Raises:
        CheckpointError: resuming, and a partial file is missing or belongs to another plan.
        SpaceError: the disk is too small.
    """

    def __init__(self, plan: ShardPlan, directory: Path, *, resume: bool = False, keep_partial: bool = False) -> None:
        self.plan: Final = plan
        self.directory: Final = directory
        self._keep_partial = keep_partial
        self._places = {info.name: (file, info) for file in plan.files for info in file.tensors}
        self.checksums: Final[dict[str, str]] = {}
        """xxh3-128 of the stored bytes of each tensor that is written, in hexadecimal."""
        self._next_row: dict[str, int] = {}
        self._hashes: dict[str, xxhash.xxh3_128] = {}
        self._handles: dict[str, int] = {}
        self._renamed: list[PlannedFile] = []
        self._is_finished = False
        if not resume:
            check_room(directory, plan.nbytes)
        make_directory(directory)
        try:
            for file in plan.files:
                self._handles[file.name] = self._reopen(file) if resume else self._create(file)
        except BaseException:
            self._abandon(keep=resume)
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor at its place.

        The bytes go to the file straight from the tensor's memory if it is a contiguous CPU tensor.

        Raises:
            CheckpointError: a name that is not planned or was written before, or another dtype or shape than planned.
            SpaceError: the disk is full.
        """
        file, info = self._place(name)
        if dtype_code(tensor.dtype) != info.dtype or tuple(tensor.shape) != info.shape:
            raise CheckpointError(
                f"tensor {name!r} was planned as {info.dtype} {info.shape}, "
                f"but {dtype_code(tensor.dtype)} {tuple(tensor.shape)} was to be written; this is a bug in the caller"
            )
        data = _bytes_of(tensor)
        self._write_at(file, data, info.start)
        self.checksums[name] = xxhash.xxh3_128_hexdigest(data)

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Write rows of dimension 0 from `start` on; parts come in order and together make the whole tensor.

        Raises:
            CheckpointError: as `write`, or rows that do not follow the ones before.
            SpaceError: the disk is full.
        """
        file, info = self._place(name)
        total, row_shape = info.shape[0], info.shape[1:]
        expected = self._next_row.get(name, 0)
        fits = start == expected and start + rows.shape[0] <= total and tuple(rows.shape[1:]) == row_shape
        if dtype_code(rows.dtype) != info.dtype or not fits:
            raise CheckpointError(
                f"tensor {name!r} was planned as {info.dtype} {info.shape} with row {expected} next, "
                f"but {dtype_code(rows.dtype)} {tuple(rows.shape)} was to be written at row {start}; "
                "this is a bug in the caller"
            )
        row_bytes = math.prod(row_shape) * DTYPE_BYTES[info.dtype]
        data = _bytes_of(rows)
        self._write_at(file, data, info.start + start * row_bytes)
        self._next_row[name] = start + rows.shape[0]
        digest = self._hashes.setdefault(name, xxhash.xxh3_128())
        digest.update(data)
        if self._next_row[name] == total:
            self.checksums[name] = self._hashes.pop(name).hexdigest()

    def sync(self) -> None:
        """Wait until everything written so far is on the disk."""
        for handle in self._handles.values():
            os.fsync(handle)

    def mark_written(self, checksums: Mapping[str, str]) -> None:
        """Count tensors that an earlier run wrote into the partial files, with these checksums, as written."""
        for name, checksum in checksums.items():
            self._place(name)
            self.checksums[name] = checksum

    def finish(self) -> None:
        """Give the files their final names, then write the index if parts were asked for.

        Raises:
            CheckpointError: a planned tensor was not written.
        """
        missing = [name for name in self._places if name not in self.checksums]
        if missing:
            raise CheckpointError(
                f"{self.directory}: {len(missing)} of {len(self._places)} planned tensors were not written, "
                f"the first is {missing[0]!r}; this is a bug in the caller"
            )
        self.sync()
        self._close()
        for file in self.plan.files:
            os.replace(self._partial(file), self.directory / file.name)
            self._renamed.append(file)
        if self.plan.is_numbered:
            weight_map = {name: file.name for name, (file, _) in sorted(self._places.items())}
            index: JsonObject = {"metadata": {"total_size": self.plan.tensor_bytes}, "weight_map": weight_map}
            write_json(self.directory / f"{self.plan.stem}{INDEX_SUFFIX}", index, indent=2)
        _sync_directory(self.directory)
        self._is_finished = True

    def leave(self) -> None:
        """Leave the files unfinished to another process that knows what was written here, and finishes them."""
        self._close()
        self._is_finished = True

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_finished:
            return
        try:
            if kind is None:
                self.finish()
        finally:
            if not self._is_finished:
                self._abandon(keep=self._keep_partial)

    def _place(self, name: str) -> tuple[PlannedFile, TensorInfo]:
        if name not in self._places:
            raise CheckpointError(f"tensor {name!r} is not in the plan; this is a bug in the caller")
        if name in self.checksums:
            raise CheckpointError(f"tensor {name!r} was already written; this is a bug in the caller")
        return self._places[name]

    def _partial(self, file: PlannedFile) -> Path:
        return self.directory / f".{file.name}.partial"

    def _create(self, file: PlannedFile) -> int:
        handle = os.open(self._partial(file), os.O_RDWR | os.O_CREAT | os.O_TRUNC, FILE_MODE)
        self._handles[file.name] = handle
        os.fchmod(handle, FILE_MODE)  # whatever the umask says
        os.ftruncate(handle, file.nbytes)
        self._write_at(file, memoryview(file.header), 0)
        return handle

    def _reopen(self, file: PlannedFile) -> int:
        partial, final = self._partial(file), self.directory / file.name
        if not partial.exists() and final.exists():  # the earlier run was killed while it gave the files their names
            os.replace(final, partial)
        try:
            handle = os.open(partial, os.O_RDWR)
        except OSError as error:
            raise CheckpointError(
                f"{partial}: cannot be resumed ({error.strerror}); start again without resuming"
            ) from None
        found = os.fstat(handle).st_size
        if found != file.nbytes or os.pread(handle, len(file.header), 0) != file.header:
            os.close(handle)
            raise CheckpointError(
                f"{partial}: was begun with other settings ({found} bytes, wanted {file.nbytes} and the same header); "
                "start again without resuming"
            )
        return handle

    def _write_at(self, file: PlannedFile, data: memoryview, offset: int) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._handles[file.name], data[done:], offset + done)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            free = shutil.disk_usage(self.directory).free
            raise _no_space(self.directory / file.name, len(data) - done, free) from None

    def _close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _abandon(self, *, keep: bool) -> None:
        """Close everything, take finished names away again, and remove the partial files unless they are to be kept."""
        self._close()
        for file in self._renamed:
            os.replace(self.directory / file.name, self._partial(file))
        if not keep:
            for file in self.plan.files:
                self._partial(file).unlink(missing_ok=True)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes in C order; its own memory if it is a contiguous CPU tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
