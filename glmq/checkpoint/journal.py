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
from glmq.checkpoint.run_note import read_note
from glmq.errors import ResumeError

NAME: Final = "journal.jsonl"
CHECKSUM: Final = "xxh3"
"""Key of a line's checksum: xxh3-128 of the line without it."""


NO_OPTIONS: Final[Mapping[str, str]] = {}
ORIGINS: Final = {
    "model": ("the float weights", ("--model_path",)),
    "statistics": ("the statistics", ("--stats",)),
    "samples": (
        "the calibration samples",
        ("--calib_images", "--recursive", "--calib-samples", "--cases", "--prompt", "--texts", "--limit", "--generate"),
    ),
}
"""Settings that are checksums: what they are of, and the options that it comes from."""
LONGEST_VALUE: Final = 60
"""Characters of a value in a message."""


class Journal:
    """The finished blocks of a run.

    Args:
        folder: the work folder; a journal that lies there is continued.
        settings: everything that the output's bytes depend on.
        writes: false on all but one of several processes: they read what lies there and keep their lines to themselves.
        options: what the user chose, by option: it tells of a setting that is a checksum where that comes from.

    Raises:
        ResumeError: the journal that lies there was written with other settings; both values are named.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, str],
        *,
        writes: bool = True,
        options: Mapping[str, str] = NO_OPTIONS,
    ) -> None:
        self._options = options
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

    def has(self, block: str) -> bool:
        """Whether that block is finished."""
        return block in self.finished

    def drop(self, blocks: Collection[str]) -> None:
        """These blocks are to be done again."""
        for block in blocks:
            del self.finished[block]
        self._rewrite([self._settings, *self.finished.values()])

    def _check(self, found: JsonObject, settings: Mapping[str, str]) -> None:
        had = {str(key): str(value) for key, value in found.items()}
        changed = [key for key in sorted({*had, *settings}) if had.get(key) != settings.get(key)]
        if changed:
            raise changed_error(self._path.parent, changed, had, settings, self._options)

    def _rewrite(self, lines: list[JsonObject]) -> None:
        """Put whole lines alone into the file, so that a torn one does not swallow the next."""
        if not self._writes:
            return
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(map(_text_of, lines)), encoding="utf-8")
        set_mode(partial, FILE_MODE)
        os.replace(partial, self._path)


def changed_error(
    folder: Path, changed: Collection[str], had: Mapping[str, str], has: Mapping[str, str], options: Mapping[str, str]
) -> ResumeError:
    """What a resumed run would do otherwise than the unfinished one, by option, with both values.

    Args:
        folder: the work folder of the unfinished run.
        changed: settings that differ.
        had: settings of the unfinished run.
        has: settings of this one.
        options: what the user of this one chose.
    """
    run = read_note(folder)
    chose = NO_OPTIONS if run is None else run.note.options
    then: list[str] = []
    now: list[str] = []
    other: list[str] = []
    for key in changed:
        what, origins = ORIGINS.get(key, ("", ()))
        named = [name for name in origins if name in chose and chose[name] != options.get(name, "")]
        if not what:
            then.append(_said(key, had.get(key, "")))
            now.append(_said(key, has.get(key, "")))
        elif named:
            then += [_said(name, chose[name]) for name in named]
            now += [_said(name, options.get(name, "")) for name in named]
        else:
            other.append(what)
    advice = "run with the same, or start again with --overwrite"
    if not then:
        return ResumeError(f"--resume: {' and '.join(other)} are not those of the unfinished run in {folder}; {advice}")
    return ResumeError(
        f"--resume: the unfinished run in {folder} had {', '.join(then)}, this one has {', '.join(now)}; {advice}"
    )


def number_text(number: float) -> str:
    """A number among the settings, as it is typed, with all its digits: two runs whose numbers differ anywhere are two."""
    return repr(float(number)).removesuffix(".0")


def _said(name: str, value: str) -> str:
    """`--limit 4`, or `no --limit`; of a flag without a value itself, or `--no-texts`."""
    if not value:
        return f"no {name}"
    if value in ("True", "False") and "_" not in name:  # the vendor's flags take a value
        return name if value == "True" else f"--no-{name.removeprefix('--')}"
    return f"{name} {value if len(value) <= LONGEST_VALUE else value[: LONGEST_VALUE - 3] + '...'}"


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
