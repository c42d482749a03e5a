"""The machine: what a log or a bug report names of it, and how its libraries say that memory is used up."""

from __future__ import annotations

import errno
import logging
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Final

import psutil

from glmq.version import __version__

log = logging.getLogger(__name__)

LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_NO_MEMORY: Final = ("can't allocate memory", "cannot allocate memory", "out of memory", "memory allocation of")
PACKAGES: Final = ("torch", "transformers", "safetensors", "numpy", "pillow", "torch-npu")


@contextmanager
def logging_to(path: Path, level: int) -> Iterator[None]:
    """Append what the loggers of glmq say, at `level` and above, to a file, which begins with the machine."""
    logger = logging.getLogger("glmq")
    before = logger.level
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    logger.addHandler(handler)
    if not logger.isEnabledFor(level):
        logger.setLevel(level)
    try:
        for line in describe_machine():
            log.info(line)
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        handler.close()


def describe_machine() -> list[str]:
    """What a bug report needs: versions, platform, cores and memory; a line each."""
    versions = [f"glmq {__version__}", f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    memory = psutil.virtual_memory()
    return [
        f"versions: {', '.join(versions)}",
        f"machine: {platform.platform()}, {psutil.cpu_count()} cores, "
        f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB of memory available",
        f"command: {sys.argv}",
    ]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is used up, in the words of whoever could not get any.

    Python and numpy raise MemoryError, the system ENOMEM. torch raises RuntimeError, on an accelerator a class of it, and
    libraries written in Rust (safetensors, tokenizers) an error or a panic of their own: these say it in their text only.
    """
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    text = str(error).lower()
    own = isinstance(error, RuntimeError) or type(error).__name__ in ("SafetensorError", "PanicException")
    return own and any(words in text for words in _NO_MEMORY)
