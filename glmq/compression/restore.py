"""decompress_checkpoint(): from a folder of the portable codec back to what it was made from, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Final

import torch
import xxhash
from torch import Tensor

from glmq.checkpoint.checksums import digest_of
from glmq.checkpoint.disk import FILE_MODE, check_room, make_directory, naming_full_disk, set_mode, write_at
from glmq.checkpoint.header import TensorInfo, parse_header, read_header
from glmq.checkpoint.json_file import write_whole
from glmq.checkpoint.layout import TensorSpec, plan_shards
from glmq.checkpoint.reader import Checkpoint, raw_bytes
from glmq.checkpoint.writer import ShardWriter
from glmq.codec.codec import decode
from glmq.compression.layouts import Unsharded
from glmq.compression.manifest import (
    MANIFEST,
    REPORT_FILES,
    CodecKind,
    Manifest,
    RankFile,
    checked_bytes,
    read_manifest,
)
from glmq.compression.split import SPLIT_STEM
from glmq.compression.stream import HEADER_SUFFIX, SOURCE_FOLDER, Step, describe_rank_file
from glmq.compression.weight_codec import BLOB_SUFFIX
from glmq.errors import CheckpointError, CodecError
from glmq.progress import resident_bytes
from glmq.spec import QuantType

_AGAIN: Final = "the folder is damaged or incomplete, copy it again"


def read_portable_manifest(directory: Path) -> Manifest:
    """The manifest of a folder that can be restored.

    Raises:
        CheckpointError: not a folder of `glmq compress`, or one with the engine's codec.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: is not a folder; give the folder that `glmq compress` wrote")
    manifest = read_manifest(directory)
    if manifest.codec is not CodecKind.PORTABLE:
        raise CheckpointError(
            f"{directory}: was compressed by the vendor's program, and only the serving engine reads that; "
            "keep the W8A8S folder, or compress with --codec portable, to have a way back"
        )
    if [part.rank for part in manifest.rank_files] != list(range(manifest.world)):
        raise CheckpointError(f"{directory}: {MANIFEST} does not list the parts 0 to {manifest.world - 1}; {_AGAIN}")
    return manifest


def restored_bytes(directory: Path, manifest: Manifest) -> int:
    """Bytes of the weights that decompress_checkpoint will write, from the parts' headers alone."""
    total = 0
    for part in manifest.rank_files:
        with _open_part(directory, part) as checkpoint:
            total += sum(spec.nbytes for spec in _restored_specs(checkpoint, part))
    return total


def decompress_checkpoint(directory: Path, manifest: Manifest, folder: Path, jobs: int) -> Generator[Step, None, None]:
    """Restore into `folder` what a portable folder was made from.

    One rank: the un-sharded checkpoint, file by file. Several: the W8A8S parts in MindIE's layout, uncompressed.

    Args:
        directory: the portable folder.
        manifest: its manifest, from read_portable_manifest.
        folder: exists; not yet under its final name.
        jobs: tiles decoded at a time.

    Raises:
        CheckpointError: a file or tensor that is missing or is not what the manifest says.
        CodecError: an altered blob; names the tensor and the tile.
        SpaceError: the disk fills up.
    """
    headers: dict[str, bytes] = {}
    for name, record in manifest.files.items():
        if name in REPORT_FILES:
            continue
        content = checked_bytes(directory, name, record)
        target = name.removeprefix(f"{SOURCE_FOLDER}/")
        if target != name and target.endswith(HEADER_SUFFIX):
            headers[target.removesuffix(HEADER_SUFFIX)] = content
        else:
            write_whole(folder / target, content)
    for part in manifest.rank_files:
        with _open_part(directory, part) as checkpoint:
            if manifest.layout is Unsharded.SOURCE:
                yield from _restore_files(checkpoint, part, directory, headers, folder, jobs)
            else:
                yield from _restore_part(checkpoint, part, (folder / part.file).parent, jobs)


def _open_part(directory: Path, part: RankFile) -> Checkpoint:
    """One rank's weight file; its size and header are what the manifest says."""
    path = directory / part.file
    header = read_header(path)
    if (
        header.file_bytes != part.nbytes
        or digest_of(header.raw) != part.header
        or set(header.tensors) != set(part.tensors)
    ):
        raise CheckpointError(f"{path}: is not the file that {MANIFEST} describes; {_AGAIN}")
    return Checkpoint(path.parent, {path: header})


def _restored_specs(checkpoint: Checkpoint, part: RankFile) -> list[TensorSpec]:
    specs = []
    for name in checkpoint:
        if name in part.matrices:
            specs.append(TensorSpec(name.removesuffix(BLOB_SUFFIX), "I8", part.matrices[name]))
        else:
            specs.append(TensorSpec(name, checkpoint[name].dtype, checkpoint[name].shape))
    return specs


def _restore_part(checkpoint: Checkpoint, part: RankFile, directory: Path, jobs: int) -> Iterator[Step]:
    """Several ranks: one W8A8S weight file with its description."""
    make_directory(directory)
    specs = _restored_specs(checkpoint, part)
    with ShardWriter(plan_shards(specs, SPLIT_STEM, None), directory) as sink:
        for stored, spec in zip(checkpoint, specs):
            row = 0
            for piece in _restored_pieces(checkpoint, part, stored, jobs):
                sink.write_rows(spec.name, row, piece)
                row += piece.shape[0]
                yield Step(spec.name, part.rank, piece.nbytes, resident_bytes())
    linears = [name.removesuffix(f".weight{BLOB_SUFFIX}") for name in part.matrices]
    describe_rank_file(directory, [spec.name for spec in specs], linears, QuantType.W8A8S)


def _restore_files(
    checkpoint: Checkpoint, part: RankFile, directory: Path, headers: dict[str, bytes], folder: Path, jobs: int
) -> Iterator[Step]:
    """One rank: the weight files of the un-sharded checkpoint, from their own headers."""
    waiting = set(checkpoint)
    for file_name, raw in headers.items():
        path = folder / file_name
        header = parse_header(directory / SOURCE_FOLDER / f"{file_name}{HEADER_SUFFIX}", raw)
        check_room(folder, header.file_bytes)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
        try:
            set_mode(handle, FILE_MODE)
            with naming_full_disk(path, header.file_bytes):
                os.ftruncate(handle, header.file_bytes)
            write_at(handle, path, raw, 0)
            for name, info in header.tensors.items():
                stored = f"{name}{BLOB_SUFFIX}" if f"{name}{BLOB_SUFFIX}" in part.matrices else name
                if stored not in waiting:
                    raise CheckpointError(
                        f"{checkpoint.directory}: has no tensor {name!r}, which {file_name} needs; {_AGAIN}"
                    )
                waiting.remove(stored)
                yield from _restore_tensor(handle, path, info, part, _restored_pieces(checkpoint, part, stored, jobs))
            os.fsync(handle)
        finally:
            os.close(handle)
    if waiting:
        raise CheckpointError(
            f"{checkpoint.directory}: tensor {min(waiting)!r} belongs into no file of the source; {_AGAIN}"
        )


def _restore_tensor(
    handle: int, path: Path, info: TensorInfo, part: RankFile, pieces: Iterator[Tensor]
) -> Iterator[Step]:
    at = info.start
    for piece in pieces:
        data = raw_bytes(piece)
        if at + len(data) > info.end:
            break
        write_at(handle, path, data, at)
        at += len(data)
        yield Step(info.name, part.rank, len(data), resident_bytes())
    if at != info.end:
        raise CheckpointError(f"{path.name}: {info.name!r} has not the size that the file's own header says; {_AGAIN}")


def _restored_pieces(checkpoint: Checkpoint, part: RankFile, stored: str, jobs: int) -> Iterator[Tensor]:
    """The values of a stored tensor, decoded where it is a blob, in blocks of dimension 0; checked at the end."""
    if stored in part.matrices:
        yield _decode(checkpoint, part, stored, jobs)
        return
    digest = xxhash.xxh3_128()
    for _, piece in checkpoint.pieces(stored):
        digest.update(raw_bytes(piece))
        yield piece
    _check_digest(checkpoint, part, stored, digest.hexdigest())


def _decode(checkpoint: Checkpoint, part: RankFile, stored: str, jobs: int) -> Tensor:
    blob = checkpoint.read(stored).numpy()
    try:
        matrix = decode(blob, threads=jobs)
    except CodecError as error:
        raise CodecError(f"{checkpoint.file_of(stored)}: {stored!r}: {error}; {_AGAIN}") from None
    _check_digest(checkpoint, part, stored, xxhash.xxh3_128_hexdigest(blob.data))
    if matrix.shape != part.matrices[stored]:
        wanted = part.matrices[stored]
        raise CodecError(f"{checkpoint.file_of(stored)}: {stored!r} holds {matrix.shape}, wanted {wanted}; {_AGAIN}")
    return torch.from_numpy(matrix)


def _check_digest(checkpoint: Checkpoint, part: RankFile, stored: str, found: str) -> None:
    if found != part.tensors[stored]:
        raise CheckpointError(
            f"{checkpoint.file_of(stored)}: tensor {stored!r} is altered, its checksum is not the one in {MANIFEST}; {_AGAIN}"
        )
