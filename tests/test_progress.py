from pathlib import Path
from types import SimpleNamespace

import pytest

from glmq import progress
from glmq.progress import Stopwatch, sum_stages
from glmq.records import StageTime


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: found.now)
    return found


def test_an_inner_stage_stops_the_clock_of_the_outer_one(clock: SimpleNamespace) -> None:
    watch = Stopwatch()
    with watch.stage("forward"):
        clock.now += 1
        with watch.stage("statistics"):
            clock.now += 10
        clock.now += 2
    clock.now += 50
    with watch.stage("statistics"):
        clock.now += 5
    watch.count("forward", flops=7)
    watch.count("forward", flops=2, nbytes=3)
    assert watch.take() == (StageTime("forward", 3.0, 9, 3), StageTime("statistics", 15.0, 0, 0))
    assert watch.take() == ()


def test_a_stage_that_fails_is_closed(clock: SimpleNamespace) -> None:
    watch = Stopwatch()

    def fail() -> None:
        with watch.stage("read"):
            clock.now += 4
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    clock.now += 9
    assert watch.take() == (StageTime("read", 4.0, 0, 0),)


def test_what_another_stopwatch_measured_is_added(clock: SimpleNamespace) -> None:
    watch = Stopwatch()
    watch.include([StageTime("rounding", 2.0, 4, 0), StageTime("report", 1.0, 0, 0)])
    watch.include([StageTime("rounding", 0.5, 1, 6)])
    assert watch.take() == (StageTime("rounding", 2.5, 5, 6), StageTime("report", 1.0, 0, 0))


def test_stages_of_several_blocks_add_up_in_the_order_of_their_first_appearance() -> None:
    times = [StageTime("read", 1.0, 0, 5), StageTime("forward", 2.0, 8, 0), StageTime("read", 0.5, 0, 1)]
    assert sum_stages(times) == [StageTime("read", 1.5, 0, 6), StageTime("forward", 2.0, 8, 0)]


def test_the_most_memory_that_was_held_is_what_linux_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("Name:\tglmq\nVmPeak:\t  900 kB\nVmHWM:\t  300 kB\nVmRSS:\t  200 kB\n")
    assert progress.peak_bytes() == 300 * 1024
    (tmp_path / "status").write_text("Name:\tglmq\n")
    monkeypatch.setattr(progress, "resident_bytes", lambda: 5)
    assert progress.peak_bytes() == 5
    (tmp_path / "status").unlink()
    assert progress.peak_bytes() == 5
