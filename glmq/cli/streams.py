"""The standard streams of the process, whatever state they were inherited in."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Final, TextIO

_LAST: Final = 2
"""Descriptor of the last of the three: standard input, output and errors."""


def mend_streams() -> None:
    """Open the null device for streams that are closed, as cron, systemd and `>&-` leave them, and let none fail at a letter.

    Left closed, their numbers would go to the next files that are opened, and what a library prints would go into weights.
    A character that the stream's encoding lacks is written as an escape; a byte that is none in it is read as half of a
    surrogate pair, which is refused where it is used.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= _LAST:
        pass
    os.close(handle)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def silence(stream: TextIO) -> None:
    """Let what a stream that takes nothing still holds, and all that follows, go nowhere: Python's end would fail of it."""
    try:
        handle = stream.fileno()
    except io.UnsupportedOperation:  # no stream of the process
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, handle)
    os.close(nowhere)


@contextmanager
def without_echo(typed: IO[Any]) -> Iterator[None]:
    """What is typed meanwhile does not show among what is printed: it waits, and whoever reads next gets and shows it.

    Args:
        typed: what is read from; anything but a terminal is left as it is, and so is every terminal of Windows.
    """
    try:
        import termios
    except ImportError:
        yield
        return
    if not typed.isatty():
        yield
        return
    before = termios.tcgetattr(typed)
    silent = [*before]
    silent[3] = before[3] & ~termios.ECHO
    try:  # TCSADRAIN, as TCSAFLUSH throws away what was typed and not yet read
        termios.tcsetattr(typed, termios.TCSADRAIN, silent)
        yield
    finally:
        termios.tcsetattr(typed, termios.TCSADRAIN, before)
