"""One self-contained HTML page: style, cards, tables, badges. No scripts, no network; light and dark as the reader's system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final, Literal

from glmq.checkpoint.json_file import write_whole
from glmq.version import __version__

Tone = Literal["good", "warn", "bad", "plain"]

_MARKS: Final[dict[str, str]] = {"good": "✓", "warn": "!", "bad": "✗", "plain": ""}

LISTED: Final = 60
"""Rows of a table that are shown at once."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell that is more than plain text."""

    html: str
    """Already escaped."""


def cell(text: str, tone: Tone = "plain", *, code: bool = False) -> Cell:
    """Text with a tone, which is shown as a colour and as a mark, or in the typewriter face."""
    inner = f"<code>{escape(text)}</code>" if code else escape(text)
    mark = _MARKS[tone]
    if tone == "plain" or not text:
        return Cell(inner if text else "")
    return Cell(f'<span class="{tone}"><span class="mark">{mark}</span> {inner}</span>')


def card(label: str, value: str, tone: Tone = "plain", note: str = "") -> str:
    """A number that matters."""
    mark = f'<span class="mark">{_MARKS[tone]}</span> ' if tone != "plain" else ""
    small = f'<div class="muted">{escape(note)}</div>' if note else ""
    return (
        f'<div class="card {tone}"><div class="muted">{escape(label)}</div>'
        f'<div class="value">{mark}{escape(value)}</div>{small}</div>'
    )


def cards(*made: str) -> str:
    """Cards side by side."""
    return f'<div class="cards">{"".join(made)}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str | Cell]], *, text_columns: int = 1) -> str:
    """A table whose first `text_columns` are flush left and the rest, numbers, flush right. Empty columns are left out."""
    if not rows:
        return '<p class="muted">None.</p>'
    used = [index for index in range(len(header)) if any(row[index] not in ("", Cell("")) for row in rows)]

    def line(cells: Sequence[str | Cell], tag: str) -> str:
        made = []
        for index in used:
            item = cells[index]
            kind = "" if index < text_columns else ' class="num"'
            made.append(f"<{tag}{kind}>{item.html if isinstance(item, Cell) else escape(item)}</{tag}>")
        return f"<tr>{''.join(made)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table><thead>{line(header, "th")}</thead><tbody>\n{body}\n</tbody></table></div>'


def split_table(header: Sequence[str], rows: Sequence[Sequence[str | Cell]], text_columns: int) -> str:
    """A table whose first LISTED rows are shown; the rest is folded away."""
    shown = table(header, rows[:LISTED], text_columns=text_columns)
    if len(rows) <= LISTED:
        return shown
    rest = table(header, rows[LISTED:], text_columns=text_columns)
    return shown + folded(f"{len(rows) - LISTED} more", rest)


def section(title: str, *content: str, note: str = "") -> str:
    """A headed part of the page."""
    small = f'<p class="muted">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{small}{''.join(content)}</section>"


def folded(title: str, content: str) -> str:
    """Something long that is closed at first."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def grid(*content: str) -> str:
    """Small charts side by side."""
    return f'<div class="grid2">{"".join(content)}</div>'


def figure(title: str, chart: str) -> str:
    """A chart with its title."""
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>"


def write_page(path: Path, html: str) -> None:
    """Write the page whole or not at all."""
    write_whole(path, html.encode(errors="backslashreplace"))  # names of files may hold what is no UTF-8


def page(title: str, subtitle: Sequence[str], *sections: str) -> str:
    """The whole document."""
    lines = "".join(f"<p>{escape(line)}</p>" for line in subtitle)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<header><h1>{escape(title)}</h1>"
        f"{lines}</header>\n<main>\n{''.join(sections)}\n</main>\n"
        f"<footer>glmq {escape(__version__)}</footer>\n</body>\n</html>\n"
    )


STYLE: Final = """
:root {
  color-scheme: light dark;
  --ground: #f6f7f9; --surface: #ffffff; --text: #1b1f24; --muted: #646c77; --line: #e2e5ea; --soft: #eef1f5;
  --accent: #2f5fd0; --second: #c2570c; --good: #14703f; --warn: #96600a; --bad: #b3261e;
  --p0: #2f5fd0; --p1: #3a9a8f; --p2: #c9862b; --p3: #8a5bc7; --p4: #7b8794; --p5: #b34a6b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #121417; --surface: #1a1d21; --text: #e4e7eb; --muted: #98a1ad; --line: #2c3138; --soft: #23272d;
    --accent: #7da2ff; --second: #f0a35e; --good: #5cc98d; --warn: #e3b04b; --bad: #ff8a80;
    --p0: #7da2ff; --p1: #5fc4b8; --p2: #e0ab5c; --p3: #b391e6; --p4: #9aa5b1; --p5: #df87a5;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
header, main, footer { max-width: 1080px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 32px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 6px; letter-spacing: -0.01em; text-wrap: balance; }
header p { margin: 0; color: var(--muted); overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 4px; }
section { background: var(--surface); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 18px 0; }
section > .muted { margin: 0 0 12px; max-width: 75ch; }
footer { color: var(--muted); padding-bottom: 32px; font-size: 13px; }
.muted { color: var(--muted); font-size: 13.5px; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.mark { font-weight: 700; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 18px 0; }
.card { background: var(--surface); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.card .muted { overflow-wrap: anywhere; }
.card .value { font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; color: var(--text); }
.card.good .mark { color: var(--good); } .card.warn .mark { color: var(--warn); } .card.bad .mark { color: var(--bad); }
.card.bad { border-color: var(--bad); }
.scroll { overflow-x: auto; margin-top: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; font-weight: 600; color: var(--muted); border-bottom: 1px solid var(--line); }
th, td { padding: 5px 14px 5px 0; vertical-align: top; }
td { border-bottom: 1px solid var(--soft); overflow-wrap: anywhere; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font: 12.5px/1.5 ui-monospace, monospace; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--accent); width: fit-content; }
figure { margin: 14px 0 0; min-width: 0; }
figcaption { font-size: 13.5px; color: var(--muted); margin-bottom: 4px; overflow-wrap: anywhere; }
.grid2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 6px 28px; }
svg { display: block; max-width: 100%; }
svg.chart { width: 100%; height: auto; }
svg.spark { display: inline-block; vertical-align: middle; }
svg text { font: 12px system-ui, sans-serif; fill: var(--muted); }
svg text.on-light { fill: var(--text); font-size: 11.5px; }
svg text.on-dark { fill: var(--surface); font-size: 11.5px; }
.heat, .bar { fill: var(--accent); }
.grid, .axis { stroke: var(--line); stroke-width: 1; }
.area { fill: var(--accent); fill-opacity: 0.28; }
.line { fill: none; stroke: var(--second); stroke-width: 1.6; }
.cover { fill: var(--accent); fill-opacity: 0.32; }
.seen { stroke: var(--text); stroke-width: 1.6; } .clip { stroke: var(--bad); stroke-width: 4; }
.part0 { fill: var(--p0); } .part1 { fill: var(--p1); } .part2 { fill: var(--p2); }
.part3 { fill: var(--p3); } .part4 { fill: var(--p4); } .part5 { fill: var(--p5); }
@media print { body { background: #fff; } section, .card { break-inside: avoid; } }
"""
