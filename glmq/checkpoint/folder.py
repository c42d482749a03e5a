"""An output folder that appears whole or not at all, can be resumed while it is not, and replaces nothing of others."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Final

from glmq.checkpoint.disk import DIRECTORY_MODE, FILE_MODE, set_mode, sync_directory
from glmq.checkpoint.filesystem import exchange, is_writable, rename_new
from glmq.checkpoint.json_file import json_bytes, read_json_object, write_whole
from glmq.checkpoint.lock import FolderLock, acquire_first
from glmq.checkpoint.own_files import check_contents
from glmq.checkpoint.run_note import RunNote, write_note
from glmq.checkpoint.workplace import (
    REPLACED,
    RESULT,
    WHOLE,
    Owner,
    Workplace,
    check_place,
    has_progress,
    has_remains,
    is_folder,
    is_put,
    is_whole,
    make_work,
    owner_of,
    remove_work,
)
from glmq.errors import BusyError, GlmqError, InputError, KeptError, NoLocksError, OutputError, ResumeError, UsageError

_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


class OutputFolder:
    """Write into `path`; `finish` gives that folder the target's name.

    The target is looked at when the folder is entered and again at the last moment. What came or changed meanwhile is left as
    it is, and the result stays in the work folder. From entering to leaving, a lock keeps every other run out.

    Leaving with an error that a repetition would meet again (bad input, wrong usage) removes the work folder. After an
    interruption (Ctrl-C, a kill, a full disk) it stays if a block is finished, so that the run can be resumed; a finished
    result always stays.

    Args:
        target: the folder to make.
        overwrite: a non-empty `target` is replaced at `finish`, and stays untouched until then.
        resume: continue in the work folder of an interrupted run.
        work_dir: where the work folder lies, if not beside the target; from another file system the result is copied.
        run: is noted in the work folder.

    Raises:
        UsageError: see `check_place`.
        BusyError: on entering, another run is writing the target.
        NoLocksError: on entering, nothing can keep another run out.
    """

    def __init__(
        self,
        target: Path,
        *,
        overwrite: bool,
        resume: bool = False,
        work_dir: Path | None = None,
        run: RunNote | None = None,
    ) -> None:
        check_place(target, overwrite=overwrite, resume=resume, work_dir=work_dir)
        self.target: Final = target
        self._places = Workplace.of(target, work_dir)
        self.work: Final = self._places.work
        """The work folder, for what is needed on the way: it goes when the output is in its place."""
        self.path: Final = self.work / RESULT
        """Where to write the output until `finish`."""
        self._overwrite, self._resume, self._run = overwrite, resume, run
        self._lock: FolderLock | None = None
        self._before = Contents(None, ())
        self._is_in_place = False

    def __enter__(self) -> OutputFolder:
        self._places.home.mkdir(parents=True, exist_ok=True)
        self.work.parent.mkdir(parents=True, exist_ok=True)
        self._lock = acquire(self._places)
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            hopeless = isinstance(error, InputError | UsageError) and not self._resume
            is_kept = is_whole(self.work) or (has_progress(self.work) and not hopeless)
            if self._is_in_place or not is_kept:
                for work in self._places.works():
                    remove_work(work)
        finally:
            if self._lock is not None:
                self._lock.release()

    def finish(self) -> None:
        """Put the finished folder in the target's place.

        Raises:
            KeptError: it could not be put there, or the target is no longer as it was; the sentence says where it lies.
        """
        for unfinished in self.path.rglob(".*.partial"):  # of a write that was killed before a resume wrote it again
            unfinished.unlink()
        sync_directory(self.path)
        try:
            self._put(self.work)
        except OSError as error:
            if error.errno != errno.EXDEV or self._places.staging == self.work:
                raise self._kept(f"cannot be put in its place ({error.strerror})") from error
            self._put_copy()
        self._is_in_place = True
        sync_directory(self._places.home)

    def _begin(self) -> None:
        """Under the lock: take back what a killed run left half moved, look at the target, make the work folder."""
        if self.target.resolve() != self._places.place:
            raise OutputError(f"{self.target}: is a link that was just changed; run the command again")
        if settle(self._places) and self._resume and self._places.contents():
            raise ResumeError(
                f"{self.target}: is whole, the interrupted run had put it in its place; what else it left is removed now"
            )
        self._before = self._look()  # this one look decides: between two, somebody could put a file there
        check_contents(self.target, self._places.contents(), overwrite=self._overwrite)
        check_place(self.target, overwrite=self._overwrite, resume=self._resume, work_dir=self._places.work_dir)
        for work in self._places.works():
            if work != self.work or not self._resume or not is_folder(self.path):
                remove_work(work)
        (self.work / WHOLE).unlink(missing_ok=True)  # from here on the result changes
        is_new = not os.path.lexists(self.work)
        try:
            make_work(self.work)
            if self._run is not None:
                write_note(self.work, self._run, self._places.place, self._places.locks())
        except BaseException:
            if is_new:
                remove_work(self.work)
            raise

    def _look(self) -> Contents:
        return look(self._places.place, self._places.contents())

    def _put(self, work: Path) -> None:
        """Move the result in `work` into the target's place, in one step where that can be."""
        result, place = work / RESULT, self._places.place
        names = sorted(os.listdir(result))
        state = result.lstat()
        write_whole(work / WHOLE, json_bytes({"device": state.st_dev, "inode": state.st_ino, "names": names}, indent=1))
        if self.target.resolve() != place:
            raise self._kept("is a link that was changed while the run was at work")
        if self._look() != self._before:
            raise self._kept("was changed by somebody else while the run was at work")
        if self._places.is_inside:
            self._fill(work, names)
        elif self._before.identity is None:
            rename_new(result, place)
        elif not self._before.entries:
            os.rename(result, place)  # the system refuses it unless the place is still empty
        else:
            self._replace(result, work / REPLACED)

    def _replace(self, result: Path, replaced: Path) -> None:
        """Exchange the target, which is not empty, for the result; what it was stays in the work folder."""
        place = self._places.place
        if exchange(result, place):
            if look(result, os.listdir(result)) != self._before:
                exchange(result, place)
                raise self._kept("was changed by somebody else while the run was at work")
            return
        os.rename(place, replaced)
        try:
            is_unchanged = look(replaced, os.listdir(replaced)) == self._before
            if is_unchanged:
                rename_new(result, place)
        except BaseException:
            rename_new(replaced, place)
            raise
        if not is_unchanged:
            rename_new(replaced, place)
            raise self._kept("was changed by somebody else while the run was at work")

    def _fill(self, work: Path, names: list[str]) -> None:
        """Move what lies in the result into the target, which itself cannot be moved. The result's folder goes last."""
        result, replaced, place = work / RESULT, work / REPLACED, self._places.place
        try:
            if self._before.entries:
                replaced.mkdir()
                for name in self._places.contents():
                    os.rename(place / name, replaced / name)
            for name in names:
                rename_new(result / name, place / name)
            result.rmdir()
            if place.stat().st_mode & _OTHERS_WRITE:  # as mounts often are; engines refuse such weights
                set_mode(place, DIRECTORY_MODE)
        except BaseException:
            take_back(work, names, place)
            raise

    def _put_copy(self) -> None:
        """As `_put`, through a copy on the target's own file system."""
        staging = self._places.staging
        try:
            make_work(staging)
            _copy_tree(self.path, staging / RESULT)
            self._put(staging)
        except OSError as error:
            if not is_folder(staging / REPLACED):
                remove_work(staging)
            raise self._kept(f"cannot be put in its place ({error.strerror})") from error
        except GlmqError:
            remove_work(staging)
            raise

    def _kept(self, reason: str) -> KeptError:
        """The result stays in the work folder."""
        text = (
            f"{self.target}: {reason}; the output is finished and whole in {self.path}, "
            f"move it where you want it: mv {quote(str(self.path))} NEW_FOLDER"
        )
        for work in self._places.works():
            if is_folder(work / REPLACED):
                text += f"; the former contents of {self.target} are in {work / REPLACED}"
        return KeptError(text)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a folder is and holds: equal if nothing in it was changed."""

    identity: tuple[int, int] | None
    """Device and inode; None: it does not exist."""
    entries: tuple[tuple[str, int, int, int], ...]
    """Path, inode, time of change in ns and bytes of every file below it; of folders path and inode."""


def look(folder: Path, names: Sequence[str]) -> Contents:
    """What lies in `folder` under these names, without following links."""
    try:
        state = folder.lstat()
    except FileNotFoundError:
        return Contents(None, ())
    entries = [entry for name in sorted(names) for entry in _entries(folder / name, name)]
    return Contents((state.st_dev, state.st_ino), tuple(entries))


def _entries(path: Path, name: str) -> Iterator[tuple[str, int, int, int]]:
    state = path.lstat()
    if not is_folder(path):
        yield name, state.st_ino, state.st_mtime_ns, state.st_size
        return
    yield name, state.st_ino, 0, 0
    for inner in sorted(os.listdir(path)):
        yield from _entries(path / inner, f"{name}/{inner}")


def acquire(places: Workplace) -> FolderLock:
    """Take the lock of an output folder, which lies in the folder for work if the output's own file system has no locks.

    Raises:
        BusyError, NoLocksError, UsageError: see `FolderLock.acquire`.
    """
    return acquire_first(places.locks(), places.target)


def tidy_up(target: Path, work_dir: Path | None = None) -> None:
    """Do for `target`, which is to be read, what its next run would do first: see `settle`. A run at work is left alone."""
    places = Workplace.of(target, work_dir)
    is_left = has_remains(places) or any(is_whole(work) for work in places.works())
    if not is_left or not is_writable(places.home):
        return
    try:
        lock = acquire(places)
    except (BusyError, NoLocksError):
        return
    try:
        settle(places)
    finally:
        lock.release()


def settle(places: Workplace) -> bool:
    """Under the lock: take back what a killed run left half moved, or remove what it left beside its output.

    Returns:
        Whether it had put its result in its place, and had only to tidy up.

    Raises:
        UsageError: see `recover`.
    """
    works = places.works()
    were_in_place = [recover(work, places) for work in works]
    is_in_place = any(were_in_place)
    for work in works:
        if is_in_place or (places.contents() and not is_folder(work / RESULT)):  # else there is something to resume
            remove_work(work)
    return is_in_place


def recover(work: Path, places: Workplace) -> bool:
    """Take back what a killed run left half moved; true if it had put its result in its place and had only to tidy up.

    Raises:
        UsageError: former contents of the target cannot be put back, because something else is there.
    """
    if owner_of(work) is not Owner.GLMQ or not (work / WHOLE).is_file():
        return False
    if is_put(work, places.place):
        return True
    replaced, place = work / REPLACED, places.place
    names = read_json_object(work / WHOLE).get("names")
    if places.is_inside and isinstance(names, list):
        take_back(work, [str(name) for name in names], place)
    elif is_folder(replaced):
        if os.path.lexists(place):
            raise OutputError(
                f"{replaced}: holds the former contents of {places.target}, which an interrupted run could not put back; "
                "move them where they belong first"
            )
        rename_new(replaced, place)
    return False


def take_back(work: Path, names: Sequence[str], place: Path) -> None:
    """Undo a move of the entries `names` of the result into `place`, and of its former contents out of it."""
    result, replaced = work / RESULT, work / REPLACED
    for name in names:
        if os.path.lexists(place / name) and not os.path.lexists(result / name):
            rename_new(place / name, result / name)
    if is_folder(replaced):
        for name in sorted(os.listdir(replaced)):
            rename_new(replaced / name, place / name)
        replaced.rmdir()


def _copy_tree(source: Path, target: Path) -> None:
    """Copy files and folders with glmq's own modes into the existing folder `target`, down to the disk."""
    for entry in sorted(source.iterdir()):
        if is_folder(entry):
            (target / entry.name).mkdir()
            set_mode(target / entry.name, DIRECTORY_MODE)
            _copy_tree(entry, target / entry.name)
            continue
        with entry.open("rb") as read, (target / entry.name).open("xb") as written:
            set_mode(written.fileno(), FILE_MODE)
            shutil.copyfileobj(read, written, 2**22)
            written.flush()
            os.fsync(written.fileno())
    sync_directory(target)


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
            raise OutputError(f"{target}: is the folder of {what}; choose another {option}")
        if path is not None and place in path.resolve().parents:
            raise OutputError(f"{target}: holds {what} ({path}); choose another {option}")
