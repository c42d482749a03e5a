"""One self-contained HTML page: style, cards, tables, badges. No network; light and dark as the reader's system.

A small script sorts and filters tables and opens what a link leads to; without it the page reads the same.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final, Literal

from glmq.checkpoint.json_file import write_named
from glmq.version import __version__

Tone = Literal["good", "warn", "bad", "plain"]

_MARKS: Final[dict[str, str]] = {"good": "✓", "warn": "!", "bad": "✗", "plain": ""}

LISTED: Final = 60
"""Rows of a table that are shown at once."""


_BREAKS: Final = re.compile(r"(?<=[./=])(?=\w)")
"""Where a name may go on in the next line."""

_COMMAND: Final = re.compile("`([^`]*)`")


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell that is more than plain text."""

    html: str
    """Already escaped."""


def cell(text: str, tone: Tone = "plain", *, code: bool = False, link: str = "", anchor: str = "") -> Cell:
    """Text with a tone, which is shown as a colour and as a mark, or in the typewriter face.

    Args:
        link: the anchor that it leads to, as `anchor_of` makes it; empty for none.
        anchor: the anchor that it is itself; empty for none.
    """
    inner = f"<code>{breakable(text)}</code>" if code else escape(text)
    if link:
        inner = f'<a href="#{link}">{inner}</a>'
    if anchor:
        inner = f'<span id="{anchor}">{inner}</span>'
    mark = _MARKS[tone]
    if tone == "plain" or not text:
        return Cell(inner if text else "")
    return Cell(f'<span class="{tone}"><span class="mark">{mark}</span> {inner}</span>')


def anchor_of(kind: str, name: str) -> str:
    """Where on a page something of that name stands, such as the histogram of a linear."""
    return f"{kind}-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}"


def breakable(text: str) -> str:
    """Escaped text that is broken behind points and slashes where a line is too short, never within a word."""
    return "<wbr>".join(escape(piece) for piece in _BREAKS.split(text))


def card(label: str, value: str, tone: Tone = "plain", note: str = "") -> str:
    """A number that matters; it is not broken before its unit."""
    value = re.sub(r"(?<=\d) (?=[KMG]?i?B\b|%)", "\N{NO-BREAK SPACE}", value)
    mark = f'<span class="mark">{_MARKS[tone]}</span> ' if tone != "plain" else ""
    small = f'<div class="muted">{breakable(note)}</div>' if note else ""
    return (
        f'<div class="card {tone}"><div class="muted">{escape(label)}</div>'
        f'<div class="value">{mark}{escape(value)}</div>{small}</div>'
    )


def cards(*made: str) -> str:
    """Cards side by side."""
    return f'<div class="cards">{"".join(made)}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str | Cell]], *, text_columns: int = 1) -> str:
    """A table whose first `text_columns` are flush left and the rest, numbers, flush right. Empty columns are left out."""
    return _table(header, rows, _used(header, rows), text_columns) if rows else '<p class="muted">None.</p>'


def split_table(header: Sequence[str], rows: Sequence[Sequence[str | Cell]], text_columns: int) -> str:
    """A table whose first LISTED rows are shown; the rest is folded away."""
    if len(rows) <= LISTED:
        return table(header, rows, text_columns=text_columns)
    used = _used(header, rows)
    shown, rest = (_table(header, part, used, text_columns) for part in (rows[:LISTED], rows[LISTED:]))
    return f'<div class="split">{shown}{folded(f"{len(rows) - LISTED} more", rest)}</div>'


def _used(header: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> list[int]:
    """The columns in which some row has something."""
    return [index for index in range(len(header)) if any(row[index] not in ("", Cell("")) for row in rows)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str | Cell]], used: Sequence[int], text_columns: int) -> str:
    def line(cells: Sequence[str | Cell], tag: str) -> str:
        made = []
        for index in used:
            item, is_text = cells[index], index < text_columns
            inner = item.html if isinstance(item, Cell) else breakable(item) if is_text else escape(item)
            made.append(f'<{tag} class="{"text" if is_text else "num"}">{inner}</{tag}>')
        return f"<tr>{''.join(made)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table><thead>{line(header, "th")}</thead><tbody>\n{body}\n</tbody></table></div>'


def section(title: str, *content: str, note: str = "") -> str:
    """A headed part of the page; what stands in backquotes in the note is a command."""
    small = f'<p class="muted">{_prose(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{small}{''.join(content)}</section>"


def _prose(note: str) -> str:
    """Escaped text, its commands in the typewriter face."""
    pieces = _COMMAND.split(note)
    return "".join(command(piece) if index % 2 else escape(piece) for index, piece in enumerate(pieces))


def command(line: str) -> str:
    """A command, which is broken between words alone, and within paths."""
    words = line.split(" ")
    whole = (f'<span class="word">{escape(word)}</span>' if word[:1] == "-" else breakable(word) for word in words)
    return f"<code>{' '.join(whole)}</code>"


def folded(title: str, content: str) -> str:
    """Something long that is closed at first."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def grid(*content: str) -> str:
    """Small charts side by side."""
    return f'<div class="grid2">{"".join(content)}</div>'


def pair(*content: str) -> str:
    """Two charts side by side, one below the other where there is no room."""
    return f'<div class="pair">{"".join(content)}</div>'


def figure(title: str, chart: str, *, note: str = "", anchor: str = "") -> str:
    """A chart with its title, a line below it, and the anchor by which links find it."""
    where = f' id="{anchor}"' if anchor else ""
    small = f'<p class="muted">{escape(note)}</p>' if note else ""
    return f"<figure{where}><figcaption>{breakable(title)}</figcaption>{chart}{small}</figure>"


def picture(jpeg: bytes, what: str) -> Cell:
    """A small picture, whose bytes lie within the page."""
    data = base64.b64encode(jpeg).decode()
    return Cell(f'<img alt="{escape(what)}" src="data:image/jpeg;base64,{data}">')


def write_page(path: Path, html: str) -> None:
    """Write the page whole or not at all."""
    write_named(path, html.encode(errors="backslashreplace"))  # names of files may hold what is no UTF-8


def page(title: str, subtitle: Sequence[str], *sections: str) -> str:
    """The whole document."""
    lines = "".join(f"<p>{breakable(line)}</p>" for line in subtitle)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<header><h1>{escape(title)}</h1>"
        f"{lines}</header>\n<main>\n{''.join(sections)}\n</main>\n"
        f"<footer>glmq {escape(__version__)}</footer>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


STYLE: Final = """
:root {
  color-scheme: light dark;
  --ground: #f6f7f9; --surface: #ffffff; --text: #1b1f24; --muted: #646c77; --line: #e2e5ea; --soft: #eef1f5;
  --accent: #2f5fd0; --second: #c2570c; --good: #14703f; --warn: #96600a; --bad: #b3261e; --shade: #0003;
  --p0: #2f5fd0; --p1: #3a9a8f; --p2: #c9862b; --p3: #8a5bc7; --p4: #7b8794; --p5: #b34a6b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #121417; --surface: #1a1d21; --text: #e4e7eb; --muted: #98a1ad; --line: #2c3138; --soft: #23272d;
    --accent: #7da2ff; --second: #f0a35e; --good: #5cc98d; --warn: #e3b04b; --bad: #ff8a80; --shade: #fff4;
    --p0: #7da2ff; --p1: #5fc4b8; --p2: #e0ab5c; --p3: #b391e6; --p4: #9aa5b1; --p5: #df87a5;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
header, main, footer { max-width: 1240px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 32px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 6px; letter-spacing: -0.01em; text-wrap: balance; }
header p { margin: 0; color: var(--muted); overflow-wrap: break-word; }
h2 { font-size: 17px; margin: 0 0 4px; }
section { background: var(--surface); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 18px 0; }
section > .muted { margin: 0 0 12px; max-width: 75ch; }
footer { color: var(--muted); padding-bottom: 32px; font-size: 13px; }
.muted { color: var(--muted); font-size: 13.5px; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.mark { font-weight: 700; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 18px 0; }
.card { background: var(--surface); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.card { min-width: 0; } .card .muted { overflow-wrap: break-word; }
.card .value { font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; color: var(--text); }
.card.good .mark { color: var(--good); } .card.warn .mark { color: var(--warn); } .card.bad .mark { color: var(--bad); }
.card.bad { border-color: var(--bad); }
.scroll { margin-top: 10px; }
.scroll, .plot {  /* a shade at the side where there is more */
  overflow-x: auto; background:
    linear-gradient(to right, var(--surface) 40%, transparent) left / 32px 100% no-repeat local,
    linear-gradient(to left, var(--surface) 40%, transparent) right / 32px 100% no-repeat local,
    linear-gradient(to right, var(--shade), transparent) left / 14px 100% no-repeat scroll,
    linear-gradient(to left, var(--shade), transparent) right / 14px 100% no-repeat scroll;
}
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; font-weight: 600; color: var(--muted); border-bottom: 1px solid var(--line); }
th, td { padding: 5px 14px 5px 0; vertical-align: top; }
td { border-bottom: 1px solid var(--soft); }
td.text { max-width: 44ch; }
td.text:first-child:not(:last-child) { min-width: 21ch; }
.word { white-space: nowrap; }
td img { display: block; max-width: 160px; height: auto; border-radius: 4px; }
tr:target, figure:target, tr:has(:target) { background: var(--soft); outline: 2px solid var(--accent); }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font: 12.5px/1.5 ui-monospace, monospace; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--accent); width: fit-content; }
figure { margin: 14px 0 0; min-width: 0; }
figcaption { font-size: 13.5px; color: var(--muted); margin-bottom: 4px; overflow-wrap: break-word; }
figure .muted { margin: 2px 0 0; }
.grid2 { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(290px, 100%), 1fr)); gap: 6px 28px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 6px 36px; }
svg { display: block; max-width: 100%; }
svg.chart { width: 100%; height: auto; }
svg.wide { min-width: 900px; }
.on-phone { display: none; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 0 0; color: var(--muted); font-size: 12.5px; }
.legend span { display: inline-flex; align-items: center; gap: 7px; } .legend svg { flex: none; }
.stack { display: grid; grid-template-columns: auto minmax(0, 1fr) auto; gap: 10px 12px; align-items: center; }
.stack { margin-top: 12px; color: var(--muted); font-size: 12.5px; } .stack svg { width: 100%; height: 26px; }
svg a { cursor: pointer; } svg a:hover rect, svg a:focus rect { stroke: var(--text); stroke-width: 2; }
svg.spark { display: inline-block; vertical-align: middle; }
svg text { font: 12px system-ui, sans-serif; fill: var(--muted); }
svg text.on-light { fill: #1b1f24; font-size: 11.5px; }
svg text.on-dark { fill: #ffffff; font-size: 11.5px; }
svg text.on-none { fill: var(--text); font-size: 11.5px; }
.bar { fill: var(--accent); }
.nothing { fill: none; stroke: var(--muted); stroke-dasharray: 3 3; }
input.filter {
  font: inherit; font-size: 13.5px; margin-top: 10px; padding: 4px 8px; width: min(260px, 100%); color: var(--text);
  background: var(--ground); border: 1px solid var(--line); border-radius: 6px;
}
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; text-align: inherit; }
button.more { color: var(--accent); margin-top: 10px; }
th[aria-sort=ascending] button::after { content: " ↑"; } th[aria-sort=descending] button::after { content: " ↓"; }
a { color: var(--accent); }
.grid, .axis { stroke: var(--line); stroke-width: 1; }
.area { fill: var(--accent); fill-opacity: 0.28; }
.line { fill: none; stroke: var(--second); stroke-width: 1.6; }
.leader { stroke: var(--muted); stroke-width: 0.7; }
.dot { fill: var(--accent); stroke: var(--surface); } .ring { fill: var(--surface); stroke: var(--muted); stroke-width: 1.6; }
svg text.name { fill: var(--text); }
@media (max-width: 480px) {
  .on-page { display: none; } .on-phone { display: block; }
  .pair svg text { font-size: 14px; }
  header, main, footer { padding-left: 12px; padding-right: 12px; }
  section { padding: 14px 12px; }
  th, td { padding-right: 9px; }
}
.cover { fill: var(--accent); fill-opacity: 0.32; }
.seen { stroke: var(--text); stroke-width: 1.6; } .clip { stroke: var(--bad); stroke-width: 4; }
.part0 { fill: var(--p0); } .part1 { fill: var(--p1); } .part2 { fill: var(--p2); }
.part3 { fill: var(--p3); } .part4 { fill: var(--p4); } .part5 { fill: var(--p5); }
@media print { body { background: #fff; } section, .card { break-inside: avoid; } }
"""

SCRIPT: Final = """
(() => {
  const units = {KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30};
  const number = text => {
    if (/^[^0-9]*(inf|∞)/.test(text)) return Infinity;
    const found = text.replace(/,/g, "").match(/(<?) *(-?[0-9.]+(?:e[-+]?[0-9]+)?) ?([KMG]iB)?/i);
    return found ? found[2] * (units[found[3]] || 1) * (found[1] ? 0.5 : 1) : null;
  };
  const compare = (a, b, isNumber, sign) => {
    if (!isNumber) return sign * a.localeCompare(b, "en", {numeric: true});
    const [x, y] = [number(a), number(b)];
    return x === null || y === null ? (x === null) - (y === null) : sign * (x > y ? 1 : x < y ? -1 : 0);
  };
  for (const split of document.querySelectorAll(".split")) {
    const body = split.querySelector("tbody"), shown = body.rows.length, rest = split.querySelector("details");
    for (const row of [...rest.querySelectorAll("tbody tr")]) body.append(row);
    const more = document.createElement("button");
    more.className = "more";
    more.textContent = rest.querySelector("summary").textContent;
    rest.replaceWith(more);
    const show = () => { split.dataset.all = "1"; more.remove(); draw(split.querySelector("table")); };
    more.onclick = show;
    split.dataset.shown = shown;
    split.addEventListener("show", show);
  }
  const draw = table => {
    const split = table.closest(".split"), words = (table.dataset.filter || "").toLowerCase();
    let left = split && !split.dataset.all && !words ? +split.dataset.shown : Infinity;
    for (const row of table.tBodies[0].rows) {
      row.hidden = left <= 0 || !row.textContent.toLowerCase().includes(words);
      left -= !row.hidden;
    }
  };
  for (const table of document.querySelectorAll("table")) {
    if (!table.tHead || table.tBodies[0].rows.length < 2) continue;
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button"), isNumber = head.className === "num";
      button.append(...head.childNodes);
      head.append(button);
      button.onclick = () => {
        const down = head.ariaSort ? head.ariaSort === "ascending" : isNumber;
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...table.tBodies[0].rows];
        rows.sort((a, b) => compare(a.cells[column].textContent, b.cells[column].textContent, isNumber, down ? -1 : 1));
        table.tBodies[0].append(...rows);
        draw(table);
      };
    });
    if (table.tBodies[0].rows.length > 10) {
      const input = document.createElement("input");
      input.className = "filter";
      input.placeholder = input.ariaLabel = "filter rows";
      input.oninput = () => { table.dataset.filter = input.value; draw(table); };
      table.parentElement.before(input);
    }
    draw(table);
  }
  const open = () => {
    const found = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!found) return;
    const split = found.closest(".split");
    if (split) split.dispatchEvent(new Event("show"));
    for (let one = found.closest("details"); one; one = one.parentElement.closest("details")) one.open = true;
    found.scrollIntoView({block: "center"});
  };
  addEventListener("hashchange", open);
  open();
})();
"""
"""Sorting, filtering, and the way to what a link names. Nothing of it is taken from a checkpoint."""
