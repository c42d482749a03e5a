import errno
import io
import os
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import start_glmq
from rich.live import Live

from glmq.cli.console import VisibleConsole
from glmq.cli.streams import mend_streams, without_echo

CODE = (
    "import os, sys\n"
    "from glmq.cli.streams import mend_streams\n"
    "mend_streams()\n"
    "print('out'), print('err', file=sys.stderr), sys.stdin.read()\n"
    "sys.exit(os.open('weights', os.O_CREAT | os.O_WRONLY))\n"
)


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "2>&-", "<&-"])
def test_no_file_takes_the_place_of_a_stream_that_is_closed(closed: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, CODE],
        stdin=subprocess.DEVNULL, capture_output=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 3
    assert (tmp_path / "weights").read_bytes() == b""


def test_characters_that_a_stream_cannot_write_are_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    mend_streams()
    print("照片.png", flush=True)
    assert written.getvalue() == b"\\u7167\\u7247.png\n"


class Full(io.StringIO):
    """A file on a full disk."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_on_a_full_disk_does_not_end_the_run() -> None:
    talk = VisibleConsole(file=Full(), stderr=True)
    talk.print("calibrate: 1/5")
    talk.print("calibrate: 2/5")
    with pytest.raises(OSError, match="No space left on device"):
        VisibleConsole(file=Full()).print("the result")


class Gone(io.StringIO):
    """A pipe whose reader went away."""

    def flush(self) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize("stream", [Full, Gone])
def test_moving_lines_that_nobody_can_be_shown_do_not_end_the_run(stream: type[io.StringIO]) -> None:
    talk = VisibleConsole(file=stream(), stderr=True, force_terminal=True)
    with Live("12 of 66 blocks", console=talk, auto_refresh=False) as live:
        live.update("13 of 66 blocks", refresh=True)
        talk.print("calibrate: done")
    assert talk.quiet


def test_a_reader_of_results_that_went_away_is_for_the_command_to_handle() -> None:
    with pytest.raises(BrokenPipeError):
        VisibleConsole(file=Gone()).print("the result")


def lose_stderr() -> None:
    """Make stderr of this process a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 2)
    os.close(writing)
    sys.stderr = open(2, "w", 1, closefd=False)  # noqa: SIM115  as Python opens it


def fill_stdout() -> None:
    """Make stdout of this process a file on a full disk."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115


@pytest.mark.slow
def test_a_run_goes_on_when_the_reader_of_its_progress_goes_away(
    small: Path, small_stats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("quantize", "--model_path", small, "--stats", small_stats, "--save_directory", out)
    done = start_glmq(*command, before=lose_stderr)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
    assert (out / "quant_model_description.json").is_file()
    again = start_glmq(*command, before=lose_stderr, anew=False)
    assert (again.returncode, again.stdout, again.stderr) == (2, "", "")
    wrong = start_glmq("quantize", "--w_bit", "x", before=lose_stderr, anew=False)
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, "", "")


FULL = "error[GLMQ-E501]: No space left on device; make room there, for bytes and for files (df -h, df -i)\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "--help"],
        ["--help"],
        ["--version"],
        ["doctor", "--json"],
        ["verify", "--list-checks"],
        ["verify", "--list-checks", "--json"],
        ["calibrate", "--model-path", "m", "--stats", "s", "--dump-config"],
    ],
    ids=" ".join,
)
def test_a_stdout_on_a_full_disk_is_said_on_stderr(arguments: list[str]) -> None:
    done = start_glmq(*arguments, before=fill_stdout, anew=False)
    assert (done.returncode, done.stderr) == (5, FULL)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_an_error_that_stdout_does_not_take_is_said_on_stderr_with_its_code() -> None:
    done = start_glmq("verify", "--json", before=fill_stdout, anew=False)
    sentence = "CANDIDATE: missing; give the folder of a quantized or compressed checkpoint"
    assert (done.returncode, done.stderr) == (2, f"error[GLMQ-E201]: {sentence}\n")


@pytest.mark.slow
def test_a_child_is_waited_for_where_the_parent_ignores_its_children(
    small: Path, pictures: Path, tmp_path: Path
) -> None:
    options = ("--calib-images", pictures, "--limit", 1, "--no-texts", "-q")
    command = ("calibrate", "--model-path", small, "--stats", tmp_path / "stats", *options)
    done = start_glmq(*command, before=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'stats'}\n", "")


class Pseudo:
    """A terminal that nobody looks at: what a program has in it, and the hand at its keyboard."""

    def __init__(self) -> None:
        self.hand, program = os.openpty()
        self.program = os.fdopen(program, "r", encoding="utf-8")

    def type(self, text: str) -> None:
        os.write(self.hand, text.encode())

    def screen(self, end: str) -> str:
        """What has come onto the screen, once it ends so: echoes come a moment later than they are typed."""
        shown = ""
        while not shown.endswith(end):
            assert select.select([self.hand], [], [], 60)[0], shown
            shown += os.read(self.hand, 4096).decode()
        return shown

    @property
    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.hand)[3] & termios.ECHO)


@pytest.fixture
def terminal() -> Iterator[Pseudo]:
    pseudo = Pseudo()
    with pseudo.program:
        yield pseudo
    os.close(pseudo.hand)


def test_what_is_typed_while_something_is_printed_is_not_seen_and_not_lost(terminal: Pseudo) -> None:
    with without_echo(terminal.program):
        terminal.type("unseen\n")
        assert select.select([terminal.program], [], [], 60)[0]  # the line is there; nobody reads it yet
    terminal.type("seen\n")
    assert terminal.screen("\n") == "seen\r\n"
    assert [terminal.program.readline() for _ in range(2)] == ["unseen\n", "seen\n"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_a_terminal_shows_again_what_is_typed_however_it_ended(terminal: Pseudo, error: type[BaseException]) -> None:
    def fail() -> None:
        assert not terminal.echoes
        raise error

    with pytest.raises(error), without_echo(terminal.program):
        fail()
    assert terminal.echoes


def test_a_terminal_that_showed_nothing_before_is_left_so(terminal: Pseudo) -> None:
    silent = termios.tcgetattr(terminal.hand)
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(terminal.hand, termios.TCSANOW, silent)
    with without_echo(terminal.program):
        pass
    assert not terminal.echoes


def test_what_is_no_terminal_and_every_system_without_them_is_left_alone(
    terminal: Pseudo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "questions").open("w+") as file, without_echo(file):
        pass
    monkeypatch.setitem(sys.modules, "termios", None)
    with without_echo(terminal.program):
        assert terminal.echoes


def test_a_byte_that_is_no_utf8_is_read_as_half_of_a_surrogate_pair() -> None:
    code = "import sys; from glmq.cli.streams import mend_streams; mend_streams(); print(ascii(input()))"
    found = subprocess.run(
        [sys.executable, "-c", code], input=b"caf\xe9\n", capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (0, b"'caf\\udce9'\n"), found.stderr
