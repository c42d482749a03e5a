"""Whole processes measured from outside, for the benchmarks."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SEED = ["--w_bit", "4", "--is_lowbit", "True", "--fraction", "0.01", "--use_sigma", "True", "--torch_dtype", "fp16"]
"""README's step 1, without paths."""


@dataclass(frozen=True)
class Measured:
    """One finished process."""

    wall_s: float
    cpu_s: float
    peak_mib: float
    output: str
    """What it printed, stdout and stderr together."""


def best_seconds(work: Callable[[], object], times: int = 3) -> float:
    """The shortest of some runs: what the machine can do when nobody disturbs it."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


def measure(command: list[str], folder: Path, *, codes: tuple[int, ...] = (0,)) -> Measured:
    """Run a command to its end and read the operating system's account of it. Other exit codes than `codes` end it all."""
    started = time.perf_counter()
    with (folder / "out.txt").open("w+b") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        out.seek(0)
        text = out.read().decode(errors="replace")
    if os.waitstatus_to_exitcode(status) not in codes:
        raise SystemExit(f"{command[0]} failed:\n{text[-3000:]}")
    return Measured(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, text.strip())
