"""Sentences on a terminal break between words; commands and paths in them stay whole."""

import io
import os
import re
import sys

import pytest

from glmq.cli.complaint import complain
from glmq.cli.console import VisibleConsole
from glmq.cli.lines import Flow, broken, width_of

PATH = "/data/" + "long/" * 8 + "out"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_commands_in_backquotes_and_long_words_stay_whole() -> None:
    sentence = f"{PATH}: no such folder; give one (`hf download zai-org/GLM-4.1V` gets it), or two"
    assert broken(sentence, 40) == [
        f"{PATH}:",
        "no such folder; give one",
        "(`hf download zai-org/GLM-4.1V` gets",
        "it), or two",
    ]
    assert broken("照片照片 照片照片 照片", 10) == ["照片照片", "照片照片", "照片"]  # two columns each
    assert broken("one ` two", 5) == ["one `", "two"]
    assert broken("", 40) == [""]


def test_later_lines_begin_where_they_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    console = VisibleConsole(file=terminal, width=30, force_terminal=True, no_color=True, highlight=False)
    console.say("  answers: 30 samples have none; they are most of it")
    console.say("kernels       statistics: avx2, rounding: avx2-fma", hang=14)
    assert terminal.getvalue().splitlines() == [
        "  answers: 30 samples have",
        "  none; they are most of it",
        "kernels       statistics:",
        " " * 14 + "avx2, rounding:",
        " " * 14 + "avx2-fma",
    ]
    pipe = io.StringIO()
    VisibleConsole(file=pipe, width=30).say("  answers: 30 samples have none; they are most of it")
    assert pipe.getvalue() == "  answers: 30 samples have none; they are most of it\n"


def test_an_error_on_a_terminal_breaks_between_words_too(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    complain("GLMQ-E201", "--fractoin: no such option; see `glmq quantize --help`", json_wanted=False, debug=False)
    assert re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines() == [
        "error[GLMQ-E201]: --fractoin: no such",
        "option; see `glmq quantize --help`",
    ]


def test_a_terminal_that_does_not_say_how_wide_it_is_gets_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    primary, secondary = os.openpty()
    with open(primary, "rb"), open(secondary, "w") as terminal:
        monkeypatch.delenv("COLUMNS", raising=False)
        assert width_of(terminal) is None
        monkeypatch.setenv("COLUMNS", "0")
        assert width_of(terminal) is None
        monkeypatch.setenv("COLUMNS", "44")
        assert width_of(terminal) == 44


def flowed(width: int | None, *pieces: str) -> list[str]:
    flow = Flow(width)
    return [*(flow.add(piece) for piece in pieces), flow.finish()]


def test_text_that_comes_in_pieces_breaks_between_words_whose_last_is_held_back() -> None:
    pieces = ["The", " background", "\nis sand. One", "", "\nobject"]
    assert flowed(16, "The back", "ground is", " sand. One ob", "ject") == pieces
    assert flowed(None, "The back", "ground") == ["The back", "ground", ""]


def test_pieces_of_wide_characters_break_anywhere_and_their_own_line_ends_stay() -> None:
    assert "".join(flowed(6, "照片照片 照", "ab\n\n  c d")) == "照片照\n片 照\nab\n\n  c d"
    assert "".join(flowed(4, "abcdefgh ij", " k")) == "abcdefgh\nij k"  # a long word is broken by the terminal
