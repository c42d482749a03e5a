"""The machine: what a log or a bug report names of it, and how its libraries say that memory is used up."""

from __future__ import annotations

import errno
import functools
import logging
import platform
import shlex
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Final

import psutil

from glmq.version import __version__
from glmq.wording import counted

log = logging.getLogger(__name__)

LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_NO_MEMORY: Final = ("can't allocate memory", "cannot allocate memory", "out of memory", "memory allocation of")
CPUINFO: Final = Path("/proc/cpuinfo")
FEATURES: Final = (
    *("sse4_2", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve"),
)
CGROUPS: Final = Path("/proc/self/cgroup")
CGROUP_ROOT: Final = Path("/sys/fs/cgroup")
PACKAGES: Final = ("torch", "transformers", "safetensors", "numpy", "pillow", "torch-npu")


class LogFile(logging.FileHandler):
    """A file for log lines. What its disk does not take is lost, which is no reason to end a run."""

    failure: OSError | None = None
    """Why lines were lost."""
    is_over = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.is_over:  # else a thread that has it still would open the file again, wherever it lies by then
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging calls it so)
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self.failure = error

    def close(self) -> None:
        self.is_over = True
        try:
            super().close()
        except OSError as error:
            self.failure = error


class _Level:
    """The level of glmq's logger while log files are open, in however many threads."""

    def __init__(self) -> None:
        self._lock, self._open, self._before = threading.Lock(), list[int](), logging.NOTSET

    def lower(self, logger: logging.Logger, level: int) -> None:
        with self._lock:
            if not self._open:
                self._before = logger.level
            self._open.append(level)
            if not logger.isEnabledFor(level):
                logger.setLevel(level)

    def restore(self, logger: logging.Logger, level: int) -> None:
        with self._lock:
            self._open.remove(level)
            if not self._open:
                logger.setLevel(self._before)


_LEVEL: Final = _Level()


@contextmanager
def logging_to(path: Path, level: int) -> Iterator[LogFile]:
    """Append what the loggers of glmq say, at `level` and above, to a file, which begins with the machine."""
    logger = logging.getLogger("glmq")
    handler = LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    logger.addHandler(handler)
    _LEVEL.lower(logger, level)
    try:
        for line in describe_machine():
            log.info(line)
        yield handler
    finally:
        logger.removeHandler(handler)
        _LEVEL.restore(logger, level)
        handler.close()


def describe_machine() -> list[str]:
    """What a bug report needs: versions, platform, cores and memory; a line each."""
    versions = [f"glmq {__version__}", f"python {platform.python_version()}"]
    for package in PACKAGES:
        version = version_of(package)
        versions.append(f"no {package}" if version is None else f"{package} {version}")
    total = psutil.virtual_memory().total
    return [
        f"versions: {', '.join(versions)}",
        f"machine: {platform.platform()}, {counted(psutil.cpu_count() or 0, 'core')}, "
        f"{available_memory() / 2**30:.1f} of {total / 2**30:.1f} GiB of memory available",
        f"command: {sys.argv}",
    ]


def command_line() -> str:
    """The command that this process was started by, as a shell would take it."""
    program = Path(sys.argv[0])
    name = "glmq" if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])


@functools.cache
def version_of(package: str) -> str | None:
    """The version of an installed package, which is not imported; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor_name() -> str:
    """The processor's name, as Linux says it, or else as Python does."""
    return _cpu_line("model name") or platform.processor() or platform.machine()


def processor_features() -> tuple[str, ...]:
    """Those instruction sets of the processor that glmq's kernels or torch's products use; empty where it is not known."""
    flags = set((_cpu_line("flags") or _cpu_line("Features") or "").split())
    return tuple(flag for flag in FEATURES if flag in flags)


def _cpu_line(key: str) -> str | None:
    """What /proc/cpuinfo says of the first processor."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.split("\t")[0] == key), None)


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


def available_memory() -> int:
    """Bytes of main memory that this process may still take: the machine's, or less where its container has a limit."""
    free = [int(psutil.virtual_memory().available)]
    for folder in _cgroups():
        limit = _number(folder, "memory.max", "memory.limit_in_bytes")
        used = _number(folder, "memory.current", "memory.usage_in_bytes")
        if limit is not None and used is not None:
            free.append(max(0, limit - used + _reclaimable(folder)))
    return min(free)


def _cgroups() -> Iterator[Path]:
    """The groups of processes (cgroups, of either version) with a memory of their own that this process is in."""
    try:
        lines = CGROUPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUP_ROOT / "memory" if controllers else CGROUP_ROOT
        # Within a container its own group is mounted as the root, under which the name need not exist.
        folder = root / name.lstrip("/")
        yield from (group for group in (folder, *folder.parents) if group.is_relative_to(root) and group.is_dir())


def _number(folder: Path, *names: str) -> int | None:
    """The number in the first of these files that is there; None if there is none, or it says "max"."""
    for name in names:
        try:
            return int((folder / name).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
    return None


def _reclaimable(folder: Path) -> int:
    """Bytes of files that a group keeps in memory, and gives up when it needs them."""
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return 0
    found = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(found.get("total_inactive_file") or found.get("inactive_file") or 0)
