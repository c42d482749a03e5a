"""How pages say numbers, names and errors: percent, bytes, short names, and from where on an error is marked."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Final

from glmq.model.config import FAMILY
from glmq.reporting.page import Tone

POOR_ERROR: Final = 0.1
BAD_ERROR: Final = 0.2
"""From where on a relative error is marked."""


def percent(value: float) -> str:
    """A share for people: `3.90 %`, `0.04 %`, `< 0.001 %`, `inf`."""
    if not math.isfinite(value):
        return "inf"
    scaled = 100 * value
    if scaled == 0:
        return "0 %"
    if scaled < 0.001:
        return "< 0.001 %"
    digits = 0 if scaled >= 99.95 else 1 if scaled >= 10 else 2 if scaled >= 0.1 else 3
    return f"{scaled:.{digits}f} %"


def moment(iso: str) -> str:
    """A time for people: `2026-11-29 16:05 UTC` of `2026-11-29T16:05:02+00:00`."""
    return f"{datetime.fromisoformat(iso):%Y-%m-%d %H:%M %Z}"


def tone_of(error: float) -> Tone:
    """How a relative error is marked."""
    if not error < BAD_ERROR:
        return "bad"
    return "warn" if error >= POOR_ERROR else "good"


def or_empty(value: float | None) -> str:
    """A number with four digits after the point; nothing for None."""
    return "" if value is None else f"{value:.4f}"


def place_of(name: str) -> tuple[str, str]:
    """Layer and role of a linear."""
    short = FAMILY.short_name(name)
    pieces = short.split(".")
    cut = next((i + 1 for i, piece in enumerate(pieces) if piece.isdigit()), 1)
    return ".".join(pieces[:cut]), ".".join(pieces[cut:]) or short
