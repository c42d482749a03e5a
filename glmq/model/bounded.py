"""Run code of others, a chat template, where it can neither run forever nor fill the memory: in a short-lived child process."""

from __future__ import annotations

import os
import resource
import signal
import warnings
from collections.abc import Callable
from typing import Final

import psutil

CPU_SECONDS: Final = 5
MEMORY_BYTES: Final = 512 * 2**20
"""That the child may take beside what this process has."""
TEXT_BYTES: Final = 16 * 2**20
"""Of the result."""
_OK, _FAILED = b"+", b"-"


class BoundedError(Exception):
    """What went wrong in the child, as words for a sentence."""


def run_bounded(make: Callable[[], str]) -> str:
    """What `make` returns, made in a child process of at most CPU_SECONDS and MEMORY_BYTES.

    The child is a copy of this process that does nothing else: what `make` changes stays there.

    Raises:
        BoundedError: it failed, took too long or too much, or returned what is no text.
    """
    # Without it, tokenizers prints a paragraph at every fork after its first use; "true" is what it does anyway.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of forks beside threads: the child starts none and uses none
        child = os.fork()
    if child == 0:
        _be_child(make, reading, writing)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            answer = pipe.read(TEXT_BYTES + 2)
    finally:
        os.kill(child, signal.SIGKILL)  # it waits where it has more to say
        _, status = os.waitpid(child, 0)
    if len(answer) > TEXT_BYTES + 1:
        raise BoundedError(f"it makes a text of more than {TEXT_BYTES // 2**20} MiB")
    if answer.startswith(_OK):
        return answer[1:].decode()
    if answer.startswith(_FAILED):
        raise BoundedError(answer[1:].decode())
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        raise BoundedError(f"it takes more than {CPU_SECONDS} seconds")
    raise BoundedError("it ended its process")


def _be_child(make: Callable[[], str], reading: int, writing: int) -> None:
    """Never returns."""
    try:
        os.close(reading)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        used = sum(psutil.Process().cpu_times()[:2])
        _lower(resource.RLIMIT_CPU, int(used) + CPU_SECONDS)
        _lower(resource.RLIMIT_AS, psutil.Process().memory_info().vms + MEMORY_BYTES)
        _lower(resource.RLIMIT_CORE, 0)
        try:
            answer = _OK + make().encode()
        except MemoryError:
            answer = _FAILED + f"it takes more than {MEMORY_BYTES // 2**20} MiB of memory".encode()
        except BaseException as error:  # handed to the parent, as words
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            answer = _FAILED + f"{reason:.200}".encode(errors="backslashreplace")
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(answer)
    finally:
        os._exit(0)


def _lower(limit: int, value: int) -> None:
    soft, hard = resource.getrlimit(limit)
    if soft == resource.RLIM_INFINITY or soft > value:
        resource.setrlimit(limit, (value, hard))
