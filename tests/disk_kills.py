"""Runs into an output folder that are killed before each of their changes of the disk, and what the next run makes of it.

Each kill takes a fork, which costs a process with torch in its memory ten times what it costs one without: `in_new_process`
does a function of this module in a Python process of its own.
"""

from __future__ import annotations

import functools
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import glmq
from glmq.checkpoint import filesystem, workplace
from glmq.checkpoint.folder import OutputFolder, tidy_up
from glmq.checkpoint.journal import Journal
from glmq.checkpoint.json_file import write_whole
from glmq.checkpoint.workplace import is_folder

WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "ctypes.call_function"}


def in_new_process(work: Callable[..., None], target: Path, **options: bool) -> None:
    """Do a function of this module, which takes a folder and flags, in a new process; its failed assertion fails the test."""
    flags = "".join(f", {name}={value}" for name, value in options.items())
    call = f"disk_kills.{work.__name__}(disk_kills.Path({str(target)!r}){flags})"
    command = [sys.executable, "-c", f"import os, disk_kills; os.fsync = lambda _: None; {call}"]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(glmq.__file__).parents[1])])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr


def die_at(number: int) -> None:
    """Kill this process before its `number`-th change of the disk."""
    count = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_CREAT | os.O_WRONLY)
        if event in WRITES or opens:
            count += 1
            if count == number:
                os._exit(9)

    sys.addaudithook(watch)


def in_child(work: Callable[[], object]) -> tuple[int, str]:
    """Exit code and error of `work` in a forked process."""
    read, written = os.pipe()
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException as error:
            os.write(written, f"{type(error).__name__}: {error}".encode())
            os._exit(1)
        os._exit(0)
    os.close(written)
    with open(read, encoding="utf-8") as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def tried(work: Callable[[], object]) -> tuple[int, str]:
    """The same in this process, for what nothing kills."""
    try:
        work()
    except Exception as error:
        return 1, f"{type(error).__name__}: {error}"
    return 0, ""


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.exists() else set()


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def modes_in(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): stat.filemode(path.lstat().st_mode) for path in folder.rglob("*")}


def long_run(target: Path) -> None:
    with OutputFolder(target, overwrite=True, resume=True) as output:
        Journal(output.work, {}).record("block", {})
        (output.path / "glmq_new.json").write_text("new")
        (output.path / "part0-of-1").mkdir(exist_ok=True)
        (output.path / "part0-of-1" / "b.txt").write_text("b")
        output.finish()


def killed_run(target: Path, number: int) -> None:
    die_at(number)
    long_run(target)


def one_file(target: Path, **options: bool) -> None:
    with OutputFolder(target, **{"overwrite": False, **options}) as output:
        Journal(output.work, {}).record("block", {})
        write_whole(output.path / "glmq_new.json", b"new")
        output.finish()


def killed_one_file(target: Path, number: int, **options: bool) -> None:
    die_at(number)
    one_file(target, **options)


def lose_nothing(target: Path, *, swaps: bool, overwritten: bool, inside: bool) -> None:
    """Killed at its first change, its second, and so on; each time either the former contents are there or the new ones."""
    if inside:
        workplace.is_mount = lambda path: path == target
    if not swaps:
        filesystem._rename2 = lambda one, two, flags: False
    wanted = {"out", "out/glmq_new.json", "out/part0-of-1", "out/part0-of-1/b.txt"}
    for number in range(1, 200):
        if inside or overwritten:
            target.mkdir(parents=True)
        if overwritten:
            (target / "glmq_old.json").write_text("old")
        code, said = in_child(functools.partial(killed_run, target, number))
        found = names_in(target.parent)
        if code == 0:
            break
        assert code == 9, said
        is_old, is_new = any(name.endswith("/glmq_old.json") for name in found), wanted <= found
        assert is_old or is_new or not overwritten, number
        code, said = tried(lambda: long_run(target))
        is_told = is_new and "is whole, the interrupted run had put it in its place" in said
        assert code == 0 or is_told, (number, said)
        assert names_in(target.parent) == wanted, number
        shutil.rmtree(target.parent)
    assert 15 < number < 199
    assert found == wanted


def leave_no_traces(target: Path, *, resume: bool, overwrite: bool) -> None:
    """Killed anywhere: what is there after the next run has the names and modes that an unbroken run leaves."""
    target.parent.mkdir()
    for number in range(1, 200):
        code, said = in_child(functools.partial(killed_one_file, target, number, overwrite=overwrite))
        if code == 0:
            break
        assert code == 9, said
        code, said = tried(functools.partial(one_file, target, resume=resume))
        if not resume and "--overwrite to start again" in said:  # there is a finished block, or a finished result
            code, said = tried(functools.partial(one_file, target, overwrite=True))
        assert code == 0 or "had put it in its place" in said or "is not empty" in said, (number, said)
        assert modes_in(target.parent) == {"out": "drwxr-x---", "out/glmq_new.json": "-rw-r-----"}, (number, said)
        shutil.rmtree(target)
    assert 20 < number < 199


def tidy_up_what_is_read(target: Path) -> None:
    """A run that takes another's finished statistics removes what that one's killed run has left beside them."""
    one_file(target)
    whole = contents_of(target.parent)
    for number in range(1, 200):
        tidy_up(target)  # there is nothing to do
        if in_child(functools.partial(killed_one_file, target, number, overwrite=True))[0] == 0:
            break
        is_interrupted = is_folder(target.parent / ".out.partial" / "result")
        tidy_up(target)
        assert is_interrupted or contents_of(target.parent) == whole, number
        assert (target / "glmq_new.json").read_text() == "new"
        assert tried(functools.partial(one_file, target, overwrite=True))[0] == 0
    with OutputFolder(target, overwrite=True) as output:
        tidy_up(target)
        assert output.path.is_dir()
