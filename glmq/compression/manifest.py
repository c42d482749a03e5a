"""glmq_manifest.json: what a compressed folder is, and a checksum of every byte of it.

    schema        "glmq.compress/1"
    glmq          version that wrote it
    codec         "ascend" or "portable"
    layout        "mindie", "vllm-ascend", or "source" (portable, one rank: names and cuts of the un-sharded checkpoint)
    world_size    number of ranks
    note          for people: what the folder is for
    source        fingerprint of the checkpoint that was compressed
    parts         per rank: file, size, digest of its header, digest of each tensor as stored, and the rows and columns of
                  each matrix that a portable blob holds
    files         every other file but this one: size and digest
    digest        of this document without this entry, keys sorted, no spaces

Digests are xxh3-128 in hexadecimal: they find damage, not forgery.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

import xxhash

from glmq.checkpoint.json_file import JsonObject, JsonValue, read_json_object, write_json
from glmq.compression.layouts import Layout, parse_layout
from glmq.errors import CheckpointError
from glmq.version import __version__

MANIFEST: Final = "glmq_manifest.json"
SCHEMA: Final = "glmq.compress/1"
REPORT: Final = "glmq_compress_report"
"""Stem of the report; the only files of the folder, with the manifest, that are not made from the source's."""
REPORT_FILES: Final = (f"{REPORT}.json", f"{REPORT}.csv")
_AGAIN: Final = "the folder is damaged or incomplete, copy it again"


class CodecKind(Enum):
    """Who can read the weights."""

    PORTABLE = "portable"
    """glmq alone."""
    ASCEND = "ascend"
    """The serving engine."""


NOTES: Final = {
    CodecKind.PORTABLE: "W8A8S weights in glmq's own lossless storage form. No serving engine reads it: "
    "restore it with `glmq compress --decompress`.",
    CodecKind.ASCEND: "W8A8SC weights for the serving engine on the Atlas 300I Duo.",
}


@dataclass(frozen=True, slots=True)
class PartRecord:
    """One weight file."""

    rank: int
    file: str
    """Path from the folder, with `/`."""
    nbytes: int
    header: str
    """Digest of everything before the tensors."""
    tensors: Mapping[str, str]
    """Tensor -> digest of its stored bytes."""
    matrices: Mapping[str, tuple[int, int]]
    """Tensor that holds a portable blob -> rows and columns of the matrix in it."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One small file."""

    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of a manifest."""

    codec: CodecKind
    layout: Layout
    world: int
    source: str
    """sha256 fingerprint of the compressed checkpoint."""
    parts: tuple[PartRecord, ...]
    files: Mapping[str, FileRecord]
    """By path from the folder."""


def digest_of(content: bytes) -> str:
    """xxh3-128 in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(content)


def record_files(folder: Path, exclude: Iterable[str]) -> dict[str, FileRecord]:
    """Size and digest of every file under `folder` but those in `exclude`, by sorted path."""
    excluded = set(exclude)
    files: dict[str, FileRecord] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in excluded:
            content = path.read_bytes()
            files[name] = FileRecord(len(content), digest_of(content))
    return files


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest; the same contents give the same bytes."""
    document: JsonObject = {
        "schema": SCHEMA,
        "glmq": __version__,
        "codec": manifest.codec.value,
        "layout": manifest.layout.value,
        "world_size": manifest.world,
        "note": NOTES[manifest.codec],
        "source": manifest.source,
        "parts": [_part_document(part) for part in manifest.parts],
        "files": {name: {"bytes": file.nbytes, "digest": file.digest} for name, file in manifest.files.items()},
    }
    write_json(folder / MANIFEST, {**document, "digest": _document_digest(document)}, indent=1)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a compressed folder.

    Raises:
        CheckpointError: there is none, it was altered, or it is of another schema.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no {MANIFEST}, so it was not written by `glmq compress`; give the folder that was"
        )
    document = read_json_object(path)
    digest = document.pop("digest", None)
    if document.get("schema") != SCHEMA:
        found = document.get("schema")
        raise CheckpointError(f"{path}: schema is {found!r}, this glmq reads {SCHEMA!r}; use the glmq that wrote it")
    if digest != _document_digest(document):
        raise CheckpointError(f"{path}: its checksum does not fit its contents; {_AGAIN}")
    try:
        return Manifest(
            codec=CodecKind(document["codec"]),
            layout=parse_layout(_text(document["layout"])),
            world=_integer(document["world_size"]),
            source=_text(document["source"]),
            parts=tuple(_parse_part(part) for part in _items(document["parts"])),
            files={_local(name): _parse_file(entry) for name, entry in _object(document["files"]).items()},
        )
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: is not a manifest ({error}); {_AGAIN}") from None


def checked_bytes(folder: Path, name: str, record: FileRecord) -> bytes:
    """The contents of a small file. Raises CheckpointError if they are not what the manifest says."""
    path = folder / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}), but the manifest lists it; {_AGAIN}"
        ) from None
    if len(content) != record.nbytes or digest_of(content) != record.digest:
        raise CheckpointError(f"{path}: its checksum is not the one in {MANIFEST}; {_AGAIN}")
    return content


def _part_document(part: PartRecord) -> JsonObject:
    return {
        "rank": part.rank,
        "file": part.file,
        "bytes": part.nbytes,
        "header": part.header,
        "tensors": dict(part.tensors),
        "matrices": {name: list(shape) for name, shape in part.matrices.items()},
    }


def _parse_part(value: JsonValue) -> PartRecord:
    part = _object(value)
    matrices: dict[str, tuple[int, int]] = {}
    for name, shape in _object(part["matrices"]).items():
        rows, cols = _items(shape)
        matrices[name] = (_integer(rows), _integer(cols))
    return PartRecord(
        rank=_integer(part["rank"]),
        file=_local(_text(part["file"])),
        nbytes=_integer(part["bytes"]),
        header=_text(part["header"]),
        tensors={name: _text(digest) for name, digest in _object(part["tensors"]).items()},
        matrices=matrices,
    )


def _parse_file(value: JsonValue) -> FileRecord:
    entry = _object(value)
    return FileRecord(_integer(entry["bytes"]), _text(entry["digest"]))


def _document_digest(document: Mapping[str, JsonValue]) -> str:
    return digest_of(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())


def _object(value: JsonValue) -> Mapping[str, JsonValue]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r:.40} where an object is needed")
    return value


def _items(value: JsonValue) -> Sequence[JsonValue]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.40} where a list is needed")
    return value


def _integer(value: JsonValue) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r:.40} where a count is needed")
    return value


def _text(value: JsonValue) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} where a text is needed")
    return value


def _local(name: str) -> str:
    """A path inside the folder; refuses one that leads out of it."""
    parts = name.split("/")
    if "" in parts or "." in parts or ".." in parts or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r:.40} where a path inside the folder is needed")
    return name
