"""Numbers with their nouns, as sentences and pages say them."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 sample`, `2 samples`."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"
