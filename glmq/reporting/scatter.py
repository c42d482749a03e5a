"""The chart of `glmq sweep`: size against error, the best of all joined by a line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Final, TypeAlias

from glmq.reporting.svg import drawing, level_line, remark, round_up, text_at
from glmq.wording import size

SIDE: Final = 420
"""Width of the drawing: two stand side by side on a large page, and one is legible on a small one."""
LEFT, RIGHT, TOP, BOTTOM = 58, 410, 26, 290
"""Of the field in it."""
NAME_WIDTH: Final = 6.3
"""Of a letter, about."""
NEAR: Final = 16
"""A name farther above or below its point is joined to it by a thin line."""
Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom."""


@dataclass(frozen=True, slots=True)
class Point:
    """One of several things that are weighed against each other."""

    label: str
    nbytes: int
    value: float
    """Its error; none is better."""
    spread: float
    """Half the length of its error bar."""
    is_best: bool
    """No other is both as small and as good."""


def scatter_chart(points: Sequence[Point], what: str, say: Callable[[float], str]) -> str:
    """Size against error, which is logarithmic. The best are filled and joined by a line of steps, the others are rings.

    Args:
        points: with values above zero, or zero, which stands on the level axis.
        what: the values are; stands at the upright axis.
        say: writes a value.
    """
    points = [point for point in points if math.isfinite(point.value)]
    positive = [point.value for point in points if point.value > 0]
    if not positive:
        return remark(f"No {what} above zero.")
    low, high = math.log10(min(positive)) - 0.1, math.log10(max(p.value + p.spread for p in points)) + 0.1
    (first, last), ticks, unit = _size_axis([point.nbytes for point in points])

    def place(nbytes: float, value: float) -> tuple[float, float]:
        share = 0.0 if value <= 0 else min(max((math.log10(value) - low) / (high - low), 0.0), 1.0)
        return LEFT + (RIGHT - LEFT) * (nbytes - first) / (last - first), BOTTOM - (BOTTOM - TOP) * share

    parts = [
        text_at(0, 12, f"{what}, logarithmic"),
        text_at(RIGHT, BOTTOM + 34, f"size, {unit}", anchor="end"),
    ]
    for value in _log_ticks(low, high):
        _, y = place(first, value)
        parts.append(level_line("grid", LEFT, RIGHT, y))
        parts.append(text_at(LEFT - 8, y + 4, say(value), anchor="end"))
    for nbytes, label in ticks:
        x, _ = place(nbytes, 0.0)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BOTTOM}"/>')
        parts.append(text_at(x, BOTTOM + 16, label, anchor="middle"))
    corners = [place(point.nbytes, point.value) for point in sorted(points, key=_by_size) if point.is_best]
    if len(corners) > 1:
        path = " ".join(f"H{x:.1f}V{y:.1f}" for x, y in corners[1:])
        parts.append(f'<path class="line" d="M{corners[0][0]:.1f} {corners[0][1]:.1f}{path}"/>')
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in (place(point.nbytes, point.value) for point in points)]
    for (x, y), (after, below) in pairwise(corners):
        taken += [(x, y - 1, after, y + 1), (after - 1, y, after + 1, below)]
    for point in sorted(points, key=lambda p: (-p.value, p.nbytes)):
        spread = f" ± {say(point.spread)}" if point.spread else ""
        title = f"<title>{escape(f'{point.label}: {size(point.nbytes)}, {say(point.value)}{spread}')}</title>"
        x, y = place(point.nbytes, point.value)
        if point.spread:
            _, above = place(point.nbytes, point.value + point.spread)
            _, below = place(point.nbytes, point.value - point.spread)
            parts.append(f'<line class="seen" x1="{x:.1f}" x2="{x:.1f}" y1="{above:.1f}" y2="{below:.1f}"/>')
        kind = "dot" if point.is_best else "ring"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5">{title}</circle>')
        parts.append(_name(point, x, y, taken))
    return drawing(BOTTOM + 40, parts, what, SIDE)


def _name(point: Point, x: float, y: float, taken: list[Box]) -> str:
    """The name of a point at (x, y), at the nearest place that is free.

    Below and to the left of the best there is nothing else; the others have their names above, to the right.

    Args:
        taken: the boxes of what stands in the field; this name's is added.
    """
    wide = NAME_WIDTH * len(point.label)
    left, right = x - 9 - wide, x + 9
    down = 1 if point.is_best else -1
    tried = [
        (start, y - 8 + sign * far, start + wide, y + 8 + sign * far)
        for far in range(4, 160, 3)
        for sign in (down, -down)
        for start in ((left, right) if sign > 0 else (right, left))
    ]
    free = (
        box
        for box in tried
        if box[0] > LEFT + 10 and box[2] < SIDE and box[1] > TOP - 12 and box[3] < BOTTOM and not _overlaps(box, taken)
    )
    box = next(free, tried[0])
    taken.append(box)
    is_left, level = box[0] < x, (box[1] + box[3]) / 2
    start = box[2] if is_left else box[0]
    name = text_at(
        start,
        level + 4,
        point.label,
        anchor="end" if is_left else "start",
        kind="name" if point.is_best else "label",
    )
    if abs(level - y) <= NEAR:
        return name
    edge = level + math.copysign(6, y - level)
    return f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{start:.1f}" y2="{edge:.1f}"/>{name}'


def _overlaps(box: Box, others: Iterable[Box]) -> bool:
    return any(box[0] < one[2] and one[0] < box[2] and box[1] < one[3] and one[1] < box[3] for one in others)


def _by_size(point: Point) -> int:
    return point.nbytes


def _size_axis(sizes: Sequence[int]) -> tuple[tuple[float, float], list[tuple[float, str]], str]:
    """Both ends of an axis of sizes, its ticks with what they say, and the unit of these."""
    unit, name = next(((2**p, f"{n}iB") for p, n in ((30, "G"), (20, "M")) if max(sizes) >= 2**p), (2**10, "KiB"))
    margin = max((max(sizes) - min(sizes)) * 0.06, max(sizes) * 0.01)
    first, last = min(sizes) - margin, max(sizes) + margin
    step = round_up((last - first) / unit / 5)
    digits = max(0, math.ceil(-math.log10(step)) + (step * 10 ** math.ceil(-math.log10(step)) % 1 > 0))
    start = math.ceil(first / unit / step)
    marks = [index * step for index in range(start, math.floor(last / unit / step) + 1)]
    return (first, last), [(mark * unit, f"{mark:.{digits}f}") for mark in marks], name


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two powers of ten; the powers alone where these are many, more where few."""
    factors = (1.0, 2.0, 5.0) if high - low < 2 else (1.0, 3.0) if high - low < 4 else (1.0,)
    found = _multiples(factors, low, high)
    return found if len(found) > 2 else _multiples((1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0), low, high)


def _multiples(factors: Sequence[float], low: float, high: float) -> list[float]:
    every = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in factors]
    return [value for value in every if low <= math.log10(value) <= high]
