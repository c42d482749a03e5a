"""Doctor: what of this machine glmq depends on, as found, and what stands in its way. The first thing for a bug report."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final

import psutil

from glmq.cann import AscendState, find_ascend
from glmq.checkpoint.disk import free_bytes
from glmq.machine import PACKAGES, available_memory, processor_features, processor_name, version_of
from glmq.version import __version__

SLOWER: Final = {"rounding": "1.5", "codec": "20 to 30", "comparison": "2"}
"""How many times as long numpy and torch take, as measured on a 2048 x 2048 weight with one thread of an x86_64 server."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One machine."""

    glmq: str
    """Versions, like the next; of packages None where one is not installed."""
    python: str
    packages: Mapping[str, str | None]
    platform: str
    processor: str
    features: tuple[str, ...]
    """Of the processor, those that decide how fast glmq computes."""
    cores: int
    memory_total: int
    """Bytes, like the next."""
    memory_available: int
    """The machine's, or less where a container has a limit."""
    disks: Mapping[str, int]
    """Free bytes by folder."""
    kernels: Mapping[str, str]
    """Which kernel computes: of the compiled ones, or its stand-in where none could be built. Empty without torch."""
    ascend: AscendState
    compress_program: str | None
    """The vendor's, that makes the W8A8SC which MindIE loads."""
    problems: tuple[str, ...]
    """What does not work as it is, a sentence's part each."""


def diagnose() -> Diagnosis:
    """Look at this machine. Works where torch cannot be imported, and says so then."""
    ascend = find_ascend()
    problems: list[str] = []
    kernels: dict[str, str] = {}
    program: str | None = None
    try:
        kernels = _kernels()
        program = _compress_program()
    except Exception as error:  # whatever a broken torch fails with is what the user needs to hear
        problems.append(f"torch cannot be imported ({type(error).__name__}: {f'{error}'.partition(chr(10))[0]:.200})")
    problems += [
        f"no compiled kernel for {what}: {kernel} computes it and takes {SLOWER[what]} times as long; install a C compiler "
        "and install glmq again"
        for what, kernel in kernels.items()
        if kernel in ("numpy", "torch")
    ]
    folders = [Path.cwd()]
    try:
        folders.append(Path(tempfile.gettempdir()))
    except FileNotFoundError:
        problems.append(
            "no temporary folder can be written to (of TMPDIR, /tmp, /var/tmp and the current one); set TMPDIR to one that can"
        )
    if ascend.torch_npu is not None:
        problems += [f"no NPU can be used: {reason}" for reason in ascend.missing()]
    return Diagnosis(
        glmq=__version__,
        python=platform.python_version(),
        packages={name: version_of(name) for name in PACKAGES},
        platform=platform.platform(),
        processor=processor_name(),
        features=processor_features(),
        cores=psutil.cpu_count() or 1,
        memory_total=psutil.virtual_memory().total,
        memory_available=available_memory(),
        disks={str(folder): free_bytes(folder) for folder in folders},
        kernels=kernels,
        ascend=ascend,
        compress_program=program,
        problems=tuple(problems),
    )


def _kernels() -> dict[str, str]:
    """By what they compute. Imported here: they need torch, which may be what is broken."""
    from glmq.codec import codec
    from glmq.inspection import sums
    from glmq.numerics import moments
    from glmq.numerics.gptq import rounding_kernel

    import_module("torch")
    return {
        "statistics": moments.KERNELS[0] if moments.KERNELS else "torch",
        "rounding": rounding_kernel(),
        "codec": codec.KERNELS[0] if codec.KERNELS else "numpy",
        "comparison": sums.KERNELS[0] if sums.KERNELS else "torch",
    }


def _compress_program() -> str | None:
    from glmq.compression.executor import find_executor

    found = find_executor(None)
    return None if found is None else str(found)
