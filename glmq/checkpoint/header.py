"""Parse and distrust a safetensors header. Standard library only.

Layout (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header length, a JSON object
`{name: {"dtype", "shape", "data_offsets"}, "__metadata__": {...}}`, then the tensors' bytes, without holes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, TypeGuard

from glmq.checkpoint.disk import LFS_START, open_input, refuse_pointer
from glmq.checkpoint.json_file import parse_json
from glmq.errors import DamagedError, UnreadableError

DTYPE_BITS: Final[dict[str, int]] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits per element of every dtype code of the format, in the order of its own list (its writer sorts by it)."""
DTYPE_BYTES: Final[dict[str, int]] = {code: bits // 8 for code, bits in DTYPE_BITS.items() if bits % 8 == 0}
"""Bytes per element of those that fill whole bytes."""

FLOAT_CODES: Final = ("F64", "F32", "F16", "BF16")
"""The dtypes of float tensors. FP8 is not one of them: its values mean nothing without their scales."""

MAX_HEADER_BYTES: Final = 16_000_000
"""Thirty times what the largest GLM-4.1V needs in one file; the format's own reader stops at 100 MB. A parsed header takes up
to thirty times its size."""
MAX_TENSORS: Final = 50_000
"""Ten times what the largest GLM-4.1V has, scales and all."""

_MAX_ELEMENTS: Final = 2**62
"""Larger shapes cannot be addressed; the bound keeps the arithmetic of a lying header small."""

_AGAIN: Final = "the file is damaged or incomplete, download or copy it again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies in its file."""

    name: str
    dtype: str
    """Code of the format: "BF16", "F16", "F32", "I8", "I32", "I64", ... (a key of DTYPE_BITS)."""
    shape: tuple[int, ...]
    start: int
    """Offset of the first byte from the start of the file."""
    end: int
    """Offset after the last byte from the start of the file."""

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A header that was found consistent with itself and with the size of its file."""

    tensors: dict[str, TensorInfo]
    """In offset order."""
    metadata: dict[str, str]
    raw: bytes
    """Everything before the data: length, JSON and padding."""
    file_bytes: int

    @property
    def data_start(self) -> int:
        """Offset of the data section from the start of the file, bytes."""
        return len(self.raw)


def read_header(path: Path) -> Header:
    """Read and check the header of the safetensors file `path`; tensor data is not read.

    Raises:
        CheckpointError: the file cannot be read, or is not exactly what its header says.
    """
    with os.fdopen(open_input(path), "rb") as file:
        try:
            file_bytes = os.fstat(file.fileno()).st_size
            raw = file.read(len(LFS_START))
            refuse_pointer(path, raw)
            if len(raw) < 8:
                _refuse(path, f"{file_bytes} bytes are too few for a safetensors file, which has at least 8")
            length = int.from_bytes(raw[:8], "little")
            if length > MAX_HEADER_BYTES:
                _refuse(path, f"header length {length} is above the limit of {MAX_HEADER_BYTES} bytes")
            if 8 + length > file_bytes:
                _refuse(path, f"a header of {length} bytes was announced, but only {file_bytes - 8} bytes follow")
            file.seek(0)
            raw = file.read(8 + length)
        except OSError as error:
            raise UnreadableError(
                f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
            ) from None
    header = parse_header(path, raw, file_bytes)
    end = max((info.end for info in header.tensors.values()), default=len(raw))
    if end != file_bytes:
        what = "is truncated" if file_bytes < end else "has trailing bytes"
        _refuse(path, f"the file {what}: its tensors end at byte {end}, but it has {file_bytes} bytes")
    return header


def parse_header(path: Path, raw: bytes, file_bytes: int | None = None) -> Header:
    """Check the header `raw` (length, JSON and padding) of the safetensors file `path`.

    Args:
        path: for messages.
        raw: everything before the data.
        file_bytes: size of the file; None if only the header is there: what it says.

    Raises:
        CheckpointError: it contradicts itself.
    """
    if len(raw) < 8 or int.from_bytes(raw[:8], "little") != len(raw) - 8:
        _refuse(path, f"{len(raw)} bytes are not a header of the length that it announces")
    try:
        document = parse_json(raw[8:])
    except ValueError as error:
        _refuse(path, f"the header is not JSON ({error})")
    if not isinstance(document, dict):
        _refuse(path, "the header is not a JSON object")
    metadata = _metadata(path, document.pop("__metadata__", {}))
    if len(document) > MAX_TENSORS:
        _refuse(path, f"{len(document)} tensors are more than a GLM-4.1V or GLM-4.6V-Flash has, {MAX_TENSORS} are read")
    infos = [_tensor(path, name, entry, len(raw)) for name, entry in document.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    at = len(raw)
    for info in infos:
        if info.start != at:
            what = "overlaps the one before it" if info.start < at else "leaves a hole before it"
            _refuse(path, f"tensor {info.name!r} starts at byte {info.start}, which {what} (wanted {at})")
        at = info.end
    return Header({info.name: info for info in infos}, metadata, raw, at if file_bytes is None else file_bytes)


def _metadata(path: Path, found: object) -> dict[str, str]:
    metadata: dict[str, str] = {}
    if found is None:  # the format's own reader takes it for none
        return metadata
    if not isinstance(found, dict):
        _refuse(path, "__metadata__ is not a JSON object")
    for key, value in found.items():
        if not isinstance(value, str):
            _refuse(path, f"__metadata__ entry {key!r} is not a string")
        metadata[key] = value
    return metadata


def _tensor(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    """One entry of the header, checked alone: known dtype, sane shape, and offsets that span just that many bytes."""
    if not name.isprintable():  # also refuses lone surrogates, which could never be shown or written again
        _refuse(path, f"tensor name {name!a} has characters that cannot be printed")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _refuse(path, f"tensor {name!r} has the unknown dtype {dtype!a}; known are {', '.join(DTYPE_BITS)}")
    if not _is_counts(shape):
        _refuse(path, f"tensor {name!r} has the shape {shape!a:.100}, which is not a list of non-negative integers")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(path, f"tensor {name!r} has the data_offsets {offsets!a:.100}, which are not two ascending integers")
    elements, bound = 1, 1
    for size in shape:
        elements *= size
        bound *= max(size, 1)
        if bound > _MAX_ELEMENTS:
            _refuse(path, f"tensor {name!r} has the impossible shape {shape!a:.100}")
    bits, found = elements * DTYPE_BITS[dtype], offsets[1] - offsets[0]
    wanted = -(-bits // 8)
    if wanted != found or bits % 8:
        _refuse(path, f"tensor {name!r} spans {found} bytes, but shape {tuple(shape)} of {dtype} needs {wanted}")
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_counts(found: object) -> TypeGuard[list[int]]:
    return isinstance(found, list) and all(type(item) is int and 0 <= item <= _MAX_ELEMENTS for item in found)


def _refuse(path: Path, what: str) -> NoReturn:
    raise DamagedError(f"{path}: {what}; {_AGAIN}")
