"""run.json in a work folder: which run it is of, so that an interrupted one can be told of, resumed and removed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glmq.checkpoint.json_file import JsonObject, json_bytes, read_json_object, write_whole
from glmq.errors import InputError

NAME: Final = "run.json"


@dataclass(frozen=True, slots=True)
class RunNote:
    """A run, as it began."""

    verb: str
    """E.g. quantize."""
    command: str
    """That resumes it, quoted for a shell; empty where no command line started it, or it cannot be resumed."""
    options: Mapping[str, str]
    """What the user chose, by option; empty text for what was not given."""


@dataclass(frozen=True, slots=True)
class FoundRun:
    """A run whose work folder was found."""

    note: RunNote
    directory: str
    """Where its command was given."""
    target: str
    """Its output folder."""
    locks: tuple[str, ...]
    """Lock files of its output folder."""


def write_note(work: Path, note: RunNote, target: Path, locks: Iterable[Path]) -> None:
    """Say in a work folder which run it is of; what an interrupted run said there stays."""
    if (work / NAME).exists():
        return
    document: JsonObject = {
        "verb": note.verb,
        "command": note.command,
        "options": dict(note.options),
        "directory": os.getcwd(),
        "target": str(target),
        "locks": [str(path) for path in locks],
    }
    write_whole(work / NAME, json_bytes(document, indent=1))


def read_note(work: Path) -> FoundRun | None:
    """The run that a work folder is of; None where nothing readable says so, as in one of an older glmq."""
    try:
        found = read_json_object(work / NAME, has_paths=True)
    except (InputError, OSError):
        return None
    options, locks = found.get("options"), found.get("locks")
    texts = [found.get(key) for key in ("verb", "command", "directory", "target")]
    if not isinstance(options, dict) or not isinstance(locks, list):
        return None
    every = [*texts, *options.values(), *locks]
    if not all(isinstance(text, str) for text in every):
        return None
    verb, command, directory, target = map(str, texts)
    note = RunNote(verb, command, {key: str(value) for key, value in options.items()})
    return FoundRun(note, directory, target, tuple(map(str, locks)))
