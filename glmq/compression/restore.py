"""decompress_checkpoint(): from a folder of the portable codec back to what it was made from, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from glmq.checkpoint.checksums import digest_of
from glmq.checkpoint.disk import FILE_MODE, check_room, naming_full_disk, set_mode, write_at
from glmq.checkpoint.header import Header, TensorInfo, read_header
from glmq.checkpoint.json_file import write_whole
from glmq.checkpoint.reader import Checkpoint, raw_bytes
from glmq.codec.codec import decode
from glmq.compression.layouts import Unsharded
from glmq.compression.manifest import (
    AGAIN,
    MANIFEST,
    REPORT_FILES,
    CodecKind,
    Manifest,
    RankFile,
    checked_bytes,
    read_manifest,
)
from glmq.compression.origin import (
    HEADER_SUFFIX,
    KEPT,
    OWN_FILES,
    SOURCE_FOLDER,
    matrix_size,
    read_headers,
    read_slices,
)
from glmq.compression.shard import Slice
from glmq.compression.stream import Step
from glmq.compression.weight_codec import BLOB_SUFFIX
from glmq.errors import CheckpointError, CodecError, DamagedError, WrongFolderError
from glmq.progress import resident_bytes


def read_portable_manifest(directory: Path) -> Manifest:
    """The manifest of a folder that can be restored.

    Raises:
        CheckpointError: not a folder of `glmq compress`, or one with the engine's codec.
    """
    if not directory.is_dir():
        raise WrongFolderError(f"{directory}: is not a folder; give the folder that `glmq compress` wrote")
    manifest = read_manifest(directory)
    if manifest.codec is not CodecKind.PORTABLE:
        raise WrongFolderError(
            f"{directory}: was compressed by the vendor's program, and only the serving engine reads that; "
            "keep the W8A8S folder, or compress with --codec portable, to have a way back"
        )
    if [part.rank for part in manifest.rank_files] != list(range(manifest.world)):
        raise DamagedError(f"{directory}: {MANIFEST} does not list the parts 0 to {manifest.world - 1}; {AGAIN}")
    return manifest


def restored_bytes(directory: Path, manifest: Manifest) -> int:
    """Bytes of the weights that decompress_checkpoint will write, from the headers of the source's files.

    Raises:
        CheckpointError: the folder is damaged, or does not say how its parts were cut.
    """
    for part in manifest.rank_files:
        with _open_part(directory, part):  # a damaged part is found before anything is written
            pass
    if manifest.layout is not Unsharded.SOURCE:
        read_slices(directory, manifest)
    return sum(header.file_bytes - len(header.raw) for header in read_headers(directory, manifest).values())


def decompress_checkpoint(directory: Path, manifest: Manifest, folder: Path, jobs: int) -> Generator[Step, None, None]:
    """Restore into `folder` the un-sharded checkpoint that a portable folder was made from, whatever its number of parts.

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
    for name, record in manifest.files.items():
        target = name.removeprefix(f"{SOURCE_FOLDER}/")
        is_altered = target == name and f"{SOURCE_FOLDER}/{name}" in manifest.files
        if name in REPORT_FILES or name in OWN_FILES or is_altered:
            continue
        content = checked_bytes(directory, name, record)
        if target == name or not target.endswith(HEADER_SUFFIX):
            write_whole(folder / target, content)
    with closing(_SourceFiles(folder, read_headers(directory, manifest))) as files:
        is_whole = manifest.layout is Unsharded.SOURCE
        cuts = [] if is_whole else read_slices(directory, manifest)
        for part in manifest.rank_files:
            with _open_part(directory, part) as checkpoint:
                slices = _whole_slices(checkpoint, part) if is_whole else cuts[part.rank]
                yield from _restore_rank(checkpoint, part, slices, files, jobs)
        if not is_whole:
            yield from _restore_kept(directory, manifest, files)
        files.finish()


def restored_tensors(directory: Path, manifest: Manifest, jobs: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a portable folder of one rank was made from, by its name, decoded and checked one at a time.

    Args:
        directory: the portable folder.
        manifest: its manifest, from read_portable_manifest.
        jobs: tiles decoded at a time.

    Raises:
        CheckpointError: parts of several ranks, or a tensor that is not what the manifest says.
        CodecError: an altered blob; names the tensor and the tile.
    """
    if manifest.layout is not Unsharded.SOURCE:
        raise CheckpointError(
            f"{directory}: holds parts of {manifest.world} ranks, not the tensors of a whole model; compress with --tp 1"
        )
    for part in manifest.rank_files:
        with _open_part(directory, part) as checkpoint:
            for stored in checkpoint:
                name = _name_of(stored, part)
                yield name, torch.cat(list(_restored_pieces(checkpoint, part, stored, jobs)))


def _open_part(directory: Path, part: RankFile) -> Checkpoint:
    """One rank's weight file; its size and header are what the manifest says."""
    path = directory / part.file
    header = read_header(path)
    if (
        header.file_bytes != part.nbytes
        or digest_of(header.raw) != part.header
        or set(header.tensors) != set(part.tensors)
    ):
        raise DamagedError(f"{path}: is not the file that {MANIFEST} describes; {AGAIN}")
    return Checkpoint(path.parent, {path: header})


def _name_of(stored: str, part: RankFile) -> str:
    """The name of a tensor that is stored, which has a suffix more where it is a blob."""
    return stored.removesuffix(BLOB_SUFFIX) if stored in part.matrices else stored


def _whole_slices(checkpoint: Checkpoint, part: RankFile) -> dict[str, tuple[Slice, ...]]:
    """Of a part that holds the source's own tensors."""
    slices: dict[str, tuple[Slice, ...]] = {}
    for stored, info in checkpoint.items():
        name = _name_of(stored, part)
        rows, cols = part.matrices[stored] if stored in part.matrices else matrix_size(info)
        slices[name] = (Slice(name, 0, rows, 0, cols),)
    return slices


def _restore_kept(directory: Path, manifest: Manifest, files: _SourceFiles) -> Iterator[Step]:
    """Write the tensors that no part has."""
    name = f"{SOURCE_FOLDER}/{KEPT}"
    if name not in manifest.files:
        raise CheckpointError(f"{directory}: {MANIFEST} does not list {name}; {AGAIN}")
    checked_bytes(directory, name, manifest.files[name])
    path = directory / name
    with Checkpoint(path.parent, {path: read_header(path)}) as kept:
        for tensor, info in kept.items():
            rows, cols = matrix_size(info)
            one = Slice(tensor, 0, rows, 0, cols)
            if files.wants(one, info.dtype, path):
                count = files.write(one, 0, kept.read(tensor).reshape(rows, cols))
                yield Step(tensor, 0, count, resident_bytes())


def _restore_rank(
    checkpoint: Checkpoint, part: RankFile, slices: Mapping[str, tuple[Slice, ...]], files: _SourceFiles, jobs: int
) -> Iterator[Step]:
    """Write what one part holds of the source's tensors."""
    for stored in checkpoint:
        name = _name_of(stored, part)
        own = _own_slices(checkpoint, part, stored, slices.get(name, ()), files)
        if not own:
            continue
        row = 0
        for piece in _restored_pieces(checkpoint, part, stored, jobs):
            block = piece.reshape(piece.shape[0] if piece.dim() else 1, -1)
            for start, one in own:
                first, last = max(start - row, 0), min(start + one.rows - row, block.shape[0])
                if first < last:
                    count = files.write(one, row + first - start, block[first:last])
                    yield Step(name, part.rank, count, resident_bytes())
            row += block.shape[0]


def _own_slices(
    checkpoint: Checkpoint, part: RankFile, stored: str, slices: Sequence[Slice], files: _SourceFiles
) -> list[tuple[int, Slice]]:
    """The slices that a stored tensor is the first to give, each with its first row there.

    Raises:
        CheckpointError: a slice that does not fit the stored tensor or the source's.
    """
    where, info = checkpoint.file_of(stored), checkpoint[stored]
    (rows, cols), dtype = (part.matrices[stored], "I8") if stored in part.matrices else (matrix_size(info), info.dtype)
    if sum(one.rows for one in slices) != rows or any(one.rows < 1 or not one.cols == cols > 0 for one in slices):
        raise DamagedError(f"{where}: {stored!r} has not the size of what it was cut from; {AGAIN}")
    own: list[tuple[int, Slice]] = []
    row = 0
    for one in slices:
        if one.name is not None and files.wants(one, dtype, where):
            own.append((row, one))
        row += one.rows
    return own


class _SourceFiles:
    """The source's weight files while they are made: headers first, then the tensors' bytes in any order.

    Args:
        folder: holds them.
        headers: of each file, by its name.
    """

    def __init__(self, folder: Path, headers: Mapping[str, Header]) -> None:
        self._paths: dict[str, Path] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._handles: dict[Path, int] = {}
        self._missing: dict[str, int] = {}
        """Bytes of each tensor that are still to come."""
        self._placed: set[Slice] = set()
        check_room(folder, sum(header.file_bytes for header in headers.values()))
        try:
            for name, header in headers.items():
                self._open(folder / name, header)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, header: Header) -> None:
        handle = self._handles[path] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
        set_mode(handle, FILE_MODE)
        with naming_full_disk(path, header.file_bytes):
            os.ftruncate(handle, header.file_bytes)
        write_at(handle, path, header.raw, 0)
        for name, info in header.tensors.items():
            self._paths[name], self._infos[name], self._missing[name] = path, info, info.nbytes

    def wants(self, part: Slice, dtype: str, where: Path) -> bool:
        """Whether a slice with values of that dtype is to be written. Asked again it is not: several ranks hold the same ones.

        Raises:
            CheckpointError: the source has no such slice; the sentence names the file `where` it is.
        """
        assert part.name is not None
        info = self._infos.get(part.name)
        if info is None:
            raise DamagedError(f"{where.parent}: tensor {part.name!r} belongs into no file of the source; {AGAIN}")
        rows, cols = matrix_size(info)
        if part.row_stop > rows or part.col_stop > cols:
            raise DamagedError(f"{where}: tensor {part.name!r} has not the size that the source's header says; {AGAIN}")
        if info.dtype != dtype or part in self._placed:
            return False
        self._placed.add(part)
        return True

    def write(self, part: Slice, row: int, block: Tensor) -> int:
        """Write rows of a slice.

        Args:
            part: of one of the source's tensors.
            row: the first of them, counted from the slice's own first.
            block: [rows, columns of the slice], in the tensor's dtype.

        Returns:
            Bytes written.
        """
        assert part.name is not None
        info, path = self._infos[part.name], self._paths[part.name]
        rows, cols = matrix_size(info)
        unit = info.nbytes // (rows * cols)
        at = info.start + ((part.row_start + row) * cols + part.col_start) * unit
        data = raw_bytes(block)
        if part.cols == cols:
            write_at(self._handles[path], path, data, at)
        else:
            step = part.cols * unit
            for index in range(block.shape[0]):
                write_at(self._handles[path], path, data[index * step : (index + 1) * step], at + index * cols * unit)
        self._missing[part.name] -= len(data)
        return len(data)

    def finish(self) -> None:
        """Every byte is there and on the disk. Raises CheckpointError if one is missing."""
        for name, count in self._missing.items():
            if count:
                raise CheckpointError(
                    f"{self._paths[name].name}: no part has all of tensor {name!r}, {count} bytes differ; {AGAIN}"
                )
        for handle in self._handles.values():
            os.fsync(handle)

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)


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
        raise CodecError(f"{checkpoint.file_of(stored)}: {stored!r}: {error}; {AGAIN}") from None
    _check_digest(checkpoint, part, stored, xxhash.xxh3_128_hexdigest(blob.data))
    if matrix.shape != part.matrices[stored]:
        wanted = part.matrices[stored]
        raise CodecError(f"{checkpoint.file_of(stored)}: {stored!r} holds {matrix.shape}, wanted {wanted}; {AGAIN}")
    return torch.from_numpy(matrix)


def _check_digest(checkpoint: Checkpoint, part: RankFile, stored: str, found: str) -> None:
    if found != part.tensors[stored]:
        raise DamagedError(
            f"{checkpoint.file_of(stored)}: tensor {stored!r} is altered, its checksum is not the one in {MANIFEST}; {AGAIN}"
        )
