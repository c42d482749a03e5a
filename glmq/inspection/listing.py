"""What is in a checkpoint, tensor by tensor, from headers alone. Neither torch nor transformers is imported here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from glmq.checkpoint.names import natural_key
from glmq.errors import PatternError
from glmq.inspection.folder import Folder, Kind, StoredTensor, layer_of, role_of
from glmq.model.config import FAMILY
from glmq.model.family import Area

_LAST_NUMBER: Final = re.compile(r"[0-9]{1,9}\Z")
"""No model has a layer with more digits; int() would refuse more than 4,300 of them."""


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One stored tensor."""

    name: str
    layer: str
    """The block or other place it belongs to, e.g. `layers.3`."""
    role: str
    """What it is there, e.g. `self_attn.q_proj`."""
    area: Area
    quant_type: str
    dtype: str
    """Code of the weight file, e.g. I8."""
    shape: tuple[int, ...]
    nbytes: int
    tensor: StoredTensor


@dataclass(frozen=True, slots=True)
class Total:
    """All tensors of one area of the model, or of one type."""

    label: str
    tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class LayerRow:
    """All tensors of one role in one layer: a line of the grouped listing."""

    layers: tuple[str, ...]
    """Consecutive layers that are alike."""
    role: str
    quant_type: str
    dtypes: str
    """Suffix and dtype of each tensor, e.g. `weight I8, deq_scale I64`."""
    shape: tuple[int, ...]
    """Of the `.weight`, else of the first tensor."""
    nbytes: int
    """Of one layer."""


SORT_KEYS: Final[dict[str, Callable[[TensorRow], tuple[object, ...]]]] = {
    "name": lambda row: (),
    "bytes": lambda row: (-row.nbytes,),
    "type": lambda row: (row.quant_type, row.dtype),
    "role": lambda row: (row.role,),
}
"""How --sort orders rows; equal ones stay in natural order of their names."""


def tensor_rows(folder: Folder) -> list[TensorRow]:
    """Every tensor, in natural order of the names."""
    return [
        TensorRow(
            name=tensor.name,
            layer=layer_of(tensor.name),
            role=role_of(tensor.name),
            area=FAMILY.area(FAMILY.checkpoint_name(tensor.name.rpartition("/")[2])),
            quant_type=tensor.quant_type,
            dtype=tensor.info.dtype,
            shape=tensor.info.shape,
            nbytes=tensor.info.nbytes,
            tensor=tensor,
        )
        for tensor in folder.tensors
    ]


def choose_rows(rows: Sequence[TensorRow], *, layer: str | None, name: str | None, sort: str) -> list[TensorRow]:
    """The rows that match the patterns, ordered.

    Args:
        layer: a number (`3`, the text layer), or a pattern with * and ? for the layer, e.g. `visual.*`; None takes all.
        name: a pattern with * and ? for the end of the name, or text that is looked for anywhere in it; None takes all.
        sort: a key of SORT_KEYS.

    Raises:
        UsageError: a pattern matches nothing.
    """
    chosen = list(rows)
    if layer is not None:
        wanted = f"layers.{layer}" if layer.isdigit() else layer
        chosen = [row for row in chosen if fnmatchcase(row.layer.rpartition("/")[2], wanted)]
        if not chosen:
            known = sorted({row.layer for row in rows})
            raise PatternError(f"--layer {layer}: matches no layer; there are {', '.join(known[:8])} and so on")
    if name is not None:
        pattern = f"*{name}" if any(mark in name for mark in "*?[") else f"*{name}*"
        chosen = [row for row in chosen if fnmatchcase(row.name, pattern)]
        if not chosen:
            raise PatternError(f"--name {name}: matches none of {len(rows)} tensors; try a part of a name or use *")
    return sorted(chosen, key=SORT_KEYS[sort])


def totals_by_area(rows: Sequence[TensorRow]) -> list[Total]:
    """Bytes by area of the model, in the order of Area, empty areas left out."""
    totals = []
    for area in Area:
        own = [row.nbytes for row in rows if row.area is area]
        if own:
            totals.append(Total(area.value, len(own), sum(own)))
    return totals


def totals_by_type(rows: Sequence[TensorRow]) -> list[Total]:
    """Bytes by quantization type and dtype, most bytes first."""
    totals: dict[str, Total] = {}
    for row in rows:
        label = f"{row.quant_type} {row.dtype}"
        before = totals.get(label, Total(label, 0, 0))
        totals[label] = Total(label, before.tensors + 1, before.nbytes + row.nbytes)
    return sorted(totals.values(), key=lambda total: -total.nbytes)


def group_rows(rows: Sequence[TensorRow]) -> list[LayerRow]:
    """One line per role and run of layers that are alike, in the order of the rows."""
    grouped: dict[tuple[str, str], list[TensorRow]] = {}
    for row in rows:
        grouped.setdefault((row.layer, row.role), []).append(row)
    lines: dict[tuple[object, ...], LayerRow] = {}
    for (layer, role), members in grouped.items():
        weight = next((m for m in members if m.name.endswith(".weight")), members[0])
        dtypes = ", ".join(f"{m.name.rpartition('.')[2]} {m.dtype}" for m in members)
        family = re.sub(r"[0-9]+", "N", layer)
        key = (family, role, weight.quant_type, dtypes, weight.shape)
        before = lines.get(key)
        lines[key] = LayerRow(
            (*(before.layers if before else ()), layer),
            role,
            weight.quant_type,
            dtypes,
            weight.shape,
            sum(m.nbytes for m in members),
        )
    return list(lines.values())


def describe_layers(layers: Sequence[str]) -> str:
    """`layers.0-39` for consecutive ones, `layers.0-2, 5` with a gap, the name itself for one."""
    runs: dict[str, list[list[str]]] = {}
    for layer in sorted(layers, key=natural_key):
        number = _LAST_NUMBER.search(layer)
        if number is None:
            runs[layer] = []
            continue
        own = runs.setdefault(layer[: number.start()], [])
        if own and int(number[0]) == int(own[-1][-1]) + 1:
            own[-1].append(number[0])
        else:
            own.append([number[0]])
    return ", ".join(
        stem + ", ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in own)
        for stem, own in runs.items()
    )


def describe_place(layers: Sequence[str], role: str) -> str:
    """`layers.0-39 mlp.down_proj`; only the layer where the role says the same, as of `lm_head`."""
    place = describe_layers(layers)
    return place if place == role or place.endswith(f".{role}") else f"{place} {role}"


def describe_folder(folder: Folder) -> str:
    """What the folder is, in one line."""
    floats = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
    dtype = next((floats[code] for code in folder.float_codes), "")
    if folder.kind is Kind.STATISTICS:
        return str(folder.kind.value)
    parts = [folder.kind.value if folder.method is None else f"{folder.kind.value} ({folder.method.title})"]
    if folder.quant_type is not None and folder.form is not None:
        parts.append(f"{folder.quant_type} ({folder.form.value})")
    if dtype:
        parts.append(f"{dtype} floats")
    return ", ".join(parts)
