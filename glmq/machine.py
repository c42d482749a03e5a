"""The machine and the versions that a log or a bug report names."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Final

import psutil

from glmq.version import __version__

LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
PACKAGES: Final = ("torch", "transformers", "safetensors", "numpy", "pillow", "torch-npu")


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
