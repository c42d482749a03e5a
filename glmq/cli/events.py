"""`--events FILE`: the events of a run as JSON lines, for programs that watch it."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Final

from glmq.progress import BlockStep, Event, Note, PassDone, PassStarted, RunPlanned
from glmq.records import BlockDone, BytesDone

SCHEMA: Final = "glmq.events/1"
NAMES: Final = {
    RunPlanned: "run_planned",
    PassStarted: "pass_started",
    BlockStep: "block_step",
    BlockDone: "block_done",
    BytesDone: "bytes_done",
    PassDone: "pass_done",
    Note: "note",
}
"""What a line calls each kind of event."""


class EventFile:
    """Appends a line for each event, as it comes; docs/formats.md says what the lines hold.

    Args:
        path: the file; it is made if it does not exist.
        verb: the command.
    """

    def __init__(self, path: Path, verb: str) -> None:
        self.path: Final = path
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self.failure: OSError | None = None
        """Why lines were lost: what a full disk does not take is no reason to end a run."""
        self._write("run_started", {"schema": SCHEMA, "verb": verb})

    def write(self, event: Event, *, elapsed: float, left: float | None) -> None:
        """Append one event.

        Args:
            elapsed: seconds since the run began.
            left: seconds that it is expected to take from now on, if that is known.
        """
        times = {"elapsed_seconds": round(elapsed, 3), "remaining_seconds": None if left is None else round(left, 3)}
        values = asdict(event)
        if isinstance(event, PassDone):
            values["pass"] = values.pop("time")  # a line's own time has that name
        self._write(NAMES[type(event)], {**values, **times})

    def close(self, error: BaseException | None, *, elapsed: float) -> None:
        """Append how the run ended, and close the file."""
        ended = "done" if error is None else "failed" if isinstance(error, Exception) else "stopped"
        reason = None if error is None else str(error) or type(error).__name__
        self._write("run_ended", {"how": ended, "reason": reason, "elapsed_seconds": round(elapsed, 3)})
        try:
            self._file.close()
        except OSError as failure:  # of what it still held back
            self.failure = failure

    def _write(self, name: str, values: dict[str, object]) -> None:
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        line = json.dumps({"event": name, "time": now, **values})
        try:
            self._file.write(line + "\n")
        except OSError as error:
            self.failure = error
