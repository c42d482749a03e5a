"""A sentence as lines of a terminal: broken between words, never inside a command or a path."""

from __future__ import annotations

import os
import re
from typing import Final, TextIO

from rich.cells import cell_len

PIECE: Final = re.compile(r"\s*(?:`[^`]*`|\S)+")
"""A word, or a command in backquotes with what adjoins it, and the blanks before it."""


def broken(sentence: str, width: int, hang: int = 0) -> list[str]:
    """The lines of a sentence.

    A command in backquotes and a word longer than a line stay whole, so that they can be copied: the terminal breaks them.

    Args:
        sentence: without line ends.
        width: columns of the terminal.
        hang: columns that the lines after the first begin further in.
    """
    lines: list[str] = []
    for piece in PIECE.findall(sentence):
        if lines and cell_len(lines[-1] + piece) <= width:
            lines[-1] += piece
        else:
            lines.append(" " * hang + piece.lstrip() if lines else piece)
    return lines or [""]


def width_of(stream: TextIO) -> int | None:
    """Columns of the terminal that a stream goes to; None for a file, another program and a terminal that does not say."""
    if not stream.isatty():
        return None
    columns = os.environ.get("COLUMNS", "")
    try:
        return (int(columns) if columns.isdecimal() else os.get_terminal_size(stream.fileno()).columns) or None
    except OSError:
        return None
