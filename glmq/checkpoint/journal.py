"""The journal of a long run: its settings, and each block that is finished. What a resumed run trusts.

`journal.jsonl` lies in the work folder of an output. The first line holds the settings, each further line one finished block.
A line is written and synced only after everything that it speaks of. Each holds its own checksum: one that is torn or altered
counts as absent, and so do all after it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import xxhash

from glmq.checkpoint.disk import FILE_MODE, naming_full_disk, set_mode
from glmq.checkpoint.json_file import JsonObject, JsonValue
from glmq.errors import ResumeError

NAME: Final = "journal.jsonl"
CHECKSUM: Final = "xxh3"
"""Key of a line's checksum: xxh3-128 of the line without it."""


class Journal:
    """The finished blocks of a run.

    Args:
        folder: the work folder; a journal that lies there is continued.
        settings: everything that the output's bytes depend on.
        writes: false on all but one of several processes: they read what lies there and keep their lines to themselves.

    Raises:
        UsageError: the journal that lies there was written with other settings; both values are named.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str], *, writes: bool = True) -> None:
        self._path = folder / NAME
        self._writes = writes
        self.finished: dict[str, JsonObject] = {}
        """Payload of each finished block, in order."""
        self._settings: JsonObject = dict(settings)
        lines = read_lines(self._path)
        if lines:
            self._check(lines[0], settings)
            self.finished = {str(line["block"]): line for line in lines[1:]}
        self._rewrite([self._settings, *self.finished.values()])

    def record(self, block: str, payload: Mapping[str, JsonValue]) -> None:
        """Say that a block is finished; what a later run needs of it is in `payload`.

        Raises:
            SpaceError: the disk is full, or another limit of `no_room` is met.
        """
        line: JsonObject = {"block": block, **payload}
        if self._writes:
            content = _text_of(line).encode()
            with naming_full_disk(self._path, len(content)), self._path.open("ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        self.finished[block] = line

    def drop(self, blocks: Collection[str]) -> None:
        """These blocks are to be done again."""
        for block in blocks:
            del self.finished[block]
        self._rewrite([self._settings, *self.finished.values()])

    def _check(self, found: JsonObject, settings: Mapping[str, str]) -> None:
        for key in sorted({*found, *settings}):
            if found.get(key) != settings.get(key):
                raise ResumeError(
                    f"--resume: the unfinished run in {self._path.parent} had {key} {found.get(key)!r}, "
                    f"this one has {settings.get(key)!r}; run with the same, or start again with --overwrite"
                )

    def _rewrite(self, lines: list[JsonObject]) -> None:
        """Put whole lines alone into the file, so that a torn one does not swallow the next."""
        if not self._writes:
            return
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(map(_text_of, lines)), encoding="utf-8")
        set_mode(partial, FILE_MODE)
        os.replace(partial, self._path)


def read_lines(path: Path) -> list[JsonObject]:
    """The whole lines of a journal up to the first that is damaged, without their checksums; empty if there is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines: list[JsonObject] = []
    for raw in text.splitlines():
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):  # ValueError covers bad JSON and integers of absurd length
            break
        if not isinstance(line, dict) or not ("block" in line or not lines):
            break
        if line.pop(CHECKSUM, None) != _checksum(line):
            break
        lines.append(line)
    return lines


def _text_of(line: JsonObject) -> str:
    return json.dumps({**line, CHECKSUM: _checksum(line)}) + "\n"


def _checksum(line: JsonObject) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(line).encode())
