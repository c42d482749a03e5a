"""How a job tells what it does: events to the caller's `watch`, lines to the log, the times of its passes kept."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Final, TypeVar

from glmq.progress import (
    BlockStep,
    Event,
    Note,
    PassDone,
    PassPlan,
    PassStarted,
    RunPlanned,
    Unit,
    Watch,
    peak_bytes,
    sum_stages,
)
from glmq.quoting import visible
from glmq.records import BlockDone, BytesDone, PassTime, StageTime

if TYPE_CHECKING:
    from glmq.ranks import Ranks

COUNT_SECONDS: Final = 10.0
"""What counts and says how far it is, says so this often."""
T = TypeVar("T")
log = logging.getLogger(__name__)


class Watcher:
    """Passes on what a job reports.

    Args:
        watch: receives the events; None: nobody does. The log gets them in any case.
    """

    def __init__(self, watch: Watch | None) -> None:
        self._watch = watch
        self._times: list[PassTime] = []
        self._started = time.perf_counter()

    def note(self, text: str) -> None:
        """Something that the user should know, one sentence."""
        text = visible(text)
        log.info("%s", text)
        self._tell(Note(text))

    @property
    def is_watched(self) -> bool:
        """Whether anybody receives the events, so that a forecast is worth its time."""
        return self._watch is not None

    def plan(self, passes: Sequence[PassPlan]) -> None:
        """What the run will do, before its first pass."""
        self._tell(RunPlanned(tuple(passes)))

    def step(self, step: BlockStep) -> None:
        """How far the block is that is under way."""
        self._tell(step)

    def counter(self, what: str) -> Callable[[int], None]:
        """What to call with how many of `what` were looked at so far: it becomes a note every COUNT_SECONDS."""
        due = time.perf_counter() + COUNT_SECONDS

        def count(done: int) -> None:
            nonlocal due
            if time.perf_counter() >= due:
                due = time.perf_counter() + COUNT_SECONDS
                self.note(f"{done} {what} so far")

        return count

    @contextmanager
    def blocks(
        self, title: str, total: int, unit: Unit = "blocks", *, finished: int = 0
    ) -> Iterator[Callable[[BlockDone], None]]:
        """A pass over blocks; call what it gives after each. Its time counts if it ends without an error.

        Args:
            finished: how many an interrupted run has done.
        """
        started, stages = self._start(title, unit, total, finished), list[StageTime]()

        def done(block: BlockDone) -> None:
            stages.extend(block.stages)
            log.info(
                "%s: %d/%d %s, %.1f s, %.0f MiB resident",
                title, block.index + 1, block.total, block.name, block.seconds, block.resident_bytes / 2**20,
            )  # fmt: skip
            self._tell(block)

        yield done
        self._end(title, started, tuple(sum_stages(stages)), 0)

    @contextmanager
    def bytes(self, title: str, total: int) -> Iterator[Callable[[str, int, int], None]]:
        """A pass over bytes; call what it gives with a tensor's name, the bytes done and the resident memory."""
        started, count = self._start(title, "bytes", total, 0), 0

        def done(name: str, nbytes: int, resident_bytes: int) -> None:
            nonlocal count
            count += nbytes
            log.debug("%s: %s, %d bytes, %.0f MiB resident", title, name, nbytes, resident_bytes / 2**20)
            self._tell(BytesDone(name, nbytes, resident_bytes))

        yield done
        self._end(title, started, (), count)

    def drain(self, title: str, total: int, steps: Generator[BytesDone, None, T]) -> T:
        """Run a generator to its end as a pass over `total` bytes; returns what it returns."""
        with self.bytes(title, total) as done:
            while True:
                try:
                    step = next(steps)
                except StopIteration as end:
                    result: T = end.value
                    break
                done(step.name, step.nbytes, step.resident_bytes)
        return result

    def times(self, ranks: Ranks) -> tuple[PassTime, ...]:
        """The passes of rank 0 so far, which every rank gets: all must call it."""
        own = json.dumps([asdict(done) for done in self._times])
        return tuple(
            PassTime(**done | {"stages": tuple(StageTime(**stage) for stage in done["stages"])})
            for done in json.loads(ranks.all_gather(own)[0])
        )

    def seconds(self, ranks: Ranks) -> float:
        """The time of the run so far on rank 0, which every rank gets: all must call it."""
        return float(ranks.all_gather(repr(time.perf_counter() - self._started))[0])

    def _start(self, title: str, unit: Unit, total: int, finished: int) -> float:
        log.info("%s: %d %s to do", title, total - finished, unit)
        self._tell(PassStarted(title, unit, total, finished))
        return time.perf_counter()

    def _end(self, title: str, started: float, stages: tuple[StageTime, ...], nbytes: int) -> None:
        done = PassTime(title, time.perf_counter() - started, peak_bytes(), stages)
        log.info("%s: done in %.1f s, at most %.0f MiB resident", done.title, done.seconds, done.peak_bytes / 2**20)
        self._times.append(done)
        self._tell(PassDone(done, nbytes))

    def _tell(self, event: Event) -> None:
        if self._watch is not None:
            self._watch(event)
