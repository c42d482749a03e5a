"""The events of a run on a pipe and on a terminal."""

import io
import re
import sys

import pytest

from glmq.cli import console
from glmq.cli.progress import ProgressView, pass_lines
from glmq.progress import Note, PassDone, PassStarted
from glmq.records import BlockDone, BytesDone, PassTime, StageTime

STARTED = PassStarted("quantize", "blocks", 4)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def done(index: int, seconds: float, *, total: int = 4, megabytes: int = 100) -> BlockDone:
    return BlockDone(f"block {index}", index, total, seconds, megabytes * 2**20)


def test_progress_on_a_pipe_is_a_line_per_block(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressView(quiet=False) as view:
        view(STARTED)
        view(done(0, 2.0))
        view(done(1, 4.0, megabytes=300))
        view(done(2, 0.06, megabytes=200))
        view(PassDone(PassTime("quantize", 6.06, 300 * 2**20, ()), 0))
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[:3] == [
        "quantize: 1/4 block 0 2.0 s, 6 s left, 100 MiB",
        "quantize: 2/4 block 1 4.0 s, 6 s left, 300 MiB",
        "quantize: 3/4 block 2 0.1 s, 2 s left, 200 MiB",
    ]
    assert lines[3:] == ["quantize: 6.1 s, peak 300 MiB resident"]


def test_stages_come_in_a_line_with_their_rates_and_small_ones_are_summed_up() -> None:
    stages = (
        StageTime("read", 2.0, 0, 3 * 10**9),
        StageTime("forward", 90.0, 18 * 10**12, 0),
        StageTime("images", 1.5, 0, 0),
        StageTime("write", 0.25, 0, 10**9),
    )
    assert pass_lines(PassTime("calibrate", 100.0, 300 * 2**20, stages)) == [
        "calibrate: 100.0 s, peak 300 MiB resident",
        "calibrate, of these: read 2.0 s (1.50 GB/s), forward 90.0 s (200 GFLOP/s), images 1.5 s, other 6.5 s",
    ]


def test_the_rest_is_estimated_from_the_last_eight_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressView(quiet=False) as view:
        view(STARTED)
        for index in range(10):
            view(done(index, 100.0 if index < 2 else 1.0, total=20))
    assert capsys.readouterr().err.splitlines()[9] == "quantize: 10/20 block 9 1.0 s, 10 s left, 100 MiB"


def test_quiet_progress_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressView(quiet=True) as view:
        view(STARTED)
        view(done(0, 1.0))
    assert capsys.readouterr() == ("", "")


def test_a_run_that_fails_shows_no_total(capsys: pytest.CaptureFixture[str]) -> None:
    view = ProgressView(quiet=False)
    view(PassStarted("quantize", "blocks", 4))
    with pytest.raises(ZeroDivisionError), view:
        print(1 / 0)
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_is_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(console.stderr, "is_interactive", True)  # rich asks when the console is made
    with ProgressView(quiet=False) as view:
        view(STARTED)
        view(done(0, 2.0))
        view(done(1, 2.0))
        assert view._bar is not None
        view._bar.refresh()
        view(Note("note: half of it is done"))
        view(PassDone(PassTime("quantize", 4.0, 100 * 2**20, ()), 0))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "2/4 blocks  4 s left  100 MiB" in plain
    assert "quantize: 1/4" not in plain
    assert "note: half of it is done\n" in plain
    assert plain.endswith("quantize: 4.0 s, peak 100 MiB resident\n")


def test_a_terminal_that_can_draw_nothing_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(console.stderr, "is_interactive", False)  # TERM=dumb
    with ProgressView(quiet=False) as view:
        view(STARTED)
        view(done(0, 2.0))
    assert "quantize: 1/4 block 0 2.0 s, 6 s left, 100 MiB" in terminal.getvalue()


def test_forced_colour_makes_no_bar_out_of_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ProgressView(quiet=False) as view:
        view(STARTED)
        view(done(0, 2.0))
        assert view._bar is None
    assert "quantize: 1/4 block 0 2.0 s, 6 s left, 100 MiB" in capsys.readouterr().err


def test_bytes_on_a_pipe_are_a_line_for_each_twentieth(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressView(quiet=False) as view:
        view(PassStarted("compress", "bytes", 40 * 2**20))
        for number in range(40):
            view(BytesDone(f"tensor {number}", 2**20, 100 * 2**20))
        view(PassDone(PassTime("compress", 2.5, 100 * 2**20, ()), 40 * 2**20))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert re.fullmatch(r"compress: 2\.0 MiB of 40\.0 MiB, tensor 1, \d+ s left, 100 MiB", lines[0])
    assert lines[-1] == "compress: 40.0 MiB in 2.5 s, peak 100 MiB resident"
