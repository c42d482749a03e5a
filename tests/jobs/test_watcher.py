"""What a job tells while it runs: events, log lines, and the times that every rank gets."""

import logging
import mmap

import pytest
from helpers import run_ranks

from glmq.jobs import watcher as watcher_module
from glmq.jobs.watcher import Watcher
from glmq.progress import Event, Note, PassDone, PassStarted, peak_bytes, resident_bytes
from glmq.ranks import Place, Ranks
from glmq.records import BlockDone, BytesDone, PassTime, StageTime


def block(index: int, megabytes: int, *stages: StageTime) -> BlockDone:
    return BlockDone(f"block {index}", index, 2, 1.0, megabytes * 2**20, stages)


def test_a_pass_over_blocks_tells_its_start_its_blocks_and_what_it_took() -> None:
    events: list[Event] = []
    watcher = Watcher(events.append)
    with watcher.blocks("rate", 2) as done:
        done(block(0, 300, StageTime("read", 1.0, 0, 8)))
        done(block(1, 200, StageTime("read", 2.0, 0, 4), StageTime("rounding", 1.0, 6, 0)))
    start, first, second, end = events
    assert start == PassStarted("rate", "blocks", 2)
    assert (first, second) == (
        block(0, 300, StageTime("read", 1.0, 0, 8)),
        block(1, 200, StageTime("read", 2.0, 0, 4), StageTime("rounding", 1.0, 6, 0)),
    )
    assert isinstance(end, PassDone)
    assert (end.time.title, end.nbytes) == ("rate", 0)
    assert end.time.stages == (StageTime("read", 3.0, 0, 12), StageTime("rounding", 1.0, 6, 0))
    assert watcher.times(Ranks(Place(0, 1))) == (end.time,)


def test_a_pass_over_bytes_adds_them_up() -> None:
    events: list[Event] = []
    with Watcher(events.append).bytes("compress", 30) as done:
        done("a", 10, 5)
        done("b", 20, 7)
    assert events[:3] == [PassStarted("compress", "bytes", 30), BytesDone("a", 10, 5), BytesDone("b", 20, 7)]
    end = events[3]
    assert isinstance(end, PassDone)
    assert end.nbytes == 30


def test_a_pass_knows_what_was_held_between_its_blocks() -> None:
    events: list[Event] = []
    with Watcher(events.append).blocks("rate", 1) as done:
        before = peak_bytes()
        # More than ever before, in pages of its own: malloc may have kept some.
        size, flags = 64 * 2**20 + before - resident_bytes(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        mmap.mmap(-1, size, flags=flags).close()
        done(block(0, 1))
    (end,) = [event for event in events if isinstance(event, PassDone)]
    assert end.time.peak_bytes == peak_bytes()
    assert end.time.peak_bytes - before > 48 * 2**20


def test_what_is_counted_is_said_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    now = [100.0]
    monkeypatch.setattr(watcher_module.time, "perf_counter", lambda: now[0])
    count = Watcher(events.append).counter("pictures of the folder read")
    for done, now[0] in ((1, 109.0), (2, 110.0), (3, 119.0), (4, 121.0)):
        count(done)
    assert events == [Note("2 pictures of the folder read so far"), Note("4 pictures of the folder read so far")]


def test_a_pass_that_fails_has_no_end() -> None:
    events: list[Event] = []
    watcher = Watcher(events.append)
    with pytest.raises(ZeroDivisionError), watcher.blocks("rate", 2):
        raise ZeroDivisionError
    assert events == [PassStarted("rate", "blocks", 2)]
    assert watcher.times(Ranks(Place(0, 1))) == ()


def test_nobody_has_to_watch_and_the_log_gets_it_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "glmq"), (watcher := Watcher(None)).blocks("rate", 2) as done:
        watcher.note("left out a.png: it is empty")
        done(block(0, 300))
    assert [record.getMessage() for record in caplog.records][:3] == [
        "rate: 2 blocks to do",
        "left out a.png: it is empty",
        "rate: 1/2 block 0, 1.0 s, 300 MiB resident",
    ]


def test_a_note_is_told_as_it_is() -> None:
    events: list[Event] = []
    Watcher(events.append).note("50 % of it [sic]")
    assert events == [Note("50 % of it [sic]")]


def test_every_rank_gets_the_times_of_the_first() -> None:
    found: dict[int, tuple[PassTime, ...]] = {}

    def work(ranks: Ranks) -> None:
        watcher = Watcher(None)
        with watcher.blocks(f"pass of {ranks.place.rank}", 1) as done:
            done(block(0, 100, StageTime("read", 1.0, 0, 8)))
        found[ranks.place.rank] = watcher.times(ranks)

    assert run_ranks(2, work) == ["", ""]
    assert found[0] == found[1]
    assert found[0][0].title == "pass of 0"
