"""glmq_source/ of a portable folder: what else the compressed checkpoint had, so that the very same files can be made again.

{file}                  every file beside weights and side files; with several ranks config.json too, which its parts alter
{weight file}.header    the header of each weight file
glmq_slices.json        several ranks: which slices of the source's tensors stand in each tensor of each part
glmq_kept.tensors       several ranks: the few tensors that the parts leave out or cast, in the format of safetensors
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from glmq.checkpoint.disk import make_directory
from glmq.checkpoint.header import Header, TensorInfo, parse_header
from glmq.checkpoint.json_file import Fields, JsonObject, parse_json, write_json, write_whole
from glmq.checkpoint.reader import Checkpoint
from glmq.checkpoint.sidecar import list_side_files
from glmq.checkpoint.writer import write_tensors
from glmq.compression.manifest import AGAIN, Manifest, checked_bytes
from glmq.compression.shard import RankTensor, Slice
from glmq.errors import CheckpointError, DamagedError

SOURCE_FOLDER: Final = "glmq_source"
HEADER_SUFFIX: Final = ".header"
SLICES: Final = "glmq_slices.json"
KEPT: Final = "glmq_kept.tensors"
SCHEMA: Final = "glmq.slices/1"
OWN_FILES: Final = frozenset({f"{SOURCE_FOLDER}/{name}" for name in (SLICES, KEPT)})
"""Those that no checkpoint had."""


def keep_origin(source: Checkpoint, folder: Path, ranks: Sequence[Sequence[RankTensor]] | None) -> None:
    """Write glmq_source/ into `folder`.

    Args:
        source: the checkpoint that was compressed.
        folder: of the parts; the source's side files are there.
        ranks: the tensors of each part, rank 0 first; None for the one part that has the source's own tensors.

    Raises:
        CheckpointError: a file of the source cannot be read.
        SpaceError: the disk is full.
    """
    target = folder / SOURCE_FOLDER
    make_directory(target)
    weights = {path.name for path in source.files()}
    elsewhere = {*list_side_files(source.directory), *weights, *(["config.json"] if ranks is None else [])}
    for path in sorted(source.directory.iterdir()):
        if path.is_file() and path.name not in elsewhere and path.suffix != ".safetensors" and path.name[0] != ".":
            write_whole(target / path.name, path.read_bytes())
    for path in source.files():
        write_whole(target / f"{path.name}{HEADER_SUFFIX}", source.header(path).raw)
    if ranks is not None:
        document: JsonObject = {"schema": SCHEMA, "parts": [_slices_document(tensors) for tensors in ranks]}
        write_json(target / SLICES, document, indent=0)
        write_tensors(target / KEPT, {name: source.read(name) for name in missing_tensors(source, ranks)})


def missing_tensors(source: Checkpoint, ranks: Sequence[Sequence[RankTensor]]) -> list[str]:
    """The tensors that the parts do not hold whole and in their own dtype, in natural order."""
    held: dict[str, set[Slice]] = {name: set() for name in source}
    for tensor in (tensor for tensors in ranks for tensor in tensors):
        for part in tensor.slices:
            if part.name is not None and source[part.name].dtype == tensor.spec.dtype:
                held[part.name].add(part)
    return [
        name
        for name, slices in held.items()
        if sum(part.rows * part.cols for part in slices) != math.prod(source[name].shape)
    ]


def read_headers(directory: Path, manifest: Manifest) -> dict[str, Header]:
    """The headers of the source's weight files, by the files' names.

    Raises:
        CheckpointError: a header that is missing or altered.
    """
    headers: dict[str, Header] = {}
    for name, record in manifest.files.items():
        file = name.removeprefix(f"{SOURCE_FOLDER}/")
        if file != name and file.endswith(HEADER_SUFFIX):
            headers[file.removesuffix(HEADER_SUFFIX)] = parse_header(
                directory / name, checked_bytes(directory, name, record)
            )
    return headers


def read_slices(directory: Path, manifest: Manifest) -> list[Mapping[str, tuple[Slice, ...]]]:
    """Of each part, rank 0 first: tensor -> the slices of the source's tensors that stand in it.

    Raises:
        CheckpointError: the folder does not say, or what it says is damaged.
    """
    name = f"{SOURCE_FOLDER}/{SLICES}"
    if name not in manifest.files:
        raise CheckpointError(
            f"{directory}: does not say how its {manifest.world} parts were cut, an older glmq wrote it; "
            "compress the W8A8S folder again"
        )
    path = directory / name
    content = checked_bytes(directory, name, manifest.files[name])
    try:
        document = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; {AGAIN}") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path}: is not of the schema {SCHEMA!r}, which this glmq reads; use the glmq that wrote it"
        )
    fields = Fields(document, str(path), lambda sentence: CheckpointError(f"{sentence}; {AGAIN}"))
    parts = fields.list_of_fields("parts")
    if len(parts) != manifest.world:
        raise DamagedError(f"{path}: is of {len(parts)} parts, the folder has {manifest.world}; {AGAIN}")
    return [
        {tensor: tuple(_parse_slice(one) for one in part.list_of_fields(tensor)) for tensor in part} for part in parts
    ]


def matrix_size(info: TensorInfo) -> tuple[int, int]:
    """Rows and columns of a tensor with the dimensions after the first flattened; a scalar has one of each."""
    return (info.shape[0] if info.shape else 1), math.prod(info.shape[1:])


def _slices_document(tensors: Sequence[RankTensor]) -> JsonObject:
    return {tensor.spec.name: [_slice_document(part) for part in tensor.slices] for tensor in tensors}


def _slice_document(part: Slice) -> JsonObject:
    return {"of": part.name or "", "at": [part.row_start, part.row_stop, part.col_start, part.col_stop]}


def _parse_slice(fields: Fields) -> Slice:
    row_start, row_stop, col_start, col_stop = fields.counts("at", 4)
    return Slice(fields.text("of") or None, row_start, row_stop, col_start, col_stop)
