"""Compressed parts by role, over ranks and layers. Neither torch nor transformers is imported here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glmq.checkpoint.json_file import Fields, read_json_object
from glmq.errors import CheckpointError
from glmq.inspection.listing import TensorRow
from glmq.records import COMPRESS_REPORT
from glmq.wording import dimensions, size

_WEIGHT: Final = re.compile(r"\.weight(\.[^.]*)?$")
"""A weight, or what a codec made of it."""
_RANK: Final = re.compile(r"(?:part|rank)([0-9]{1,4})(?:-of-[0-9]{1,4})?/")


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """One weight of one rank as it was before it was compressed."""

    rows: int
    cols: int
    stored_bytes: int
    """Of everything that is stored for it."""


@dataclass(frozen=True, slots=True)
class PartRow:
    """All tensors of one role that are alike over ranks and layers."""

    layers: tuple[str, ...]
    role: str
    quant_type: str
    ranks: int
    shape: tuple[int, ...]
    """Of a rank's weight before it was compressed."""
    nbytes: int
    """Of all of them as stored."""
    weights: int
    """Those that are compressed; 0 where none is."""
    stored_bytes: int
    """Of the compressed weights."""

    @property
    def bits_per_weight(self) -> float | None:
        """None where nothing is compressed."""
        return 8 * self.stored_bytes / self.weights if self.weights else None

    @property
    def ratio(self) -> float | None:
        """int8 bytes over stored bytes; None where nothing is compressed."""
        return self.weights / self.stored_bytes if self.stored_bytes else None


def describe_part(row: PartRow) -> tuple[str, str, str, str, str, str]:
    """Its type, ranks, shape, bytes, bits per weight and ratio, as a line of a table has them behind its name."""
    bits = "" if row.bits_per_weight is None else f"{row.bits_per_weight:.3f}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return row.quant_type, str(row.ranks), dimensions(row.shape), size(row.nbytes), bits, ratio


def read_packed(directory: Path) -> dict[tuple[int, str], PackedWeight]:
    """By rank and linear, what the report of `glmq compress` says; empty where there is none that can be read."""
    path = directory / f"{COMPRESS_REPORT}.json"
    if not path.is_file():
        return {}
    try:
        document = Fields(read_json_object(path), str(path), CheckpointError)
        return {
            (linear.count("rank"), linear.text("name")): PackedWeight(
                linear.count("rows"), linear.count("cols"), linear.count("stored_bytes")
            )
            for linear in document.list_of_fields("linears")
        }
    except CheckpointError:  # only what it adds to the headers is lost
        return {}


@dataclass(frozen=True, slots=True)
class _Module:
    """What one rank stores of one module."""

    rank: int
    layer: str
    kind: tuple[str, str, str, tuple[int, ...]]
    """Layer without numbers, role, type, shape: what modules of one line have in common."""
    nbytes: int
    weight: PackedWeight | None


def group_parts(rows: Sequence[TensorRow], packed: Mapping[tuple[int, str], PackedWeight]) -> list[PartRow]:
    """One line per role that is alike over ranks and layers, in the order of the rows.

    Args:
        rows: tensors of a tree of parts.
        packed: from read_packed.
    """
    tensors: dict[tuple[int, str], list[TensorRow]] = {}
    for row in rows:
        found = _RANK.match(row.name)
        rank, name = (int(found[1]), row.name[found.end() :]) if found else (0, row.name)
        tensors.setdefault((rank, _module_of(name, packed, rank)), []).append(row)
    lines: dict[tuple[str, str, str, tuple[int, ...]], list[_Module]] = {}
    for (rank, name), members in tensors.items():
        module = _module(rank, members, packed.get((rank, name)))
        lines.setdefault(module.kind, []).append(module)
    return [_line(modules) for modules in lines.values()]


def _module_of(name: str, packed: Mapping[tuple[int, str], PackedWeight], rank: int) -> str:
    """The module that a tensor belongs to; a packed weight has a suffix more than others."""
    module = name.rpartition(".")[0]
    shorter = module.rpartition(".")[0]
    return shorter if module.endswith(".weight") or (rank, shorter) in packed else module


def _module(rank: int, members: Sequence[TensorRow], weight: PackedWeight | None) -> _Module:
    first = next((row for row in members if _WEIGHT.search(row.name)), members[0])
    layer = first.layer.rpartition("/")[2]
    shape = first.shape if weight is None else (weight.rows, weight.cols)
    kind = (re.sub(r"[0-9]+", "N", layer), first.role.removesuffix(".weight"), first.quant_type, shape)
    return _Module(rank, layer, kind, sum(row.nbytes for row in members), weight)


def _line(modules: Sequence[_Module]) -> PartRow:
    """Modules of one kind together."""
    _, role, quant_type, shape = modules[0].kind
    weights = [module.weight for module in modules if module.weight is not None]
    return PartRow(
        layers=tuple(dict.fromkeys(module.layer for module in modules)),
        role=role,
        quant_type=quant_type,
        ranks=len({module.rank for module in modules}),
        shape=shape,
        nbytes=sum(module.nbytes for module in modules),
        weights=sum(weight.rows * weight.cols for weight in weights),
        stored_bytes=sum(weight.stored_bytes for weight in weights),
    )
