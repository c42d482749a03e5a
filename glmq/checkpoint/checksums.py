"""glmq_checksums.json beside the weights: a checksum of the stored bytes of every tensor.

    schema        "glmq.checksums/1"
    glmq          version that wrote it
    tensors       by sorted name: xxh3-128 of the tensor's bytes, in hexadecimal
    digest        xxh3-128 of this document without this entry, keys sorted, no spaces

They find damage, not forgery. The weights alone cannot tell a scale or a norm from one whose lowest bits were flipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from glmq.checkpoint.json_file import JsonObject, JsonValue, read_json_object, write_json
from glmq.errors import CheckpointError
from glmq.version import __version__

CHECKSUMS: Final = "glmq_checksums.json"
SCHEMA: Final = "glmq.checksums/1"


@dataclass(frozen=True, slots=True)
class Checksums:
    """The contents of the file."""

    tensors: Mapping[str, str]
    digest: str
    """Of the whole document; whoever kept it knows whether the file is still the one that was written."""


def write_checksums(folder: Path, tensors: Mapping[str, str]) -> None:
    """Write the file; the same checksums give the same bytes."""
    ordered = {name: tensors[name] for name in sorted(tensors)}
    document: JsonObject = {"schema": SCHEMA, "glmq": __version__, "tensors": ordered}
    write_json(folder / CHECKSUMS, {**document, "digest": document_digest(document)}, indent=1)


def read_checksums(folder: Path) -> Checksums:
    """Read the file and hold it to its own digest.

    Raises:
        CheckpointError: unreadable, altered, or of another schema.
    """
    path = folder / CHECKSUMS
    document = read_json_object(path)
    digest, tensors = document.pop("digest", None), document.get("tensors")
    if document.get("schema") != SCHEMA:
        found = document.get("schema")
        raise CheckpointError(f"{path}: schema is {found!r}, this glmq reads {SCHEMA!r}; use the glmq that wrote it")
    if digest != document_digest(document) or not isinstance(tensors, Mapping):
        raise CheckpointError(f"{path}: its digest does not fit its contents; it was altered, copy it again")
    return Checksums({name: str(value) for name, value in tensors.items()}, str(digest))


def digest_of(content: bytes) -> str:
    """xxh3-128 of bytes, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(content)


def document_digest(document: Mapping[str, JsonValue]) -> str:
    """xxh3-128 of a JSON document, in hexadecimal: of its text with sorted keys and without spaces."""
    return digest_of(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())
