"""What options may hold. The library refuses what the command line refuses, in the same sentences."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum
from pathlib import Path
from typing import Final, TypeVar

from glmq.errors import UsageError

DTYPE_WORDS: Final = {"float16": "fp16", "bfloat16": "bf16"}
"""torch's names of what --torch_dtype takes."""
LEAST_PIXELS: Final = 28 * 28
"""Of --max-pixels: one patch of a picture after merging."""
Member = TypeVar("Member", bound=Enum)


def check_least(option: str, value: float | None, least: float) -> None:
    """Raise UsageError unless an option that may be left out is a number of at least `least`, whole if that is."""
    if value is None:
        return
    whole = isinstance(least, int)
    if not isinstance(value, int if whole else (int, float)):
        raise UsageError(f"{option} {value!r}: a {'whole ' if whole else ''}number is needed")
    if not value >= least:
        raise UsageError(f"{option} {value}: at least {least} is needed")


def check_between(option: str, value: float | None, least: float, most: float) -> None:
    """Raise UsageError unless an option that may be left out is a number from `least` to `most`."""
    if value is not None and not least <= value <= most:
        raise UsageError(f"{option} {value}: a number from {least} to {most} is needed")


def check_word(option: str, value: object, words: Collection[object]) -> None:
    """Raise UsageError unless an option has one of its words, or numbers."""
    if value not in words:
        raise UsageError(f"{option} {value}: one of {', '.join(map(str, words))} is needed")


def member(option: str, value: object, kind: type[Member]) -> Member:
    """The member that an option names, by itself or by its value. Raises UsageError for what names none."""
    if not isinstance(value, kind):
        check_word(option, value, [one.value for one in kind])
    return kind(value)


def to_path(value: str | Path) -> Path:
    """A path from text. Raises UsageError for an empty one, which would stand for the current folder."""
    if value == "":
        raise UsageError("an empty text was given where a path is needed; name a folder or a file")
    return Path(value)


def take_paths(record: object, *names: str) -> None:
    """Turn the text in these fields of a frozen record into paths, in its `__post_init__`."""
    for name in names:
        value = getattr(record, name)
        if value is not None:
            object.__setattr__(record, name, to_path(value))
