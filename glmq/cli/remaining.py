"""How long a run still takes: the time that its blocks were expected to need, corrected by what they have needed so far."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Final

from glmq.progress import BlockStep, Event, PassDone, PassPlan, PassStarted, RunPlanned, StepPlan
from glmq.records import BlockDone, BytesDone

COUNTED: Final = ("blocks", "answers")
"""Units of which each is a step of its own."""
TRUSTED_SHARE: Final = 0.2
"""Of a block or of a pass over bytes that must be finished before its own speed counts."""
TRUSTED_TOKENS: Final = 0.05
"""Of a pass over tokens, which take equally long."""


class Remaining:
    """Sees the events of a run.

    A block needs its expected time, times the ratio that the finished blocks of its kind in its pass have shown, or those of
    the pass that does the same for another recipe of a sweep. A kind of which none is finished takes half of the ratio (of its
    logarithm) that all finished blocks together have shown: part of it is the machine's load, which stays, and part the
    difference between the kinds, which does not.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started = clock()
        self._ready: float | None = None
        """When the first pass began."""
        self._passes: tuple[PassPlan, ...] = ()
        self._number = -1
        """Index of the current pass in `_passes`."""
        self._is_timed = False
        """Expected times are seconds, not mere weights."""
        self._done: set[int] = set()
        self._taken: dict[tuple[str, str], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        """By pass and kind: seconds taken and seconds expected."""
        self._current, self._share, self._since = 0, 0.0, self._started
        self._total, self._unit = 0, "blocks"

    def see(self, event: Event) -> None:
        """Take note of an event."""
        match event:
            case RunPlanned():
                self._passes, self._number, self._is_timed = event.passes, -1, True
            case PassStarted():
                self._ready = self._clock() if self._ready is None else self._ready
                self._start(event)
            case BlockStep():
                if event.index != self._current or event.done == 0:
                    self._since = self._clock()
                self._current, self._share = event.index, event.share
            case BlockDone():
                self._finish(event)
            case BytesDone():
                self._share = min(self._share + event.nbytes / max(self._total, 1), 1.0)
            case PassDone():
                self._done = set(range(len(self._steps)))
            case _:
                pass

    @property
    def place(self) -> tuple[int, int] | None:
        """Number of the current pass, from 1, and how many there are; None if that is not known."""
        return (self._number + 1, len(self._passes)) if self._is_timed and self._number >= 0 else None

    @property
    def is_bound(self) -> bool:
        """What is left is the most that it can be expected to be: a pass may end before all of it is done."""
        return any(one.is_bound for one in self._passes[max(self._number, 0) :])

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self._clock() - self._started

    def left(self) -> float | None:
        """Seconds that the run is expected to take from now on; None before anything tells."""
        if self._number < 0:
            return sum(step.seconds for one in self._passes for step in one.steps) if self._is_timed else None
        title = self._passes[self._number].title
        total = 0.0
        for index, step in enumerate(self._steps):
            if index not in self._done:
                ratio = self._ratio(title, step.kind)
                if ratio is None:
                    return None
                seconds = ratio * step.seconds
                total += self._rest_of_block(seconds) if index == self._current else seconds
        for one in self._passes[self._number + 1 :]:
            for step in one.steps:
                total += step.seconds * (self._ratio(one.title, step.kind) or 1.0)
        return total

    def share(self) -> float:
        """Of the time of the run's passes that has passed, 0 to 1: what came before them is none of their work."""
        left = self.left()
        if left is None:
            return (len(self._done) + self._share) / max(len(self._steps), 1)
        passed = 0.0 if self._ready is None else self._clock() - self._ready
        return passed / max(passed + left, 1e-9)

    @property
    def _steps(self) -> tuple[StepPlan, ...]:
        return self._passes[self._number].steps if self._number >= 0 else ()

    def _start(self, started: PassStarted) -> None:
        titles = [one.title for one in self._passes]
        after = self._number + 1
        if not self._is_timed:
            count = started.total if started.unit in COUNTED else 1
            self._passes, self._number = (PassPlan(started.title, (StepPlan("", "", 1.0),) * count),), 0
        elif started.title in titles[after:]:
            self._number = titles.index(started.title, after)
        else:
            return  # nothing of it is left to do: what an earlier pass found is read again
        self._total, self._unit = started.total, started.unit
        self._done = set(range(started.done)) if started.unit in COUNTED else set()
        self._current, self._share, self._since = len(self._done), 0.0, self._clock()

    def _finish(self, block: BlockDone) -> None:
        if self._unit == "tokens":
            self._share = (block.index + 1) / max(block.total, 1)
            return
        if block.index < len(self._steps) and block.index not in self._done:
            step = self._steps[block.index]
            key = self._passes[self._number].title, step.kind
            taken, expected = self._taken[key]
            self._taken[key] = taken + block.seconds, expected + step.seconds
        self._done.add(block.index)
        self._current, self._share, self._since = block.index + 1, 0.0, self._clock()

    def _ratio(self, title: str, kind: str) -> float | None:
        """Seconds taken for each second expected; None before anything tells."""
        shown = _mean([self._taken.get((title, kind), (0.0, 0.0))])
        if shown is not None:
            return shown
        before, now = self._ratio_before(title, kind), self._ratio_under_way(title, kind)
        if before is None or now is None:
            return before if now is None else now
        if self._unit not in COUNTED:
            return now
        return float(now**self._share * before ** (1 - self._share))  # parts of one block differ more than two blocks

    def _ratio_before(self, title: str, kind: str) -> float | None:
        """What other passes tell of blocks of that kind: those that do the same for other recipes, or all of them by half."""
        alike = [pair for (other, of), pair in self._taken.items() if of == kind and _work(other) == _work(title)]
        shown, by_all = _mean(alike), _mean(self._taken.values())
        if shown is not None:
            return shown
        if not self._is_timed:
            return by_all
        return math.sqrt(by_all) if by_all else 1.0

    def _ratio_under_way(self, title: str, kind: str) -> float | None:
        """What the block tells that is under way, once enough of it is done."""
        if self._number < 0 or self._current >= len(self._steps) or title != self._passes[self._number].title:
            return None
        step, passed = self._steps[self._current], self._clock() - self._since
        trusted = TRUSTED_TOKENS if self._unit == "tokens" else TRUSTED_SHARE
        if step.kind != kind or self._share < trusted or step.seconds <= 0.0:
            return None
        return passed / self._share / step.seconds

    def _rest_of_block(self, seconds: float) -> float:
        """Of the current block, which is expected to take that long altogether."""
        by_share = seconds * (1 - self._share)
        return by_share if self._share > 0.0 else max(seconds - (self._clock() - self._since), 0.0)


def _mean(pairs: Iterable[tuple[float, float]]) -> float | None:
    """Seconds taken for each second expected, of all of them; None where nothing was expected to take any."""
    known = [pair for pair in pairs if pair[1] > 0.0]
    return sum(taken for taken, _ in known) / sum(expected for _, expected in known) if known else None


def _work(title: str) -> str:
    """What a pass does, whatever the recipe: `KL` of `3-bits: KL`."""
    return title.rpartition(": ")[2]
