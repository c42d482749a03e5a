"""Tables that hold at any width: no number or word is broken, and a column that has no room is named below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from glmq.cli.console import VisibleTable
from glmq.quoting import visible

Cell: TypeAlias = str | Text
SHORTEST_NAME: Final = 12
"""Characters that are left of a shortened name at least."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    header: str
    drop: int = 0
    """Those with 0 stay; of the others those with the smallest number have room first."""
    left: bool = False
    """Flush left, as words are; numbers are flush right."""
    wraps: bool = False
    """Cells are running text, which may be broken between words."""
    note: str = ""
    """What its head or its cells mean, said below the table where the column is shown."""


class FittedTable:
    """A table that is laid out when it is printed, for the width that there is.

    Names in the first column lose their beginning where even the columns that stay have no room.

    Args:
        title: above it.
        columns: of every row, those of names or words first.
        rows: a cell for each column.
        caption: below it, about all of it; empty for none.
        total: a last row in bold.
    """

    def __init__(
        self,
        title: str,
        columns: Sequence[Column],
        rows: Iterable[Sequence[Cell]],
        *,
        caption: str = "",
        total: Sequence[Cell] = (),
    ) -> None:
        self.title: Final = title
        self.columns: Final = tuple(columns)
        self.rows: Final = [list(row) for row in rows]
        self.caption: Final = caption
        self.total: Final = list(total)

    def layout(self, width: int) -> dict[int, int]:
        """The columns that have room in a line of `width` characters, each with its own width."""
        told = [index for index in range(len(self.columns)) if self._says_something(index)]
        shown: list[int] = []
        for index in sorted(told, key=lambda index: (self.columns[index].drop, index)):
            if self.columns[index].drop == 0 or _line(self._least(other) for other in (*shown, index)) <= width:
                shown.append(index)
        shown.sort()
        widths = {index: self._least(index) for index in shown}
        # What is left goes to those that would like more, the columns in their order.
        for index in shown:
            widths[index] += max(0, min(self._most(index) - widths[index], width - _line(widths.values())))
        widths[shown[0]] -= min(max(_line(widths.values()) - width, 0), max(widths[shown[0]] - SHORTEST_NAME, 0))
        return widths

    def left_out(self, width: int) -> list[str]:
        """The heads of the columns that have no room."""
        shown = self.layout(width)
        return [
            column.header
            for index, column in enumerate(self.columns)
            if index not in shown and self._says_something(index)
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = VisibleTable(self.title)
        widths = self.layout(options.max_width)
        for index, width in widths.items():
            column = self.columns[index]
            table.add_column(Text(column.header), justify="left" if column.left else "right", width=width)
        first, *others = widths
        for row in self._all_rows():
            name = row[first] if self.columns[first].wraps else shortened(row[first], widths[first])
            table.add_row(name, *(row[index] for index in others), style="bold" if row is self.total else None)
        yield table
        left_out = self.left_out(options.max_width)
        notes = [self.caption, *(self.columns[index].note for index in widths)]
        notes = [note for note in dict.fromkeys(notes) if note]
        notes += [f"no room for: {', '.join(left_out)}"] if left_out else []
        if notes:
            yield Text(visible("; ".join(notes)) + "\n", style="dim")

    def _all_rows(self) -> list[list[Cell]]:
        return [*self.rows, self.total] if self.total else self.rows

    def _says_something(self, index: int) -> bool:
        """Whether a column has anything in it; one that is empty in every row is left out without a word."""
        return not self.rows or any(str(row[index]) for row in self.rows)

    def _least(self, index: int) -> int:
        """The width that breaks no cell, or where it may wrap no word; heads wrap everywhere."""
        column = self.columns[index]
        cells = (visible(str(row[index])) for row in self._all_rows())
        texts = (word for cell in cells for word in cell.split()) if column.wraps else cells
        return max(map(cell_len, (*column.header.split(), *texts)), default=0)

    def _most(self, index: int) -> int:
        """The width at which nothing wraps."""
        return max(map(cell_len, (self.columns[index].header, *(visible(str(row[index])) for row in self._all_rows()))))


def _line(widths: Iterable[int]) -> int:
    """The characters of a line of columns that wide: one at each side, three between two."""
    return sum(width + 3 for width in widths) - 1


def shortened(name: Cell, length: int) -> Cell:
    """A name without its beginning, which dots at its place stand for, if it is longer than `length`."""
    text = str(name)
    if cell_len(text) <= length:
        return name
    while cell_len(text) >= length:
        text = text[1:]
    short = f"…{text}"
    return short if isinstance(name, str) else Text(short, style=name.style)
