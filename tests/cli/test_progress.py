"""The events of a run on a pipe, on a terminal and in a file."""

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from glmq.cli import console
from glmq.cli.progress import ProgressView, pass_lines
from glmq.progress import BlockStep, Note, PassDone, PassPlan, PassStarted, RunPlanned, StepPlan
from glmq.records import BlockDone, BytesDone, PassTime, StageTime

STARTED = PassStarted("quantize", "blocks", 4)
PLANNED = RunPlanned(
    (
        PassPlan(
            "calibrate", (StepPlan("a", "vision", 10.0), StepPlan("b", "text", 40.0), StepPlan("c", "text", 50.0))
        ),
        PassPlan("quantize", (StepPlan("b", "text", 100.0),)),
    )
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock(SimpleNamespace):
    now = 0.0

    def __call__(self) -> float:
        return self.now


def done(index: int, seconds: float, *, total: int = 4, megabytes: int = 100) -> BlockDone:
    return BlockDone(f"block {index}", index, total, seconds, megabytes * 2**20)


def without_times(shown: str) -> list[str]:
    """The lines without the time that each begins with."""
    lines = shown.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    return [line[9:] for line in lines]


def test_progress_on_a_pipe_is_time_stamped_lines_ten_seconds_apart(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with ProgressView(quiet=False, clock=clock) as view:
        view(PLANNED)
        view(PassStarted("calibrate", "blocks", 3))
        for index, clock.now in enumerate((9.0, 58.0, 60.0)):
            view(done(index, (9.0, 49.0, 2.0)[index], total=3))
        view(PassDone(PassTime("calibrate", 60.0, 300 * 2**20, ()), 0))
    out, err = capsys.readouterr()
    assert out == ""
    assert without_times(err) == [
        "calibrate (pass 1 of 2): 3 blocks, about 3 min for the whole run",
        "calibrate (pass 1 of 2): 2 of 3 blocks, block 1; 26%, 58 s gone, about 3 min left, 100 MiB resident",
        "calibrate: 60 s, peak 300 MiB resident",
    ]


def test_a_run_that_may_end_earlier_is_estimated_at_most(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    reading, answer = PassPlan("read", (StepPlan("a", "text", 20.0),)), StepPlan("", "other", 180.0)
    with ProgressView(quiet=False, clock=clock) as view:
        view(RunPlanned((reading, PassPlan("answer", (answer,), is_bound=True), PassPlan("end", (answer,)))))
        view(PassStarted("read", "blocks", 1))
        clock.now = 20.0
        view(done(0, 20.0, total=1))
        view(PassStarted("answer", "tokens", 9))
        clock.now = 40.0
        view(done(0, 20.0, total=9))
        view(PassStarted("end", "blocks", 1))
    assert without_times(capsys.readouterr().err) == [
        "read (pass 1 of 3): 1 block, at most about 6 min for the whole run",
        "read (pass 1 of 3): 1 of 1 blocks, block 0; 5%, 20 s gone, at most about 6 min left, 100 MiB resident",
        "answer (pass 2 of 3): 9 tokens, at most about 6 min left",
        "answer (pass 2 of 3): 1 of 9 tokens, block 0; 11%, 40 s gone, at most about 6 min left, 100 MiB resident",
        "end (pass 3 of 3): 1 block, about 3 min left",
    ]


def test_stages_come_with_their_rates_when_asked_for_and_small_ones_are_summed_up() -> None:
    stages = (
        StageTime("read", 2.0, 0, 3 * 10**9),
        StageTime("forward", 90.0, 18 * 10**12, 0),
        StageTime("images", 1.5, 0, 0),
        StageTime("write", 0.25, 0, 10**9),
    )
    time = PassTime("calibrate", 100.0, 300 * 2**20, stages)
    assert pass_lines(time, verbose=False) == ["calibrate: 2 min, peak 300 MiB resident"]
    assert pass_lines(time, verbose=True)[1:] == [
        "calibrate, of these: read 2.0 s (1.50 GB/s), forward 2 min (200 GFLOP/s), images 1.5 s, other 6.5 s",
    ]


def test_quiet_progress_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressView(quiet=True) as view:
        view(STARTED)
        view(done(0, 1.0))
    assert capsys.readouterr() == ("", "")


def test_a_fleeting_pass_leaves_no_line_when_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressView(quiet=False, fleeting={"quantize"}) as view:
        view(STARTED)
        view(PassDone(PassTime("quantize", 1.0, 2**20, ()), 0))
    assert without_times(capsys.readouterr().err) == ["quantize: 4 blocks"]


def test_a_run_is_not_all_done_before_its_end() -> None:
    clock = Clock()
    view = ProgressView(quiet=True, clock=clock)
    view(RunPlanned((PassPlan("calibrate", (StepPlan("a", "text", 1000.0), StepPlan("b", "text", 1.0))),)))
    view(PassStarted("calibrate", "blocks", 2))
    clock.now = 1000.0
    view(done(0, 1000.0, total=2))
    assert view._share() == 0.99
    clock.now = 1001.0
    view(done(1, 1.0, total=2))
    assert view._share() == 1.0


def test_a_run_that_fails_shows_no_total(capsys: pytest.CaptureFixture[str]) -> None:
    view = ProgressView(quiet=False)
    view(PassStarted("quantize", "blocks", 4))
    with pytest.raises(ZeroDivisionError), view:
        print(1 / 0)
    out, err = capsys.readouterr()
    assert (out, without_times(err)) == ("", ["quantize: 4 blocks"])


def drawn(terminal: Terminal) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())


def test_progress_on_a_terminal_is_two_lines_that_move(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, clock = Terminal(), Clock()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(console.stderr, "is_interactive", True)  # rich asks when the console is made
    monkeypatch.setattr(console.stderr, "_width", 80)
    with ProgressView(quiet=False, clock=clock) as view:
        assert "getting ready" in drawn(terminal)
        view(PLANNED)
        view(PassStarted("calibrate", "blocks", 3))
        clock.now = 12.0
        view(done(0, 12.0, total=3, megabytes=300))
        view(BlockStep("model.language_model.layers.3", 1, 6, 12, "samples", 0.5))
        clock.now = 32.0
        assert view._live is not None
        view._live.refresh()
        view(Note("note: half of it is done"))
        view(PassDone(PassTime("calibrate", 65.0, 100 * 2**20, ()), 0))
    plain = drawn(terminal)
    assert "calibrate (pass 1 of 2): 1 of 3 blocks  layers.3, sample 7 of 12\n" in plain
    assert "32 s gone, about 3 min left, 300 MiB" in plain
    assert max(map(len, plain.splitlines())) <= 81  # with the carriage return
    assert "note: half of it is done\n" in plain
    assert plain.endswith("calibrate: 65 s, peak 100 MiB resident\n")


def test_a_run_after_another_begins_anew(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    view = ProgressView(quiet=False, clock=clock)
    for clock.now in (60.0, 600.0):  # a question is typed slowly
        with view:
            assert view.reached() == ""
            view(RunPlanned((PassPlan("read", (StepPlan("a", "text", 20.0), StepPlan("b", "text", 20.0))),)))
            view(PassStarted("read", "blocks", 2))
            clock.now += 30.0
            view(done(0, 30.0, total=2))
    assert without_times(capsys.readouterr().err) == 2 * [
        "read (pass 1 of 1): 2 blocks, about 40 s for the whole run",
        "read (pass 1 of 1): 1 of 2 blocks, block 0; 50%, 30 s gone, about 30 s left, 100 MiB resident",
    ]


@pytest.mark.parametrize("is_interactive", [True, False])
def test_a_stream_that_can_draw_nothing_gets_lines(
    is_interactive: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes no terminal out of a pipe
    monkeypatch.setattr(console.stderr, "is_interactive", is_interactive)
    if not is_interactive:  # TERM=dumb
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with ProgressView(quiet=False) as view:
        view(STARTED)
        assert view._live is None
    assert without_times(capsys.readouterr().err) == ["quantize: 4 blocks"]


def test_bytes_on_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with ProgressView(quiet=False, clock=clock) as view:
        view(PassStarted("compress", "bytes", 40 * 2**20))
        for number in range(40):
            clock.now += 1.0
            view(BytesDone(f"tensor {number}", 2**20, 100 * 2**20))
        view(PassDone(PassTime("compress", 40.0, 100 * 2**20, ()), 40 * 2**20))
    assert without_times(capsys.readouterr().err) == [
        "compress: 40.0 MiB",
        "compress: 10.0 MiB of 40.0 MiB, tensor 9; 25%, 10 s gone, about 30 s left, 100 MiB resident",
        "compress: 20.0 MiB of 40.0 MiB, tensor 19; 50%, 20 s gone, about 20 s left, 100 MiB resident",
        "compress: 30.0 MiB of 40.0 MiB, tensor 29; 75%, 30 s gone, about 10 s left, 100 MiB resident",
        "compress: 40.0 MiB of 40.0 MiB, tensor 39; 100%, 40 s gone, 100 MiB resident",
        "compress: 40.0 MiB in 40 s, peak 100 MiB resident",
    ]


def test_how_far_a_run_has_come_is_one_sentence() -> None:
    view = ProgressView(quiet=True)
    assert view.reached() == ""
    view(PLANNED)
    view(PassStarted("calibrate", "blocks", 3, 1))
    assert view.reached() == "calibrate (pass 1 of 2): 1 of 3 blocks are finished"
    view(done(1, 1.0, total=3))
    assert view.reached() == "calibrate (pass 1 of 2): 2 of 3 blocks are finished"


def test_a_file_of_events_has_a_line_for_each(tmp_path: Path) -> None:
    path, clock = tmp_path / "events.jsonl", Clock()
    path.write_text("{}\n")
    with ProgressView(quiet=True, events=path, verb="quantize", clock=clock) as view:
        view(PLANNED)
        view(PassStarted("calibrate", "blocks", 3))
        view(BlockStep("a", 0, 1, 2, "samples", 0.5))
        clock.now = 10.0
        view(done(0, 10.0, total=3))
        view(Note("so it is"))
        view(PassDone(PassTime("calibrate", 65.0, 100, ()), 0))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {}  # what is there stays
    times = [line.pop("time") for line in lines[1:]]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", time) for time in times)
    started, planned, first, step, block, note, finished, ended = lines[1:]
    assert started == {"event": "run_started", "schema": "glmq.events/1", "verb": "quantize"}
    assert planned["passes"][1] == {
        "title": "quantize",
        "steps": [{"name": "b", "kind": "text", "seconds": 100.0}],
        "is_bound": False,
    }
    assert planned["remaining_seconds"] == 200.0
    assert (first["event"], first["title"], first["unit"], first["total"]) == ("pass_started", "calibrate", "blocks", 3)
    assert (step["event"], step["done"], step["parts"], step["share"]) == ("block_step", 1, 2, 0.5)
    assert (block["event"], block["name"], block["resident_bytes"]) == ("block_done", "block 0", 100 * 2**20)
    assert (block["elapsed_seconds"], block["remaining_seconds"]) == (10.0, 190.0)
    assert (note["event"], note["text"]) == ("note", "so it is")
    assert finished["pass"] == {"title": "calibrate", "seconds": 65.0, "peak_bytes": 100, "stages": []}
    assert ended == {"event": "run_ended", "how": "done", "reason": None, "elapsed_seconds": 10.0}


def test_a_file_of_events_tells_why_a_run_ended(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for error, how, reason in (
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt"),
        (ValueError("no"), "failed", "no"),
    ):
        with pytest.raises(type(error)), ProgressView(quiet=True, events=path, verb="verify"):
            raise error
        last = json.loads(path.read_text().splitlines()[-1])
        assert (last["event"], last["how"], last["reason"]) == ("run_ended", how, reason)


def test_events_that_a_full_disk_does_not_take_end_no_run_and_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressView(quiet=True, events=Path("/dev/full"), verb="quantize") as view:
        view(PassStarted("quantize", "blocks", 4))
    assert capsys.readouterr().err == "warning: /dev/full: events are missing (No space left on device)\n"
