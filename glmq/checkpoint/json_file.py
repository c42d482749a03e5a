"""JSON files beside the weights: read with distrust, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from glmq.errors import CheckpointError, SpaceError

JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
JsonObject: TypeAlias = dict[str, JsonValue]

MAX_JSON_BYTES: Final = 100_000_000
"""The serving engine refuses larger ones."""
FILE_MODE: Final = 0o640
DIRECTORY_MODE: Final = 0o750
DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
"""What the system says when a disk, or the user's share of it, is full."""


def read_json_object(path: Path) -> JsonObject:
    """The JSON object in `path`, keys in file order.

    Raises:
        CheckpointError: unreadable, larger than 100 MB, not JSON, not an object, or a key appears twice.
    """

    def unique(pairs: list[tuple[str, JsonValue]]) -> JsonObject:
        found: JsonObject = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(f"{path}: the key {key!r} appears twice; remove one of them")
            found[key] = value
        return found

    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    if len(raw) > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path}: is larger than {MAX_JSON_BYTES} bytes; it is not a file of a GLM-4.1V checkpoint"
        )
    try:
        document: JsonValue = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); download or write it again") from None
    if not isinstance(document, dict):
        raise CheckpointError(
            f"{path}: wanted a JSON object, found {type(document).__name__}; download or write it again"
        )
    return document


def write_json(path: Path, document: Mapping[str, JsonValue], *, indent: int) -> None:
    """Write `document` to `path` through a temporary name, mode 0640, keys in their order, ending in a newline."""
    write_whole(path, json_bytes(document, indent=indent))


def json_bytes(document: Mapping[str, JsonValue], *, indent: int) -> bytes:
    """The text of `document` as it is written: keys in their order, ending in a newline."""
    return (json.dumps(document, indent=indent, ensure_ascii=False) + "\n").encode()


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` through a temporary name, mode 0640 whatever the umask.

    Raises:
        SpaceError: the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a journal may speak of it next
        partial.chmod(FILE_MODE)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise SpaceError(
                f"{path}: {len(content)} bytes are to be written, but its disk is full; make room"
            ) from None
        raise
