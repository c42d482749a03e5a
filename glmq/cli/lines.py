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


class Flow:
    """Text that comes piece by piece, as lines of a terminal that are broken between words.

    A word is held back until it is whole; a character that is two columns wide is a word of its own.

    Args:
        width: columns of the terminal; None: nothing is broken or held back.
    """

    def __init__(self, width: int | None) -> None:
        self._width = width
        self._column = 0
        self._blanks = self._word = ""

    def add(self, text: str) -> str:
        """What can be written now that this has come."""
        if self._width is None:
            return text
        written = ""
        for character in text:
            if character == "\n":
                written += self.finish() + "\n"
                self._column, self._blanks = 0, ""
            elif character.isspace():
                written += self.finish()
                self._blanks += character
            elif cell_len(character) > 1:
                written += self.finish()
                self._word = character
                written += self.finish()
            else:
                self._word += character
        return written

    def finish(self) -> str:
        """The word that is held back, on a line of its own where the last has no room for it."""
        if not self._word or self._width is None:
            return ""
        shown = self._blanks + self._word
        if self._column and self._column + cell_len(shown) > self._width:
            shown, self._column = f"\n{self._word}", 0
        self._column = (self._column + cell_len(shown.lstrip("\n")) - 1) % self._width + 1
        self._blanks = self._word = ""
        return shown


def width_of(stream: TextIO) -> int | None:
    """Columns of the terminal that a stream goes to; None for a file, another program and a terminal that does not say."""
    if not stream.isatty():
        return None
    columns = os.environ.get("COLUMNS", "")
    try:
        return (int(columns) if columns.isdecimal() else os.get_terminal_size(stream.fileno()).columns) or None
    except OSError:
        return None
