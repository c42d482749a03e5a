"""A file of samples: its text in UTF-8, and the JSON of its lines, of its array or of its one object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Final

from glmq.checkpoint.disk import read_input
from glmq.checkpoint.json_file import JsonValue, parse_json
from glmq.errors import CheckpointError, SampleError
from glmq.quoting import file_text

MAX_LINES_BYTES: Final = 256 * 2**20
"""Of a file of samples."""
_START: Final = 4096
"""Bytes by which an encoding is recognised."""
_UTF16_STARTS: Final = tuple(char.encode(f"utf-16-{order}") for char in "{[ \r\n" for order in ("le", "be"))
"""How JSON begins in UTF-16 without a mark of its byte order."""
_FILE_MAGIC: Final = (
    (b"\x1f\x8b", "gzip-compressed"),
    (b"\x28\xb5\x2f\xfd", "Zstandard-compressed"),
    (b"\xfd7zXZ", "xz-compressed"),
    (b"BZh", "bzip2-compressed"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\x80\x04", "a Python pickle"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
)
"""How files begin that are no text."""


def documents(path: Path, option: str) -> Iterator[tuple[str, str, JsonValue | ValueError]]:
    """What each line holds: how its sample is called, how messages call the line, and its JSON or why it is none."""
    text, file = _read_text(path, option), file_text(path.name)
    start = text.lstrip()
    if start.startswith("["):
        try:
            items = parse_json(text)
        except ValueError as error:
            raise SampleError(f"{path}: begins like a JSON array, but is not valid JSON ({error})") from None
        for number, item in enumerate(items if isinstance(items, list) else (), 1):
            yield f"{file}:{number}", f"item {number}", item
        return
    if start.startswith("{\n") or start.startswith("{\r\n"):  # no line of JSON lines ends after its first brace
        with suppress(ValueError):
            yield f"{file}:1", "line 1", parse_json(text)
            return
    # splitlines also cuts at U+2028, which JSON may hold; a lone \r is how files of old Macs end lines.
    for number, line in enumerate(text.split("\n" if "\n" in text else "\r"), 1):
        if line.strip():
            try:
                document = parse_json(line.removeprefix("\ufeff"))  # of files written one behind the other
            except json.JSONDecodeError as error:  # its own "line 1" would be taken for that of the file
                yield f"{file}:{number}", f"line {number}", ValueError(f"{error.msg} in column {error.colno}")
            except ValueError as error:
                yield f"{file}:{number}", f"line {number}", error
            else:
                yield f"{file}:{number}", f"line {number}", document


def _read_text(path: Path, option: str) -> str:
    """The text of a samples file. Raises SampleError that names its encoding if that is not UTF-8."""
    if path.is_dir():
        raise SampleError(f"{path}: is a folder; give one of images as --calib-images, or a file of samples")
    try:
        raw = read_input(path, MAX_LINES_BYTES)
    except CheckpointError as error:
        raise SampleError(str(error)) from error
    if len(raw) > MAX_LINES_BYTES:
        raise SampleError(
            f"{path}: has more than {MAX_LINES_BYTES // 2**20} MiB, which no calibration needs; give fewer or shorter lines"
        )
    for magic, what in _FILE_MAGIC:
        if raw.startswith(magic):
            raise SampleError(f"{path}: is {what}; give a JSON-lines file as {option}")
    if raw.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        raise SampleError(f"{path}: is UTF-32 text, {_convert(path, 'UTF-32')}")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff", *_UTF16_STARTS)):
        raise SampleError(f"{path}: is UTF-16 text, {_convert(path, 'UTF-16')}")
    if b"\0" in raw[:_START]:
        raise SampleError(f"{path}: is no text; give a JSON-lines file as {option}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = raw[: error.start].count(b"\n") + 1
        try:
            raw.decode("gb18030")
        except UnicodeDecodeError:
            raise SampleError(
                f"{path}, line {number}: is not UTF-8 text ({error}); give a JSON-lines file as {option}"
            ) from None
        raise SampleError(
            f"{path}, line {number}: is not UTF-8 text, perhaps GBK; {_convert(path, 'GB18030')}"
        ) from None


def _convert(path: Path, encoding: str) -> str:
    new = path.with_suffix(".utf8.jsonl")  # beside it: pictures are named from there
    return f"UTF-8 is needed; convert it: iconv -f {encoding} -t UTF-8 {quote(str(path))} > {quote(str(new))}"
