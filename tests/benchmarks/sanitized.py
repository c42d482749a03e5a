"""Compiled modules of glmq, built with address and undefined-behaviour sanitizers, in a process that has them from its start.

A script calls `run_sanitized` in the process that a user started, and `load_sanitized` in the one that this starts; which of
the two it is, `is_sanitized` says. Needs gcc.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILT = "GLMQ_SANITIZED"
"""Set for the second process: the folder of the built modules."""


def _build(module: str, folder: Path) -> None:
    subprocess.run(
        [
            # -O2 fuses multiplication and addition as setup.py's -O3 does; -O1 would not.
            *("gcc", "-g", "-O2", "-std=c11", "-ffp-contract=fast", "-shared", "-fPIC", "-fno-omit-frame-pointer"),
            *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
            f"-I{sysconfig.get_path('include')}",
            str(ROOT.joinpath(*module.split(".")).with_suffix(".c")),
            *("-o", str(folder / f"{module}.so")),
        ],
        check=True,
    )


def is_sanitized() -> bool:
    """Whether this process has the sanitizers."""
    return BUILT in os.environ


def run_sanitized(modules: Sequence[str]) -> int:
    """Run this script again with its arguments, sanitizers loaded; returns its exit status, which a report makes non-zero.

    Args:
        modules: dotted names, e.g. glmq.codec._codec, whose C source lies beside.
    """
    library = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        for module in modules:
            _build(module, Path(folder))
        environment = os.environ | {
            BUILT: folder,
            "LD_PRELOAD": library,
            "ASAN_OPTIONS": "detect_leaks=0",  # Python leaks by design
            "PYTHONMALLOC": "malloc",  # every bytes object gets the sanitizer's red zones
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode


def load_sanitized(modules: Sequence[str]) -> None:
    """Let `import` find the sanitized builds under the modules' names."""
    for name in modules:
        spec = importlib.util.spec_from_file_location(name, Path(os.environ[BUILT], f"{name}.so"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
