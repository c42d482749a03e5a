"""An output folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType

from glmq.checkpoint.json_file import DIRECTORY_MODE
from glmq.errors import UsageError


class OutputFolder:
    """Work in a hidden sibling folder; `finish` gives it its name, leaving with an exception removes it.

    Args:
        target: the folder to make.
        overwrite: a non-empty `target` is replaced at `finish`, and stays untouched until then.

    Raises:
        UsageError: `target` is not empty and `overwrite` is false, or it is a file.
    """

    def __init__(self, target: Path, *, overwrite: bool) -> None:
        check_target(target, overwrite=overwrite)
        self.target = target
        self.path = target.parent / f".{target.name}.partial"
        """Where to write until `finish`."""

    def __enter__(self) -> OutputFolder:
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        self.path.chmod(DIRECTORY_MODE)  # mkdir's mode is cut by the umask
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            shutil.rmtree(self.path, ignore_errors=True)

    def finish(self) -> None:
        """Put the finished folder in the target's place."""
        if self.target.exists():
            old = self.target.parent / f".{self.target.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            os.rename(self.target, old)
            os.rename(self.path, self.target)
            shutil.rmtree(old)
        else:
            os.rename(self.path, self.target)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise UsageError unless `target` can become an output folder."""
    if target.is_dir():
        if any(target.iterdir()) and not overwrite:
            raise UsageError(
                f"{target}: is not empty; choose another folder, or pass --overwrite to replace its contents"
            )
    elif target.exists():
        raise UsageError(f"{target}: is a file, a folder is needed; choose another name")
