"""A compressed folder: what `glmq_manifest.json` says of it, and whether an engine's parts are what the engine needs.

Checks 21 to 25 of MindIE's parts, 27 and 28 of vLLM-Ascend's. With the W8A8S checkpoint beside them every tensor
is made again from there and compared bit for bit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Final

import torch

from glmq.checkpoint.checksums import digest_of
from glmq.checkpoint.description import find_descriptions
from glmq.checkpoint.header import read_header
from glmq.checkpoint.reader import Checkpoint, raw_bytes
from glmq.codec.codec import decode
from glmq.compression.layouts import rank_tensors
from glmq.compression.manifest import MANIFEST, REPORT_FILES, Manifest, RankFile, checked_bytes, read_manifest
from glmq.compression.shard import RankTensor, read_pieces
from glmq.compression.source import Source, open_source
from glmq.engines import Engine
from glmq.errors import CheckpointError, CodecError, GlmqError, ModelError
from glmq.inspection.folder import Folder, Kind, StoredTensor
from glmq.model.config import ModelConfig, parse_config
from glmq.spec import QuantType
from glmq.verification.checksums import checksum_of
from glmq.verification.engines.check import ENGINE_OF_PARTS
from glmq.verification.findings import Check, Checked, Finding, Skipped
from glmq.wording import list_names

TILING: Final = 8
"""The engine's kernel has it built in."""

_DTYPES: Final = {
    "weight": "I8",
    "index": "I8",
    "info": "I64",
    "quant_bias": "I32",
    "deq_scale": "I64",
    "input_scale": "F16",
    "input_offset": "I8",
}
_COMPRESSED: Final = ("index", "info")
"""Of compressed weights only."""
_PREFIX: Final = re.compile(r"(?:part([0-9]+)-of-([0-9]+)|rank([0-9]+))/")


def check_manifest(folder: Folder) -> Iterator[Finding | Checked | Skipped]:
    """Check 33: every byte of a folder that `glmq compress` wrote is still there.

    Blobs of the portable codec are decoded, which checks each of their tiles. A folder that glmq wrote must have a manifest;
    parts of another tool have none.
    """
    directory = folder.directory
    if not (directory / MANIFEST).exists():
        if folder.kind is Kind.PORTABLE or any((directory / name).exists() for name in REPORT_FILES):
            message = f"{MANIFEST} is missing, `glmq compress` writes one; without it nothing proves the weights"
            yield Check.MANIFEST.error("", message)
        else:
            yield Skipped(f"single bits (no {MANIFEST} was written)")
        return
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        yield Check.MANIFEST.error("", str(error))
        return
    yield from _check_rest(directory, manifest)
    for part in manifest.rank_files:
        yield from _check_part_bytes(directory, part)
    tensors = sum(len(part.tensors) for part in manifest.rank_files)
    yield Checked(f"the bytes of {tensors} tensors and {len(manifest.files)} files by {MANIFEST}")


def _check_rest(directory: Path, manifest: Manifest) -> Iterator[Finding | Skipped]:
    """Everything beside the weight files."""
    listed = {MANIFEST, *manifest.files, *(part.file for part in manifest.rank_files)}
    others: list[str] = []
    for path in sorted(path for path in directory.rglob("*") if not path.is_dir()):
        name = path.relative_to(directory).as_posix()
        if name not in listed and path.suffix in (".safetensors", ".json"):
            yield Check.MANIFEST.error("", f"{name} is not in {MANIFEST}; it does not belong here")
        elif name not in listed:
            others.append(name)
    if others:
        yield Skipped(f"{list_names(others)} (not written by glmq)")
    for name, record in manifest.files.items():
        try:
            checked_bytes(directory, name, record)
        except CheckpointError as error:
            yield Check.MANIFEST.error("", str(error))


def _check_part_bytes(directory: Path, part: RankFile) -> Iterator[Finding]:
    path = directory / part.file
    try:
        header = read_header(path)
    except CheckpointError as error:
        yield Check.MANIFEST.error("", str(error))
        return
    if digest_of(header.raw) != part.header or set(header.tensors) != set(part.tensors):
        yield Check.MANIFEST.error("", f"{part.file}: its header is not the one in {MANIFEST}")
        return
    with Checkpoint(path.parent, {path: header}) as checkpoint:
        for name, digest in part.tensors.items():
            where = f"{part.file}: {name}"
            if name in part.matrices:
                yield from _check_blob(checkpoint, name, where, part.matrices[name])
            if checksum_of(checkpoint, name) != digest:
                yield Check.MANIFEST.error(where, f"is altered, its checksum is not the one in {MANIFEST}")


def _check_blob(checkpoint: Checkpoint, name: str, where: str, shape: tuple[int, int]) -> Iterator[Finding]:
    try:
        found = decode(checkpoint.read(name).numpy(), threads=1).shape
    except CodecError as error:
        yield Check.MANIFEST.error(where, str(error))
        return
    if found != shape:
        yield Check.MANIFEST.error(where, f"holds a matrix of {found}, {MANIFEST} says {shape}")


def check_parts(folder: Folder, source_dir: Path | None) -> Iterator[Finding]:
    """Checks 21 to 25, 27 and 28 of weights that are laid out for an engine.

    Args:
        folder: of kind PARTS or SHARDED.
        source_dir: the W8A8S checkpoint they were made from; without it, nothing is compared with one.
    """
    first = Check.PART_FILES if folder.kind is Kind.PARTS else Check.SHARD_FILES
    for problem in folder.problems:
        yield first.error("", problem)
    config = yield from _check_top(folder, first)
    ranks: dict[tuple[int, int], dict[str, StoredTensor]] = {}
    for tensor in folder.tensors:
        match = _PREFIX.match(tensor.name)
        assert match is not None
        rank, world = int(match[1] or match[3]), int(match[2] or 0)
        ranks.setdefault((world, rank), {})[tensor.name[match.end() :]] = tensor
    if folder.kind is Kind.SHARDED:
        ranks = {(len(ranks), rank): tensors for (_, rank), tensors in ranks.items()}
    source = yield from _open_source(source_dir, first)
    for world in sorted({world for world, _ in ranks}):
        for rank in range(world):
            if (world, rank) not in ranks:
                yield first.error("", f"rank {rank} of {world} is missing; every rank needs its own weights")
    for (world, rank), tensors in sorted(ranks.items()):
        with _RankWeights(folder, rank, world, tensors) as part:
            yield from _check_description(part)
            yield from _check_names(part, ranks.get((world, 0), {}))
            yield from _check_linears(part)
            if source is not None and config is not None:
                yield from _check_against(part, source)
    if source is not None:
        source.checkpoint.close()


class _RankWeights:
    """The weights of one tensor-parallel rank; its files stay open until the end of `with`."""

    def __init__(self, folder: Folder, rank: int, world: int, tensors: Mapping[str, StoredTensor]) -> None:
        self.rank, self.world, self.tensors = rank, world, tensors
        self.label = f"rank {rank} of {world}"
        self.layout = ENGINE_OF_PARTS[folder.kind]
        has_index = any(name.endswith(".index") for name in tensors)
        self.is_compressed = has_index or folder.quant_type != QuantType.W8A8S.value
        self.suffixes = _DTYPES if self.is_compressed else {k: v for k, v in _DTYPES.items() if k not in _COMPRESSED}
        """Of each integer linear, with their dtypes."""
        self.quant_type = (QuantType.W8A8SC if self.is_compressed else QuantType.W8A8S).value
        self._files: dict[Path, Checkpoint] = {}

    def __enter__(self) -> _RankWeights:
        return self

    def __exit__(self, *_: object) -> None:
        for checkpoint in self._files.values():
            checkpoint.close()

    def read(self, name: str) -> torch.Tensor:
        """One of its tensors."""
        file = self.tensors[name].file
        if file not in self._files:
            self._files[file] = Checkpoint(file.parent, {file: read_header(file)})
        return self._files[file].read(name)

    def linears(self) -> Iterator[str]:
        """Names of the linears that are stored as integers."""
        for name, tensor in self.tensors.items():
            if name.endswith(".weight") and tensor.info.dtype == "I8":
                yield name.removesuffix(".weight")


def _check_top(folder: Folder, check: Check) -> Generator[Finding, None, ModelConfig | None]:
    """The folder's own config.json and description."""
    quantize = folder.config.get("quantize")
    if quantize is not None and (folder.kind is Kind.SHARDED or quantize != "w8a8sc"):
        wanted = "absent" if folder.kind is Kind.SHARDED else "absent or 'w8a8sc'"
        yield check.error("", f"config.json says quantize {quantize!r}, wanted it {wanted}")
    if "quantization_config" in folder.config:
        yield check.error("", "config.json has quantization_config, which must be absent")
    for where in ("", "text_config", "vision_config"):
        section = folder.config if not where else folder.config.get(where)
        for key in ("torch_dtype", "dtype"):
            found = section.get(key, "float16") if isinstance(section, Mapping) else "float16"
            if found != "float16":
                place = f"{where}.{key}".lstrip(".")
                yield check.error("", f"config.json says {place} {found!r}, W8A8SC runs in float16 only")
    if folder.kind is Kind.PARTS:
        for path in find_descriptions(folder.directory):
            yield check.error("", f"{path.name} lies beside the parts; the engine takes its type for theirs")
    elif folder.quant_type != "W8A8SC":
        yield check.error("", f"the description says {folder.quant_type}, wanted W8A8SC")
    try:
        return parse_config(folder.config, str(folder.directory / "config.json"))
    except ModelError as error:
        yield check.error("", str(error))
        return None


def _open_source(directory: Path | None, check: Check) -> Generator[Finding, None, Source | None]:
    if directory is None:
        return None
    try:
        return open_source(directory)
    except (CheckpointError, ModelError) as error:
        yield check.error("", f"cannot be compared with its source: {error}")
        return None


def _check_description(part: _RankWeights) -> Iterator[Finding]:
    """Checks 21 and 22: one weight file and one description for each of MindIE's ranks, every tensor described."""
    if part.layout is not Engine.MINDIE:
        return
    place = next(iter(part.tensors.values())).file.parent
    weights, descriptions = list(place.glob("*.safetensors")), find_descriptions(place)
    for what, paths in (("weight files", weights), ("descriptions", descriptions)):
        if len(paths) != 1:
            yield Check.PART_FILES.error("", f"{part.label} has {len(paths)} {what}, wanted one")
    for name, tensor in part.tensors.items():
        integers = tensor.info.dtype == "I8" and name.endswith((".weight", ".index"))
        if tensor.quant_type == "?" or (integers and tensor.quant_type != part.quant_type):
            found = "nothing" if tensor.quant_type == "?" else tensor.quant_type
            yield Check.PART_NAMES.error(f"{part.label}: {name}", f"is described as {found}")


def _check_names(part: _RankWeights, first: Mapping[str, StoredTensor]) -> Iterator[Finding]:
    """Check 22: every rank has the same tensors, under the engine's names."""
    for name in part.tensors.keys() ^ first.keys():
        where = "only on rank 0" if name in first else f"only on {part.label}"
        yield Check.PART_NAMES.error(f"{part.label}: {name}", f"is {where}; all ranks need the same tensors")
    for name in part.tensors:
        if name.startswith("model."):
            yield Check.PART_NAMES.error(f"{part.label}: {name}", "has the name of the un-sharded checkpoint")


def _check_linears(part: _RankWeights) -> Iterator[Finding]:
    """Checks 23, 24 and 28 of each integer linear."""
    check = Check.PART_LINEARS if part.layout is Engine.MINDIE else Check.SHARD_LINEARS
    for linear in part.linears():
        where = f"{part.label}: {linear}"
        missing = [suffix for suffix in part.suffixes if f"{linear}.{suffix}" not in part.tensors]
        if linear.endswith("query_key_value") and f"{linear}.bias" not in part.tensors:
            missing.append("bias")
        for suffix in missing:
            yield check.error(
                f"{where}.{suffix}",
                f"is missing, a {'compressed' if part.is_compressed else part.quant_type} linear has it",
            )
        wrong = False
        for suffix, code in part.suffixes.items():
            found = part.tensors.get(f"{linear}.{suffix}")
            if found is not None and found.info.dtype != code:
                wrong = True
                yield check.error(f"{where}.{suffix}", f"has dtype {found.info.dtype}, wanted {code}")
        if not missing and not wrong:
            yield from _check_sizes(part, linear, where, check)


def _check_sizes(part: _RankWeights, linear: str, where: str, check: Check) -> Iterator[Finding]:
    if not part.is_compressed:
        rows, cols = part.tensors[f"{linear}.weight"].info.shape
        yield from _check_scales(part, linear, where, check, {"weight": (rows, cols)} | _scale_shapes(rows))
        return
    info = part.read(f"{linear}.info").tolist()
    if len(info) != 5 or info[:2] != [TILING, TILING] or info[4] != 1 or min(info[2:4]) < 1:
        yield check.error(f"{where}.info", f"is {info}, wanted [8, 8, columns, rows, 1]")
        return
    cols, rows = info[2], info[3]
    padded = math.ceil(cols / 32) * math.ceil(rows / 16) * 512
    length = math.prod(part.tensors[f"{linear}.weight"].info.shape)
    limit = padded if part.layout is Engine.MINDIE else cols * rows
    if not 0 < length <= limit:
        yield check.error(f"{where}.weight", f"has {length} bytes, wanted 1 to {limit} for {rows} x {cols}")
    shapes = {"weight": (length,), "index": (index_length(rows, cols),)} | _scale_shapes(rows)
    yield from _check_scales(part, linear, where, check, shapes)


def _scale_shapes(rows: int) -> dict[str, tuple[int, ...]]:
    return {"deq_scale": (rows,), "quant_bias": (rows,), "input_scale": (1,), "input_offset": (1,)}


def _check_scales(
    part: _RankWeights, linear: str, where: str, check: Check, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Finding]:
    for suffix, shape in shapes.items():
        found = part.tensors[f"{linear}.{suffix}"].info.shape
        if found != shape:
            yield check.error(f"{where}.{suffix}", f"has shape {list(found)}, wanted {list(shape)}")
    deq = part.read(f"{linear}.deq_scale")
    if not bool(((deq > 0) & (deq < 0x7F800000)).all()):
        yield check.error(f"{where}.deq_scale", "does not hold the bits of positive finite numbers")
    scale = float(part.read(f"{linear}.input_scale").flatten()[0])
    if not 0 < scale < math.inf:
        yield check.error(f"{where}.input_scale", f"is {scale:g}, wanted a positive number")
    if part.layout is Engine.MINDIE and part.rank > 0 and linear.endswith((".o_proj", ".down_proj")):
        # The engine adds it on every rank before it sums the ranks.
        values = part.read(f"{linear}.quant_bias")
        if bool(values.any()):
            yield Check.PART_BIAS.error(
                f"{where}.quant_bias",
                "is not zero on a rank above 0; the engine would add it twice",
            )


def index_length(rows: int, cols: int) -> int:
    """Length of the index of one compressed weight: 8 for each 8 x 8 square of its 16 x 32 tiles."""
    return 8 * math.ceil(math.ceil(cols / 32) / 8) * math.ceil(math.ceil(rows / 16) / 8)


def _check_against(part: _RankWeights, source: Source) -> Iterator[Finding]:
    """Check 25: every tensor made again from the W8A8S checkpoint. Compressed weights are compared by size alone."""
    try:
        wanted = rank_tensors(source.checkpoint, source.config, part.layout, part.rank, part.world)
        matrices = {tensor.spec.name.removesuffix(".weight") for tensor in wanted if tensor.is_matrix}
        names = {tensor.spec.name for tensor in wanted}
        for base in matrices if part.is_compressed else ():
            names |= {f"{base}.index", f"{base}.info"}
        for name in sorted(names ^ part.tensors.keys()):
            where = "is missing" if name in names else "belongs to nothing in the source"
            yield Check.PART_SOURCE.error(f"{part.label}: {name}", where)
        for tensor in wanted:
            if tensor.spec.name in part.tensors:
                yield from _check_same(part, tensor, source.checkpoint)
    except GlmqError as error:
        yield Check.PART_SOURCE.error(part.label, f"cannot be made again from the source: {error}")


def _check_same(part: _RankWeights, tensor: RankTensor, source: Checkpoint) -> Iterator[Finding]:
    name, where = tensor.spec.name, f"{part.label}: {tensor.spec.name}"
    if tensor.is_matrix and part.is_compressed:
        base = name.removesuffix(".weight")
        if f"{base}.info" in part.tensors:
            found = part.read(f"{base}.info").tolist()[2:4]
            if found != list(tensor.spec.shape[::-1]):
                message = f"says {found} columns and rows, the source gives {list(tensor.spec.shape[::-1])}"
                yield Check.PART_SOURCE.error(f"{where.removesuffix('weight')}info", message)
        return
    info = part.tensors[name].info
    if (info.dtype, info.shape) != (tensor.spec.dtype, tensor.spec.shape):
        message = f"is {info.dtype} {list(info.shape)}, the source gives {tensor.spec.dtype} {list(tensor.spec.shape)}"
        yield Check.PART_SOURCE.error(where, message)
        return
    found_bytes, at = raw_bytes(part.read(name)), 0
    for piece in read_pieces(source, tensor):
        data = raw_bytes(piece)
        if found_bytes[at : at + len(data)] != data:
            yield Check.PART_SOURCE.error(where, "differs from what the source gives")
            return
        at += len(data)
