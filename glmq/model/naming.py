"""Names of tensors as trainers leave them, and which of the model's tensors each stands for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

from glmq.errors import CheckpointError, ForeignError
from glmq.model.family import Family, renamed

_ADAPTER: Final = re.compile(
    r"\.(?:base_layer|lora_[A-Za-z_]+|modules_to_save|original_module|ia3_l|hada_w[12]_[ab])\."
)
"""Modules of an adapter that was not merged into the weights."""


@dataclass(frozen=True, slots=True)
class Naming:
    """How a checkpoint calls the model's tensors."""

    names: Mapping[str, str]
    """Every tensor: its name in the model's own way of naming -> as it is stored."""
    changed: tuple[str, str] | None
    """A stored name and the model's, where they differ; None where none does."""


def find_naming(stored: Collection[str], family: Family, expected: Collection[str]) -> Naming:
    """Whose names these are: the way of naming under which the most of the model's tensors are there.

    Args:
        stored: names of the tensors of a checkpoint.
        family: knows how trainers wrap and rename its tensors.
        expected: names of the model's tensors.

    Raises:
        CheckpointError: an adapter that is not merged, or two tensors of one name.
    """
    adapter = next((name for name in stored if _ADAPTER.search(f"{name}.")), None)
    if adapter is not None:
        raise ForeignError(
            f"tensor {adapter!r} belongs to an adapter (LoRA or its like) that is not merged into the weights; "
            "merge it first, e.g. with peft's merge_and_unload(), and give the merged checkpoint"
        )
    wanted = set(expected)
    best, most = {name: name for name in stored}, sum(name in wanted for name in stored)
    bare = {name: _unwrapped(name, family) for name in stored}
    for wrapped in _wrappers(bare.values(), family):
        found = {name: renamed(bare[name].removeprefix(wrapped), family.foreign_names) for name in stored}
        count = sum(name in wanted for name in found.values())
        if count > most:
            best, most = found, count
    return _naming(best)


def _naming(renamed: Mapping[str, str]) -> Naming:
    names: dict[str, str] = {}
    for stored, name in renamed.items():
        if name in names:
            raise CheckpointError(
                f"tensors {names[name]!r} and {stored!r} both stand for {name!r}; remove the one that does not belong there"
            )
        names[name] = stored
    changed = next(((stored, name) for name, stored in names.items() if stored != name), None)
    return Naming(names, changed)


def _shared_start(first: str, last: str) -> str:
    """What two names have in common up to a dot; of the first and the last in order, what all names have."""
    pairs = zip(first.split(".")[:-1], last.split(".")[:-1], strict=False)
    return "".join(f"{part}." for part, other in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _unwrapped(name: str, family: Family) -> str:
    """A name without the modules that wrap some of the model's own: sharded, recomputed or compiled layers."""
    return ".".join(part for part in name.split(".") if f"{part}." not in family.inner_wrappers)


def _wrappers(stored: Iterable[str], family: Family) -> list[str]:
    """What wrapping modules may have put before every name: nothing, one of the family's or several, what all names share."""
    names = list(stored)
    found, prefix = [""], ""
    if names and (shared := _shared_start(min(names), max(names))):
        found.append(shared)
    while True:
        inner = next(
            (w for w in family.wrappers if sum(n.startswith(prefix + w) for n in names) > len(names) // 2), None
        )
        if inner is None:
            return found
        prefix += inner
        found.append(prefix)
