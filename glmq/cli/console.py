"""The two streams of the shell, on which no text from outside is more than text."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TextIO

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from glmq.cli.lines import broken
from glmq.machine import is_out_of_memory
from glmq.quoting import visible

LONGEST_LINE: Final = 10_000
"""Characters of one text that are shown."""
PIPE_WIDTH: Final = 140
"""Columns of output that goes to a file or another program, unless COLUMNS says otherwise."""


def _visible(shown: Any) -> Any:
    """A string, or the string of a Text, without characters that a terminal would act on; anything else as it is."""
    if isinstance(shown, str):
        return visible(shown, LONGEST_LINE)
    if isinstance(shown, Text) and not shown.plain.isprintable():
        return Text(visible(shown.plain, LONGEST_LINE), style=shown.style)
    return shown


class VisibleConsole(Console):
    """A console on which every text is one line of visible characters, whoever wrote it."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*map(_visible, objects), **options)

    def on_broken_pipe(self) -> None:
        """Of rich: it would end the program here, without a word."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def _check_buffer(self) -> None:
        """Of rich: every way to show something, that of its moving lines too, ends here."""
        try:
            super()._check_buffer()
        except OSError:
            if not self.stderr:
                raise
            # A full disk, a reader or a terminal that went away: what the run makes is worth more than what it says.
            self.quiet = True

    def say(self, sentence: str | Text, style: str | None = None, *, hang: int | None = None) -> None:
        """A sentence: broken between words on a terminal, one line for a file or another program.

        Args:
            sentence: without line ends.
            style: of all of it; by default that of a Text.
            hang: columns that later lines begin further in; by default as the first does.
        """
        shown = visible(str(sentence), LONGEST_LINE)
        chosen = sentence.style if isinstance(sentence, Text) else style
        indent = len(shown) - len(shown.lstrip()) if hang is None else hang
        for line in broken(shown, self.width, indent) if self.is_terminal else [shown]:
            self.print(line, style=chosen, soft_wrap=True)


class VisibleTable(Table):
    """A plain table whose title and cells are visible characters."""

    def __init__(self, title: str) -> None:
        super().__init__(title=visible(title), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        super().add_row(*map(_visible, cells), **options)


@contextmanager
def showing(folder: Path) -> Iterator[None]:
    """Show what a run gave. Its output is whole by now, so a lack of memory for showing it is no failure of the run."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        stderr.say(f"note: the output in {folder} is whole, but memory ran out while it was shown")


def _console(stream: TextIO, *, is_stderr: bool) -> VisibleConsole:
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    # Paths and patterns hold brackets and colons, which are neither markup nor emoji.
    return VisibleConsole(stderr=is_stderr, highlight=False, markup=False, emoji=False, width=width)


stdout = _console(sys.stdout, is_stderr=False)
stderr = _console(sys.stderr, is_stderr=True)
