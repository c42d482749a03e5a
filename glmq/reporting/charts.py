"""Inline SVG charts for the HTML page: text that a browser draws without scripts or a network.

Colours are classes of the page's style sheet, so that charts follow its light and dark themes; those of heat maps are the same
in both. Each mark has a <title>,
which browsers show when it is pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import product
from typing import Final

from glmq.reporting.svg import (
    PHONE,
    WIDTH,
    at_both_widths,
    drawing,
    legend,
    level_line,
    remark,
    round_up,
    sample,
    text_at,
)
from glmq.reporting.words import percent
from glmq.wording import size

LABEL_WIDTHS: Final = {WIDTH: 170, PHONE: 116}
"""Of the roles beside a heat map."""
HEAT_LABEL: Final = 24
"""Width that the number of a layer above a heat map has."""
HEAT_SPAN: Final = 20.0
SHADES: Final = ((255, 244, 214), (250, 199, 120), (222, 110, 52), (122, 22, 22))
"""From light to dark; the same in both themes, so that darker is larger in each."""
DARK_SHARE: Final = 0.73
"""From where on a cell's number is white, which there has as much contrast as black."""
NARROW: Final = 320
"""Width of a chart that stands beside others."""


@dataclass(frozen=True, slots=True)
class RangeBar:
    """What an int8 activation covers, and what was seen."""

    label: str
    low: float
    high: float
    seen_low: float | None
    seen_high: float | None


def heat_map(
    columns: Sequence[str],
    rows: Sequence[str],
    values: Mapping[tuple[str, str], float],
    what: str,
    links: Mapping[tuple[str, str], str] | None = None,
) -> str:
    """Cells by (column, row), darker for larger values in both themes; numbers in them where there is room.

    The scale is logarithmic over the largest value's last HEAT_SPAN; smaller values are all as light as can be. A value of zero
    is an empty cell with a broken frame.

    Args:
        columns: what stands side by side, e.g. layers.
        rows: what stands one below the other, e.g. roles of linears.
        values: shares of one.
        what: the values are.
        links: anchors of the page that cells lead to.
    """
    drawn = [values[place] for place in product(columns, rows) if place in values]
    positive = [value for value in drawn if 0 < value < math.inf]
    if not positive:
        return remark(f"No {what} above zero.")
    high = max(positive)
    low = max(min(positive), high / HEAT_SPAN)
    span = math.log(high / low) or 1.0

    def share(value: float) -> float:
        return 0.0 if value <= 0 else min(1.0, max(0.0, math.log(min(value, high) / low) / span))

    def draw(page: int) -> str:
        left, cell_h = LABEL_WIDTHS[page], 26
        cell_w = (page - left) / len(columns)
        parts = [text_at(left - 8, 14, "layer", anchor="end")]
        for y, row in enumerate(rows):
            top = 22 + y * cell_h
            shown = row if len(row) <= left / 6.5 else f"…{row[-int(left / 6.5) + 1 :]}"
            parts.append(text_at(left - 8, top + cell_h / 2 + 4, shown, anchor="end"))
            for x, column in enumerate(columns):
                value = values.get((column, row))
                if value is None:
                    continue
                place = left + x * cell_w, top, cell_w, cell_h
                made = f"<title>{escape(f'{column} {row}: {percent(value)}')}</title>{_heat_value(value, share(value), place)}"
                link = (links or {}).get((column, row))
                parts.append(f"<g>{made}</g>" if link is None else f'<a href="#{link}">{made}</a>')
        every = max(1, math.ceil(len(columns) * HEAT_LABEL / (page - left)))
        for x, column in enumerate(columns):
            if x % every == 0:
                centre = min(left + (x + 0.5) * cell_w, page - 8)  # two digits of the last one have room
                parts.append(text_at(centre, 14, column.rpartition(".")[2], anchor="middle"))
        return drawing(22 + len(rows) * cell_h + 4, parts, what, page)

    return f"<div>{at_both_widths(draw)}{_heat_legend(low, high, what, has_zero=0.0 in drawn)}</div>"


def _heat_value(value: float, share: float, place: tuple[float, float, float, float]) -> str:
    """The cell at that place (left, top, width, height), with its number where there is room."""
    left, top, width, height = place
    gap = min(1.0, width / 8)
    made = _heat_cell(left + gap, top + 1, width - 2 * gap, height - 2, None if value == 0 else share)
    if width <= 46:
        return made
    shade = "on-none" if value == 0 else "on-dark" if share > DARK_SHARE else "on-light"
    return made + text_at(left + width / 2, top + height / 2 + 4, percent(value), anchor="middle", kind=shade)


def _heat_cell(x: float, y: float, width: float, height: float, share: float | None) -> str:
    """One cell, `share` of the way from light to dark; None: for a value of zero."""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{min(3.0, width / 4):.1f}"'
    return f'<rect class="nothing" {place}/>' if share is None else f'<rect fill="{_shade(share)}" {place}/>'


def _shade(share: float) -> str:
    """A colour between the first of SHADES and the last."""
    at = share * (len(SHADES) - 1)
    index = min(int(at), len(SHADES) - 2)
    mixed = (round(a + (b - a) * (at - index)) for a, b in zip(SHADES[index], SHADES[index + 1], strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def _heat_legend(low: float, high: float, what: str, *, has_zero: bool) -> str:
    """What the colours mean: from light to dark, with the values at both ends."""
    steps, width = 12, 14
    shades = "".join(_heat_cell(width * step, 0, width + 0.5, 14, step / (steps - 1)) for step in range(steps))
    items = [
        escape(what),
        escape(f"up to {percent(low)}") + sample(width * steps, 14, shades) + escape(percent(high)),
        "logarithmic; darker is larger",
    ]
    if has_zero:
        items.append(f"{sample(24, 16, _heat_cell(1, 1, 22, 14, None))}exactly 0")
    return legend(items)


def columns_chart(labels: Sequence[str], values: Sequence[float], what: str, across: str = "block") -> str:
    """Upright columns from zero, with a grid. A value of zero is a ring on the line, so that no small one is taken for it.

    Args:
        labels: below the columns.
        values: shares of one.
        what: the values are; stands at the upright axis.
        across: what a column stands for; stands at the level axis.
    """
    height, top, bottom = 214, 26, 42
    finite = [value for value in values if math.isfinite(value)]
    limit = round_up(max(finite, default=0.0))
    if limit == 0:
        return remark(f"No {what} above zero.")
    left, plot_h = 64, height - top - bottom

    def draw(page: int) -> str:
        parts: list[str] = [text_at(0, 12, what), text_at(page, height - 4, across, anchor="end")]
        for tick in range(5):
            value = limit * tick / 4
            y = top + plot_h * (1 - tick / 4)
            parts.append(level_line("grid", left, page, y))
            parts.append(text_at(left - 8, y + 4, percent(value), anchor="end"))
        step = (page - left) / len(values)
        width = min(46.0, step * 0.72)
        every = max(1, math.ceil(len(labels) * 44 / (page - left)))
        for x, (label, value) in enumerate(zip(labels, values, strict=True)):
            tall = plot_h * min(1.0, value / limit) if math.isfinite(value) else plot_h
            centre, title = left + (x + 0.5) * step, f"<title>{escape(f'{label}: {percent(value)}')}</title>"
            if value == 0:
                parts.append(f'<circle class="nothing" cx="{centre:.1f}" cy="{top + plot_h}" r="3">{title}</circle>')
            else:
                tall = max(tall, 1.5)
                parts.append(
                    f'<rect class="bar" x="{centre - width / 2:.1f}" y="{top + plot_h - tall:.1f}" width="{width:.1f}" '
                    f'height="{tall:.1f}" rx="{min(2.0, width / 4):.1f}">{title}</rect>'
                )
            if x % every == 0:
                parts.append(text_at(centre, height - 24, _short(label), anchor="middle"))
        return drawing(height, parts, what, page)

    return at_both_widths(draw)


def stacked_bars(bars: Mapping[str, Mapping[str, int]], what: str) -> str:
    """One horizontal bar per key, of parts in bytes, as wide as the page; the same part has the same colour in each."""
    names = list(dict.fromkeys(name for parts in bars.values() for name in parts))
    longest = max((sum(parts.values()) for parts in bars.values()), default=0)
    if longest == 0:
        return remark(f"No {what}.")
    out: list[str] = []
    for label, parts in bars.items():
        x, drawn = 0.0, ""
        for name, nbytes in parts.items():
            wide = WIDTH * nbytes / longest
            drawn += (
                f'<rect class="part{names.index(name) % 6}" x="{x:.1f}" y="0" width="{max(wide - 1, 0.5):.1f}" height="26">'
                f"<title>{escape(f'{name}: {size(nbytes)}')}</title></rect>"
            )
            x += wide
        out.append(
            f'<span>{escape(label)}</span><svg role="img" aria-label="{escape(f"{what}, {label}")}" '
            f'viewBox="0 0 {WIDTH} 26" preserveAspectRatio="none">{drawn}</svg><span>{size(sum(parts.values()))}</span>'
        )
    keys = [
        sample(11, 11, f'<rect class="part{index % 6}" width="11" height="11" rx="2"/>') + escape(name)
        for index, name in enumerate(names)
    ]
    return f'<div><div class="stack">{"".join(out)}</div>{legend(keys)}</div>'


def histogram_pair(before: Sequence[int], after: Sequence[int], low: float, high: float, what: str) -> str:
    """Two histograms over the same bins: the first filled, the second a line; heights are square roots of counts."""
    height, top, bottom, width = 168, 8, 40, NARROW
    limit = math.sqrt(max((*before, *after), default=0)) or 1.0
    plot_h, step = height - top - bottom, width / max(1, len(before))

    def level(count: int) -> float:
        return top + plot_h * (1 - math.sqrt(count) / limit)

    base = top + plot_h
    filled = " ".join(
        f"{x * step:.1f},{level(c):.1f} {(x + 1) * step:.1f},{level(c):.1f}" for x, c in enumerate(before)
    )
    line = " ".join(f"{x * step:.1f},{level(c):.1f} {(x + 1) * step:.1f},{level(c):.1f}" for x, c in enumerate(after))
    parts = [
        f'<polygon class="area" points="0,{base} {filled} {width},{base}"/>',
        f'<polyline class="line" points="{line}"/>',
        *_value_axis(base, low, high, "weight"),
    ]
    return drawing(height, parts, what, width)


def integer_histogram(counts: Sequence[int], first: int, what: str) -> str:
    """How often each integer occurs, from `first` on; heights are square roots of counts. An integer that never occurs among
    others that do has no column.
    """
    height, top, bottom, width = 138, 8, 40, NARROW
    limit = math.sqrt(max(counts, default=0)) or 1.0
    plot_h, step = height - top - bottom, width / max(1, len(counts))
    base, gap = top + plot_h, 1.0 if step > 5 else 0.0
    bars = "".join(
        f"M{x * step:.1f} {base}v{-max(1.0, plot_h * math.sqrt(count) / limit):.1f}h{step - gap:.2f}V{base}z"
        for x, count in enumerate(counts)
        if count
    )
    last = first + len(counts) - 1
    parts = [f'<path class="bar" d="{bars}"/>', *_value_axis(base, first, last, "integer")]
    return drawing(height, parts, what, width)


def _value_axis(base: float, low: float, high: float, what: str) -> list[str]:
    """The level axis of a narrow histogram: both ends, zero where it lies apart from them, and what is counted."""
    parts = [
        f'<line class="axis" x1="0" x2="{NARROW}" y1="{base}" y2="{base}"/>',
        text_at(0, base + 15, f"{low:.3g}"),
        text_at(NARROW, base + 15, f"{high:.3g}", anchor="end"),
        text_at(0, base + 32, f"{what}; height: square root of the count"),
    ]
    if low < 0 < high:
        zero = NARROW * -low / (high - low)
        if NARROW / 8 < zero < NARROW * 7 / 8:
            parts.append(text_at(zero, base + 15, "0", anchor="middle"))
    return parts


def sparkline(counts: Sequence[int]) -> str:
    """A histogram a line of text high; heights are square roots of counts."""
    limit = math.sqrt(max(counts, default=0)) or 1.0
    steps = "".join(f"V{18 - 18 * math.sqrt(count) / limit:.1f}h3" for count in counts)
    return (
        f'<svg class="spark" viewBox="0 0 {3 * len(counts)} 18" width="{3 * len(counts)}" height="18">'
        f'<path class="bar" d="M0 18{steps}V18z"/></svg>'
    )


def range_chart(bars: Sequence[RangeBar], what: str, said: str = "covered") -> str:
    """Each range on its own line, all on one axis: sign(x) * log(1 + |x|), which shows small and large ranges alike."""
    ends = [abs(v) for b in bars for v in (b.low, b.high, b.seen_low or 0.0, b.seen_high or 0.0)]
    limit = math.log1p(max(ends, default=0.0))
    if limit == 0:
        return remark(f"No {what}.")
    left, right, line_h = 250, 12, 20
    half = (WIDTH - left - right) / 2

    def place(value: float) -> float:
        return left + half + half * math.copysign(math.log1p(abs(value)), value) / limit

    parts: list[str] = []
    bottom = 8 + len(bars) * line_h
    for value in (*(-t for t in reversed(_decades(max(ends)))), 0.0, *_decades(max(ends))):
        parts.append(f'<line class="grid" x1="{place(value):.1f}" x2="{place(value):.1f}" y1="4" y2="{bottom}"/>')
        parts.append(text_at(place(value), bottom + 15, f"{value:g}", anchor="middle"))
    for y, bar in enumerate(bars):
        top = 8 + y * line_h
        parts.append(text_at(left - 8, top + 12, bar.label, anchor="end"))
        note = f"{bar.label}: {said} {bar.low:.4g} to {bar.high:.4g}"
        if bar.seen_low is not None and bar.seen_high is not None:
            note += f", seen {bar.seen_low:.4g} to {bar.seen_high:.4g}"
        parts.append(
            f'<g><title>{escape(note)}</title><rect class="cover" x="{place(bar.low):.1f}" y="{top + 2}" '
            f'width="{max(1.0, place(bar.high) - place(bar.low)):.1f}" height="12" rx="3"/>'
        )
        if bar.seen_low is not None and bar.seen_high is not None:
            y_line = top + 8
            parts.append(level_line("seen", place(bar.seen_low), place(bar.seen_high), y_line))
            if bar.seen_low < bar.low:
                parts.append(level_line("clip", place(bar.seen_low), place(bar.low), y_line))
            if bar.seen_high > bar.high:
                parts.append(level_line("clip", place(bar.high), place(bar.seen_high), y_line))
        parts.append("</g>")
    parts.append(text_at(WIDTH, bottom + 32, f"{what}; logarithmic away from zero", anchor="end"))
    return drawing(bottom + 40, parts, what)


def _decades(largest: float) -> list[float]:
    """Powers of ten up to the largest value; half of it where that is below one."""
    if largest < 1:
        return [largest / 2]
    return [10.0**power for power in range(int(math.log10(largest)) + 1)]


def _short(label: str) -> str:
    """The number of a layer (v3 in the vision tower), or the last word of a name, short enough to stand below a column."""
    last = label.rpartition(".")[2]
    if last.isdigit() and "visual" in label:
        return f"v{last}"
    return last if len(last) < 9 else f"{last[:7]}…"
