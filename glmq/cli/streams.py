"""The standard streams of the process, whatever state they were inherited in."""

from __future__ import annotations

import io
import os
import sys
from typing import Final

_LAST: Final = 2
"""Descriptor of the last of the three: standard input, output and errors."""


def mend_streams() -> None:
    """Open the null device for streams that are closed, as cron, systemd and `>&-` leave them, and let none fail at a letter.

    Left closed, their numbers would go to the next files that are opened, and what a library prints would go into weights.
    A character that the stream's encoding lacks is written as an escape.
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
