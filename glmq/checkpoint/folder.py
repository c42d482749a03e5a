"""An output folder that appears whole or not at all, and whose unfinished state can be resumed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from glmq.checkpoint import journal
from glmq.checkpoint.disk import DIRECTORY_MODE
from glmq.errors import InputError, UsageError

RUN_LOG = "glmq.log"
"""The log of the run, in the hidden folder while it lasts; ranks above 0 add their number."""


class OutputFolder:
    """Work in a hidden sibling folder; `finish` gives it its name.

    Leaving with an error that a repetition would meet again (bad input, wrong usage) removes the hidden folder. After an
    interruption (Ctrl-C, a kill, a full disk) it stays if a block is finished, so that the run can be resumed.

    Args:
        target: the folder to make.
        overwrite: a non-empty `target` is replaced at `finish`, and stays untouched until then.
        resume: continue in the hidden folder of an interrupted run.

    Raises:
        UsageError: see `check_output`.
    """

    def __init__(self, target: Path, *, overwrite: bool, resume: bool = False) -> None:
        check_output(target, overwrite=overwrite, resume=resume)
        self.target = target
        self.path = partial_path(target)
        """Where to write until `finish`."""
        self._resume = resume

    def __enter__(self) -> OutputFolder:
        if not self._resume:
            shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(DIRECTORY_MODE)  # mkdir's mode is cut by the umask
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        hopeless = isinstance(error, InputError | UsageError) and not self._resume
        if hopeless or not _finished_blocks(self.target):
            shutil.rmtree(self.path, ignore_errors=True)

    def finish(self) -> None:
        """Put the finished folder in the target's place."""
        place = self.target.resolve()  # a link stays one
        if place.exists():
            old = place.parent / f".{place.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            os.rename(place, old)
            os.rename(self.path, place)
            shutil.rmtree(old)
        else:
            os.rename(self.path, place)


def partial_path(target: Path) -> Path:
    """The hidden folder where `target` grows, on the same disk."""
    place = target.resolve()
    return place.parent / f".{place.name}.partial"


def check_output(target: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Check that `target` can become an output folder.

    Raises:
        UsageError: it is a file, it is not empty and `overwrite` is false, or an interrupted run lies beside it that neither
            `resume` continues nor `overwrite` drops.
    """
    if target.is_dir():
        if any(target.iterdir()) and not overwrite:
            raise UsageError(
                f"{target}: is not empty; choose another folder, or pass --overwrite to replace its contents"
            )
    elif target.exists():
        raise UsageError(f"{target}: is a file, a folder is needed; choose another name")
    if not resume and not overwrite:
        refuse_interrupted(target, target)


def check_apart(target: Path, option: str, inputs: Mapping[str, Path | None]) -> None:
    """Check that replacing `target` would remove nothing that is read.

    Args:
        target: the output folder.
        option: that names it, for the message.
        inputs: what is read, e.g. `the float weights`, and where it lies; None for what is not given.

    Raises:
        UsageError: an input is `target` or lies in it.
    """
    place = target.resolve()
    for what, path in inputs.items():
        if path is not None and place == path.resolve():
            raise UsageError(f"{target}: is the folder of {what}; choose another {option}")
        if path is not None and place in path.resolve().parents:
            raise UsageError(f"{target}: holds {what} ({path}); choose another {option}")


def refuse_interrupted(folder: Path, target: Path) -> None:
    """Raise UsageError if an interrupted run for `target` has begun to fill `folder`, which may be the target itself."""
    blocks = _finished_blocks(folder)
    if blocks:
        counted = "1 finished block" if blocks == 1 else f"{blocks} finished blocks"
        raise UsageError(
            f"{target}: an interrupted run of {counted} lies beside it, in {partial_path(folder).name}; "
            "run the same command with --resume to continue it, or with --overwrite to start again"
        )


def stored_bytes(target: Path) -> int:
    """What the unfinished folder of an interrupted run for `target` takes on the disk; holes in files take nothing."""
    found = partial_path(target)
    return sum(path.stat().st_blocks * 512 for path in found.iterdir()) if found.is_dir() else 0


def _finished_blocks(target: Path) -> int:
    """How much an interrupted run for `target` has done: without a finished block there is nothing to resume."""
    lines = journal.read_lines(partial_path(target) / journal.NAME)
    return max(0, len(lines) - 1)  # the first line holds the settings
