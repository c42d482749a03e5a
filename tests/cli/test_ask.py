"""`glmq ask`: the answer on stdout, its speed on stderr, and a sentence for what cannot answer."""

import fcntl
import json
import os
import signal
import sys
import termios
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import import_module
from pathlib import Path

import pytest
from cli.command_line import glmq, run
from programs import begin, forget

import glmq as library
from glmq.cli.ask import _Question
from glmq.cli.progress import REFRESHES
from glmq.jobs.ask import describe_plan, open_asker
from glmq.verification.answering import AnswerPlan


@pytest.fixture
def picture(pictures: Path) -> Path:
    return pictures / "00.png"


def type_in(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    """Let these lines be typed where glmq asks for one, and then the end of the input."""
    typed = iter(lines)

    def read(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


def test_the_answer_goes_to_stdout_piece_by_piece_and_is_the_librarys(tiny: Path, picture: Path) -> None:
    pieces: list[str] = []
    answer = library.ask(tiny, image=picture, max_new_tokens=10, tell=pieces.append)
    assert answer.text == "The background is sky. There is one object:"
    assert len(pieces) > 5
    assert "".join(pieces) == answer.text
    assert (answer.tokens, answer.is_complete, answer.image) == (10, False, picture)
    shown = glmq("ask", tiny, "--image", picture, "--max-new-tokens", 10)
    assert shown.stdout == f"{answer.text}\n"
    first, *_, last = shown.stderr.splitlines()
    assert first.startswith("expect about ")
    assert first.endswith(f": its {answer.plan.token_bytes / 2**20:.0f} MiB of weights stay in memory")
    assert last.startswith(f"{answer.prompt_tokens} tokens read in ")
    assert last.endswith(" tokens per second); cut off there, --max-new-tokens allows more")


def test_json_says_how_it_ended(tiny_seed: Path, picture: Path) -> None:
    shown = glmq("ask", tiny_seed, "--image", picture, "--json")
    document = json.loads(shown.stdout)
    assert document["schema"] == "glmq.ask/1"
    assert document["is_complete"]
    assert document["text"].startswith("The background is sky. ")
    assert document["prompt"] == "Please describe this picture in detail."
    assert document["model"] == "quantized checkpoint, W8A8S (ascendV1), float16 floats"
    assert shown.stderr == ""


def test_lines_are_answered_until_the_input_ends_and_ctrl_c_ends_one_answer(
    tiny: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, ["Describe it.", "", "stop", "stop at once", "Describe it."])
    with open_asker(tiny) as asker:
        ask = asker.ask

        def interrupted(prompt: str, *args: object, **options: object) -> object:
            if prompt == "stop":
                tell = options["tell"]
                assert callable(tell)
                tell("The back")
                raise KeyboardInterrupt
            if prompt == "stop at once":
                raise KeyboardInterrupt
            return ask(prompt, *args, **options)

        monkeypatch.setattr(asker, "ask", interrupted)
        view: AbstractContextManager[object] = nullcontext()
        _Question(asker, picture, 5, shrinks=False).answer_lines(view)
    out, err = capsys.readouterr()
    assert out == "The background is sky.\nThe back\nThe background is sky.\n"  # what was stopped ends its line
    assert err.startswith(
        f"Type a question about {picture}, one a line; none knows of those before it. Ctrl-C stops an answer, Ctrl-D leaves.\n"
    )
    assert err.splitlines().count("stopped") == 2


def test_what_cannot_answer_is_said(
    tiny: Path, small_stats: Path, small_seed: Path, picture: Path, tmp_path: Path
) -> None:
    def said(*args: object) -> tuple[int, str]:
        result = run("ask", *args)
        return result.exit_code, result.stderr.splitlines()[-1]

    assert said(tiny) == (2, "error: give a question with --prompt, a picture with --image, or both")
    assert said(small_stats, "--prompt", "What?") == (
        4,
        f"error: {small_stats}: holds calibration statistics, no weights; give a checkpoint",
    )
    glmq(
        "compress",
        "--model_path",
        small_seed,
        "--save_directory",
        tmp_path / "packed",
        "--tp",
        1,
        "--codec",
        "portable",
    )
    assert said(tmp_path / "packed", "--prompt", "What?") == (
        4,
        f"error: {tmp_path / 'packed'}: is compressed; restore it first: `glmq compress --decompress IN OUT`",
    )
    (tmp_path / "empty.png").touch()
    assert said(tiny, "--image", tmp_path / "empty.png") == (4, f"error: {tmp_path / 'empty.png'}: is empty")
    assert said(tiny, "--image", picture, "--max-new-tokens", 5000) == (
        2,
        "error: --max-new-tokens 5000: the question has 38 tokens, and the model takes 4096 with its answer; allow fewer, or "
        "shrink the picture with --max-pixels",
    )
    assert said(tiny, "--prompt", "hi", "--max-new-tokens", 99999999) == (
        2,
        "error: --max-new-tokens 99999999: the question has 8 tokens, and the model takes 4096 with its answer; allow fewer",
    )
    assert said(tiny, "--prompt", "<|image|>") == (
        4,
        "error: the question has 1 image placeholder where 0 are needed: <|image|> must not be part of a prompt or answer",
    )
    assert said(tiny, "--prompt", "caf\udce9") == (
        4,
        r"error: the question 'caf\udce9' has half of a surrogate pair, which is no character; write it in UTF-8",
    )


def test_a_model_that_does_not_fit_says_how_slow_it_will_be() -> None:
    assert describe_plan(AnswerPlan(2**30, 2**29, 48.2)) == (
        "expect about 48 s per token: 512 MiB of its 1.0 GiB of weights do not fit into memory and are read again for each"
    )
    assert describe_plan(AnswerPlan(2**30, 2**30, 0.25)) == (
        "expect about 4.0 tokens per second: its 1.0 GiB of weights stay in memory"
    )


class Terminal:
    """`glmq ask` in a terminal, what stands there, and the hand at its keyboard.

    Args:
        go: file that it waits for after `The back`.
        question: its arguments.
        draws: the terminal can show what moves, and is given it; else the answers alone.
    """

    def __init__(self, go: Path, *question: object, draws: bool) -> None:
        self.hand, self.program = os.openpty()
        os.set_blocking(self.hand, False)
        self.screen, self._seen = "", 0

        def program() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            ask_slowly(go, "ask", *question)

        with open(os.devnull, "w") as nowhere:
            streams = {0: self.program, 1: self.program, 2: self.program if draws else nowhere.fileno()}
            self._child = begin(program, streams, {"TERM": "xterm" if draws else "dumb", "COLUMNS": "80"})

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        if self._child:
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
        os.close(self.hand)
        os.close(self.program)

    def wait_for_its_end(self) -> int:
        """Its exit code."""
        _, status = os.waitpid(self._child, 0)
        self._child = 0
        return os.waitstatus_to_exitcode(status)

    def type(self, text: str) -> None:
        os.write(self.hand, text.encode())

    def look(self) -> None:
        with suppress(BlockingIOError):
            self.screen += os.read(self.hand, 4096).decode()

    def wait_for(self, text: str) -> None:
        """Look until that comes after what was waited for before."""
        until = time.monotonic() + 60
        while text not in self.screen[self._seen :]:
            assert time.monotonic() < until, self.screen
            self.look()
            time.sleep(0.01)
        self._seen = self.screen.index(text, self._seen) + len(text)


def ask_slowly(go: Path, *arguments: object) -> None:
    """`glmq` as a new import, which goes on after `The back` once a file is there."""
    forget("glmq")
    asker = import_module("glmq.jobs.ask").Asker
    answer = asker.ask

    def slow(self: object, *question: object, tell: Callable[[str], object], **options: object) -> object:
        def wait(piece: str) -> None:
            tell(piece)
            while "back" in piece and not go.exists():
                time.sleep(0.01)

        return answer(self, *question, tell=wait, **options)

    asker.ask = slow
    sys.argv = ["glmq", *map(str, arguments)]
    import_module("glmq.__main__").main()


def test_what_is_typed_while_it_answers_is_the_next_question(tiny: Path, picture: Path, tmp_path: Path) -> None:
    go = tmp_path / "go"
    with Terminal(go, tiny, "--image", picture, "--max-new-tokens", 5, draws=False) as terminal:
        terminal.wait_for("> ")
        terminal.type("Describe it.\n")
        terminal.wait_for("\r\nThe")
        terminal.type("What is there?\nWhat is not")
        go.touch()
        terminal.wait_for("> What is not")
        go.unlink()
        terminal.type("?\n")
        terminal.wait_for("?\r\nThe")
        terminal.type("\x03")
        terminal.wait_for("\r\n> ")
        terminal.type("\x04")
        assert terminal.wait_for_its_end() == 0
        assert termios.tcgetattr(terminal.program)[3] & termios.ECHO
    assert terminal.screen.splitlines() == [
        "> Describe it.",
        "The background is sky.",
        "> What is there?",
        "The background is sky.",
        "> What is not?",
        "The background",
        "> ",
    ]


def test_bytes_that_are_no_utf8_end_one_question(
    tiny: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, ["caf\udce9?", "Describe it."])
    view: AbstractContextManager[object] = nullcontext()
    with open_asker(tiny) as asker:
        _Question(asker, picture, 5, shrinks=False).answer_lines(view)
    out, err = capsys.readouterr()
    assert out == "The background is sky.\n"
    said = " ".join(err.split())
    assert (
        r"error: the question 'caf\udce9?' has half of a surrogate pair, which is no character; write it in UTF-8"
        in said
    )


def test_nothing_moves_while_a_question_is_typed(tiny: Path, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    with Terminal(tmp_path / "go", tiny, "--image", picture, "--max-new-tokens", 3, draws=True) as terminal:
        terminal.wait_for("getting ready")
        for question in ("", "What is there?\n"):
            terminal.type(question)
            terminal.wait_for("tokens read" if question else "leaves.")  # a word: lines break where the path ends
            terminal.wait_for("> ")
            before = terminal.screen
            time.sleep(4 / REFRESHES)
            terminal.look()
            assert terminal.screen == before
