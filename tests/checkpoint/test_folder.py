import os
from pathlib import Path

import pytest
from helpers import tree

from glmq.checkpoint.folder import OutputFolder, check_output, partial_path, refuse_interrupted, stored_bytes
from glmq.checkpoint.journal import Journal
from glmq.errors import CheckpointError, SpaceError, UsageError


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "parent" / "out"


def fill(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / "old.txt").write_text(text)


def interrupt(target: Path, *, blocks: int = 0, error: type[BaseException] = KeyboardInterrupt) -> None:
    """A run that is stopped after it has journalled some blocks."""

    def work() -> None:
        with OutputFolder(target, overwrite=False) as folder:
            journal = Journal(folder.path, {})
            for number in range(blocks):
                journal.record(f"block {number}", {})
            raise error

    with pytest.raises(error):
        work()


def test_the_folder_appears_whole_and_with_all_its_parents(target: Path) -> None:
    with OutputFolder(target, overwrite=False) as folder:
        (folder.path / "a.txt").write_text("a")
        assert not target.exists()
        folder.finish()
    assert [path.name for path in target.iterdir()] == ["a.txt"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_it_grows_beside_its_place_on_the_same_disk(target: Path) -> None:
    with OutputFolder(target, overwrite=False) as folder:
        assert folder.path == partial_path(target) == target.parent / ".out.partial"


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_group_may_read_it_whatever_the_umask(umask: int, target: Path) -> None:
    before = os.umask(umask)
    try:
        with OutputFolder(target, overwrite=False) as folder:
            folder.finish()
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == 0o750


def test_an_empty_folder_is_a_good_place(target: Path) -> None:
    target.mkdir(parents=True)
    with OutputFolder(target, overwrite=False) as folder:
        (folder.path / "a.txt").touch()
        folder.finish()
    assert tree(target.parent).keys() == {"out", "out/a.txt"}


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
    with OutputFolder(target, overwrite=True) as folder:
        (folder.path / "new.txt").write_text("new")
        assert (target / "old.txt").read_text() == "old"
        folder.finish()
    assert tree(target.parent).keys() == {"out", "out/new.txt"}


def test_an_error_leaves_the_old_contents_and_nothing_else(target: Path) -> None:
    fill(target, "old")
    before = tree(target.parent)
    with pytest.raises(FileExistsError), OutputFolder(target, overwrite=True) as folder:
        folder.path.mkdir()
    assert tree(target.parent) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_to_a_folder_stays_a_link(overwrite: bool, tmp_path: Path) -> None:
    place, link = tmp_path / "disk" / "place", tmp_path / "out"
    place.mkdir(parents=True)
    if overwrite:
        (place / "old.txt").touch()
    link.symlink_to(place)
    with OutputFolder(link, overwrite=overwrite) as folder:
        (folder.path / "new.txt").touch()
        folder.finish()
    assert link.is_symlink()
    assert tree(tmp_path / "disk").keys() == {"place", "place/new.txt"}


def test_the_current_folder_is_a_good_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with OutputFolder(Path(), overwrite=False) as folder:
        (folder.path / "new.txt").touch()
        folder.finish()
    assert tree(tmp_path).keys() == {"here", "here/new.txt"}


def test_what_an_older_run_without_a_journal_left_is_swept_away(target: Path) -> None:
    fill(partial_path(target), "rest")
    with OutputFolder(target, overwrite=False) as folder:
        folder.finish()
    assert tree(target.parent) == {"out": ""}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, SpaceError, OSError, CheckpointError])
def test_a_run_that_stopped_before_its_first_journal_line_leaves_nothing(
    error: type[BaseException], target: Path
) -> None:
    with pytest.raises(error), OutputFolder(target, overwrite=False):
        raise error
    assert tree(target.parent) == {}


def test_a_run_that_stopped_before_its_first_block_leaves_nothing(target: Path) -> None:
    interrupt(target, blocks=0)
    assert tree(target.parent) == {}


def test_a_run_that_was_killed_before_its_first_block_is_no_run_to_resume(target: Path) -> None:
    partial_path(target).mkdir(parents=True)
    Journal(partial_path(target), {})
    check_output(target, overwrite=False)
    with OutputFolder(target, overwrite=False) as folder:
        assert list(folder.path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, SpaceError, OSError])
def test_an_interrupted_run_stays_to_be_resumed(error: type[BaseException], target: Path) -> None:
    interrupt(target, blocks=2, error=error)
    assert tree(target.parent).keys() == {".out.partial", ".out.partial/journal.jsonl"}
    with OutputFolder(target, overwrite=False, resume=True) as folder:
        journal = Journal(folder.path, {})
        assert list(journal.finished) == ["block 0", "block 1"]
        journal.remove()
        folder.finish()
    assert tree(target.parent) == {"out": ""}


@pytest.mark.parametrize("error", [CheckpointError, UsageError])
def test_a_run_that_met_bad_input_leaves_nothing(error: type[BaseException], target: Path) -> None:
    interrupt(target, blocks=2, error=error)
    assert tree(target.parent) == {}


def test_a_resumed_run_is_kept_when_it_meets_bad_input(target: Path) -> None:
    interrupt(target, blocks=2)
    with pytest.raises(UsageError), OutputFolder(target, overwrite=False, resume=True):
        raise UsageError("other settings")
    assert tree(target.parent).keys() == {".out.partial", ".out.partial/journal.jsonl"}


def test_an_interrupted_run_is_not_overlooked(target: Path) -> None:
    interrupt(target, blocks=2)
    sentence = (
        f"{target}: an interrupted run of 2 finished blocks lies beside it, in .out.partial; "
        "run the same command with --resume to continue it, or with --overwrite to start again"
    )
    for refuse in (lambda: check_output(target, overwrite=False), lambda: refuse_interrupted(target, target)):
        with pytest.raises(UsageError) as caught:
            refuse()
        assert str(caught.value) == sentence
    check_output(target, overwrite=False, resume=True)


def test_overwriting_starts_an_interrupted_run_again(target: Path) -> None:
    interrupt(target, blocks=2)
    with OutputFolder(target, overwrite=True) as folder:
        assert Journal(folder.path, {}).finished == {}


def test_what_an_interrupted_run_takes_on_the_disk_leaves_holes_out(target: Path) -> None:
    assert stored_bytes(target) == 0
    partial_path(target).mkdir(parents=True)
    assert stored_bytes(target) == 0
    (partial_path(target) / "written").write_bytes(bytes(range(256)) * 256)
    with (partial_path(target) / "hole").open("wb") as file:
        file.truncate(2**30)
    assert 2**16 <= stored_bytes(target) < 2**17
