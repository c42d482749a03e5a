"""glmq_manifest.json: what a compressed folder is, and a checksum of every byte of it.

    schema        "glmq.compress/1"
    glmq          version that wrote it
    codec         "ascend" or "portable"
    layout        "mindie", "vllm-ascend", or "source" (portable, one rank: names and cuts of the un-sharded checkpoint)
    world_size    number of ranks
    note          for people: what the folder is for
    source        fingerprint of the checkpoint that was compressed
    parts         per rank: file, size, digest of its header, digest of each tensor as stored, and the rows and columns of
                  each matrix that a portable blob holds
    files         every other file but this one: size and digest
    digest        of this document without this entry, keys sorted, no spaces

Digests are xxh3-128 in hexadecimal: they find damage, not forgery.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from glmq.checkpoint.checksums import digest_of, document_digest
from glmq.checkpoint.disk import read_input
from glmq.checkpoint.json_file import Fields, JsonObject, read_json_object, write_json
from glmq.compression.layouts import Layout, parse_layout
from glmq.errors import DamagedError, VersionError, WrongFolderError
from glmq.records import COMPRESS_REPORT
from glmq.version import __version__

MANIFEST: Final = "glmq_manifest.json"
SCHEMA: Final = "glmq.compress/1"
REPORT_FILES: Final = (f"{COMPRESS_REPORT}.json", f"{COMPRESS_REPORT}.csv")
"""The only files of the folder, with the manifest, that are not made from the source's."""
MAX_WEIGHTS: Final = 2**40
"""Of one linear: a thousand times the largest."""
AGAIN: Final = "the folder is damaged or incomplete, copy it again"


class CodecKind(Enum):
    """Who can read the weights."""

    PORTABLE = "portable"
    """glmq alone."""
    ASCEND = "ascend"
    """The serving engine."""


NOTES: Final = {
    CodecKind.PORTABLE: "W8A8S weights in glmq's own lossless storage form. No serving engine reads it: "
    "restore it with `glmq compress --decompress`.",
    CodecKind.ASCEND: "W8A8SC weights for the serving engine on the Atlas 300I Duo.",
}


@dataclass(frozen=True, slots=True)
class RankFile:
    """The weight file of one rank."""

    rank: int
    file: str
    """Path from the folder, with `/`."""
    nbytes: int
    header: str
    """Digest of everything before the tensors."""
    tensors: Mapping[str, str]
    """Tensor -> digest of its stored bytes."""
    matrices: Mapping[str, tuple[int, int]]
    """Tensor that holds a portable blob -> rows and columns of the matrix in it."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One small file."""

    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of a manifest."""

    codec: CodecKind
    layout: Layout
    world: int
    source: str
    """sha256 fingerprint of the compressed checkpoint."""
    rank_files: tuple[RankFile, ...]
    files: Mapping[str, FileRecord]
    """By path from the folder."""


def record_files(folder: Path, exclude: Iterable[str]) -> dict[str, FileRecord]:
    """Size and digest of every file under `folder` but those in `exclude`, by sorted path."""
    excluded = set(exclude)
    files: dict[str, FileRecord] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in excluded:
            content = path.read_bytes()
            files[name] = FileRecord(len(content), digest_of(content))
    return files


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest; the same contents give the same bytes."""
    document: JsonObject = {
        "schema": SCHEMA,
        "glmq": __version__,
        "codec": manifest.codec.value,
        "layout": manifest.layout.value,
        "world_size": manifest.world,
        "note": NOTES[manifest.codec],
        "source": manifest.source,
        "parts": [_rank_file_document(file) for file in manifest.rank_files],
        "files": {name: {"bytes": file.nbytes, "digest": file.digest} for name, file in manifest.files.items()},
    }
    write_json(folder / MANIFEST, {**document, "digest": document_digest(document)}, indent=1)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a compressed folder.

    Raises:
        CheckpointError: there is none, it was altered, or it is of another schema.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise WrongFolderError(
            f"{folder}: has no {MANIFEST}, so it was not written by `glmq compress`; give the folder that was"
        )
    document = read_json_object(path)
    digest = document.pop("digest", None)
    if document.get("schema") != SCHEMA:
        found = document.get("schema")
        raise VersionError(f"{path}: schema is {found!r}, this glmq reads {SCHEMA!r}; use the glmq that wrote it")
    if digest != document_digest(document):
        raise DamagedError(f"{path}: its checksum does not fit its contents; {AGAIN}")
    fields = Fields(document, str(path), lambda sentence: DamagedError(f"{sentence}; {AGAIN}"))
    files = fields.fields("files")
    return Manifest(
        codec=fields.choice("codec", CodecKind),
        layout=fields.choice("layout", parse_layout),
        world=fields.count("world_size"),
        source=fields.text("source"),
        rank_files=tuple(_parse_rank_file(part, path) for part in fields.list_of_fields("parts")),
        files={_local(name, path): _parse_file(files.fields(name)) for name in files},
    )


def checked_bytes(folder: Path, name: str, record: FileRecord) -> bytes:
    """The contents of a small file. Raises CheckpointError if they are not what the manifest says."""
    path = folder / name
    if not path.is_file():
        raise DamagedError(f"{path}: is no file, but the manifest lists it; {AGAIN}")
    content = read_input(path, record.nbytes)
    if len(content) != record.nbytes or digest_of(content) != record.digest:
        raise DamagedError(f"{path}: its checksum is not the one in {MANIFEST}; {AGAIN}")
    return content


def _rank_file_document(file: RankFile) -> JsonObject:
    return {
        "rank": file.rank,
        "file": file.file,
        "bytes": file.nbytes,
        "header": file.header,
        "tensors": dict(file.tensors),
        "matrices": {name: list(shape) for name, shape in file.matrices.items()},
    }


def _parse_rank_file(part: Fields, path: Path) -> RankFile:
    tensors, shapes = part.fields("tensors"), part.fields("matrices")
    matrices: dict[str, tuple[int, int]] = {}
    for name in shapes:
        rows, cols = shapes.counts(name, 2)
        if not 0 < rows * cols <= MAX_WEIGHTS:
            raise DamagedError(f"{path}: {name!a:.200} holds {rows} x {cols} weights, which no linear has; {AGAIN}")
        matrices[name] = (rows, cols)
    return RankFile(
        rank=part.count("rank"),
        file=_local(part.text("file"), path),
        nbytes=part.count("bytes"),
        header=part.text("header"),
        tensors={name: tensors.text(name) for name in tensors},
        matrices=matrices,
    )


def _parse_file(entry: Fields) -> FileRecord:
    return FileRecord(entry.count("bytes"), entry.text("digest"))


def _local(name: str, path: Path) -> str:
    """A path inside the folder; refuses one that leads out of it."""
    parts = name.split("/")
    if "" in parts or "." in parts or ".." in parts or "\\" in name or not name.isprintable():
        raise DamagedError(f"{path}: lists {name!a:.60}, which is no path inside the folder; {AGAIN}")
    return name
