"""One writer at a time: a lock file with an exclusive flock(2), which the system drops when its process ends, however."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Final

from glmq.checkpoint.disk import FILE_MODE, naming_full_disk
from glmq.errors import BusyError, NoLocksError, OutputError

_MARK: Final = b"glmq lock: "
"""How the content of a lock file begins; the holder follows."""
_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
_LOOKS: Final = 3
_BETWEEN_LOOKS: Final = 0.05
"""Seconds. Who only looks whether there is a holder (`refuse_held`) has the lock for a moment himself."""


class FolderLock:
    """The right to write one output folder.

    Args:
        path: the lock file. It is removed when the lock is released; after a kill it stays, and holds nobody up.
        target: the output folder, for messages.
    """

    def __init__(self, path: Path, target: Path) -> None:
        self.path: Final = path
        self._target = target
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock, or say at once who has it.

        Raises:
            BusyError: another process has it; its number and machine are named.
            NoLocksError: the file system has no locks.
            UsageError: what has the lock's name is no lock file.
            SpaceError: the disk is full.
        """
        while self._handle is None:
            handle = self._open()
            try:
                self._lock(handle)
                if _is_at(handle, self.path):  # else its last holder has just removed it: the next one is another file
                    self._handle = handle
            finally:
                if self._handle is None:
                    os.close(handle)
        try:
            self._sign(self._handle)
        except BaseException:
            self.release()
            raise

    def refuse_held(self) -> None:
        """Raise BusyError if another process has the lock; takes nothing, and leaves no file."""
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return  # there is none, or `acquire` says what is wrong with it
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._busy(handle) from None
        except OSError:
            return  # a file system without locks: `acquire` says so
        finally:
            os.close(handle)

    def release(self) -> None:
        """Remove the lock file, while it is still held, and let go."""
        if self._handle is not None:
            if _is_at(self._handle, self.path):
                self.path.unlink()
            os.close(self._handle)
            self._handle = None

    def _open(self) -> int:
        # Without O_NONBLOCK a named pipe in its place would be waited for.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            handle = os.open(self.path, flags, FILE_MODE)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise self._foreign() from None
            raise
        if not stat.S_ISREG(os.fstat(handle).st_mode) or os.pread(handle, len(_MARK), 0) not in (b"", _MARK):
            os.close(handle)
            raise self._foreign()
        return handle

    def _lock(self, handle: int) -> None:
        try:
            for _ in range(_LOOKS):
                with suppress(BlockingIOError):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                time.sleep(_BETWEEN_LOOKS)
            raise self._busy(handle)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self.path.unlink(missing_ok=True)
            raise NoLocksError(
                f"{self.path.parent}: its file system has no locks ({error.strerror}), so that nothing keeps a second run "
                "out; choose another disk, or pass --work-dir with a folder on one that has them"
            ) from None

    def _sign(self, handle: int) -> None:
        """Say who holds it, for those who come."""
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        text = _MARK + f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode()
        with naming_full_disk(self.path, len(text)):
            os.pwrite(handle, text, 0)
            os.ftruncate(handle, len(text))

    def _busy(self, handle: int) -> BusyError:
        holder = os.pread(handle, 1000, len(_MARK)).decode(errors="replace").partition("\n")[0]
        return BusyError(
            f"{self._target}: is being written by {holder or 'another run'}; wait until it ends, or choose another folder"
        )

    def _foreign(self) -> OutputError:
        return OutputError(
            f"{self.path}: has the name of the run's lock file, but is none; move it away, or choose another folder"
        )


def acquire_first(paths: Iterable[Path], target: Path) -> FolderLock:
    """Take the lock of an output folder at the first path, or at the second if the first one's file system has no locks.

    Raises:
        BusyError, NoLocksError, UsageError, SpaceError: see `FolderLock.acquire`.
    """
    lock, *elsewhere = (FolderLock(path, target) for path in paths)
    try:
        lock.acquire()
    except NoLocksError:
        if not elsewhere:
            raise
        (lock,) = elsewhere
        lock.acquire()
    return lock


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file still has that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False
