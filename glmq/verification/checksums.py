"""Are the stored bytes those that `glmq quantize` wrote? Tensor by tensor, against glmq_checksums.json beside the weights.

The other checks see what a damage does to the numbers; one of a low mantissa bit does too little to be seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import xxhash

from glmq.checkpoint.checksums import CHECKSUMS, read_checksums
from glmq.checkpoint.json_file import JsonValue
from glmq.checkpoint.reader import Checkpoint, raw_bytes
from glmq.errors import CheckpointError
from glmq.verification.findings import Check, Finding


def check_checksums(checkpoint: Checkpoint, report: Mapping[str, JsonValue]) -> Iterator[Finding]:
    """Check 34: every tensor has the checksum it was written with. One piece of a tensor is in memory at a time.

    A file that cannot be trusted is a warning, and nothing is held to it; nothing is said where none was ever written.

    Args:
        checkpoint: un-sharded.
        report: contents of glmq_report.json, which names the digest of the checksums.
    """
    directory, wanted_digest = checkpoint.directory, report.get("checksums")
    if not (directory / CHECKSUMS).exists():
        if wanted_digest is not None:
            message = f"{CHECKSUMS} is missing, glmq_report.json says it was written; single bits cannot be proven"
            yield Check.CHECKSUMS.warning("", message)
        return
    try:
        checksums = read_checksums(directory)
    except CheckpointError as error:
        yield Check.CHECKSUMS.warning("", f"{error}; single bits cannot be proven")
        return
    if wanted_digest not in (None, checksums.digest):
        message = f"{CHECKSUMS} has digest {checksums.digest}, glmq_report.json says {wanted_digest}: it was replaced"
        yield Check.CHECKSUMS.warning("", message)
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


def checksum_of(checkpoint: Checkpoint, name: str) -> str:
    """xxh3-128 of a tensor's stored bytes, in hexadecimal."""
    digest = xxhash.xxh3_128()
    for _, piece in checkpoint.pieces(name):
        digest.update(raw_bytes(piece))
    return str(digest.hexdigest())
