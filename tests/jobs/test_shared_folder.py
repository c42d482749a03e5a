"""Ranks as threads of one process; tests/cli/test_compress.py runs real ones."""

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from helpers import ThreadRanks, run_ranks

from glmq.checkpoint.folder import OutputFolder
from glmq.errors import GlmqError, LostRanksError, OtherRankError
from glmq.jobs.shared_folder import SharedFolder
from glmq.ranks import Place, Ranks


def run(target: Path, world: int, work: Callable[[int, SharedFolder], None]) -> list[str]:
    """Do `work` on every rank in a shared folder; returns what each rank raised (empty: nothing)."""

    def rank_main(ranks: Ranks) -> None:
        with SharedFolder(OutputFolder(target, overwrite=False), ranks) as folder:
            work(ranks.place.rank, folder)
            folder.finish()

    return run_ranks(world, rank_main)


def left_over(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


@pytest.mark.parametrize("world", [1, 3])
def test_what_all_ranks_wrote_appears_together(tmp_path: Path, world: int) -> None:
    def work(rank: int, folder: SharedFolder) -> None:
        (folder.path / f"part{rank}").write_text(str(rank))
        folder.check_others()
        assert not (tmp_path / "out").exists()  # after the meeting another rank may give it its name
        assert folder.all_gather(f"text {rank}") == [f"text {other}" for other in range(world)]

    assert run(tmp_path / "out", world, work) == [""] * world
    assert left_over(tmp_path / "out") == [f"part{rank}" for rank in range(world)]
    assert left_over(tmp_path) == ["out"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_is_heard_by_all_and_nothing_is_left(tmp_path: Path, failing: int) -> None:
    def work(rank: int, folder: SharedFolder) -> None:
        (folder.path / f"part{rank}").write_text("half")
        if rank == failing:
            raise GlmqError("weights are bad")
        folder.all_gather("done")

    told = f"OtherRankError: stopped because rank {failing} failed: weights are bad"
    assert run(tmp_path / "out", 2, work) == [
        ("GlmqError: weights are bad" if r == failing else told) for r in range(2)
    ]
    assert left_over(tmp_path) == []


def test_a_rank_hears_of_a_failure_between_two_tensors(tmp_path: Path) -> None:
    def work(rank: int, folder: SharedFolder) -> None:
        if rank == 1:
            raise GlmqError("weights are bad")
        while True:
            folder.check_others()

    told = "OtherRankError: stopped because rank 1 failed: weights are bad"
    assert run(tmp_path / "out", 3, work) == [told, "GlmqError: weights are bad", told]
    assert left_over(tmp_path) == []


def test_a_rank_that_is_interrupted_leaves_without_a_word_and_nothing_is_left(tmp_path: Path) -> None:
    def work(rank: int, folder: SharedFolder) -> None:
        (folder.path / f"part{rank}").write_text("half")
        folder.all_gather("begin")
        if rank == 1:
            raise KeyboardInterrupt
        folder.all_gather("done")

    assert run(tmp_path / "out", 2, work) == ["LostRanksError: gone", "KeyboardInterrupt: "]
    assert left_over(tmp_path) == []


def test_a_failed_rename_is_everybodys_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: OutputFolder) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(OutputFolder, "finish", refuse)
    raised = run(tmp_path / "out", 2, lambda rank, folder: None)
    assert raised == [
        "PermissionError: [Errno 13] Permission denied",
        "OtherRankError: stopped because rank 0 failed: [Errno 13] Permission denied",
    ]
    assert left_over(tmp_path) == []


def test_a_rank_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    class Elsewhere(ThreadRanks):
        def _all_gather_text(self, text: str) -> list[str]:
            return [text, text]

    output = OutputFolder(tmp_path / "out", overwrite=False)
    with pytest.raises(GlmqError) as caught, SharedFolder(output, Elsewhere(1, threading.Barrier(2), ["", ""])):
        pass
    assert str(caught.value) == (
        f"{output.path}: rank 1 does not see the folder that rank 0 made; all ranks must run on one machine or share the disk"
    )


def test_other_rank_errors_are_unexpected_failures() -> None:
    assert (OtherRankError.exit_code, LostRanksError.exit_code) == (1, 1)
    assert Ranks(Place(0, 1)).all_gather("alone") == ["alone"]
    assert Ranks(Place(0, 1), timedelta(0)).place == Place(0, 1)
