"""Folders that are mount points, folders that are not ours, renames that replace nothing and that exchange two folders."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Final

from glmq.checkpoint.disk import NOT_OFFERED

_AT_CWD: Final = -100
_NO_REPLACE: Final = 1
_EXCHANGE: Final = 2
"""Of linux/fcntl.h and linux/fs.h, for renameat2(2)."""


def is_mount(folder: Path) -> bool:
    """Whether a file system is mounted on `folder`, which is resolved; a part of the same one (bind mount) counts."""
    if os.path.ismount(folder):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux, or no /proc: what os.path says is all that can be known
        return False
    return any(_unescaped(line.split(" ")[4]) == str(folder) for line in lines)


def _unescaped(name: str) -> str:
    """A name of /proc/self/mountinfo, where blanks and the like are written as \\040."""
    for character in " \t\n\\":
        name = name.replace(f"\\{ord(character):03o}", character)
    return name


def is_writable(folder: Path) -> bool:
    """Whether this process may make entries in `folder`, or in its nearest parent that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(
        folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids
    )


def rename_new(source: Path, target: Path) -> None:
    """Give `source` the name `target`, which nothing may have: not even an empty folder or a dangling link.

    Raises:
        FileExistsError: something has it.
    """
    if _rename2(source, target, _NO_REPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders swap names in one step; false, and nothing done, on a file system that has no such step."""
    return _rename2(one, other, _EXCHANGE)


def _rename2(source: Path, target: Path, flags: int) -> bool:
    """renameat2(2); false if the system or the file system does not have it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_CWD, os.fsencode(source), _AT_CWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in NOT_OFFERED:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
