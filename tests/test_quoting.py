"""Nothing from outside reaches a terminal, a spreadsheet or a JSON reader as more than text."""

import json

import pytest

from glmq.errors import CheckpointError
from glmq.quoting import csv_cell, visible, visible_json


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0.weight", "model.layers.0.weight"),
        ("\x1b[2J\x1b[31mok", r"\x1b[2J\x1b[31mok"),
        ("a\nerror: b\r\n", r"a\nerror: b\r\n"),
        ("\x9b31m\x07", r"\x9b31m\x07"),
        ("safe\u202egnp.exe", r"safe\u202egnp.exe"),
        ("\ud800", r"\ud800"),
        ("\u2028\ue000\ufeff", r"\u2028\ue000\ufeff"),
        ("图片 一.png", "图片 一.png"),
        ("\u3000", "\u3000"),
        ("🚀 é", "🚀 é"),
    ],
)
def test_what_is_no_visible_character_is_escaped(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown


def test_a_long_text_is_cut_and_says_how_long_it_was() -> None:
    assert visible("x" * 2000) == "x" * 2000
    assert visible("x" * 2001) == f"{'x' * 2000}... (2001 characters)"
    assert visible("a\nb" * 3, longest=4) == r"a\nba... (9 characters)"


def test_every_error_of_glmq_is_one_visible_line() -> None:
    error = CheckpointError("layers.0\x1b]0;owned\x07\nweight: is missing")
    assert str(error) == r"layers.0\x1b]0;owned\x07\nweight: is missing"
    assert error.args == (str(error),)


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"), ("+1", "'+1"), ("-2", "'-2"), ("@x", "'@x"), ("\tx", r"\tx"), ("a=b", "a=b"),
        (-2.5, -2.5), (None, None), (7, 7),
    ],
)  # fmt: skip
def test_a_cell_is_never_a_formula(value: object, cell: object) -> None:
    assert csv_cell(value) == cell


@pytest.mark.parametrize("text", ["图片", "\x1b[0m", "\u202e", "\U000e0001", "a\u2028b", "\x9b"])
def test_json_stays_the_same_values_without_invisible_characters(text: str) -> None:
    shown = visible_json(json.dumps({text: [text]}, ensure_ascii=False, indent=1))
    assert json.loads(shown) == {text: [text]}
    assert all(char.isprintable() or char == "\n" for char in shown)
