"""Are the stored bytes those that `glmq quantize` wrote? Tensor by tensor and file by file, against glmq_checksums.json.

The other checks see what a damage does to the numbers; one of a low mantissa bit does too little to be seen.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Final

import xxhash

from glmq.checkpoint.checksums import (
    CHECKSUMS,
    Checksums,
    digest_of,
    file_checksum,
    header_checksum,
    read_checksums,
)
from glmq.checkpoint.json_file import JsonValue
from glmq.checkpoint.reader import Checkpoint, raw_bytes
from glmq.errors import CheckpointError
from glmq.verification.findings import Check, Checked, Finding, Skipped
from glmq.wording import list_names

_AGAIN: Final = "copy the folder again, or quantize again"


def check_checksums(
    checkpoint: Checkpoint, report: Mapping[str, JsonValue]
) -> Generator[Finding | Checked | Skipped, None, Checksums | None]:
    """Check 34: every tensor and every file has the checksum it was written with. A piece of a tensor is in memory at a time.

    Args:
        checkpoint: un-sharded.
        report: contents of glmq_report.json, which names the digest of the tensors' checksums.

    Returns:
        The checksums, if every byte that they cover fits them.
    """
    directory, wanted_digest = checkpoint.directory, report.get("checksums")
    if not (directory / CHECKSUMS).exists():
        if wanted_digest is None:
            yield Skipped(f"single bits (no {CHECKSUMS} was written)")
        else:
            message = f"{CHECKSUMS} is missing, glmq_report.json says it was written; {_AGAIN}"
            yield Check.CHECKSUMS.error("", message)
        return None
    try:
        checksums = read_checksums(directory)
    except CheckpointError as error:
        yield Check.CHECKSUMS.error("", f"{error}; single bits cannot be proven")
        return None
    is_proven = True
    for record in _compare(checkpoint, checksums, wanted_digest):
        is_proven = is_proven and not isinstance(record, Finding)
        yield record
    return checksums if is_proven else None


def _compare(
    checkpoint: Checkpoint, checksums: Checksums, wanted_digest: JsonValue
) -> Iterator[Finding | Checked | Skipped]:
    digest = checksums.tensors_digest if checksums.covers_files else checksums.digest
    if wanted_digest not in (None, digest):
        message = f"{CHECKSUMS} has digest {digest}, glmq_report.json says {wanted_digest}: it was replaced"
        yield Check.CHECKSUMS.error("", message)
    yield from _check_tensors(checkpoint, checksums)
    if checksums.covers_files:
        yield from _check_files(checkpoint, checksums)
    else:
        yield Checked(f"the bytes of {len(checksums.tensors)} tensors by {CHECKSUMS}")
        yield Skipped(f"the bytes of config.json and side files ({CHECKSUMS} is of a glmq that listed tensors only)")


def _check_tensors(checkpoint: Checkpoint, checksums: Checksums) -> Iterator[Finding]:
    for name in checkpoint:
        wanted, found = checksums.tensors.get(name), checksum_of(checkpoint, name)
        if wanted is None:
            yield Check.CHECKSUMS.error(name, f"is stored, but {CHECKSUMS} does not list it")
        elif found != wanted:
            message = f"has checksum {found}, {CHECKSUMS} says {wanted}: its bytes were changed since it was written"
            yield Check.CHECKSUMS.error(name, message)
    for name in checksums.tensors:
        if name not in checkpoint:
            yield Check.CHECKSUMS.error(name, f"is not stored, but {CHECKSUMS} lists it")


def _check_files(checkpoint: Checkpoint, checksums: Checksums) -> Iterator[Finding | Checked | Skipped]:
    directory, opened = checkpoint.directory, set(checkpoint.files())

    def checksum_of_header(path: Path) -> str:
        return digest_of(checkpoint.header(path).raw) if path in opened else header_checksum(path)

    for what, listed, checksum in (
        ("its header was", checksums.headers, checksum_of_header),
        ("it was", checksums.files, file_checksum),
    ):
        for name, wanted in listed.items():
            path = directory / Path(name).name
            if not path.is_file():
                yield Check.CHECKSUMS.error("", f"{name} is missing, {CHECKSUMS} lists it; {_AGAIN}")
                continue
            try:
                found = checksum(path)
            except CheckpointError as error:
                yield Check.CHECKSUMS.error("", str(error))
                continue
            if found != wanted:
                message = f"{name} has checksum {found}, {CHECKSUMS} says {wanted}: {what} changed since it was written"
                yield Check.CHECKSUMS.error("", message)
    yield Checked(f"the bytes of {len(checksums.tensors)} tensors and {len(checksums.files)} files by {CHECKSUMS}")
    known = {*checksums.headers, *checksums.files, CHECKSUMS}
    others = sorted(path.name for path in directory.iterdir() if path.name not in known)
    if others:
        yield Skipped(f"{list_names(others)} (not written by glmq)")


def checksum_of(checkpoint: Checkpoint, name: str) -> str:
    """xxh3-128 of a tensor's stored bytes, in hexadecimal."""
    digest = xxhash.xxh3_128()
    for _, piece in checkpoint.pieces(name):
        digest.update(raw_bytes(piece))
    return str(digest.hexdigest())
