"""Where the time of a run goes: seconds, arithmetic and bytes, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from glmq.records import StageTime


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
