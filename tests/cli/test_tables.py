"""Every table, at every width: no number is split, and no column vanishes without being named."""

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli.command_line import glmq
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from glmq.cli import console
from glmq.cli.render import captions_table
from glmq.cli.tables import Column, FittedTable
from glmq.jobs.compress import compress

WIDTHS = (60, 80, 100, 160)


@contextmanager
def collected(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[FittedTable], set[tuple[str, str]]]]:
    """The tables that are printed meanwhile, and the module and function that each was made in."""
    tables: list[FittedTable] = []
    places: set[tuple[str, str]] = set()
    printed, made = console.VisibleConsole.print, FittedTable.__init__

    def collect(self: console.VisibleConsole, *objects: object, **options: object) -> None:
        tables.extend(one for one in objects if isinstance(one, FittedTable))
        printed(self, *objects, **options)

    def make(self: FittedTable, *args: Any, **options: Any) -> None:
        code = sys._getframe(1).f_code
        places.add((Path(code.co_filename).name, code.co_name))
        made(self, *args, **options)

    monkeypatch.setattr(console.VisibleConsole, "print", collect)
    monkeypatch.setattr(FittedTable, "__init__", make)
    yield tables, places


def places_in_the_source() -> set[tuple[str, str]]:
    """The module and function of every table in the sources of the shell."""
    return {
        (path.name, function.name)
        for path in Path(console.__file__).parent.glob("*.py")
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "FittedTable"
    }


def check(table: FittedTable, width: int) -> None:
    terminal = Console(width=width, legacy_windows=False)
    with terminal.capture() as capture:
        terminal.print(table)
    lines = capture.get().splitlines()
    assert all(cell_len(line.rstrip()) <= width for line in lines), (table.title, width, lines)
    shown, left_out = table.layout(width), table.left_out(width)
    notes = " ".join(" ".join(lines).split())
    said = {table.columns[index].note for index in shown}
    for index, column in enumerate(table.columns):
        assert (column.note in notes) == (column.note in said or not column.note), (table.title, width, column.note)
        assert not column.drop or f"{column.header}: " not in table.caption.lower(), (table.title, column.header)
        cells = [str(row[index]) for row in table.rows if str(row[index])]
        if index in shown:
            first = index == next(iter(shown))
            for cell in cells:
                if column.wraps:
                    assert all(any(word in line for line in lines) for word in cell.split()), (table.title, width, cell)
                else:
                    tail = cell[len(cell) - shown[index] + 1 :] if first and len(cell) > shown[index] else cell
                    assert any(tail in line for line in lines), (table.title, width, cell)
        elif cells:
            assert column.header in left_out
            assert "no room for: " in notes
            assert column.header in notes


@pytest.mark.slow
def test_every_table_of_every_verb_holds_at_every_width(
    small: Path,
    small_stats: Path,
    small_seed: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = compress(small_seed, out=tmp_path / "parts", codec="portable", tp=2).folder
    stats, taken = tmp_path / "stats", ["--calib-images", pictures, "--limit", 1]
    swept = ["--model_path", small, "--stats", small_stats, "--out", tmp_path / "s", "--target-bits", "2.5,3", *taken]
    with collected(monkeypatch) as (tables, places):
        console.stdout.print(captions_table("000.png", {"float": "A red car on a long road. " * 6, "W8A8S": "A car."}))
        commands: list[list[object]] = [
            ["compress", small_seed, tmp_path / "sc", "--codec", "portable"],
            ["compress", small_seed, tmp_path / "plan", "--codec", "portable", "--tp", 2, "--dry-run"],
            ["inspect", small_seed],
            ["inspect", small_seed, "--layer", 0],
            ["inspect", small_seed, "--layer", 0, "--values"],
            ["inspect", parts],
            ["inspect", small_stats],
            ["inspect", small_stats, "--layer", 0],
            ["inspect", small, small_seed],
            ["verify", small_seed, "--reference", small, *taken, "-v", "--target", "mindie"],
            ["verify", "--list-checks"],
            ["calibrate", "--model-path", small, *taken, "--stats", stats, "--no-texts"],
            ["inspect", small_stats, stats],
            ["quantize", "--model_path", small, "--stats", stats, "--save_directory", tmp_path / "q"],
            [
                "quantize",
                "--model_path",
                small,
                "--stats",
                stats,
                "--save_directory",
                tmp_path / "r",
                "--dry-run",
                "-v",
            ],
            ["sweep", *swept, "--dry-run"],
            ["sweep", *swept],
        ]
        for command in commands:
            before = len(tables)
            glmq(*command)
            assert len(tables) > before, command
    assert places_in_the_source() - places == set()
    for table in tables:
        for width in WIDTHS:
            check(table, width)


def test_columns_go_by_their_number_and_are_named_and_names_lose_their_beginning() -> None:
    columns = [Column("linear", left=True), Column("type", drop=2), Column("output error"), Column("SQNR dB", drop=1)]
    table = FittedTable(
        "T", columns, [["layers.10.self_attn.o_proj", "W8A8S", Text("!! 23.0%"), "11.9"]], caption="and more"
    )

    def lines(width: int) -> list[str]:
        terminal = Console(width=width)
        with terminal.capture() as capture:
            terminal.print(table)
        return [line.rstrip() for line in capture.get().splitlines() if line.strip()]

    assert lines(64)[1:] == [
        " linear                        type   output error   SQNR dB",
        " " + "─" * 59,
        " layers.10.self_attn.o_proj   W8A8S       !! 23.0%      11.9",
        "and more",
    ]
    assert lines(50)[-2:] == [
        " layers.10.self_attn.o_proj       !! 23.0%   11.9",
        "and more; no room for: type",
    ]
    assert lines(36)[-2:] == [
        " …rs.10.self_attn.o_proj   !! 23.0%",
        "and more; no room for: type, SQNR dB",
    ]


def test_a_note_is_said_where_its_column_is_shown() -> None:
    columns = [
        Column("linear", left=True, note="linear: of the text model"),
        Column("clipped", drop=1, note="clipped: beyond the range"),
        Column("beyond", drop=2, note="beyond: by how much"),
        Column("greatest", drop=3, note="beyond: by how much"),
        Column("seed", drop=4, note="seed: of the run"),
    ]
    table = FittedTable("T", columns, [["o_proj", "3.81", "12%", "9", ""]], caption="2 more")

    def said(width: int) -> str:
        terminal = Console(width=width)
        with terminal.capture() as capture:
            terminal.print(table)
        return " ".join(capture.get().partition("o_proj")[2].partition("2 more; ")[2].split())

    every = "linear: of the text model; clipped: beyond the range; beyond: by how much"
    assert said(120) == every
    assert said(30) == f"{every}; no room for: greatest"
    assert said(20) == ("linear: of the text model; clipped: beyond the range; no room for: beyond, greatest")
    assert said(16) == "linear: of the text model; no room for: clipped, beyond, greatest"


def test_a_narrow_column_has_the_room_that_a_wide_one_of_more_worth_leaves() -> None:
    columns = [Column("name"), Column("shape", drop=1), Column("bits", drop=2)]
    table = FittedTable("T", columns, [["o_proj", "1024 x 4096", "3.81"]])
    assert (table.layout(18), table.left_out(18)) == ({0: 6, 2: 4}, ["shape"])


def test_a_name_in_wide_characters_is_shortened_to_the_width_that_it_takes() -> None:
    name = "layers." + "量" * 20
    table = FittedTable("T", [Column("linear", left=True), Column("bits")], [[name, "3.81"]])
    terminal = Console(width=30)
    with terminal.capture() as capture:
        terminal.print(table)
    assert capture.get().splitlines()[-2].rstrip() == " …" + "量" * 10 + "   3.81"
