"""What a folder is, from headers and JSON files alone. Neither torch nor transformers is imported here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Final

from glmq.checkpoint.compressed_config import CompressedConfig, is_compressed_tensors, read_compressed_config
from glmq.checkpoint.description import find_descriptions, form_of
from glmq.checkpoint.foreign import ForeignMethod, find_method
from glmq.checkpoint.header import FLOAT_CODES, TensorInfo, read_header
from glmq.checkpoint.json_file import JsonObject, JsonValue, read_json_object
from glmq.checkpoint.names import natural_key
from glmq.checkpoint.weight_files import INDEX_SUFFIX, PART_FOLDER, RANK_FILE, folders_below, read_index
from glmq.errors import CheckpointError, WrongFolderError
from glmq.model.config import FAMILY, how_to_fetch
from glmq.spec import PACKED_SUFFIXES, Form, QuantType

STATISTICS: Final = "statistics.json"
PORTABLE_FILE: Final = ".gqsc.safetensors"
MANIFEST_FILE: Final = "glmq_manifest.json"
LINEAR_SUFFIXES: Final = (
    "input_scale",
    "input_offset",
    "quant_bias",
    "deq_scale",
    "weight_scale",
    "weight_offset",
    "weight_scale_second",
    "weight_offset_second",
    "scale_bias",
    "input_zero_point",
    "weight_packed",
    "weight_shape",
)
"""Tensors that belong to an integer linear beside its `.weight`; a packed one has none of that name."""


class Kind(Enum):
    """What lies in a folder."""

    FLOAT = "float checkpoint"
    FOREIGN = "checkpoint that another tool has quantized"
    QUANTIZED = "quantized checkpoint"
    PARTS = "compressed parts, one folder a rank (MindIE)"
    SHARDED = "compressed parts, one file a rank (vLLM-Ascend)"
    PORTABLE = "compressed with the portable codec: for storage, no engine reads it"
    STATISTICS = "calibration statistics"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a folder."""

    name: str
    """As stored; in a tree of parts with the rank's folder or file in front, e.g. `part0-of-2/language_model.norm.weight`."""
    info: TensorInfo
    file: Path
    quant_type: str
    """By the description; where it has no entry, FLOAT for float dtypes and `?` for integers. `statistics` in such a folder."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder's tensors and JSON files."""

    directory: Path
    """Of one weight file alone: the file."""
    kind: Kind
    quant_type: str | None
    """model_quant_type of the description, or what quantization_config says instead; None without either."""
    form: Form | None
    """Of the description or of quantization_config; None without either."""
    config: JsonObject
    """Empty where config.json is missing or unreadable."""
    description: JsonObject
    """Empty without one."""
    tensors: tuple[StoredTensor, ...]
    """In natural order of their names."""
    problems: tuple[str, ...]
    """Why something here could not be read, one sentence each."""
    is_whole: bool
    """Every weight file that is there can be read, those that an index names are there, and it is not one rank's part."""
    method: ForeignMethod | None = None
    """Of a FOREIGN one."""
    stored: Mapping[str, str] | None = None
    """What `tensors` are called here -> as stored; None where that is the same."""

    @property
    def has_integers(self) -> bool:
        """Whether a tensor is int8, as the weights of quantized linears are."""
        return any(tensor.info.dtype == "I8" for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.info.nbytes for tensor in self.tensors)

    @property
    def float_codes(self) -> tuple[str, ...]:
        """Dtype codes of the float matrices, the most bytes first."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors:
            if tensor.info.dtype in FLOAT_CODES and len(tensor.info.shape) > 1:
                sizes[tensor.info.dtype] = sizes.get(tensor.info.dtype, 0) + tensor.info.nbytes
        return tuple(sorted(sizes, key=lambda code: -sizes[code]))


def scan_folder(directory: Path) -> Folder:
    """Read every header and the description and config.json of a folder; weights are not read.

    Raises:
        CheckpointError: no such folder, or nothing in it that glmq knows.
    """
    if not directory.is_dir():
        raise WrongFolderError(
            f"{directory}: is not a folder; give the folder that holds config.json and the weights{how_to_fetch(directory)}"
        )
    groups = _weight_files(directory)
    if not groups:
        advice = folders_below(directory, "*.safetensors") or "is this the right folder?"
        raise WrongFolderError(f"{directory}: has neither safetensors files nor part folders with some; {advice}")
    return _scan(directory, groups)


def scan_file(path: Path) -> Folder:
    """Read the header of one weight file, and config.json and the description beside it, which say what its tensors are.

    Raises:
        CheckpointError: it is no safetensors file.
    """
    read_header(path)
    found = _scan(path.parent, {f"rank{_rank(path)}/" if RANK_FILE.fullmatch(path.name) else "": [path]})
    return replace(found, directory=path, problems=())


def _scan(directory: Path, groups: Mapping[str, list[Path]]) -> Folder:
    """What lies in the files of some groups, described by the JSON files in `directory`."""
    problems: list[str] = []
    config = _read(directory / "config.json", problems) if (directory / "config.json").is_file() else {}
    kind = _kind(directory, groups, config)
    damaged = _damaged_indexes(directory, groups.get("", []), kind)
    if not config and PART_FOLDER.fullmatch(directory.resolve().name):
        damaged.append(f"{directory}: is one rank's part of a model; inspect the folder above it")
    elif not config and kind is not Kind.STATISTICS and not problems:
        problems.append(f"{directory}: has no config.json, so no engine can load it; copy it from the float checkpoint")
    description, form = _description(directory, groups, problems)
    quant_type = description.get("model_quant_type")
    compressed = None
    if form is None and kind is Kind.QUANTIZED:
        form = Form.COMPRESSED_TENSORS
        compressed = _compressed_config(directory, config, problems)
        quant_type = None if compressed is None else compressed.quant_type.value
    tensors: list[StoredTensor] = []
    for prefix, files in groups.items():
        seen: dict[str, Path] = {}
        own, _ = _description(files[0].parent, {}, []) if prefix and kind is not Kind.SHARDED else (description, None)
        for file in files:
            try:
                header = read_header(file)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            own = own if compressed is None else {**compressed.tensor_types(header.tensors)}
            for name, info in header.tensors.items():
                if name in seen:
                    problems.append(
                        f"{file.name}: has {name!r}, which is also in {seen[name].name}; engines refuse that"
                    )
                    continue
                seen[name] = file
                quant = "statistics" if kind is Kind.STATISTICS else _type_of(info, own, kind)
                tensors.append(StoredTensor(f"{prefix}{name}", info, file, quant))
    tensors.sort(key=lambda tensor: natural_key(tensor.name))
    method = find_method({t.name: t.info for t in tensors}, config) if kind is Kind.FLOAT and not description else None
    if method is not None:
        kind = Kind.FOREIGN
    elif not description and kind is Kind.FLOAT and any(t.info.dtype == "I8" for t in tensors):
        kind = Kind.QUANTIZED
        problems.append(f"{directory}: has int8 tensors but no quant_model_description.json; engines take it for float")
    return Folder(
        directory,
        kind,
        quant_type if isinstance(quant_type, str) else None,
        form,
        config,
        description,
        tuple(tensors),
        (*problems, *damaged),
        not damaged,
        method,
    )


def is_statistics(directory: Path) -> bool:
    """Whether a folder holds finished calibration statistics."""
    return (directory / STATISTICS).is_file()


def foreign_entries(folder: Folder) -> list[str]:
    """Names of what belongs to a checkpoint of another kind than the folder is: engines and people take one for the other."""
    patterns = {
        Kind.FLOAT: ("part*-of-*", "model-rank-*-part-*", MANIFEST_FILE, f"*{PORTABLE_FILE}"),
        Kind.FOREIGN: (),
        Kind.QUANTIZED: ("part*-of-*", "model-rank-*-part-*", MANIFEST_FILE, f"*{PORTABLE_FILE}"),
        Kind.PARTS: ("model-rank-*-part-*", f"part*-of-*/*{PORTABLE_FILE}"),
        Kind.SHARDED: ("part*-of-*", f"*{PORTABLE_FILE}"),
        Kind.PORTABLE: ("model-rank-*-part-*",),
        Kind.STATISTICS: (),
    }[folder.kind]
    found = {path for pattern in patterns for path in folder.directory.glob(pattern)}
    if folder.kind in (Kind.PARTS, Kind.PORTABLE):
        used = {tensor.file.parent for tensor in folder.tensors}
        found |= {path for path in folder.directory.glob("part*-of-*") if path not in used}
    return sorted(path.relative_to(folder.directory).as_posix() for path in found)


def _weight_files(directory: Path) -> dict[str, list[Path]]:
    """Weight files by the prefix that their tensors get: none, or a rank's."""
    own = sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("."))
    if own and all(RANK_FILE.fullmatch(path.name) for path in own):
        groups: dict[str, list[Path]] = {}
        for path in own:
            groups.setdefault(f"rank{_rank(path)}/", []).append(path)
        return groups
    if own:
        return {"": own}
    return {
        f"{part.name}/": files
        for part in sorted(directory.iterdir(), key=lambda path: natural_key(path.name))
        if PART_FOLDER.fullmatch(part.name) and (files := sorted(part.glob("*.safetensors")))
    }


def _damaged_indexes(directory: Path, files: Sequence[Path], kind: Kind) -> list[str]:
    """What is wrong with the indexes of un-sharded weight files, or with the files that they name.

    The float model's index beside quantized weights is none of theirs; `check_lookups` says what an engine makes of it.
    """
    found = []
    for path in sorted(directory.glob(f"*{INDEX_SUFFIX}")) if files else []:
        stem = path.name.removesuffix(INDEX_SUFFIX)
        if kind is Kind.FLOAT or any(file.name.startswith(stem) for file in files):
            try:
                read_index(path)
            except CheckpointError as error:
                found.append(str(error))
    return found


def _rank(path: Path) -> int:
    match = RANK_FILE.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _kind(directory: Path, groups: Mapping[str, list[Path]], config: JsonObject) -> Kind:
    if is_statistics(directory):
        return Kind.STATISTICS
    prefix = next(iter(groups))
    if any(path.name.endswith(PORTABLE_FILE) for files in groups.values() for path in files):
        return Kind.PORTABLE
    if prefix:
        return Kind.PARTS if prefix.startswith("part") else Kind.SHARDED
    return Kind.QUANTIZED if find_descriptions(directory) or is_compressed_tensors(config) else Kind.FLOAT


def _compressed_config(directory: Path, config: JsonObject, problems: list[str]) -> CompressedConfig | None:
    try:
        return read_compressed_config(config, str(directory / "config.json"))
    except CheckpointError as error:
        problems.append(str(error))
        return None


def _description(
    directory: Path, groups: Mapping[str, list[Path]], problems: list[str]
) -> tuple[JsonObject, Form | None]:
    """The description of a folder, or of its first part that has one; and the form that its name says."""
    places = [directory, *(files[0].parent for prefix, files in groups.items() if prefix)]
    for place in places:
        paths = find_descriptions(place)
        if len(paths) > 1:
            problems.append(f"{place}: has {len(paths)} descriptions; engines take the one without a type in its name")
        if paths:
            return _read(paths[0], problems), form_of(paths[0])
    return {}, None


def _read(path: Path, problems: list[str]) -> JsonObject:
    try:
        return read_json_object(path)
    except CheckpointError as error:
        problems.append(str(error))
        return {}


def _type_of(info: TensorInfo, description: Mapping[str, JsonValue], kind: Kind) -> str:
    found = description.get(info.name)
    if isinstance(found, str):
        return found
    if kind is Kind.PORTABLE and info.dtype not in FLOAT_CODES:
        return QuantType.W8A8S.value
    is_sparse = description.get("model_quant_type") == QuantType.W8A8SC.value
    if kind is Kind.SHARDED and is_sparse and info.dtype not in FLOAT_CODES:
        # The description has the names of the un-sharded checkpoint, and the types that its parts have everywhere.
        is_packed = info.name.rpartition(".")[2] in PACKED_SUFFIXES
        return QuantType.W8A8SC.value if is_packed else QuantType.W8A8S.value
    return QuantType.FLOAT.value if info.dtype in FLOAT_CODES else "?"


def plain_name(name: str) -> str:
    """A tensor's name, packed weights called `.weight` as in the float model."""
    return name.removesuffix("_packed") if name.endswith(".weight_packed") else name


def layer_of(name: str) -> str:
    """The block or other place that a tensor belongs to: `layers.3`, `visual.blocks.0`, `visual.merger`, `embed_tokens`.

    Takes names with and without `model.`, and those of statistics and of parts.
    """
    prefix, _, bare = name.rpartition("/")
    bare = FAMILY.short_name(bare)
    match = re.match(r"(layers\.[0-9]+|visual\.blocks\.[0-9]+|visual\.[a-z_]+|[a-z_]+)", bare)
    layer = bare if match is None else match[1]
    return f"{prefix}/{layer}" if prefix else layer


def role_of(name: str) -> str:
    """What a tensor is within its block: `self_attn.q_proj`, `input_layernorm`; the block's last word where it is alone."""
    bare = name.rpartition("/")[2]
    base = bare.rpartition(".")[0] or bare
    layer = layer_of(bare)
    role = base[base.find(layer) + len(layer) :].lstrip(".") if layer in base else base
    return role or layer.rpartition(".")[2]
