"""A checkpoint folder as named tensors: lists them from the headers, reads each by its byte range."""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Final

import torch
from torch import Tensor

from glmq.checkpoint.contents import HASH_BYTES, ContentDigests
from glmq.checkpoint.disk import open_input, read_input
from glmq.checkpoint.header import DTYPE_BYTES, FLOAT_CODES, MAX_TENSORS, Header, TensorInfo, read_header
from glmq.checkpoint.json_file import MAX_JSON_BYTES
from glmq.checkpoint.names import natural_key
from glmq.checkpoint.weight_files import INDEX_SUFFIX, bare_files, check_index, read_index
from glmq.errors import CheckpointError, DamagedError, UnreadableError, WrongFolderError

FLOAT16_MAX: Final = 65504.0
AHEAD_BYTES: Final = 2 * 2**20
"""Bytes asked for at a time when reading ahead; Linux takes no more in one call than its device's readahead."""
PIECE_BYTES: Final = 64 * 2**20
"""A tensor that need not be in memory as a whole is read in pieces of about this size."""
WIDENED_BYTES: Final = 4 * 2**20
"""So much is read at a time and widened to float32: it stays in the cache, and in memory that the process has had before."""

EXPONENTS: Final = "F8_E8M0"
"""The dtype of the scales of some FP8 checkpoints, which older torch does not know: read as float32, never stored."""
_TORCH_DTYPES: Final[dict[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_CODES: Final = {dtype: code for code, dtype in _TORCH_DTYPES.items()}
STORED_CODES: Final = tuple(_TORCH_DTYPES)
"""The dtype codes of tensors that can be written."""
_TORCH_DTYPES["C64"] = torch.complex64  # read, never stored


def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype code, e.g. torch.bfloat16 for "BF16".

    Raises:
        CheckpointError: torch has none that every version knows.
    """
    if code not in _TORCH_DTYPES:
        raise CheckpointError(f"tensors of dtype {code} are listed, but their values cannot be read; leave them out")
    return _TORCH_DTYPES[code]


def dtype_code(dtype: torch.dtype) -> str:
    """The safetensors code of a torch dtype, e.g. "BF16" for torch.bfloat16.

    Raises:
        CheckpointError: a dtype that we do not store.
    """
    if dtype not in _CODES:
        raise CheckpointError(f"{dtype} cannot be stored; use one of {', '.join(str(known) for known in _CODES)}")
    return _CODES[dtype]


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in C order; its own memory if it is a contiguous CPU tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of a checkpoint folder: name -> TensorInfo, in natural order. Reads are thread-safe.

    Opening reads headers only. Files are opened at the first read of one of their tensors and stay open until `close`.
    """

    def __init__(self, directory: Path, headers: Mapping[Path, Header]) -> None:
        self.directory: Final = directory
        self._headers = dict(headers)
        self._files: dict[str, Path] = {}
        count = sum(len(header.tensors) for header in headers.values())
        if count > MAX_TENSORS:
            raise CheckpointError(
                f"{directory}: {count} tensors are more than a GLM-4.1V or GLM-4.6V-Flash has, {MAX_TENSORS} are read"
            )
        for path, header in headers.items():
            for name in header.tensors:
                if name in self._files:
                    raise CheckpointError(
                        f"{directory}: tensor {name!r} is in {self._files[name].name} and in {path.name}; "
                        "remove the file that does not belong to this checkpoint"
                    )
                self._files[name] = path
        self._names = sorted(self._files, key=natural_key)
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._ahead: threading.Thread | None = None
        self.contents: ContentDigests | None = None
        """Where set, every tensor that is read whole is hashed and compared."""
        self.beyond_float16: Final[set[str]] = set()
        """Tensors that `read_finite` has found to hold more than float16 can."""

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Find the weight files of `directory` (through its index if it has one) and check every header.

        Raises:
            CheckpointError: no such folder, no safetensors in it, several indexes, an index that disagrees with the
                files, a damaged header, a tensor in two files.
        """
        if not directory.is_dir():
            raise WrongFolderError(
                f"{directory}: is not a folder; give the folder that holds config.json and the weights"
            )
        indexes = sorted(directory.glob(f"*{INDEX_SUFFIX}"))
        if len(indexes) > 1:
            raise CheckpointError(
                f"{directory}: has {len(indexes)} indexes ({', '.join(path.name for path in indexes)}); "
                "remove those that do not belong to this checkpoint"
            )
        if not indexes:
            return cls(directory, {path: read_header(path) for path in bare_files(directory)})
        weight_map = read_index(indexes[0])
        headers = {directory / file: read_header(directory / file) for file in sorted(set(weight_map.values()))}
        check_index(indexes[0], weight_map, headers)
        return cls(directory, headers)

    def selected(self, names: Mapping[str, str]) -> Checkpoint:
        """The same files with other names for their tensors, and only with some of them.

        Args:
            names: how each tensor is called from now on -> how the files call it. One stored tensor may have two names.
        """
        headers = {path: replace(header, tensors={}) for path, header in self._headers.items()}
        for name, stored in names.items():
            info = self.info(stored)
            headers[self._files[stored]].tensors[name] = replace(info, name=name)
        return Checkpoint(self.directory, headers)

    def dtype_read(self, name: str) -> str:
        """The dtype code of what `read` and `read_rows` give."""
        return self.info(name).dtype

    def __getitem__(self, name: str) -> TensorInfo:
        return self._headers[self._files[name]].tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """Every tensor name, in natural order."""
        return list(self._names)

    def files(self) -> list[Path]:
        """The weight files, sorted by name."""
        return sorted(self._headers)

    def header(self, path: Path) -> Header:
        """The header of one of the weight files."""
        return self._headers[path]

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor. Raises CheckpointError with the nearest name if there is none."""
        return self._headers[self.file_of(name)].tensors[name]

    def file_of(self, name: str) -> Path:
        """The file that holds the tensor. Raises CheckpointError like `info`."""
        if name not in self._files:
            near = difflib.get_close_matches(name, self._names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {len(self._names)} other tensors"
            raise CheckpointError(f"{self.directory}: has no tensor {name!r}; {hint}")
        return self._files[name]

    def nbytes(self, name: str) -> int:
        """Size of the tensor's data in the file, bytes."""
        return self.info(name).nbytes

    def read(self, name: str) -> Tensor:
        """A fresh CPU tensor with the stored dtype and shape; the file is neither mapped nor read beyond the tensor."""
        info = self.info(name)
        return self._read_range(info, info.shape, 0)

    def read_rows(self, name: str, start: int, stop: int, room: Tensor | None = None) -> Tensor:
        """Rows start..stop (stop excluded) of dimension 0, read alone.

        Args:
            room: uint8 memory for the rows, of their size at least; what was read there before is lost. Fresh unless given.

        Raises:
            CheckpointError: no such tensor, or not 0 <= start <= stop <= rows.
        """
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise CheckpointError(
                f"{self.file_of(name)}: tensor {name!r} has shape {info.shape}, so rows {start}..{stop} cannot be read"
            )
        row_bytes = math.prod(info.shape[1:]) * DTYPE_BYTES[info.dtype]
        return self._read_range(info, (stop - start, *info.shape[1:]), start * row_bytes, room)

    def pieces(
        self, name: str, start: int = 0, stop: int | None = None, size: int | None = None, *, reuse: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """The tensor, or rows start..stop of its dimension 0, some `size` bytes (PIECE_BYTES) at a time and in order.

        Args:
            reuse: each piece is lost when the next one is asked for, which is read into its memory.

        Yields:
            the first row of each piece, and the piece: [rows, ...] in the stored dtype. A scalar comes whole.

        Raises:
            CheckpointError: as `read_rows`.
        """
        info = self.info(name)
        if not info.shape:
            yield 0, self.read(name)
            return
        stop = info.shape[0] if stop is None else stop
        height = max(1, (size or PIECE_BYTES) * info.shape[0] // max(info.nbytes, 1))
        room = None
        if reuse:
            rows = min(height, stop - start)
            room = torch.empty(rows * info.nbytes // max(info.shape[0], 1), dtype=torch.uint8)
        for row in range(start, stop, height):
            yield row, self.read_rows(name, row, min(row + height, stop), room)

    def read_finite(self, name: str) -> Tensor:
        """As `read`; raises CheckpointError if the tensor holds NaN or infinity."""
        return self.check_finite(name, self.read(name))

    def read_float(self, name: str) -> Tensor:
        """As `read_finite`, in float32. Its values as stored are in memory a few megabytes at a time."""
        info = self.info(name)
        if not info.shape:
            return self.read_finite(name).float()
        values, extremes = torch.empty(info.shape), list[Tensor]()
        for start, piece in self.pieces(name, size=WIDENED_BYTES, reuse=True):
            values[start : start + len(piece)] = piece
            extremes += self._extremes(name, piece)
        self._check_extremes(name, extremes, values)
        return values

    def check_finite(self, name: str, values: Tensor) -> Tensor:
        """Return `values`, read from tensor `name`; raise CheckpointError if they hold NaN or infinity."""
        self._check_extremes(name, self._extremes(name, values), values)
        return values

    def _extremes(self, name: str, values: Tensor) -> list[Tensor]:
        """The smallest and the largest of some values of a float tensor, NaN if there is one; of other tensors nothing."""
        return list(torch.aminmax(values)) if values.numel() and self.dtype_read(name) in FLOAT_CODES else []

    def _check_extremes(self, name: str, found: Sequence[Tensor], values: Tensor) -> None:
        """Raise CheckpointError if one of the extremes of a tensor is not finite; note it if one is beyond float16."""
        if not found:
            return
        extremes = [abs(float(extreme)) for extreme in found]
        if max(extremes) > FLOAT16_MAX:
            self.beyond_float16.add(name)
        if not all(map(math.isfinite, extremes)):
            bad = int((~torch.isfinite(values)).sum())
            raise DamagedError(
                f"{self.file_of(name).name}: tensor {name!r} holds {bad} NaN or infinite values of {values.numel()}; "
                "download the file again or repair the checkpoint"
            )

    def scan(self, name: str) -> None:
        """Read a tensor for `contents` alone, in pieces, without keeping it."""
        info = self.info(name)
        buffer = memoryview(bytearray(min(HASH_BYTES, info.nbytes)))
        for start in range(0, max(1, info.nbytes), HASH_BYTES):
            self._fill(info, buffer[: info.nbytes - start], start)

    def prefetch(self, names: Iterable[str]) -> None:
        """Have the system read these tensors into its file cache, in the background, for a `read` soon after.

        It takes no memory of this process, and nothing depends on it. Systems without posix_fadvise leave it out.
        """
        self._wait()
        if hasattr(os, "posix_fadvise"):
            ranges = [(self._handle(self.file_of(name)), self.info(name)) for name in names]
            self._ahead = threading.Thread(target=_read_ahead, args=(ranges,), daemon=True)
            self._ahead.start()

    def _wait(self) -> None:
        """Let the reading ahead end, whose file handles must not be closed under it."""
        if self._ahead is not None:
            self._ahead.join()
            self._ahead = None

    def fingerprint(self) -> str:
        """sha256 (hex) over names, sizes and headers of the weight files and over config.json; no tensor data."""
        digest = hashlib.sha256()
        for path in self.files():
            header = self._headers[path]
            digest.update(os.fsencode(path.name) + f"\n{header.file_bytes}\n{len(header.raw)}\n".encode())
            digest.update(header.raw)
        config = self.directory / "config.json"
        if config.is_file():
            digest.update(read_input(config, MAX_JSON_BYTES))
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files. A later read opens them again."""
        self._wait()
        with self._lock:
            while self._handles:
                os.close(self._handles.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _handle(self, path: Path) -> int:
        with self._lock:
            if path not in self._handles:
                self._handles[path] = open_input(path)
            return self._handles[path]

    def _read_range(self, info: TensorInfo, shape: tuple[int, ...], skip: int, room: Tensor | None = None) -> Tensor:
        """`shape` elements of the tensor's dtype, `skip` bytes after its first, at the beginning of `room` if given."""
        dtype = None if info.dtype == EXPONENTS else torch_dtype(info.dtype)
        nbytes = math.prod(shape) * DTYPE_BYTES[info.dtype]
        raw = torch.empty(nbytes, dtype=torch.uint8) if room is None else room[:nbytes]
        self._fill(info, raw.numpy().data, skip)
        return (_powers_of_two(raw) if dtype is None else raw.view(dtype)).reshape(shape)

    def _fill(self, info: TensorInfo, view: memoryview, skip: int) -> None:
        """Fill `view` with what lies `skip` bytes after the tensor's first."""
        path = self._files[info.name]
        handle, done = self._handle(path), 0
        while done < len(view):
            try:
                count = os.preadv(handle, [view[done:]], info.start + skip + done)
            except OSError as error:
                raise UnreadableError(
                    f"{path}: tensor {info.name!r} cannot be read ({error.strerror}); check its disk or network, "
                    "and copy the file again if it is damaged"
                ) from error
            if count == 0:
                raise DamagedError(
                    f"{path}: ended while tensor {info.name!r} was read; do not change a file that is in use"
                )
            done += count
        if self.contents is not None:
            self.contents.observe(path, info.name, info.nbytes, skip, view)


def _powers_of_two(exponents: Tensor) -> Tensor:
    """The numbers that bytes of an EXPONENTS tensor stand for: float32, 2^(byte - 127), NaN for 255."""
    powers = torch.ldexp(torch.ones(exponents.shape), exponents.to(torch.int32) - 127)
    return torch.where(exponents == 255, torch.nan, powers)


def _read_ahead(ranges: Sequence[tuple[int, TensorInfo]]) -> None:
    with suppress(OSError):  # what cannot be read ahead will be read all the same, or say why not
        for handle, info in ranges:
            for start in range(info.start, info.end, AHEAD_BYTES):
                os.posix_fadvise(handle, start, min(AHEAD_BYTES, info.end - start), os.POSIX_FADV_WILLNEED)
