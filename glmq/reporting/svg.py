"""The pieces of the pages' charts: texts, lines, and the SVG drawing around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from html import escape
from typing import Final

WIDTH: Final = 960
"""Of a chart that fills the page."""
PHONE: Final = 350
"""Of the same chart on a phone."""


def round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten."""
    if value <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= value * 0.999999)


def text_at(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "label") -> str:
    """A text whose base line begins, ends or has its middle there; `kind` is its class in the style sheet."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def level_line(kind: str, x1: float, x2: float, y: float) -> str:
    """A level line of that class."""
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'


def remark(text: str) -> str:
    """What stands in the place of a chart with nothing to draw."""
    return f'<p class="muted">{escape(text)}</p>'


def drawing(height: float, parts: Iterable[str], what: str, width: int = WIDTH) -> str:
    """The drawing of these parts, which scrolls where the page is too narrow for it; `what` says what it shows."""
    body = "\n".join(parts)
    kind = {WIDTH: "chart wide", PHONE: "chart phone"}.get(width, "chart")
    return (
        f'<div class="plot"><svg class="{kind}" role="img" aria-label="{escape(what)}" viewBox="0 0 {width} {height:.0f}" '
        f'preserveAspectRatio="xMinYMin meet">\n{body}\n</svg></div>'
    )


def at_both_widths(draw: Callable[[int], str]) -> str:
    """A drawing for a page and one for a phone, of which the style sheet shows one."""
    return f'<div><div class="on-page">{draw(WIDTH)}</div><div class="on-phone">{draw(PHONE)}</div></div>'


def sample(width: int, height: int, shapes: str) -> str:
    """A small drawing within a line of text, such as the colour that a legend speaks of."""
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" aria-hidden="true">{shapes}</svg>'


def legend(items: Iterable[str]) -> str:
    """What the colours of a chart mean, in as many lines as the page needs for it; the items are HTML."""
    return f'<p class="legend">{"".join(f"<span>{item}</span>" for item in items)}</p>'
