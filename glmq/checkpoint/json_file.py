"""JSON files: read with distrust into typed values, written whole or not at all. Standard library only.

`read_json_object` bounds what a file may hold; `Fields` then takes its values out by name and type, so that whatever a file
says ends in one sentence at the edge and never inside.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn, TypeAlias, TypeVar

from glmq.checkpoint.disk import FILE_MODE, naming_full_disk, read_input, set_mode
from glmq.errors import DamagedError

JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
JsonObject: TypeAlias = dict[str, JsonValue]
T = TypeVar("T")

MAX_JSON_BYTES: Final = 16_000_000
"""Ten times the largest JSON file of a GLM-4.1V, the manifest of a compressed one. Parsed it takes up to thirty times that."""
MAX_DEPTH: Final = 64
"""Lists and objects within each other; config.json has 4."""
MAX_DIGITS: Final = 40
"""Of an integer; tokenizers write 10^30 for "no limit"."""
SURROGATE: Final = re.compile(r"[\ud800-\udfff]")
"""No character: half of one that JSON spells as two, or in the name of a file a byte that is no UTF-8."""

_NO_BYTE: Final = re.compile(r"[\ud800-\udc7f\udd00-\udfff]")
"""Those that stand for no byte of a path either."""


def parse_json(raw: bytes | str, *, has_paths: bool = False) -> JsonValue:
    """The JSON document in `raw`, keys in their order.

    Args:
        raw: text, or its bytes in UTF-8.
        has_paths: glmq wrote it, paths among its texts: what stands for a byte that is no UTF-8 is taken.

    Raises:
        ValueError: not JSON, a key that appears twice, numbers that are not finite or have more than MAX_DIGITS digits, halves
            of a surrogate pair, or more than MAX_DEPTH levels. The message says which, without a full stop.
    """
    text = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw
    try:
        document: JsonValue = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_parse_integer,
            parse_float=_parse_number,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} lists and objects lie within each other") from None
    _check_depth(document)
    if "\\u" in text or not text.isascii():
        _check_texts(document, _NO_BYTE if has_paths else SURROGATE)
    return document


def _unique(pairs: list[tuple[str, JsonValue]]) -> JsonObject:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!a:.200} appears twice")
            seen.add(key)
    return found


def _parse_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits, {MAX_DIGITS} are read")
    return int(digits)


def _parse_number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits:.40} is out of range")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check_depth(document: JsonValue) -> None:
    """Refuse what is nested too deep, level by level."""
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(MAX_DEPTH):
        # The pair of types, as a union of them takes longer.
        level = [item for value in level for item in _items(value) if isinstance(item, (dict, list))]
        if not level:
            return
    raise ValueError(f"more than {MAX_DEPTH} lists and objects lie within each other")


def _items(value: JsonValue) -> Iterable[JsonValue]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_texts(document: JsonValue, refused: re.Pattern[str]) -> None:
    """Refuse text that could never be written again."""
    stack = [document]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            _check_text(value, refused)
        elif isinstance(value, dict):
            for key in value:
                _check_text(key, refused)
        stack += _items(value)


def _check_text(text: str, refused: re.Pattern[str]) -> None:
    if not text.isascii() and refused.search(text):
        raise ValueError(f"{text!a:.40} has half of a surrogate pair, which is no character")


def read_json_object(path: Path, *, has_paths: bool = False) -> JsonObject:
    """The JSON object in `path`, keys in file order. `has_paths`: see `parse_json`.

    Raises:
        CheckpointError: no regular file, unreadable, larger than MAX_JSON_BYTES, not an object, or what parse_json refuses.
    """
    raw = read_input(path, MAX_JSON_BYTES)
    if len(raw) > MAX_JSON_BYTES:
        raise DamagedError(
            f"{path}: is larger than {MAX_JSON_BYTES} bytes; it is not a file of a GLM-4.1V or GLM-4.6V-Flash"
        )
    try:
        document = parse_json(raw, has_paths=has_paths)
    except ValueError as error:
        raise DamagedError(f"{path}: is not JSON ({error}); download or write it again") from None
    if not isinstance(document, dict):
        raise DamagedError(f"{path}: wanted a JSON object, found {type(document).__name__}; download or write it again")
    return document


class Fields:
    """A JSON object whose values are taken out by name and type.

    Args:
        document: the object.
        where: what it is, for messages, e.g. a path.
        refuse: makes the error from a sentence without its end.
    """

    def __init__(self, document: Mapping[str, JsonValue], where: str, refuse: Callable[[str], Exception]) -> None:
        self._document = document
        self._where = where
        self._refuse = refuse

    def text(self, key: str) -> str:
        """A string."""
        return self._typed(key, str, "a text")

    def count(self, key: str) -> int:
        """An integer from 0 to 2^63 - 1."""
        value = self._document.get(key)
        if type(value) is not int or not 0 <= value < 2**63:
            self._wrong(key, value, "a count")
        return value

    def counts(self, key: str, length: int) -> tuple[int, ...]:
        """A list of that many integers from 0 to 2^63 - 1."""
        value = self._document.get(key)
        right = isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
        if not isinstance(value, list) or not right or len(value) != length:
            self._wrong(key, value, f"a list of {length} counts")
        return tuple(value)

    def choice(self, key: str, kind: Callable[[str], T]) -> T:
        """A string that names a member of the enumeration `kind`."""
        text = self.text(key)
        try:
            return kind(text)
        except ValueError:
            self._wrong(key, text, "one of the names that this glmq knows")

    def fields(self, key: str) -> Fields:
        """An object."""
        value = self._document.get(key)
        if not isinstance(value, dict):
            self._wrong(key, value, "an object")
        return Fields(value, f"{self._where}: {key}", self._refuse)

    def list_of_fields(self, key: str) -> list[Fields]:
        """A list of objects."""
        value = self._document.get(key)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self._wrong(key, value, "a list of objects")
        return [Fields(item, f"{self._where}: {key} {i}", self._refuse) for i, item in enumerate(value)]

    def texts(self, key: str) -> dict[str, str]:
        """An object whose values are strings."""
        fields = self.fields(key)
        return {name: fields.text(name) for name in fields}

    def __iter__(self) -> Iterator[str]:
        """The keys, in their order."""
        return iter(self._document)

    def _typed(self, key: str, kind: type[T], wanted: str) -> T:
        value = self._document.get(key)
        if not isinstance(value, kind):
            self._wrong(key, value, wanted)
        return value

    def _wrong(self, key: str, value: JsonValue, wanted: str) -> NoReturn:
        found = f"{value!a:.60}" if key in self._document else "missing"
        raise self._refuse(f"{self._where}: {key!a:.200} is {found}, wanted {wanted}")


def write_json(path: Path, document: Mapping[str, JsonValue], *, indent: int) -> None:
    """Write `document` to `path` through a temporary name, mode 0640, keys in their order, ending in a newline."""
    write_whole(path, json_bytes(document, indent=indent))


def json_bytes(document: Mapping[str, JsonValue], *, indent: int) -> bytes:
    r"""The text of `document` as it is written: keys in their order, ending in a newline.

    A byte of a path that is no UTF-8 is written as `\udcff`, which reads back as the same path.
    """
    text = json.dumps(document, indent=indent, ensure_ascii=False) + "\n"
    if not text.isascii():
        text = SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return text.encode()


def write_named(path: Path, content: bytes) -> None:
    """Write a file that the user named: into a device or a pipe as it comes, else whole, through a link where that leads.

    Raises:
        SpaceError: the disk is full.
    """
    if path.exists() and not path.is_file():
        with naming_full_disk(path, len(content)):
            path.write_bytes(content)
    else:
        write_whole(Path(os.path.realpath(path)), content)


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write bytes, one part after the other, to `path` through a temporary name, mode 0640 whatever the umask.

    Raises:
        SpaceError: the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with naming_full_disk(path, sum(map(len, parts))):
            with partial.open("wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())  # a journal may speak of it next
            set_mode(partial, FILE_MODE)
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
