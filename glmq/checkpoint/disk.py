"""What every reader opens and every writer fills: regular files alone, bytes written until done, one sentence for a full disk.

Standard library only.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from glmq.errors import CheckpointError, DamagedError, SpaceError, UnreadableError

LFS_START: Final = b"version https://git-lfs"
"""How the pointer begins that git leaves in a large file's place."""
LFS_POINTER: Final = "is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`, or download it"
"""The end of the sentence that refuses one."""
FILE_MODE: Final = 0o640
DIRECTORY_MODE: Final = 0o750
DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
"""What the system says when a disk, or the user's share of it, is full."""
NO_ROOM: Final = (*DISK_FULL, errno.EFBIG)
"""The same, and when a file may not grow any more."""
NOT_OFFERED: Final = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system says to a request that it has no notion of."""
REFUSED: Final = (errno.EPERM, errno.EACCES, *NOT_OFFERED)
"""The same, from FAT and network file systems too, which refuse as if it were a matter of permissions."""


def open_input(path: Path) -> int:
    """A descriptor for reading the regular file `path`, which links may lead to.

    A pipe, a device or a folder of that name is refused at once: opening a pipe would wait for somebody to write into it, and
    a device never ends.

    Raises:
        CheckpointError: it cannot be opened, or is no regular file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:
        raise UnreadableError(f"{path}: no file can have such a name; give the name of one") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return handle
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise _unreadable(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    kind = "a pipe" if stat.S_ISFIFO(mode) else "a device"
    raise UnreadableError(f"{path}: is {kind}, a regular file is needed; give the file itself")


def read_input(path: Path, limit: int) -> bytes:
    """The contents of the regular file `path`; of one with more than `limit` bytes, its first limit + 1.

    Raises:
        CheckpointError: as open_input, reading fails, or a Git LFS pointer.
    """
    handle = open_input(path)
    try:
        with open(handle, "rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    refuse_pointer(path, raw)
    return raw


def refuse_pointer(path: Path, start: bytes) -> None:
    """Raise DamagedError if `path`, which begins like that, is what git left in a file's place."""
    if start.startswith(LFS_START):
        raise DamagedError(f"{path}: {LFS_POINTER}")


def refuse_dangling(path: Path) -> None:
    """Raise UnreadableError for a link that leads nowhere, as those of a hub snapshot do that was mounted without its cache."""
    if path.is_symlink() and not path.exists():
        raise UnreadableError(
            f"{path}: is a link to {os.readlink(path)}, which is not there; mount or copy what it leads to as well "
            "(cp -rL copies the files themselves)"
        )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    refuse_dangling(path)
    return UnreadableError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions")


def write_at(handle: int, path: Path, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`: the system may take only a part of it at a time.

    Args:
        handle: open for writing.
        path: of the file, for the message.
        data: bytes.
        offset: from the start of the file, bytes.

    Raises:
        SpaceError: the disk is full, or another limit of `no_room` is met.
        OSError: another failure of the disk; it names the file.
    """
    view, done = memoryview(data), 0
    try:
        while done < len(view):
            done += os.pwrite(handle, view[done:], offset + done)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise no_room(path, len(view) - done, error) from None


@contextmanager
def naming_full_disk(path: Path, nbytes: int) -> Iterator[None]:
    """Within it, no room for the `nbytes` of `path` raises the SpaceError of `no_room`; other failures pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise no_room(path, nbytes, error) from None


def no_room(path: Path, wanted: int, error: OSError) -> SpaceError:
    """The sentence for `wanted` bytes of `path` that one of `NO_ROOM` left unwritten: it names the limit that was met."""
    to_write = f"{path}: {wanted} bytes are to be written, but"
    if error.errno == errno.EDQUOT:
        return SpaceError(f"{to_write} your quota on its disk is used up; make room within it or choose another disk")
    if error.errno == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit == resource.RLIM_INFINITY:
            return SpaceError(
                f"{to_write} its file system takes no file that large; choose another disk, "
                "or write smaller weight files with --part_file_size"
            )
        return SpaceError(
            f"{to_write} files are limited to {limit} bytes here (ulimit -f); raise the limit, "
            "or write smaller weight files with --part_file_size"
        )
    free = shutil.disk_usage(path.parent).free
    if free >= wanted:
        return SpaceError(
            f"{to_write} its disk takes no more, with {free} bytes free: it may have as many files as it can hold (df -i); "
            "remove some or choose another disk"
        )
    return _no_space(path, wanted, free)


def check_file_size(directory: Path, largest: int) -> None:
    """Raise SpaceError if this process may not write a file of `largest` bytes (`ulimit -f`)."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and largest > limit:
        raise no_room(directory, largest, OSError(errno.EFBIG, os.strerror(errno.EFBIG)))


def set_mode(file: Path | int, mode: int) -> None:
    """Give a file, by path or descriptor, its Unix mode, whatever the umask says; FAT and SMB have none, there it stays."""
    try:
        os.chmod(file, mode)
    except OSError as error:
        if error.errno not in REFUSED:
            raise


def free_bytes(directory: Path) -> int:
    """Free bytes on the disk of `directory`, which need not exist yet."""
    return shutil.disk_usage(_existing(directory)).free


def _existing(directory: Path) -> Path:
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def check_room(directory: Path, bytes_needed: int) -> None:
    """Raise SpaceError unless the disk of `directory` has `bytes_needed` bytes free."""
    free = free_bytes(directory)
    if not free and not shutil.disk_usage(_existing(directory)).total:
        return  # file systems in memory, and some of networks, do not know their size
    if free < bytes_needed:
        raise _no_space(directory, bytes_needed, free)


def _no_space(place: Path, wanted: int, free: int) -> SpaceError:
    return SpaceError(
        f"{place}: {wanted} bytes are to be written, but its disk has {free} free; make room or choose another disk"
    )


def make_directory(directory: Path) -> None:
    """Create `directory` (and its parents) with mode 0750; an existing one is left as it is."""
    if not directory.is_dir():
        directory.mkdir(parents=True)
        set_mode(directory, DIRECTORY_MODE)


def sync_directory(directory: Path) -> None:
    """Wait until the names in `directory` are on the disk; some network file systems cannot be asked to, and are not."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EBADF, *REFUSED):
            raise
    finally:
        os.close(handle)
