"""What is told of a run that was stopped: how far it came, what lies where, and the command that resumes it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from shlex import join
from typing import Final

from glmq.wording import size

OUTPUTS: Final = ("save_directory", "stats", "out")
"""Parameters of the verbs that name an output folder."""

_command: ContextVar[str] = ContextVar("command", default="")
_reached: ContextVar[str] = ContextVar("reached", default="")


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A work folder with something to resume."""

    path: Path
    nbytes: int
    """That it takes on the disk."""


def remember_command(program: Sequence[str], args: Sequence[str], *, can_resume: bool) -> None:
    """Keep the command line that this process serves, if it can be resumed.

    Args:
        program: the words before the arguments.
        args: without --resume.
        can_resume: whether the verb has that option.
    """
    _reached.set("")
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    launcher = ["torchrun", "--nproc_per_node", processes, "-m"] if processes != "1" else []
    _command.set(join([*launcher, *program, *args]) if can_resume else "")


def resuming_command() -> str:
    """The command that resumes the run, quoted for a shell; empty where there is none."""
    return f"{_command.get()} --resume" if _command.get() else ""


def remember_reached(sentence: str) -> None:
    """Keep how far the run had come when it was stopped."""
    _reached.set(sentence)


def find_unfinished(params: Mapping[str, object]) -> list[Unfinished]:
    """The work folders of a command's outputs that a resumed run would go on from."""
    from glmq.checkpoint.workplace import Workplace, has_progress, stored_bytes

    work_dir = params.get("work_dir")
    found = []
    for target in (params.get(name) for name in OUTPUTS):
        if isinstance(target, Path):
            own = work_dir if isinstance(work_dir, Path) else None
            work = Workplace.of(target, own).work
            if has_progress(work):
                found.append(Unfinished(work, stored_bytes(target, own)))
    return found


def describe_stop(by: str, left: Sequence[Unfinished]) -> str:
    """One sentence: what stopped the run, how far it came, and whether that is lost."""
    reached = _reached.get()
    if left:
        return f"stopped by {by}; {reached or 'what is finished stays'}"
    return "; ".join(filter(None, [f"stopped by {by}", reached, "nothing half-written was left behind"]))


def describe_rest(left: Sequence[Unfinished]) -> list[str]:
    """Lines below it: where the unfinished output lies, and what continues or removes it, or starts again."""
    if not left:
        return [f"  to start again: {_command.get()}"] if _command.get() else []
    lines = [f"  unfinished: {one.path}, {size(one.nbytes)}" for one in left]
    folders = dict.fromkeys(str(one.path.parent) for one in left)
    return [
        *lines,
        f"  to continue: {resuming_command()}",
        f"  to remove: {join(['glmq', 'clean', '--yes', *folders])}",
    ]
