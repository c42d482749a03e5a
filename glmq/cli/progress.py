"""The events of a run, drawn on stderr: a bar where it is a terminal, plain lines where not, and the notes."""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType
from typing import Final, Literal

from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn

from glmq.cli.console import stderr
from glmq.cli.render import MIB, size
from glmq.progress import Event, Note, PassDone, PassStarted
from glmq.records import BlockDone, BytesDone, PassTime, StageTime

RECENT_BLOCKS: Final = 8
"""The remaining time is estimated from the last few blocks: early ones (vision) differ from later ones (text)."""
BYTE_LINES: Final = 20
"""Lines of a pass over bytes where stderr is no terminal."""


class ProgressView:
    """Draws the events that it is called with. A context manager, so that no bar is left when a run fails.

    Args:
        quiet: draw nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._pass = PassStarted("", "blocks", 0)
        self._started = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT_BLOCKS)
        self._bytes_done = 0
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> ProgressView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_bar()

    def __call__(self, event: Event) -> None:
        """Draw one event."""
        if self._quiet:
            return
        match event:
            case PassStarted():
                self._start(event)
            case BlockDone():
                self._show_block(event)
            case BytesDone():
                self._show_bytes(event)
            case PassDone():
                self._stop_bar()
                for line in done_lines(event, self._pass.unit):
                    stderr.print(line, soft_wrap=True)
            case Note():
                stderr.print(event.text, soft_wrap=True)

    def _start(self, started: PassStarted) -> None:
        self._pass, self._started, self._bytes_done = started, time.perf_counter(), 0
        self._recent.clear()
        # rich takes FORCE_COLOR for a terminal, so ask the stream too before drawing a live bar; TERM=dumb can show none.
        if sys.stderr.isatty() and stderr.is_interactive:
            columns: list[ProgressColumn] = [
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[count]}  {task.fields[left]}  {task.fields[memory]}"),
            ]
            self._bar = Progress(*columns, console=stderr, transient=True)
            count = self._count(0)
            self._task = self._bar.add_task(started.title, total=started.total, count=count, left="", memory="")
            self._bar.start()

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _count(self, done: int) -> str:
        if self._pass.unit == "bytes":
            return f"{size(done)} of {size(self._pass.total)}"
        return f"{done}/{self._pass.total} {self._pass.unit}"

    def _show_block(self, block: BlockDone) -> None:
        self._recent.append(block.seconds)
        left = f"{(block.total - block.index - 1) * sum(self._recent) / len(self._recent):.0f} s left"
        memory = f"{block.resident_bytes / MIB:.0f} MiB"
        if self._bar is not None:
            self._bar.update(
                self._task,
                total=block.total,
                completed=block.index + 1,
                count=self._count(block.index + 1),
                left=left,
                memory=memory,
            )
        else:
            stderr.print(
                f"{self._pass.title}: {block.index + 1}/{block.total} {block.name} {block.seconds:.1f} s, {left}, {memory}",
                soft_wrap=True,
            )

    def _show_bytes(self, step: BytesDone) -> None:
        total = max(self._pass.total, 1)
        line_before, self._bytes_done = self._bytes_done * BYTE_LINES // total, self._bytes_done + step.nbytes
        seconds = time.perf_counter() - self._started
        left = f"{seconds * (self._pass.total - self._bytes_done) / max(self._bytes_done, 1):.0f} s left"
        memory = f"{step.resident_bytes / MIB:.0f} MiB"
        count = self._count(self._bytes_done)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._bytes_done, count=count, left=left, memory=memory)
        elif self._bytes_done * BYTE_LINES // total > line_before:
            stderr.print(f"{self._pass.title}: {count}, {step.name}, {left}, {memory}", soft_wrap=True)


def done_lines(event: PassDone, unit: Literal["blocks", "tokens", "bytes"]) -> list[str]:
    """What a finished pass took."""
    if unit != "bytes":
        return pass_lines(event.time)
    done = event.time
    return [
        f"{done.title}: {size(event.nbytes)} in {done.seconds:.1f} s, peak {done.peak_bytes / MIB:.0f} MiB resident"
    ]


def pass_lines(done: PassTime) -> list[str]:
    """How long a pass took and how much memory; then the stages that took more than a hundredth of it, with their rates."""
    lines = [f"{done.title}: {done.seconds:.1f} s, peak {done.peak_bytes / MIB:.0f} MiB resident"]
    shown = [stage for stage in done.stages if stage.seconds > done.seconds / 100]
    if shown:
        other = done.seconds - sum(stage.seconds for stage in shown)
        parts = [f"{stage.stage} {stage.seconds:.1f} s{_rate(stage)}" for stage in shown]
        lines.append(f"{done.title}, of these: {', '.join(parts)}, other {other:.1f} s")
    return lines


def _rate(stage: StageTime) -> str:
    if stage.flops:
        return f" ({stage.flops / stage.seconds / 1e9:.0f} GFLOP/s)"
    return f" ({stage.nbytes / stage.seconds / 1e9:.2f} GB/s)" if stage.nbytes else ""
