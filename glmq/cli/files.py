"""The files that options name and a run writes beside its work: looked at before it, so that no result is lost to them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from glmq.errors import OutputError

WHOLE: Final = ("html", "csv")
"""Parameters that name a file which is written at the end, whole or not at all."""
GROWING: Final = ("log_file", "events")
"""Parameters that name a file which is appended to."""
SHARED: Final = "work_dir"
"""A folder that files may lie in, beside the one that a run makes there."""


def check_files(params: Mapping[str, object]) -> None:
    """Look at every file that the options of a verb name, before anything is written.

    Args:
        params: the verb's, by name.

    Raises:
        OutputError: a folder, in no folder, not writable, in what the verb reads or makes, or named by two options.
    """
    seen: dict[Path, str] = {}
    for name in (*WHOLE, *GROWING):
        path = params.get(name)
        if isinstance(path, Path):
            option = f"--{name.replace('_', '-')}"
            try:
                _check(f"{option} {path}", path, params, grows=name in GROWING)
                place = None if _is_stream(path) else Path(os.path.realpath(path))
            except OSError as error:  # of a folder that may not be looked into, or a name that is too long
                raise OutputError(f"{option} {path}: {error.strerror}; choose another place") from error
            if place in seen:
                raise OutputError(f"{option} {path}: is the file of {seen[place]} too; choose another name")
            if place is not None:
                seen[place] = option


def _check(what: str, path: Path, params: Mapping[str, object], *, grows: bool) -> None:
    from glmq.checkpoint.filesystem import is_writable
    from glmq.checkpoint.workplace import LONGEST_NAME

    if path.is_dir():
        raise OutputError(f"{what}: is a folder; name a file")
    if _is_stream(path):
        return
    place = Path(os.path.realpath(path))  # what a link names is what is written
    if not place.parent.is_dir():
        raise OutputError(f"{what}: there is no folder {place.parent}; make it, or choose another place")
    for used in _paths(params):
        if _would_alter(place, Path(os.path.realpath(used))):
            raise OutputError(f"{what}: lies in {used}, which the command reads or writes; choose another place")
    if grows and place.exists():
        if not os.access(place, os.W_OK):
            raise OutputError(f"{what}: is not writable; choose another file")
    elif not is_writable(place.parent):
        raise OutputError(f"{what}: {place.parent} is not writable; choose another place")
    longest = LONGEST_NAME if grows else LONGEST_NAME - len("..partial")  # it has that name until it is whole
    if len(os.fsencode(place.name)) > longest:
        raise OutputError(f"{what}: has a name of more than {longest} bytes; choose a shorter one")


def _is_stream(path: Path) -> bool:
    """Whether it is a device or a pipe, which takes what is written and keeps its name."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _paths(params: Mapping[str, object]) -> Iterator[Path]:
    """What a verb reads, and the folders that it makes."""
    for value in (value for name, value in params.items() if name not in (*WHOLE, *GROWING, SHARED)):
        yield from (one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, Path))


def _would_alter(place: Path, used: Path) -> bool:
    """Whether a file at `place` would be what is used, lie in it, or be one of those that belong to a file of weights."""
    if used == place or (used in place.parents and not used.is_file()):
        return True
    return used.suffix == ".safetensors" and used.parent == place.parent and place.suffix in (".safetensors", ".json")
