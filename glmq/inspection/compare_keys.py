"""What differs between two folders beside the weights: names of tensors, config.json, description."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from glmq.checkpoint.json_file import JsonValue
from glmq.inspection.folder import LINEAR_SUFFIXES, Folder, plain_name


@dataclass(frozen=True, slots=True)
class KeyChange:
    """A key of config.json or of the description that differs; None where it is absent."""

    key: str
    a: str | None
    b: str | None


@dataclass(frozen=True, slots=True)
class NamePattern:
    """Tensors that only one checkpoint has, numbers in their names replaced by N."""

    pattern: str
    count: int


def only_in(a: Folder, b: Folder) -> list[NamePattern]:
    """Tensors of `a` that `b` lacks, by pattern; those that make up an integer linear of `a` are left out."""
    there = {plain_name(tensor.name) for tensor in b.tensors}
    patterns: dict[str, int] = {}
    for tensor in a.tensors:
        if tensor.name not in there and tensor.name.rpartition(".")[2] not in LINEAR_SUFFIXES:
            pattern = re.sub(r"\.[0-9]+\.", ".N.", tensor.name)
            patterns[pattern] = patterns.get(pattern, 0) + 1
    return [NamePattern(pattern, count) for pattern, count in patterns.items()]


def config_changes(a: Folder, b: Folder) -> list[KeyChange]:
    """Keys of config.json, dotted, that differ."""
    return _changes(_flatten(a.config), _flatten(b.config))


def description_changes(a: Folder, b: Folder) -> list[KeyChange]:
    """Keys of the description that differ, numbers in tensor names replaced by N where all such keys change alike."""
    if not a.description or not b.description:
        return []
    found: dict[tuple[str, str | None, str | None], int] = {}
    for change in _changes(_flatten(a.description), _flatten(b.description)):
        key = (re.sub(r"\.[0-9]+\.", ".N.", change.key), change.a, change.b)
        found[key] = found.get(key, 0) + 1
    return [KeyChange(key if n == 1 else f"{key} ({n} keys)", x, y) for (key, x, y), n in found.items()]


def _flatten(document: Mapping[str, JsonValue], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _changes(a: Mapping[str, str], b: Mapping[str, str]) -> list[KeyChange]:
    keys = [*a, *(key for key in b if key not in a)]
    return [KeyChange(key, _brief(a.get(key)), _brief(b.get(key))) for key in keys if a.get(key) != b.get(key)]


def _brief(text: str | None) -> str | None:
    """A value for a table: the list of a quantization_config names hundreds of linears."""
    return text if text is None or len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"
