"""Where an output folder grows before it has its name: hidden work folders, how they are known, what is refused beforehand.

.{name}.partial             the work folder, normally beside the output
    .glmq-work              marks it as glmq's; without it nothing here is touched
    run.json                which run it is of
    journal.jsonl           what is finished, for a resume
    result/                 what gets the output's name at the end
    result.json             `result` is whole, and is being put in its place: what that takes back if it is interrupted
    replaced/               the former contents of the output, while they are being replaced
    statistics/             of `glmq quantize` without --stats
    candidate-{recipe}/     of `glmq sweep`, until its row is measured
.{name}.glmq-lock           who is writing
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from glmq.checkpoint import journal
from glmq.checkpoint.disk import DIRECTORY_MODE, FILE_MODE, set_mode
from glmq.checkpoint.filesystem import is_mount, is_writable
from glmq.checkpoint.json_file import read_json_object
from glmq.checkpoint.lock import FolderLock
from glmq.checkpoint.own_files import check_contents
from glmq.errors import BusyError, OutputError, ResumeError, SpaceError, UsageError
from glmq.wording import counted

MARKER: Final = ".glmq-work"
RESULT: Final = "result"
REPLACED: Final = "replaced"
WHOLE: Final = "result.json"
STATISTICS: Final = "statistics"

LONGEST_NAME: Final = 255
"""Bytes of a file's name, on every file system that Linux writes."""
OF_FILE_SYSTEM: Final = frozenset({"lost+found"})
"""What an empty file system has; engines do not open it."""


@dataclass(frozen=True, slots=True)
class Workplace:
    """The places that belong to one output folder. Looked at once, when the run starts; a link is not followed anew later."""

    target: Path
    """The output folder as it was named."""
    place: Path
    """The same without links."""
    is_inside: bool
    """It cannot be renamed, being a mount point, in a folder that is not ours, or where this process stands: it is filled, with
    the work folder in it."""
    work_dir: Path | None
    """Where the work folder shall lie instead."""

    @classmethod
    def of(cls, target: Path, work_dir: Path | None = None) -> Workplace:
        """The places of an output folder, which need not exist."""
        place = target.resolve()
        is_inside = place.is_dir() and (is_mount(place) or not is_writable(place.parent) or _is_used(place))
        return cls(target, place, is_inside, None if work_dir is None else work_dir.resolve())

    @property
    def home(self) -> Path:
        """The folder on the output's own file system that takes hidden files."""
        return self.place if self.is_inside else self.place.parent

    @property
    def staging(self) -> Path:
        """The work folder in `home`."""
        return self.home / f".{self.place.name}.partial"

    @property
    def work(self) -> Path:
        """The work folder."""
        return self.staging if self.work_dir is None else self.work_dir / f".{self._unique_name}.partial"

    @property
    def lock(self) -> Path:
        """The lock file."""
        return self.home / f".{self.place.name}.glmq-lock"

    def locks(self) -> tuple[Path, ...]:
        """The lock file, and the one that is used if `home` has no locks."""
        return (self.lock,) if self.work_dir is None else (self.lock, self.work_dir / f".{self._unique_name}.glmq-lock")

    @property
    def _unique_name(self) -> str:
        """Several outputs of one name may have one work_dir."""
        return f"{self.place.name}-{hashlib.sha256(os.fsencode(self.place)).hexdigest()[:8]}"

    def contents(self) -> list[str]:
        """What lies in the output folder; where only its contents are renamed, without glmq's own hidden files and what an
        empty file system has. Sorted."""
        own = {self.staging.name, self.lock.name, *OF_FILE_SYSTEM} if self.is_inside else set()
        found = os.listdir(self.place) if self.place.is_dir() else []
        return sorted(name for name in found if name not in own)

    def works(self) -> tuple[Path, ...]:
        """The work folder, and the one in `home` through which the result goes if they are two."""
        return tuple(dict.fromkeys((self.work, self.staging)))


def _is_used(place: Path) -> bool:
    """Whether this process, and the shell that started it, stand in `place`: a rename would leave them in no folder at all.

    A run that began elsewhere is continued where it began.
    """
    name = f".{place.name}.partial"
    if (place / name).is_dir() or (place.parent / name).is_dir():
        return (place / name).is_dir()
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return False
    return here == place or place in here.parents


class Owner(Enum):
    """Whose a work folder is."""

    NOBODY = "does not exist, or is an empty folder"
    GLMQ = "was made by a run of glmq"
    FOREIGN = "is something else"


def owner_of(work: Path) -> Owner:
    """Whose that is; links are not followed."""
    try:
        folder = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return Owner.NOBODY
    except OSError:  # a link, a file, not readable: whatever it is, it is not ours
        return Owner.FOREIGN
    try:
        if not os.listdir(folder):
            return Owner.NOBODY
        mode = os.stat(MARKER, dir_fd=folder, follow_symlinks=False).st_mode
        return Owner.GLMQ if stat.S_ISREG(mode) else Owner.FOREIGN
    except FileNotFoundError:
        return Owner.FOREIGN
    finally:
        os.close(folder)


def is_folder(path: Path) -> bool:
    """Whether that is a folder, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def make_work(work: Path) -> None:
    """Make a work folder, or complete the one that glmq has there. The marker comes first: a kill leaves nothing unmarked."""
    if owner_of(work) is Owner.FOREIGN:
        raise foreign(work)
    if not is_folder(work):
        work.mkdir()
    set_mode(work, DIRECTORY_MODE)  # mkdir's mode is cut by the umask; a kill may have come between the two
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    os.close(os.open(work / MARKER, flags, FILE_MODE))
    result = work / RESULT
    if not is_folder(result):
        result.mkdir()
    set_mode(result, DIRECTORY_MODE)


def remove_work(work: Path) -> None:
    """Remove a work folder that is glmq's, the marker last, or an empty one; anything else stays."""
    if owner_of(work) is Owner.FOREIGN or not is_folder(work):
        return
    for entry in sorted(work.iterdir()):
        if entry.name == MARKER:
            continue
        if is_folder(entry):
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (work / MARKER).unlink(missing_ok=True)  # a run killed right here leaves an empty folder
    work.rmdir()


def foreign(work: Path) -> UsageError:
    """Something that glmq did not write has the name of the work folder."""
    return UsageError(
        f"{work}: has the name of the run's work folder, but glmq did not write it; move it away, or choose another folder"
    )


@contextmanager
def foreseen(obstacles: list[str]) -> Iterator[None]:
    """Remember what a check of an output folder refuses, instead of raising it: a dry run says so and goes on."""
    try:
        yield
    except (OutputError, ResumeError, BusyError, SpaceError) as error:
        obstacles.append(str(error))


def check_output(target: Path, *, overwrite: bool, resume: bool = False, work_dir: Path | None = None) -> None:
    """Check, before a run begins, that nobody writes `target` and that it can become an output folder. Changes nothing.

    Raises:
        BusyError: another run is writing it.
        UsageError: see `check_place`.
    """
    for path in Workplace.of(target, work_dir).locks():
        FolderLock(path, target).refuse_held()
    check_place(target, overwrite=overwrite, resume=resume, work_dir=work_dir)


def check_place(target: Path, *, overwrite: bool, resume: bool = False, work_dir: Path | None = None) -> None:
    """Check that `target` can become an output folder, whoever has its lock. Changes nothing.

    Raises:
        UsageError: it is a file; it is not empty and `overwrite` is false, or it holds what glmq did not write; nothing can be
            written there; something foreign has the name of a hidden file; or a run lies there, interrupted or kept, that
            neither `resume` continues nor `overwrite` drops.
    """
    places = Workplace.of(target, work_dir)
    if places.place.exists() and not places.place.is_dir():
        raise OutputError(f"{target}: is a file, a folder is needed; choose another name")
    is_left = resume and owner_of(places.work) is Owner.GLMQ
    # Where a run was killed, perhaps while it moved its result, OutputFolder looks when it has the lock.
    if places.contents() and not is_left and not has_remains(places):
        check_contents(target, places.contents(), overwrite=overwrite)
    for path in (*places.works(), *places.locks()):
        _check_folder(path.parent, places)
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise OutputError(
                f"{target}: has a name of {len(os.fsencode(places.place.name))} bytes, and those of the hidden files of a run "
                f"are longer than the {LONGEST_NAME} that a name may have; choose a shorter one"
            )
    if places.work_dir is not None and places.place in places.work_dir.parents:
        raise OutputError(f"--work-dir {work_dir}: lies in the output folder {target}; choose another one")
    for work in places.works():
        if owner_of(work) is Owner.FOREIGN:
            raise foreign(work)
    if not resume and not overwrite:
        _refuse_interrupted(places)


def _check_folder(folder: Path, places: Workplace) -> None:
    """Raise UsageError unless entries can be made in `folder`, which need not exist."""
    target, existing = places.target, folder
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise OutputError(f"{target}: {existing} is no folder; choose another place")
    if is_writable(folder):
        return
    if folder == places.place:
        raise OutputError(f"{target}: is not writable; choose another folder, or mount it writable")
    raise OutputError(
        f"{target}: {folder} is not writable, where its work folder would lie; make {target} as an empty folder of your "
        "own, or choose another one"
    )


def _refuse_interrupted(places: Workplace) -> None:
    """Raise UsageError if there is something to resume, or a finished result that has no place."""
    work = places.work
    side = "inside" if places.is_inside else "beside"
    where = f"in {work}" if places.work_dir is not None else f"{side} it, in {work.name}"
    if is_whole(work):
        raise ResumeError(
            f"{places.target}: the finished result of an earlier run lies in {work / RESULT}; "
            "move it where you want it, or pass --overwrite to start again"
        )
    advice = "run the same command with --resume to continue it, or with --overwrite to start again"
    if is_folder(work / STATISTICS):
        raise ResumeError(
            f"{places.target}: an interrupted run that has finished its calibration lies {where}; {advice}"
        )
    blocks = sum(finished_blocks(folder) for folder in _journals(work))
    if blocks:
        raise ResumeError(
            f"{places.target}: an interrupted run of {counted(blocks, 'finished block')} lies {where}; {advice}"
        )


def is_whole(work: Path) -> bool:
    """Whether the result in a work folder is finished, but not in its place."""
    return owner_of(work) is Owner.GLMQ and (work / WHOLE).is_file() and is_folder(work / RESULT)


def is_put(work: Path, place: Path) -> bool:
    """Whether the run that left this work folder had put its result in its place, and had only to tidy up."""
    if owner_of(work) is not Owner.GLMQ or not (work / WHOLE).is_file():
        return False
    if is_folder(work / RESULT):
        whole, state = read_json_object(work / WHOLE), (work / RESULT).lstat()
        if [state.st_dev, state.st_ino] == [whole.get("device"), whole.get("inode")]:
            return False
    return os.path.lexists(place) or not is_folder(work / REPLACED)


def has_remains(places: Workplace) -> bool:
    """Whether a run that was killed at its very end, or somebody at work, has something beside a finished output."""
    works = [work for work in places.works() if owner_of(work) is Owner.GLMQ]
    if not works:
        return any(map(os.path.lexists, places.locks()))
    return any(is_put(work, places.place) or not is_folder(work / RESULT) for work in works)


def has_progress(work: Path) -> bool:
    """Whether there is something in a work folder that a resumed run would not have to do again."""
    return is_folder(work / STATISTICS) or any(finished_blocks(folder) for folder in _journals(work))


def _journals(work: Path) -> Iterator[Path]:
    """The work folder, and those of the outputs in it, which are statistics or of a sweep: each may have a journal."""
    yield work
    yield from filter(is_folder, sorted(work.glob(".*.partial")))


def finished_blocks(work: Path) -> int:
    """How many blocks a work folder's journal holds: without a finished block there is nothing to resume."""
    lines = journal.read_lines(work / journal.NAME)
    return max(0, len(lines) - 1)  # the first line holds the settings


def stored_bytes(target: Path, work_dir: Path | None = None) -> int:
    """What the work folder of an interrupted run for `target` takes on the disk; holes in files take nothing."""
    work = Workplace.of(target, work_dir).work
    if owner_of(work) is not Owner.GLMQ:
        return 0
    return taken_bytes(work)


def taken_bytes(work: Path) -> int:
    """What a folder takes on the disk; holes in files take nothing. A run may be at work in it."""
    total = 0
    for path in work.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.lstat().st_blocks * 512
    return total
