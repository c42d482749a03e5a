"""Clean: the work folders of interrupted runs, found and removed."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from shlex import quote
from typing import Final

from glmq.checkpoint.lock import FolderLock, acquire_first
from glmq.checkpoint.run_note import FoundRun, read_note
from glmq.checkpoint.workplace import (
    REPLACED,
    RESULT,
    Owner,
    Workplace,
    is_folder,
    is_whole,
    owner_of,
    remove_work,
    taken_bytes,
)
from glmq.errors import BusyError, UnreadableError

_WORK: Final = re.compile(r"\.(.+)\.partial")
_ELSEWHERE: Final = re.compile(r".+-[0-9a-f]{8}")
"""Names of outputs as they stand in the names of their work folders under --work-dir."""


class State(Enum):
    """What a work folder is in."""

    UNFINISHED = "unfinished"
    """It may be resumed or removed."""
    RUNNING = "running"
    """A run has its lock."""
    FINISHED = "finished"
    """Its result is whole, but has not got its place."""
    REPLACING = "replacing"
    """It holds the former contents of an output folder, which could not be put back."""
    UNKNOWN = "unknown"
    """It does not say whose lock it is under: an older glmq made it."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """The work folder of a run."""

    path: Path
    state: State
    verb: str
    """Empty if that is not known."""
    nbytes: int
    """That it takes on the disk."""
    age_seconds: float
    """Since something in it was changed last."""
    command: str
    """That resumes the run, quoted for a shell; empty if there is none, or it is not known."""


def find_leftovers(folders: Sequence[Path]) -> list[Leftover]:
    """The work folders in some folders, and those of outputs of these names; sorted by path.

    Raises:
        UnreadableError: there is no such folder, and no unfinished output of that name.
    """
    found: dict[Path, Leftover] = {}
    for folder in folders:
        own = Workplace.of(folder).staging
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        candidates = [path for path in (own, folder.resolve(), *inside) if _WORK.fullmatch(path.name)]
        works = [path.resolve() for path in candidates if owner_of(path) is Owner.GLMQ]
        if not works and not folder.is_dir():
            raise UnreadableError(
                f"{folder}: is no folder, and no run left an unfinished output of that name beside it"
            )
        found |= {work: _look(work) for work in works}
    return [found[path] for path in sorted(found)]


def remove_leftovers(found: Sequence[Leftover]) -> list[Leftover]:
    """Remove those that are unfinished, each under its lock, unless a run has taken that meanwhile; returns what is gone."""
    removed = []
    for one in found:
        if one.state is State.UNFINISHED:
            try:
                lock = acquire_first(_locks(one.path), one.path)
            except BusyError:
                continue
            try:
                if _state_of(one.path) is State.UNFINISHED:
                    remove_work(one.path)
                    removed.append(one)
            finally:
                lock.release()
    return removed


def _look(work: Path) -> Leftover:
    run = read_note(work)
    changed = work.stat().st_mtime
    for path in work.iterdir():
        with suppress(FileNotFoundError):  # a run may be at work
            changed = max(changed, path.lstat().st_mtime)
    state = _state_of(work)
    if state is State.UNFINISHED and _is_held(work):
        state = State.RUNNING
    return Leftover(
        path=work,
        state=state,
        verb="" if run is None else run.note.verb,
        nbytes=taken_bytes(work),
        age_seconds=max(0.0, time.time() - changed),
        command="" if run is None else _command_from_here(run),
    )


def _state_of(work: Path) -> State:
    if is_folder(work / REPLACED):
        return State.REPLACING
    if is_whole(work):
        return State.FINISHED
    return State.UNFINISHED if _locks(work) else State.UNKNOWN


def _locks(work: Path) -> tuple[Path, ...]:
    """The lock files under which the work folder may be; none where that is not known."""
    run = read_note(work)
    if run is not None:
        return tuple(Path(path) for path in run.locks if path.endswith(".glmq-lock"))
    match = _WORK.fullmatch(work.name)
    assert match is not None
    return () if _ELSEWHERE.fullmatch(match[1]) else (work.parent / f".{match[1]}.glmq-lock",)


def _is_held(work: Path) -> bool:
    try:
        for path in _locks(work):
            FolderLock(path, work).refuse_held()
    except BusyError:
        return True
    return False


def _command_from_here(run: FoundRun) -> str:
    """The command that resumes a run, with the folder where it was given, if that is another one than this."""
    command = run.note.command
    return f"cd {quote(run.directory)} && {command}" if command and run.directory != str(Path.cwd()) else command


def result_of(leftover: Leftover) -> Path:
    """Where a finished result lies."""
    return leftover.path / RESULT
