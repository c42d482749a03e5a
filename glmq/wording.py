"""Numbers with their nouns and units, as sentences, tables and pages say them."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 sample`, `2 samples`."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def size(nbytes: int) -> str:
    """Bytes for people: `13.66 GiB`, `7.2 MiB`, `512 B`."""
    for unit, digits, name in ((2**30, 2, "GiB"), (2**20, 1, "MiB"), (2**10, 1, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.{digits}f} {name}"
    return f"{nbytes} B"


def dimensions(shape: Sequence[int]) -> str:
    """A shape: `96 x 128`."""
    return " x ".join(map(str, shape))


def list_names(names: Sequence[str]) -> str:
    """The first five names and how many more there are."""
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest


def say_absent(names: Sequence[str]) -> str:
    """`a.txt, which is not in the folder`."""
    return f"{list_names(names)}, which {'is' if len(names) == 1 else 'are'} not in the folder"
