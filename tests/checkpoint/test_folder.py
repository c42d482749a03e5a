import errno
import os
import resource
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from disk_kills import in_child, in_new_process, leave_no_traces, lose_nothing, tidy_up_what_is_read
from helpers import tree

from glmq.checkpoint import disk, filesystem, folder, lock, workplace
from glmq.checkpoint.folder import OutputFolder
from glmq.checkpoint.journal import Journal
from glmq.checkpoint.json_file import write_whole
from glmq.checkpoint.run_note import RunNote, read_note
from glmq.checkpoint.workplace import check_output, stored_bytes
from glmq.errors import BusyError, CheckpointError, KeptError, NoLocksError, SpaceError, UsageError


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "parent" / "out"


def fill(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / "glmq_old.json").write_text(text)


def interrupt(target: Path, *, blocks: int = 0, error: type[BaseException] = KeyboardInterrupt) -> None:
    """A run that is stopped after it has journalled some blocks."""

    def work() -> None:
        with OutputFolder(target, overwrite=False) as output:
            journal = Journal(output.work, {})
            for number in range(blocks):
                journal.record(f"block {number}", {})
            raise error("stopped")

    with pytest.raises(error):
        work()


def write(target: Path, *, meanwhile: Callable[[], object] = lambda: None, **options: object) -> None:
    """A run that writes one file; `meanwhile` happens before it ends."""
    with OutputFolder(target, **{"overwrite": False, **options}) as output:
        (output.path / "glmq_new.json").write_text("new")
        meanwhile()
        output.finish()


WORK = {".out.partial": "", ".out.partial/.glmq-work": "", ".out.partial/result": ""}


def test_the_folder_appears_whole_and_with_all_its_parents(target: Path) -> None:
    with OutputFolder(target, overwrite=False) as output:
        (output.path / "glmq_a.json").write_text("a")
        assert not target.exists()
        output.finish()
    assert [path.name for path in target.iterdir()] == ["glmq_a.json"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_it_grows_beside_its_place_on_the_same_disk(target: Path) -> None:
    with OutputFolder(target, overwrite=False) as output:
        assert output.work == target.parent / ".out.partial"
        assert output.path == output.work / "result"
        assert sorted(os.listdir(target.parent)) == [".out.glmq-lock", ".out.partial"]


def test_what_is_needed_on_the_way_is_not_in_the_finished_folder(target: Path) -> None:
    with OutputFolder(target, overwrite=False) as output:
        Journal(output.work, {}).record("block", {})
        (output.work / ".states-000-0").touch()
        (output.path / ".config.json.partial").touch()  # of a write that was killed; the resume wrote it anew
        (output.path / "part0").mkdir()
        (output.path / "part0" / ".weights.safetensors.partial").touch()
        output.finish()
    assert tree(target.parent) == {"out": "", "out/part0": ""}


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_group_may_read_it_whatever_the_umask(umask: int, target: Path) -> None:
    before = os.umask(umask)
    try:
        with OutputFolder(target, overwrite=False) as output:
            assert output.work.stat().st_mode & 0o777 == 0o750
            output.finish()
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == 0o750


def test_an_empty_folder_is_a_good_place(target: Path) -> None:
    target.mkdir(parents=True)
    write(target)
    assert tree(target.parent).keys() == {"out", "out/glmq_new.json"}


def test_a_folder_with_contents_is_refused_and_left_as_it_is(target: Path) -> None:
    fill(target, "old")
    before = tree(target.parent)
    with pytest.raises(UsageError) as caught:
        OutputFolder(target, overwrite=False)
    assert str(caught.value) == (
        f"{target}: is not empty; choose another folder, or pass --overwrite to replace its contents"
    )
    assert tree(target.parent) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_place_is_refused(overwrite: bool, target: Path) -> None:
    target.parent.mkdir()
    target.touch()
    with pytest.raises(UsageError) as caught:
        check_output(target, overwrite=overwrite)
    assert str(caught.value) == f"{target}: is a file, a folder is needed; choose another name"


def test_overwriting_replaces_the_contents_at_the_end_and_not_before(target: Path) -> None:
    fill(target, "old")
    write(target, overwrite=True, meanwhile=lambda: (target / "glmq_old.json").read_text())
    assert tree(target.parent).keys() == {"out", "out/glmq_new.json"}


def test_an_error_leaves_the_old_contents_and_nothing_else(target: Path) -> None:
    fill(target, "old")
    before = tree(target.parent)
    with pytest.raises(FileExistsError), OutputFolder(target, overwrite=True) as output:
        output.path.mkdir()
    assert tree(target.parent) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_to_a_folder_stays_a_link(overwrite: bool, tmp_path: Path) -> None:
    place, link = tmp_path / "disk" / "place", tmp_path / "out"
    place.mkdir(parents=True)
    if overwrite:
        (place / "glmq_old.json").touch()
    link.symlink_to(place)
    write(link, overwrite=overwrite)
    assert link.is_symlink()
    assert tree(tmp_path / "disk").keys() == {"place", "place/glmq_new.json"}


def test_the_current_folder_is_a_good_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    write(Path())
    assert tree(tmp_path).keys() == {"here", "here/glmq_new.json"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, SpaceError, OSError, CheckpointError])
def test_a_run_that_stopped_before_its_first_journal_line_leaves_nothing(
    error: type[BaseException], target: Path
) -> None:
    with pytest.raises(error), OutputFolder(target, overwrite=False):
        raise error("stopped")
    assert tree(target.parent) == {}


def test_a_run_that_stopped_before_its_first_block_leaves_nothing(target: Path) -> None:
    interrupt(target, blocks=0)
    assert tree(target.parent) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, SpaceError, OSError])
def test_an_interrupted_run_stays_to_be_resumed(error: type[BaseException], target: Path) -> None:
    interrupt(target, blocks=2, error=error)
    assert tree(target.parent).keys() == {*WORK, ".out.partial/journal.jsonl"}
    with OutputFolder(target, overwrite=False, resume=True) as output:
        assert list(Journal(output.work, {}).finished) == ["block 0", "block 1"]
        output.finish()
    assert tree(target.parent) == {"out": ""}


@pytest.mark.parametrize("error", [CheckpointError, UsageError])
def test_a_run_that_met_bad_input_leaves_nothing(error: type[BaseException], target: Path) -> None:
    interrupt(target, blocks=2, error=error)
    assert tree(target.parent) == {}


def test_a_resumed_run_is_kept_when_it_meets_bad_input(target: Path) -> None:
    interrupt(target, blocks=2)
    with pytest.raises(UsageError), OutputFolder(target, overwrite=False, resume=True):
        raise UsageError("other settings")
    assert tree(target.parent).keys() == {*WORK, ".out.partial/journal.jsonl"}


def test_an_interrupted_run_is_not_overlooked(target: Path) -> None:
    interrupt(target, blocks=2)
    with pytest.raises(UsageError) as caught:
        check_output(target, overwrite=False)
    assert str(caught.value) == (
        f"{target}: an interrupted run of 2 finished blocks lies beside it, in .out.partial; "
        "run the same command with --resume to continue it, or with --overwrite to start again"
    )
    check_output(target, overwrite=False, resume=True)


def test_overwriting_starts_an_interrupted_run_again(target: Path) -> None:
    interrupt(target, blocks=2)
    with OutputFolder(target, overwrite=True) as output:
        assert Journal(output.work, {}).finished == {}


def test_what_an_interrupted_run_takes_on_the_disk_leaves_holes_out(target: Path) -> None:
    assert stored_bytes(target) == 0
    with OutputFolder(target, overwrite=False) as output:
        small = stored_bytes(target)
        (output.path / "written").write_bytes(bytes(range(256)) * 256)
        with (output.work / "hole").open("wb") as file:
            file.truncate(2**30)
        assert 2**16 <= stored_bytes(target) - small < 2**17


# What this run did not write is neither deleted nor replaced.


def kept(target: Path) -> str:
    return (
        f"the output is finished and whole in {target.parent}/.out.partial/result, "
        f"move it where you want it: mv {target.parent}/.out.partial/result NEW_FOLDER"
    )


CHANGED = "was changed by somebody else while the run was at work"


def test_a_folder_that_somebody_makes_during_the_run_is_left_alone(target: Path) -> None:
    with pytest.raises(KeptError) as caught:
        write(target, meanwhile=lambda: fill(target, "thesis"))
    assert str(caught.value) == f"{target}: {CHANGED}; {kept(target)}"
    assert caught.value.exit_code == 5
    assert (target / "glmq_old.json").read_text() == "thesis"
    assert (target.parent / ".out.partial" / "result" / "glmq_new.json").read_text() == "new"


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda target: (target / "thesis.txt").touch(),
        lambda target: (target / "glmq_old.json").write_text("more"),
        lambda target: (target / "part0-of-2" / "thesis.txt").touch(),
        lambda target: (target.rename(target.parent / "aside"), fill(target, "another")),
    ],
)
def test_contents_that_change_after_the_run_has_begun_are_not_overwritten(
    target: Path, change: Callable[[Path], object], swaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when they change after the last look, right before they are moved."""
    fill(target, "old")
    (target / "part0-of-2").mkdir()
    if not swaps:
        monkeypatch.setattr(folder, "exchange", lambda one, other: False)
    real = folder.write_whole

    def late(path: Path, content: bytes) -> None:
        real(path, content)
        change(target)
        before = folder.look(target, os.listdir(target))
        monkeypatch.setattr(OutputFolder, "_look", lambda self: self._before)  # the look that comes too early
        seen.append(before)

    seen: list[folder.Contents] = []
    monkeypatch.setattr(folder, "write_whole", late)
    with pytest.raises(KeptError) as caught:
        write(target, overwrite=True)
    assert str(caught.value) == f"{target}: {CHANGED}; {kept(target)}"
    assert folder.look(target, os.listdir(target)) == seen[0]
    assert (target.parent / ".out.partial" / "result" / "glmq_new.json").read_text() == "new"


def test_a_file_that_comes_while_the_run_begins_stays(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every moment of beginning: either the run is refused, or the file is found at its end."""
    real, count = os.listdir, 0
    for moment in range(1, 100):
        target.mkdir(parents=True)
        count = 0

        def list_late(folder: Path, moment: int = moment) -> list[str]:
            nonlocal count
            found = real(folder)
            count += 1
            if count == moment:
                (target / "thesis.txt").touch()
            return found

        with monkeypatch.context() as patch, suppress(UsageError, KeptError):
            patch.setattr(os, "listdir", list_late)
            write(target)
        if count < moment:
            break
        assert (target / "thesis.txt").exists(), moment
        shutil.rmtree(target.parent)
    assert 3 < moment < 99


def test_a_file_that_comes_into_an_empty_folder_at_the_last_moment_stays(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.mkdir(parents=True)
    real = os.rename
    monkeypatch.setattr(os, "rename", lambda one, two: ((target / "thesis.txt").touch(), real(one, two)))
    with pytest.raises(KeptError, match="Directory not empty"):
        write(target)
    assert os.listdir(target) == ["thesis.txt"]


@pytest.mark.parametrize("has_flags", [True, False])
def test_a_folder_that_comes_at_the_last_moment_is_not_replaced(
    target: Path, has_flags: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_flags:
        monkeypatch.setattr(filesystem, "_rename2", lambda one, two, flags: False)
    real = folder.rename_new
    monkeypatch.setattr(folder, "rename_new", lambda one, two: (target.mkdir(), real(one, two)))
    with pytest.raises(KeptError, match=r"cannot be put in its place \(File exists\)"):
        write(target)
    assert os.listdir(target) == []
    assert (target.parent / ".out.partial" / "result" / "glmq_new.json").exists()


def test_a_link_that_is_redirected_during_the_run_is_not_followed(tmp_path: Path) -> None:
    first, second, link = tmp_path / "first", tmp_path / "second", tmp_path / "link"
    first.mkdir()
    second.mkdir()
    link.symlink_to(first)

    def redirect() -> None:
        link.unlink()
        link.symlink_to(second)

    with pytest.raises(KeptError, match="is a link that was changed while the run was at work"):
        write(link, meanwhile=redirect)
    assert os.listdir(first) == os.listdir(second) == []
    assert (tmp_path / ".first.partial" / "result" / "glmq_new.json").exists()


def test_a_folder_of_the_users_own_with_the_work_folders_name_is_refused(target: Path) -> None:
    work = target.parent / ".out.partial"
    fill(work, "mine")
    before = tree(target.parent)
    for options in ({"overwrite": False}, {"overwrite": True}, {"overwrite": False, "resume": True}):
        with pytest.raises(UsageError) as caught:
            OutputFolder(target, **options)
        assert str(caught.value) == (
            f"{work}: has the name of the run's work folder, but glmq did not write it; "
            "move it away, or choose another folder"
        )
    assert tree(target.parent) == before


def test_a_folder_that_is_called_old_is_nothing_to_us(target: Path) -> None:
    fill(target, "old")
    fill(target.parent / ".out.old", "mine")
    write(target, overwrite=True)
    assert tree(target.parent).keys() == {".out.old", ".out.old/glmq_old.json", "out", "out/glmq_new.json"}


@pytest.mark.parametrize("marked", [False, True])
def test_a_planted_link_is_not_followed(target: Path, tmp_path: Path, marked: bool) -> None:
    victim = tmp_path / "victim"
    fill(victim, "mine")
    victim.chmod(0o700)
    if marked:
        (victim / ".glmq-work").touch()
    target.parent.mkdir()
    (target.parent / ".out.partial").symlink_to(victim)
    with pytest.raises(UsageError, match="glmq did not write it"):
        write(target, overwrite=True)
    assert (victim / "glmq_old.json").read_text() == "mine"
    assert victim.stat().st_mode & 0o777 == 0o700


def test_a_marker_that_is_a_link_marks_nothing(target: Path, tmp_path: Path) -> None:
    work = target.parent / ".out.partial"
    fill(work, "mine")
    (work / ".glmq-work").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="glmq did not write it"):
        write(target, overwrite=True)


def test_a_planted_folder_that_appears_after_the_check_is_refused_too(target: Path) -> None:
    output = OutputFolder(target, overwrite=True)
    fill(target.parent / ".out.partial", "mine")
    with pytest.raises(UsageError, match="glmq did not write it"):
        output.__enter__()
    assert tree(target.parent).keys() == {".out.partial", ".out.partial/glmq_old.json"}


# A kill at any moment.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("swaps", "overwritten", "inside"),
    [(True, True, False), (False, True, False), (True, False, False), (False, True, True), (True, False, True)],
)
def test_a_run_killed_at_any_change_of_the_disk_loses_nothing_and_the_next_one_is_whole(
    target: Path, swaps: bool, overwritten: bool, inside: bool
) -> None:
    in_new_process(lose_nothing, target, swaps=swaps, overwritten=overwritten, inside=inside)


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("resume", [False, True])
def test_the_next_run_tidies_up_even_where_it_finds_the_output_whole(
    target: Path, resume: bool, overwrite: bool
) -> None:
    in_new_process(leave_no_traces, target, resume=resume, overwrite=overwrite)


@pytest.mark.slow
def test_folders_that_are_read_are_tidied_up_and_those_at_work_are_not(target: Path) -> None:
    in_new_process(tidy_up_what_is_read, target)


@pytest.mark.slow
def test_contents_that_a_killed_overwrite_has_moved_away_come_back(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without an exchange there is a moment when the target does not exist."""
    fill(target, "old")
    monkeypatch.setattr(filesystem, "_rename2", lambda one, two, flags: False)
    monkeypatch.setattr(folder, "rename_new", lambda one, two: os._exit(9))
    assert in_child(lambda: write(target, overwrite=True))[0] == 9
    assert not target.exists()
    monkeypatch.undo()
    with pytest.raises(UsageError, match="is not empty"):
        OutputFolder(target, overwrite=False, resume=True).__enter__()
    assert (target / "glmq_old.json").read_text() == "old"
    assert (target.parent / ".out.partial" / "result" / "glmq_new.json").read_text() == "new"


@pytest.mark.slow
def test_a_killed_run_leaves_a_lock_that_holds_nobody_up(target: Path) -> None:
    assert in_child(lambda: (OutputFolder(target, overwrite=False).__enter__(), os._exit(9)))[0] == 9
    assert sorted(os.listdir(target.parent)) == [".out.glmq-lock", ".out.partial"]
    write(target)
    assert tree(target.parent).keys() == {"out", "out/glmq_new.json"}


# --overwrite whose last rename fails.


@pytest.mark.parametrize("swaps", [True, False])
def test_a_failing_last_rename_keeps_the_old_contents_and_the_new(
    target: Path, swaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(target, "old")

    def fail(one: Path, two: Path) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    if swaps:
        monkeypatch.setattr(folder, "exchange", fail)
    else:
        monkeypatch.setattr(folder, "exchange", lambda one, two: False)
        real = folder.rename_new
        monkeypatch.setattr(
            folder, "rename_new", lambda one, two: fail(one, two) if one.name == "result" else real(one, two)
        )
    with pytest.raises(KeptError) as caught:
        write(target, overwrite=True)
    assert str(caught.value) == f"{target}: cannot be put in its place (Input/output error); {kept(target)}"
    assert (target / "glmq_old.json").read_text() == "old"
    assert (target.parent / ".out.partial" / "result" / "glmq_new.json").read_text() == "new"
    with pytest.raises(UsageError) as refused:
        check_output(target, overwrite=False)
    assert "is not empty" in str(refused.value)
    (target / "glmq_old.json").unlink()
    with pytest.raises(UsageError) as refused:
        check_output(target, overwrite=False)
    assert str(refused.value) == (
        f"{target}: the finished result of an earlier run lies in {target.parent}/.out.partial/result; "
        "move it where you want it, or pass --overwrite to start again"
    )


def test_when_even_the_old_contents_cannot_go_back_the_sentence_says_where_both_are(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(target, "old")

    def fail(one: Path, two: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(folder, "exchange", lambda one, two: False)
    monkeypatch.setattr(folder, "rename_new", fail)
    with pytest.raises(KeptError) as caught:
        write(target, overwrite=True)
    replaced = target.parent / ".out.partial" / "replaced"
    assert str(caught.value) == (
        f"{target}: cannot be put in its place (Input/output error); {kept(target)}; "
        f"the former contents of {target} are in {replaced}"
    )
    assert (replaced / "glmq_old.json").read_text() == "old"
    monkeypatch.undo()
    fill(target, "another")  # now they have no place to go back to
    with pytest.raises(UsageError) as refused:
        write(target, overwrite=True)
    assert str(refused.value) == (
        f"{replaced}: holds the former contents of {target}, which an interrupted run could not put back; "
        "move them where they belong first"
    )
    assert (replaced / "glmq_old.json").read_text() == "old"


# One run at a time.


@pytest.mark.parametrize("options", [{"overwrite": False}, {"overwrite": True}, {"overwrite": False, "resume": True}])
def test_a_second_run_stops_before_it_touches_anything(target: Path, options: dict[str, bool]) -> None:
    with OutputFolder(target, overwrite=False) as first:
        (first.path / "first.txt").touch()
        before = tree(target.parent)
        with pytest.raises(BusyError) as caught:
            write(target, **options)
        assert tree(target.parent) == before
        first.finish()
    assert str(caught.value).startswith(
        f"{target}: is being written by process {os.getpid()} on {os.uname().nodename} since 2"
    )
    assert str(caught.value).endswith("; wait until it ends, or choose another folder")
    assert (caught.value.exit_code, caught.value.code) == (5, "GLMQ-E531")
    assert tree(target.parent).keys() == {"out", "out/first.txt"}


def test_a_file_system_without_locks_is_named(target: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = lock.fcntl.flock

    def flock(handle: int, how: int) -> None:
        if str(target.parent) in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOLCK, "No locks available")
        real(handle, how)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(NoLocksError) as caught:
        write(target)
    assert str(caught.value) == (
        f"{target.parent}: its file system has no locks (No locks available), so that nothing keeps a second run out; "
        "choose another disk, or pass --work-dir with a folder on one that has them"
    )
    assert caught.value.exit_code == 5
    assert tree(target.parent) == {}
    write(target, work_dir=tmp_path / "work")
    assert tree(tmp_path).keys() == {"parent", "parent/out", "parent/out/glmq_new.json", "work"}


# Where output may lie.


@pytest.fixture
def mount(target: Path) -> Iterator[Path]:
    target.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", target], capture_output=True).returncode:
        pytest.skip("a mount needs root")
    yield target
    subprocess.run(["umount", target], check=True)


def test_a_mount_point_is_filled(mount: Path) -> None:
    with OutputFolder(mount, overwrite=False) as output:
        assert output.work == mount / ".out.partial"
        (output.path / "glmq_new.json").touch()
        output.finish()
    assert tree(mount.parent).keys() == {"out", "out/glmq_new.json"}


def test_a_part_of_the_same_disk_mounted_elsewhere_is_a_mount_point_too(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "a b"
    source.mkdir()
    target.mkdir()
    if subprocess.run(["mount", "--bind", source, target], capture_output=True).returncode:
        pytest.skip("a mount needs root")
    try:
        write(target)
        assert os.listdir(source) == ["glmq_new.json"]
    finally:
        subprocess.run(["umount", target], check=True)


def test_an_empty_file_system_is_empty(mount: Path) -> None:
    (mount / "lost+found").mkdir()
    write(mount)
    assert tree(mount).keys() == {"lost+found", "glmq_new.json"}
    with pytest.raises(UsageError, match="is not empty"):
        write(mount)
    write(mount, overwrite=True)
    assert tree(mount).keys() == {"lost+found", "glmq_new.json"}


def test_a_folder_that_is_no_mount_point_but_has_what_they_have_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "out" / "lost+found").mkdir(parents=True)
    with pytest.raises(UsageError, match="is not empty"):  # a rename over it would fail, with the whole output made
        write(tmp_path / "out")
    assert tree(tmp_path).keys() == {"out", "out/lost+found"}


def test_a_mount_point_that_somebody_fills_during_the_run_is_left_alone(mount: Path) -> None:
    with pytest.raises(KeptError, match=CHANGED):
        write(mount, meanwhile=(mount / "thesis.txt").touch)
    assert {"thesis.txt", ".out.partial/result/glmq_new.json"} <= tree(mount).keys()
    with pytest.raises(UsageError, match="is not empty"):
        write(mount)


@pytest.mark.parametrize(("before", "after"), [(0o1777, 0o750), (0o775, 0o750), (0o755, 0o755), (0o700, 0o700)])
def test_a_mount_that_everybody_may_write_is_closed_as_engines_want_it(before: int, after: int, mount: Path) -> None:
    mount.chmod(before)
    write(mount)
    assert stat.S_IMODE(mount.stat().st_mode) == after


def test_a_folder_of_our_own_in_one_that_is_not_is_filled(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target.mkdir(parents=True)
    refuse_writing(target.parent, monkeypatch)
    write(target)
    assert tree(target.parent).keys() == {"out", "out/glmq_new.json"}


def test_a_folder_that_cannot_be_made_is_said_before_the_work(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target.parent.mkdir()
    refuse_writing(target.parent, monkeypatch)
    with pytest.raises(UsageError) as caught:
        check_output(target, overwrite=False)
    assert str(caught.value) == (
        f"{target}: {target.parent} is not writable, where its work folder would lie; "
        f"make {target} as an empty folder of your own, or choose another one"
    )


def test_a_place_that_cannot_be_written_itself_is_said_so(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target.mkdir(parents=True)
    monkeypatch.setattr(workplace, "is_writable", lambda _: False)
    with pytest.raises(UsageError) as caught:
        check_output(target, overwrite=False)
    assert str(caught.value) == f"{target}: is not writable; choose another folder, or mount it writable"


@pytest.mark.parametrize("below", ["out", "a/b/out"])
def test_a_place_below_a_file_is_said_so(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as caught:
        check_output(tmp_path / "file" / below, overwrite=False)
    assert str(caught.value) == f"{tmp_path / 'file' / below}: {tmp_path / 'file'} is no folder; choose another place"


def test_a_name_that_leaves_no_room_for_the_hidden_ones_is_said_before_the_work(tmp_path: Path) -> None:
    check_output(tmp_path / ("图" * 81), overwrite=False)
    long = tmp_path / ("图" * 82)
    with pytest.raises(UsageError) as caught:
        check_output(long, overwrite=False)
    assert str(caught.value) == (
        f"{long}: has a name of 246 bytes, and those of the hidden files of a run are longer than the 255 that a name may "
        "have; choose a shorter one"
    )


@pytest.mark.parametrize("below", ["", "part1-of-2"])
def test_the_folder_in_which_the_user_stands_stays_the_same(
    below: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(target, "old")
    (target / "part1-of-2").mkdir()
    monkeypatch.chdir(target / below)
    before = target.stat().st_ino
    write(target, overwrite=True)
    assert (target.stat().st_ino, os.listdir(target)) == (before, ["glmq_new.json"])
    assert os.path.samefile(target, "." if not below else target)


def test_a_run_goes_on_where_it_began_wherever_the_user_stands(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target.mkdir(parents=True)
    monkeypatch.chdir(target)
    interrupt(target, blocks=1)
    monkeypatch.chdir(target.parent)
    assert {"out/.out.partial/journal.jsonl"} <= tree(target.parent).keys()
    write(target, resume=True)
    assert tree(target.parent).keys() == {"out", "out/glmq_new.json"}
    target.joinpath("glmq_new.json").unlink()
    interrupt(target, blocks=1)
    monkeypatch.chdir(target)
    assert {".out.partial/journal.jsonl"} <= tree(target.parent).keys()
    write(target, resume=True)
    assert tree(target.parent).keys() == {"out", "out/glmq_new.json"}


def refuse_writing(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `parent` look as if it belonged to somebody else, also to root."""
    real = os.access

    def access(path: Path, mode: int, **how: bool) -> bool:
        return path != parent and real(path, mode, **how)

    monkeypatch.setattr(os, "access", access)
    monkeypatch.setattr(os, "supports_effective_ids", {access})


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_work_folder_may_lie_elsewhere(
    target: Path, tmp_path: Path, overwrite: bool, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if overwrite:
        fill(target, "old")
    if elsewhere:
        other_disk(target.parent, monkeypatch)
    with OutputFolder(target, overwrite=overwrite, work_dir=tmp_path / "work") as output:
        assert output.work.parent == tmp_path / "work"
        (output.path / "part0-of-1").mkdir()
        (output.path / "part0-of-1" / "glmq_new.json").write_text("new")
        output.finish()
    assert tree(tmp_path).keys() == {
        "parent",
        "parent/out",
        "parent/out/part0-of-1",
        "parent/out/part0-of-1/glmq_new.json",
        "work",
    }
    assert (target / "part0-of-1" / "glmq_new.json").stat().st_mode & 0o777 == 0o640 or not elsewhere


def test_a_copy_from_elsewhere_that_fails_keeps_old_and_new(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(target, "old")
    other_disk(target.parent, monkeypatch)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(
        KeptError, match=r"cannot be put in its place \(No space left on device\); the output is finished"
    ):
        write(target, overwrite=True, work_dir=tmp_path / "work")
    assert tree(target.parent).keys() == {"out", "out/glmq_old.json"}
    (kept,) = (tmp_path / "work").iterdir()
    assert (kept / "result" / "glmq_new.json").read_text() == "new"


def test_a_work_dir_in_the_output_is_refused(target: Path) -> None:
    target.mkdir(parents=True)
    with pytest.raises(UsageError) as caught:
        check_output(target, overwrite=True, work_dir=target / "work")
    assert str(caught.value) == f"--work-dir {target}/work: lies in the output folder {target}; choose another one"


def other_disk(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `parent` look as if it were another file system."""
    real_rename, real_rename2 = os.rename, filesystem._rename2

    def check(one: Path, two: Path) -> None:
        if (parent in one.parents) != (parent in two.parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", lambda one, two: (check(one, two), real_rename(one, two)))
    monkeypatch.setattr(filesystem, "_rename2", lambda one, two, how: (check(one, two), real_rename2(one, two, how))[1])


@pytest.mark.parametrize("code", [errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES])
def test_file_systems_without_modes_and_folder_syncs_will_do(
    code: int, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAT refuses chmod by EPERM; CIFS and FUSE refuse to sync a folder by EINVAL, others as they like."""
    real = os.fsync

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    def fsync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            refuse()
        real(handle)

    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "fsync", fsync)
    write(target)
    assert tree(target.parent).keys() == {"out", "out/glmq_new.json"}


def test_a_limit_of_file_size_is_named(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(SpaceError) as caught:
            write_whole(tmp_path / "file", bytes(5000))
        with pytest.raises(SpaceError) as refused:
            disk.check_file_size(tmp_path, 5000)
        disk.check_file_size(tmp_path, 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    sentence = (
        ": 5000 bytes are to be written, but files are limited to 4096 bytes here (ulimit -f); "
        "raise the limit, or write smaller weight files with --part_file_size"
    )
    assert (str(caught.value), str(refused.value)) == (f"{tmp_path / 'file'}{sentence}", f"{tmp_path}{sentence}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.EDQUOT, "your quota on its disk is used up; make room within it or choose another disk"),
        (
            errno.EFBIG,
            "its file system takes no file that large; choose another disk, or write smaller weight files with "
            "--part_file_size",
        ),
    ],
)
def test_a_quota_and_a_largest_file_are_named(tmp_path: Path, code: int, reason: str) -> None:
    sentence = f"{tmp_path}: 7 bytes are to be written, but {reason}"
    assert str(disk.no_room(tmp_path, 7, OSError(code, ""))) == sentence


def test_a_run_whose_note_cannot_be_written_leaves_nothing(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SpaceError("full")

    monkeypatch.setattr(folder, "write_note", full)
    with pytest.raises(SpaceError), OutputFolder(target, overwrite=False, run=RunNote("quantize", "", {})):
        raise AssertionError("entered")
    assert list(target.parent.iterdir()) == []


def test_a_resumed_run_whose_note_cannot_be_written_keeps_what_it_resumes(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SpaceError("full")

    interrupt(target, blocks=1)
    before = tree(target.parent)
    monkeypatch.setattr(folder, "write_note", full)
    with pytest.raises(SpaceError), OutputFolder(target, overwrite=False, resume=True, run=RunNote("quantize", "", {})):
        raise AssertionError("entered")
    assert tree(target.parent) == before


def test_a_run_in_and_into_folders_that_are_no_utf8_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / os.fsdecode(b"cwd\xff")
    here.mkdir()
    monkeypatch.chdir(here)
    target = Path(os.fsdecode(b"a\xff/o"))
    options = {"--calib-images": os.fsdecode(b"pics\xff")}
    note = RunNote("calibrate", f"glmq calibrate --stats {target}", options)
    with OutputFolder(target, overwrite=False, run=note) as output:
        found = read_note(output.work)
        assert found is not None
        assert (found.note, found.directory, found.target) == (note, str(here), str(here / target))
        (output.path / "glmq_new.json").write_text("new")
        output.finish()
    assert list(tree(here)) == [os.fsdecode(b"a\xff"), str(target), f"{target}/glmq_new.json"]
