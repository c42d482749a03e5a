"""Write the files of a plan (layout.py): tensors in any order, at their places, and final names when everything is there."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

import xxhash
from torch import Tensor

from glmq.checkpoint.disk import (
    FILE_MODE,
    check_room,
    make_directory,
    naming_full_disk,
    set_mode,
    sync_directory,
    write_at,
)
from glmq.checkpoint.header import DTYPE_BYTES, TensorInfo
from glmq.checkpoint.json_file import JsonObject, write_json, write_whole
from glmq.checkpoint.layout import PlannedFile, ShardPlan, TensorSpec, lay_out_bare
from glmq.checkpoint.reader import dtype_code, raw_bytes
from glmq.checkpoint.weight_files import INDEX_SUFFIX
from glmq.errors import LeftOverError, PlanError


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
            raise PlanError(
                f"tensor {name!r} was planned as {info.dtype} {info.shape}, "
                f"but {dtype_code(tensor.dtype)} {tuple(tensor.shape)} was to be written; this is a bug in the caller"
            )
        data = raw_bytes(tensor)
        write_at(self._handles[file.name], self.directory / file.name, data, info.start)
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
            raise PlanError(
                f"tensor {name!r} was planned as {info.dtype} {info.shape} with row {expected} next, "
                f"but {dtype_code(rows.dtype)} {tuple(rows.shape)} was to be written at row {start}; "
                "this is a bug in the caller"
            )
        row_bytes = math.prod(row_shape) * DTYPE_BYTES[info.dtype]
        data = raw_bytes(rows)
        write_at(self._handles[file.name], self.directory / file.name, data, info.start + start * row_bytes)
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
        """Give the files their final names, then write the index if shards were asked for.

        Raises:
            CheckpointError: a planned tensor was not written.
        """
        missing = [name for name in self._places if name not in self.checksums]
        if missing:
            raise PlanError(
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
        sync_directory(self.directory)
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
            raise PlanError(f"tensor {name!r} is not in the plan; this is a bug in the caller")
        if name in self.checksums:
            raise PlanError(f"tensor {name!r} was already written; this is a bug in the caller")
        return self._places[name]

    def _partial(self, file: PlannedFile) -> Path:
        return self.directory / f".{file.name}.partial"

    def _create(self, file: PlannedFile) -> int:
        handle = os.open(self._partial(file), os.O_RDWR | os.O_CREAT | os.O_TRUNC, FILE_MODE)
        self._handles[file.name] = handle
        set_mode(handle, FILE_MODE)
        with naming_full_disk(self.directory / file.name, file.nbytes):
            os.ftruncate(handle, file.nbytes)
        write_at(self._handles[file.name], self.directory / file.name, file.header, 0)
        return handle

    def _reopen(self, file: PlannedFile) -> int:
        partial, final = self._partial(file), self.directory / file.name
        if not partial.exists() and final.exists():  # the earlier run was killed while it gave the files their names
            os.replace(final, partial)
        try:
            handle = os.open(partial, os.O_RDWR)
        except OSError as error:
            raise LeftOverError(
                f"{partial}: cannot be resumed ({error.strerror}); start again without resuming"
            ) from None
        found = os.fstat(handle).st_size
        if found != file.nbytes or os.pread(handle, len(file.header), 0) != file.header:
            os.close(handle)
            raise LeftOverError(
                f"{partial}: was begun with other settings ({found} bytes, wanted {file.nbytes} and the same header); "
                "start again without resuming"
            )
        return handle

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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a small safetensors file whole or not at all; returns the xxh3-128 of its bytes, in hexadecimal.

    Raises:
        SpaceError: the disk is full.
    """
    specs = [TensorSpec(name, dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    header, ordered = lay_out_bare(specs)
    parts: list[bytes | memoryview] = [header, *(raw_bytes(tensors[spec.name]) for spec in ordered)]
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    write_whole(path, *parts)
    return digest.hexdigest()
