"""A portable folder against the checkpoint that it was made from: every blob decoded, every tensor compared bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from glmq.checkpoint.header import read_header
from glmq.checkpoint.reader import Checkpoint, raw_bytes
from glmq.codec.codec import decode
from glmq.compression.layouts import rank_tensors
from glmq.compression.manifest import Manifest, RankFile, read_manifest
from glmq.compression.shard import read_matrix, read_pieces
from glmq.compression.source import Source, open_source
from glmq.compression.weight_codec import BLOB_SUFFIX
from glmq.errors import CheckpointError, GlmqError, ModelError
from glmq.verification.findings import Check, Finding


def check_portable(directory: Path, source_dir: Path) -> Iterator[Finding]:
    """Check 25 of a portable folder: every blob and tensor against the W8A8S checkpoint it was made from, bit for bit."""
    try:
        manifest, source = read_manifest(directory), open_source(source_dir)
    except (CheckpointError, ModelError) as error:
        yield Check.PART_SOURCE.error("", f"cannot be compared with its source: {error}")
        return
    with source.checkpoint:
        for part in manifest.rank_files:
            yield from _check_portable_part(directory, manifest, part, source)


def _check_portable_part(directory: Path, manifest: Manifest, part: RankFile, source: Source) -> Iterator[Finding]:
    path = directory / part.file
    try:
        wanted = rank_tensors(source.checkpoint, source.config, manifest.layout, part.rank, manifest.world)
        with Checkpoint(path.parent, {path: read_header(path)}) as checkpoint:
            for tensor in wanted:
                name = f"{tensor.spec.name}{BLOB_SUFFIX}" if tensor.is_matrix else tensor.spec.name
                where = f"{part.file}: {name}"
                if name not in checkpoint:
                    yield Check.PART_SOURCE.error(where, "is missing")
                elif tensor.is_matrix:
                    found = decode(checkpoint.read(name).numpy(), threads=1)
                    if not np.array_equal(found, read_matrix(source.checkpoint, tensor)):
                        yield Check.PART_SOURCE.error(where, "decodes to other integers than the source has")
                else:
                    data = b"".join(bytes(raw_bytes(piece)) for piece in read_pieces(source.checkpoint, tensor))
                    if bytes(raw_bytes(checkpoint.read(name))) != data:
                        yield Check.PART_SOURCE.error(where, "differs from what the source gives")
    except GlmqError as error:
        yield Check.PART_SOURCE.error(part.file, f"cannot be compared with its source: {error}")
