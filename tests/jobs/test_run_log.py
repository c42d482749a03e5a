"""glmq.log: there while a run lasts, gone when it is whole, kept when something unforeseen stops it."""

import logging
from pathlib import Path

import pytest
from helpers import run_ranks

from glmq.errors import CheckpointError
from glmq.jobs.run_log import run_log
from glmq.jobs.watcher import Watcher
from glmq.progress import Event, Note
from glmq.ranks import Place, Ranks

ALONE = Ranks(Place(0, 1))
log = logging.getLogger("glmq.some.engine")


def logged(tmp_path: Path, error: BaseException | None, events: list[Event]) -> Path:
    """Run a job of one log line that ends with `error`; returns the log's path."""
    work = tmp_path / ".out.partial"
    work.mkdir(exist_ok=True)
    with run_log(work, tmp_path / "out", {"w_bit": 4}, ALONE, Watcher(events.append)):
        log.info("layer 3 is folded")
        log.debug("a detail")
        if error is not None:
            raise error
    return work / "glmq.log"


def test_the_log_of_a_run_that_succeeds_is_removed(tmp_path: Path) -> None:
    path = logged(tmp_path, None, [])
    assert list(path.parent.iterdir()) == []


def test_an_interruption_leaves_versions_machine_options_lines_and_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        logged(tmp_path, KeyboardInterrupt(), [])
    text = (tmp_path / ".out.partial" / "glmq.log").read_text(encoding="utf-8")
    for part in (
        "versions: glmq ",
        "torch 2.",
        "GiB of memory available",
        "options: {'w_bit': 4}",
        "layer 3 is folded",
    ):
        assert part in text
    assert "stopped by KeyboardInterrupt\nTraceback (most recent call last):" in text
    assert "a detail" not in text
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]


def test_a_resumed_run_goes_on_writing_the_same_log(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            logged(tmp_path, KeyboardInterrupt(), [])
    text = (tmp_path / ".out.partial" / "glmq.log").read_text(encoding="utf-8")
    assert text.count("layer 3 is folded") == 2


def test_an_unforeseen_failure_leaves_a_copy_beside_the_output_and_says_so(tmp_path: Path) -> None:
    events: list[Event] = []
    with pytest.raises(ZeroDivisionError):
        logged(tmp_path, ZeroDivisionError("by zero"), events)
    copy = tmp_path / ".out.glmq.log"
    assert "ZeroDivisionError: by zero" in copy.read_text(encoding="utf-8")
    assert events == [Note(f"the log of this run is kept in {copy}")]


def test_bad_input_leaves_no_copy(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        logged(tmp_path, CheckpointError("a.safetensors: is truncated"), [])
    assert not (tmp_path / ".out.glmq.log").exists()


def test_the_loggers_are_left_as_they_were(tmp_path: Path) -> None:
    logger = logging.getLogger("glmq")
    before = (logger.level, list(logger.handlers))
    logged(tmp_path, None, [])
    assert (logger.level, logger.handlers) == before


def test_each_rank_writes_its_own_and_the_first_removes_them_all(tmp_path: Path) -> None:
    seen: list[str] = []

    def work(ranks: Ranks) -> None:
        with run_log(tmp_path, tmp_path / "out", None, ranks, Watcher(None)):
            ranks.barrier()
            if ranks.place.is_first:
                seen.extend(sorted(path.name for path in tmp_path.iterdir()))
            ranks.barrier()
        ranks.barrier()

    (tmp_path / "glmq.log.7").touch()  # of an interrupted run of more ranks
    assert run_ranks(2, work) == ["", ""]
    assert seen == ["glmq.log", "glmq.log.1", "glmq.log.7"]
    assert list(tmp_path.iterdir()) == []
