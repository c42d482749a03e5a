"""The events of a run, drawn on stderr: two lines that move on a terminal, time-stamped lines elsewhere; and the notes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Container
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Final

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from glmq.cli.console import stderr
from glmq.cli.events import EventFile
from glmq.cli.remaining import Remaining
from glmq.cli.render import MIB, duration
from glmq.cli.stopped import remember_reached
from glmq.model.config import FAMILY
from glmq.progress import BlockStep, Event, Note, PassDone, PassStarted, RunPlanned
from glmq.records import BlockDone, BytesDone, PassTime, StageTime
from glmq.wording import counted, size

LINE_SECONDS: Final = 10.0
"""Between two lines of one pass where stderr is no terminal."""
SHORTEST: Final = 0.5
"""Seconds left that are still told."""
REFRESHES: Final = 8
"""A second, of the two lines on a terminal."""


class ProgressView:
    """Draws the events that it is called with. A context manager, so that nothing goes on moving when a run fails; entered
    again, it draws another run.

    Args:
        quiet: draw nothing.
        verbose: say of each pass where its time went.
        events: file that the events are appended to as JSON lines; None: none.
        verb: the command, for that file.
        hidden: titles of passes that are not drawn, because what they give is to be seen as they make it.
        fleeting: titles of passes that leave no line when they end, because what is said later has their times.
        clock: seconds.
    """

    def __init__(
        self,
        *,
        quiet: bool,
        verbose: bool = False,
        events: Path | None = None,
        verb: str = "",
        hidden: Container[str] = (),
        fleeting: Container[str] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._quiet, self._verbose, self._clock = quiet, verbose, clock
        self._hidden, self._fleeting = hidden, fleeting
        self._file = _open_events(events, verb)
        self._line_due = 0.0
        self._begin()
        self._live: Live | None = None
        self._spinner = Spinner("line" if stderr.options.ascii_only else "dots")

    def _begin(self) -> None:
        """Know nothing of a run yet."""
        self._remaining = Remaining(self._clock)
        self._pass = PassStarted("", "blocks", 0)
        self._done = 0
        """Of the pass, in its unit."""
        self._at = ""
        """What is under way in it."""
        self._resident_bytes = 0

    def __enter__(self) -> ProgressView:
        self._begin()
        self._move()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if error is not None:
            remember_reached(self.reached())
        if self._file is not None:
            self._file.close(error, elapsed=self._remaining.elapsed())
            if self._file.failure is not None:
                stderr.say(f"warning: {self._file.path}: events are missing ({self._file.failure.strerror})")

    def __call__(self, event: Event) -> None:
        """Draw one event."""
        self._remaining.see(event)
        self._remember(event)
        if self._file is not None:
            self._file.write(event, elapsed=self._remaining.elapsed(), left=self._remaining.left())
        if self._quiet or self._pass.title in self._hidden:
            return
        match event:
            case PassStarted():
                self._start()
            case BlockDone() | BytesDone():
                self._line()
            case PassDone():
                self._stop()
                if self._pass.title not in self._fleeting:
                    for line in done_lines(event, self._pass.unit, verbose=self._verbose):
                        self._say(line)
            case Note():
                stderr.say(event.text)
            case BlockStep() | RunPlanned():
                pass

    def reached(self) -> str:
        """How far the run has come: `calibrate (pass 1 of 3): 12 of 66 blocks are finished`; empty before the first pass."""
        return f"{self._title()}: {self._count()} are finished" if self._pass.title else ""

    def _remember(self, event: Event) -> None:
        match event:
            case PassStarted():
                self._pass, self._done, self._at = event, event.done, ""
            case BlockStep():
                parts = f", {event.what.removesuffix('s')} {event.done + 1} of {event.parts}"
                self._at = FAMILY.short_name(event.name) + parts
            case BlockDone():
                self._done, self._at = event.index + 1, FAMILY.short_name(event.name)
                self._resident_bytes = event.resident_bytes
            case BytesDone():
                self._done, self._at = self._done + event.nbytes, FAMILY.short_name(event.name)
                self._resident_bytes = event.resident_bytes
            case _:
                pass

    def _start(self) -> None:
        self._move()
        if self._live is None:
            self._line_due = self._clock() + LINE_SECONDS
            place = self._remaining.place
            what = "for the whole run" if place is not None and place[0] == 1 else "left"
            self._say(f"{self._title()}: {self._count_all()}{self._times(what)}")

    def _move(self) -> None:
        """Begin to draw what moves, where it can be seen."""
        if self._live is None and not self._quiet and _is_moving():
            self._live = Live(
                get_renderable=self._draw, console=stderr, transient=True, refresh_per_second=REFRESHES
            )  # fmt: skip
            self._live.start(refresh=True)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self) -> None:
        if self._live is not None or self._clock() < self._line_due:
            return
        self._line_due = self._clock() + LINE_SECONDS
        share = f"{self._share():.0%}, {duration(self._remaining.elapsed())} gone"
        memory = f"{self._resident_bytes / MIB:.0f} MiB resident"
        self._say(f"{self._title()}: {self._count()}, {self._at}; {share}{self._times('left')}, {memory}")

    def _say(self, line: str) -> None:
        """A line of progress; with the time where there may be hours between two, and nobody looks on."""
        stamp = "" if _is_moving() else f"{datetime.now():%H:%M:%S} "
        stderr.print(stamp + line, soft_wrap=True)

    def _title(self) -> str:
        place = self._remaining.place
        return self._pass.title if place is None else f"{self._pass.title} (pass {place[0]} of {place[1]})"

    def _count(self) -> str:
        if self._pass.unit == "bytes":
            return f"{size(self._done)} of {size(self._pass.total)}"
        return f"{self._done} of {self._pass.total} {self._pass.unit}"

    def _count_all(self) -> str:
        rest = f", {self._pass.done} of them finished before" if self._pass.done else ""
        if self._pass.unit == "bytes":
            return size(self._pass.total)
        return f"{counted(self._pass.total, self._pass.unit.removesuffix('s'))}{rest}"

    def _share(self) -> float:
        """Of the run, what is done; 99 % until all of it is."""
        share = self._remaining.share()
        return share if share >= 1.0 else min(share, 0.99)

    def _times(self, what: str) -> str:
        """`, about 3 min left`, if that is what it is called; of a run that may end earlier, at most."""
        left = self._remaining.left()
        most = "at most " if self._remaining.is_bound else ""
        return "" if left is None or left < SHORTEST else f", {most}about {duration(left)} {what}"

    def _draw(self) -> Group:
        """Where the run is, and how much of it is done: two lines that fit the terminal."""
        where = Table.grid(padding=(0, 1))
        if not self._pass.title:
            where.add_row(self._spinner, Text("getting ready"))
            return Group(where)
        where.add_row(
            self._spinner, Text(f"{self._title()}: {self._count()}  {self._at}", no_wrap=True, overflow="ellipsis")
        )
        share = self._share()
        times = f"{share:4.0%}  {duration(self._remaining.elapsed())} gone" + self._times("left")
        memory = f", {self._resident_bytes / MIB:.0f} MiB" if self._resident_bytes else ""
        if len(times) + len(memory) + 12 <= stderr.width:
            times += memory
        much = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=1.0, completed=share, width=max(stderr.width - len(times) - 5, 4))
        much.add_row(bar, Text(times, no_wrap=True, overflow="ellipsis"))
        return Group(where, much)


def _is_moving() -> bool:
    """Whether stderr is a terminal that can show what moves.

    rich takes FORCE_COLOR for a terminal, so the stream is asked too; TERM=dumb can show nothing that moves.
    """
    return sys.stderr.isatty() and stderr.is_interactive


def _open_events(path: Path | None, verb: str) -> EventFile | None:
    """The file of `--events`, on the rank that is told of the events."""
    if path is None:
        return None
    from glmq.ranks import read_place  # imports torch, which `glmq inspect` starts without

    return EventFile(path, verb) if read_place().is_first else None


def done_lines(event: PassDone, unit: str, *, verbose: bool) -> list[str]:
    """What a finished pass took."""
    if unit != "bytes":
        return pass_lines(event.time, verbose=verbose)
    done = event.time
    return [f"{done.title}: {size(event.nbytes)} in {duration(done.seconds)}, peak {_resident(done)}"]


def pass_lines(done: PassTime, *, verbose: bool) -> list[str]:
    """How long a pass took and how much memory; with `verbose` the stages that took more than a hundredth of it, with rates."""
    lines = [f"{done.title}: {duration(done.seconds)}, peak {_resident(done)}"]
    shown = [stage for stage in done.stages if stage.seconds > done.seconds / 100]
    if shown and verbose:
        other = done.seconds - sum(stage.seconds for stage in shown)
        parts = [f"{stage.stage} {duration(stage.seconds)}{_rate(stage)}" for stage in shown]
        lines.append(f"{done.title}, of these: {', '.join(parts)}, other {duration(other)}")
    return lines


def _resident(done: PassTime) -> str:
    return f"{done.peak_bytes / MIB:.0f} MiB resident"


def _rate(stage: StageTime) -> str:
    if stage.flops:
        return f" ({stage.flops / stage.seconds / 1e9:.0f} GFLOP/s)"
    return f" ({stage.nbytes / stage.seconds / 1e9:.2f} GB/s)" if stage.nbytes else ""
