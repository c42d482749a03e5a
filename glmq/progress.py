"""What a run tells while it goes on: its events, and where its time goes (seconds, arithmetic, bytes; stage by stage)."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

import psutil

from glmq.records import BlockDone, BytesDone, PassTime, StageTime

STATUS: Final = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One block of a pass, before the pass begins."""

    name: str
    """The block's module name."""
    kind: str
    """Blocks of one kind take about equally long for their `seconds`: vision, merger, text, head, other."""
    seconds: float
    """Expected; 0 for what takes no time worth counting."""


@dataclass(frozen=True, slots=True)
class PassPlan:
    """One pass of a run, before the run begins."""

    title: str
    """As PassStarted will have it."""
    steps: tuple[StepPlan, ...]
    """In their order; of a pass that counts tokens or bytes a single one."""
    is_bound: bool = False
    """It may end before all of this is done, as an answer does: the seconds are those of the longest."""


@dataclass(frozen=True, slots=True)
class RunPlanned:
    """The passes that a run will take, with the time that each block of them is expected to need."""

    passes: tuple[PassPlan, ...]


Unit: TypeAlias = Literal["blocks", "answers", "tokens", "bytes"]


@dataclass(frozen=True, slots=True)
class PassStarted:
    """A pass over a model or over files begins."""

    title: str
    """E.g. calibrate, rate, quantize, compress."""
    unit: Unit
    """What is counted."""
    total: int
    """How many of them the pass has."""
    done: int = 0
    """How many of them an interrupted run has finished, which are not done again."""


@dataclass(frozen=True, slots=True)
class BlockStep:
    """A block is under way."""

    name: str
    """The block's module name."""
    index: int
    """Of this block among all of the pass, from 0."""
    done: int
    """Parts of it that are finished; 0 when it begins."""
    parts: int
    """All of them."""
    what: Literal["samples", "inputs"]
    """What the parts are: calibration samples that go through it, or inputs whose linears are quantized."""
    share: float
    """Of the block's work that is finished, 0 to 1: parts are of different sizes."""


@dataclass(frozen=True, slots=True)
class PassDone:
    """The current pass is finished."""

    time: PassTime
    nbytes: int
    """Bytes that it counted; 0 where it counts blocks or tokens."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something that the user should know; nothing stops because of it."""

    text: str
    """One sentence."""


Event: TypeAlias = RunPlanned | PassStarted | BlockStep | BlockDone | BytesDone | PassDone | Note
Watch: TypeAlias = Callable[[Event], None]
"""Receives the events of a run in the thread that runs it. What it raises ends the run as Ctrl-C does."""
Step: TypeAlias = Callable[[BlockStep], None]
"""Receives how far the block is that is under way."""


Read: TypeAlias = Callable[[str, int], None]
"""Receives the name and the bytes of each tensor that was read."""


def no_read(_: str, __: int) -> None:
    """For whom nobody watches."""


def no_step(_: BlockStep) -> None:
    """For whom nobody watches."""


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(_process(os.getpid()).memory_info().rss)


def peak_bytes() -> int:
    """The most resident memory that this process has had so far; where the system does not say, what it has now."""
    try:
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return resident_bytes()


@functools.cache
def _process(number: int) -> psutil.Process:
    """A process, found once: that reads several files, and every block asks."""
    return psutil.Process(number)


def sum_stages(times: Iterable[StageTime]) -> list[StageTime]:
    """One entry per stage, in the order of their first appearance."""
    total: dict[str, StageTime] = {}
    for one in times:
        so_far = total.get(one.stage, StageTime(one.stage, 0.0, 0, 0))
        total[one.stage] = StageTime(
            one.stage, so_far.seconds + one.seconds, so_far.flops + one.flops, so_far.nbytes + one.nbytes
        )
    return list(total.values())


class Stopwatch:
    """Splits the time of one thread into stages. While an inner stage runs, the one around it stands still."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._flops: dict[str, int] = {}
        self._nbytes: dict[str, int] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time spent in the context goes to stage `name`."""
        self._book()
        self._open.append(name)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def count(self, name: str, *, flops: int = 0, nbytes: int = 0) -> None:
        """Say how much work a stage did."""
        self._flops[name] = self._flops.get(name, 0) + flops
        self._nbytes[name] = self._nbytes.get(name, 0) + nbytes

    def include(self, times: Iterable[StageTime]) -> None:
        """Add what another stopwatch has measured, while no stage is open here."""
        assert not self._open
        for one in times:
            self._seconds[one.stage] = self._seconds.get(one.stage, 0.0) + one.seconds
            self.count(one.stage, flops=one.flops, nbytes=one.nbytes)

    def take(self) -> tuple[StageTime, ...]:
        """What was measured since the last call, in the order in which the stages began."""
        times = tuple(
            StageTime(name, seconds, self._flops.get(name, 0), self._nbytes.get(name, 0))
            for name, seconds in self._seconds.items()
        )
        self._seconds, self._flops, self._nbytes = {}, {}, {}
        return times

    def _book(self) -> None:
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now
