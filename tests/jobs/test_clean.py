"""Work folders of interrupted runs: found, told apart, removed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from helpers import tree

from glmq.checkpoint.folder import OutputFolder
from glmq.checkpoint.journal import Journal
from glmq.checkpoint.run_note import RunNote
from glmq.errors import UnreadableError
from glmq.jobs.clean import State, find_leftovers, remove_leftovers

NOTE = RunNote("quantize", "glmq quantize --save_directory 'my out' --resume", {})


@contextmanager
def running(target: Path, *, work_dir: Path | None = None, note: RunNote | None = NOTE) -> Iterator[OutputFolder]:
    """A run that has finished one block and goes on."""
    with OutputFolder(target, overwrite=False, work_dir=work_dir, run=note) as folder:
        Journal(folder.work, {}).record("a block", {})
        (folder.path / "weights").write_bytes(bytes(2**16))
        yield folder


def interrupt(target: Path, *, work_dir: Path | None = None, note: RunNote | None = NOTE) -> Path:
    """Its work folder when it was stopped."""
    with suppress(KeyboardInterrupt), running(target, work_dir=work_dir, note=note) as folder:
        raise KeyboardInterrupt
    return folder.work


def test_an_unfinished_run_is_found_in_its_folder_and_by_its_output(tmp_path: Path) -> None:
    work = interrupt(tmp_path / "out")
    os.utime(work, (0, 0))
    for place in (tmp_path, tmp_path / "out", work):
        (found,) = find_leftovers([place, tmp_path])
        assert (found.path, found.state, found.verb) == (work, State.UNFINISHED, "quantize")
        assert found.nbytes >= 2**16
        assert 0.0 <= found.age_seconds < 600.0
        assert found.command == NOTE.command  # given here


def test_a_command_that_was_given_elsewhere_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b").mkdir()
    interrupt(tmp_path / "out")
    here = Path.cwd()
    monkeypatch.chdir(tmp_path / "a b")
    (found,) = find_leftovers([tmp_path])
    assert found.command == f"cd {here} && {NOTE.command}"


def test_only_what_is_unfinished_is_removed(tmp_path: Path) -> None:
    unfinished = interrupt(tmp_path / "unfinished")
    older = interrupt(tmp_path / "older", note=None)
    whole = interrupt(tmp_path / "whole")
    (whole / "result.json").write_text("{}")
    replacing = interrupt(tmp_path / "replacing")
    (replacing / "replaced").mkdir()
    elsewhere = interrupt(tmp_path / "out", work_dir=tmp_path, note=None)
    foreign = tmp_path / ".foreign.partial"
    foreign.mkdir()
    (foreign / "file").touch()
    (tmp_path / "other.partial").mkdir()
    with running(tmp_path / "running") as folder:
        found = find_leftovers([tmp_path])
        assert {one.path: one.state for one in found} == {
            older: State.UNFINISHED,
            elsewhere: State.UNKNOWN,
            replacing: State.REPLACING,
            folder.work: State.RUNNING,
            unfinished: State.UNFINISHED,
            whole: State.FINISHED,
        }
        assert [one.path for one in remove_leftovers(found)] == [older, unfinished]
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {
            ".foreign.partial", "other.partial", ".running.glmq-lock",
            *(path.name for path in (whole, replacing, elsewhere, folder.work)),
        }  # fmt: skip


def test_a_run_that_begins_meanwhile_keeps_its_folder(tmp_path: Path) -> None:
    interrupt(tmp_path / "out")
    found = find_leftovers([tmp_path])
    with OutputFolder(tmp_path / "out", overwrite=False, resume=True) as folder:
        before = tree(folder.work)
        assert remove_leftovers(found) == []
        assert tree(folder.work) == before


def test_a_run_with_a_folder_for_work_is_known_to_be_at_work_by_its_outputs_lock(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    with running(tmp_path / "out", work_dir=tmp_path / "work"):
        (found,) = find_leftovers([tmp_path / "work"])
        assert found.state is State.RUNNING
    (found,) = remove_leftovers(find_leftovers([tmp_path / "work"]))
    assert list(tmp_path.rglob("*")) == [tmp_path / "work"]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError) as caught:
        find_leftovers([tmp_path / "no"])
    assert str(caught.value) == (
        f"{tmp_path / 'no'}: is no folder, and no run left an unfinished output of that name beside it"
    )
    assert find_leftovers([tmp_path]) == []
