"""glmq_checksums.json beside the weights: a checksum of every byte of the folder.

    schema        "glmq.checksums/2"
    glmq          version that wrote it
    tensors       by sorted name: xxh3-128 of the tensor's bytes, in hexadecimal
    headers       by weight file: xxh3-128 of everything before its tensors
    files         by sorted name: xxh3-128 of every other file: config.json, description, index, side files, reports
    source        by sorted name: xxh3-128 of each tensor of the float model that it was made from, if that is known
    digest        xxh3-128 of this document without this entry, keys sorted, no spaces

They find damage, not forgery. The weights alone cannot tell a scale or a norm from one whose lowest bits were flipped.
Files of schema 1, which older versions of glmq wrote, have tensors only; some of schema 2 have no source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from glmq.checkpoint import journal
from glmq.checkpoint.header import read_header
from glmq.checkpoint.json_file import Fields, JsonObject, JsonValue, read_json_object, write_json
from glmq.errors import DamagedError, UnreadableError, VersionError
from glmq.version import __version__

CHECKSUMS: Final = "glmq_checksums.json"
SCHEMA: Final = "glmq.checksums/2"
OLD_SCHEMA: Final = "glmq.checksums/1"
_CHUNK_BYTES: Final = 2**20


@dataclass(frozen=True, slots=True)
class Checksums:
    """The contents of the file."""

    tensors: Mapping[str, str]
    headers: Mapping[str, str]
    files: Mapping[str, str]
    source: Mapping[str, str]
    """Of the float model's tensors, not of the folder's; empty where that is not known."""
    covers_files: bool
    """Whether headers and files are listed; not in schema 1."""
    digest: str
    """Of the whole document."""

    @property
    def tensors_digest(self) -> str:
        """Of the tensors' entries alone; glmq_report.json, which is among the files, has it."""
        return document_digest(dict(self.tensors))


def write_checksums(folder: Path, tensors: Mapping[str, str], source: Mapping[str, str]) -> None:
    """Write the file for a folder as it is now; the same folder gives the same bytes.

    Args:
        folder: holds the weight files and the rest.
        tensors: xxh3-128 of each tensor's bytes, in hexadecimal.
        source: the same of the tensors of the float model that it was made from; empty if not known.
    """
    document: JsonObject = {
        "schema": SCHEMA,
        "glmq": __version__,
        "tensors": {name: tensors[name] for name in sorted(tensors)},
        "headers": {path.name: header_checksum(path) for path in sorted(folder.glob("*.safetensors"))},
        "files": {path.name: file_checksum(path) for path in covered_files(folder)},
        "source": {name: source[name] for name in sorted(source)},
    }
    write_json(folder / CHECKSUMS, {**document, "digest": document_digest(document)}, indent=1)


def cover_new_files(folder: Path) -> None:
    """Write the file again, after others were added beside the same weights."""
    known = read_checksums(folder)
    write_checksums(folder, known.tensors, known.source)


def covered_files(folder: Path) -> list[Path]:
    """Every file that is checked as a whole, sorted: not weights, checksums or journal, nothing hidden."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.suffix != ".safetensors"
        and path.name not in (CHECKSUMS, journal.NAME)
        and not path.name.startswith(".")
    )


def is_as_written(path: Path, digest: str) -> bool:
    """Whether a file is there with that xxh3-128."""
    return path.is_file() and file_checksum(path) == digest


def file_checksum(path: Path) -> str:
    """xxh3-128 of a file's bytes, in hexadecimal.

    Raises:
        CheckpointError: it cannot be read.
    """
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    return digest.hexdigest()


def header_checksum(path: Path) -> str:
    """xxh3-128 of everything in a weight file before its tensors, in hexadecimal.

    Raises:
        CheckpointError: no safetensors file.
    """
    return digest_of(read_header(path).raw)


def read_checksums(folder: Path) -> Checksums:
    """Read the file and hold it to its own digest.

    Raises:
        CheckpointError: unreadable, altered, or of another schema.
    """
    path = folder / CHECKSUMS
    document = read_json_object(path)
    digest, schema = document.pop("digest", None), document.get("schema")
    if schema not in (SCHEMA, OLD_SCHEMA):
        raise VersionError(f"{path}: schema is {schema!r}, this glmq reads {SCHEMA!r}; use the glmq that wrote it")
    covers_files = schema == SCHEMA
    if digest != document_digest(document):
        raise DamagedError(f"{path}: its digest does not fit its contents; it was altered, copy it again")
    fields = Fields(document, str(path), lambda sentence: DamagedError(f"{sentence}; copy it again"))
    tensors = fields.texts("tensors")
    headers, files = (fields.texts("headers"), fields.texts("files")) if covers_files else ({}, {})
    source = fields.texts("source") if "source" in document else {}
    return Checksums(tensors, headers, files, source, covers_files, digest)


def digest_of(content: bytes) -> str:
    """xxh3-128 of bytes, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(content)


def document_digest(document: Mapping[str, JsonValue]) -> str:
    """xxh3-128 of a JSON document, in hexadecimal: of its text with sorted keys and without spaces."""
    return digest_of(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())
