"""How glibc's malloc treats large buffers that were freed: the verbs want different things of it. Elsewhere, nothing."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping
from typing import Final

TRIM_THRESHOLD: Final = -1
TOP_PAD: Final = -2
MMAP_THRESHOLD: Final = -3
ARENA_MAX: Final = -8


def return_large_buffers() -> None:
    """Give freed buffers of 1 MiB and more back to the system at once.

    After the first few, glibc would rather keep those of up to 32 MiB, in pieces, in a heap for each thread: with two jobs on
    8 layers of hidden size 4096 the peak was 582 MiB, so it is 314.
    """
    _set_options({MMAP_THRESHOLD: 1 << 20})


def share_one_heap() -> None:
    """Have all threads allocate from the heap of the first one.

    glibc gives threads heaps of their own and keeps what was freed in each. On 2 layers of hidden size 4096 and two threads the
    peak of `quantize` was 1757 MiB, so it is 1630.
    """
    _set_options({ARENA_MAX: 1})


def keep_freed_memory() -> None:
    """Keep what is freed for the next allocation.

    Each piece of a weight takes a few megabytes. Given back to the system and asked for again, they come as fresh pages that
    must be cleared first, which costs as much time as comparing.
    """
    _set_options({TRIM_THRESHOLD: 2**30, TOP_PAD: 64 * 2**20, MMAP_THRESHOLD: 2**30})


def _set_options(options: Mapping[int, int]) -> None:
    """Call mallopt, with the numbers of glibc's <malloc.h>."""
    if platform.libc_ver()[0] == "glibc":
        for option, value in options.items():
            ctypes.CDLL(None).mallopt(option, value)
