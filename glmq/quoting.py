"""What came from outside (names of tensors, files and keys, values of JSON files), made fit for where it is shown.

A terminal acts on control characters, some of which hide or overwrite what stands beside them; a spreadsheet computes a cell
that begins like a formula.
"""

from __future__ import annotations

import csv
import io
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

LONGEST: Final = 2000
"""Characters of one text that are shown."""
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")


def file_text(name: str) -> str:
    r"""The name of a file as text that can be written: bytes that are no UTF-8, as old archives leave them, as `\xce`."""
    return os.fsencode(name).decode(errors="backslashreplace")


def visible(text: str, longest: int = LONGEST) -> str:
    r"""`text` on one line, with an escape (`\x1b`, `\n`, `\u202e`) for whatever is no visible character.

    Escaped are control characters, line ends, marks that change the direction of writing, halves of surrogate pairs,
    private and unassigned characters. Of a text longer than `longest` the beginning is kept, and its length is said.
    """
    if len(text) > longest:
        text = f"{text[:longest]}... ({len(text)} characters)"
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char.isprintable() or unicodedata.category(char) == "Zs" else _escape(char) for char in text)


def visible_json(document: str) -> str:
    """JSON text in which no character is one that `visible` escapes; it stands for the same values.

    Only within strings, where an escape means the character: outside of them JSON has no such characters but line ends.
    """
    if document.isascii():
        return document
    return "".join(
        char if char.isprintable() or char == "\n" or unicodedata.category(char) == "Zs" else _json_escape(char)
        for char in document
    )


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """A table as CSV with a header, lines ended by a line feed, its cells made safe by `csv_cell`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([csv_cell(column) for column in columns])
    writer.writerows([csv_cell(row[column]) for column in columns] for row in rows)
    return text.getvalue()


def csv_cell(value: object) -> object:
    """A cell's value; a text that a spreadsheet would compute gets an apostrophe in front, which makes it text there."""
    if isinstance(value, str):
        value = visible(value)
        return f"'{value}" if value.startswith(_FORMULA) else value
    return value


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def _json_escape(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
