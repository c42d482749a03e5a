"""GQSC files that a forger would send: altered, with checksums of the head that fit again."""

from __future__ import annotations

import struct

import xxhash

from glmq.codec.container import class_bits

HEAD = struct.Struct("<4sBBBBBBHIQQIIQQQ")
FIELDS = (
    *("magic", "version", "layout", "classes", "prob_bits", "lanes", "escape", "reserved", "tile_rows", "rows", "cols"),
    *("tiles", "table_bytes", "payload_bytes", "matrix_digest", "head_digest"),
)


def read_fields(blob: bytes) -> dict[str, int]:
    return dict(zip(FIELDS, HEAD.unpack_from(blob)))


def with_fields(blob: bytes, **changes: int | bytes) -> bytes:
    """The same file with other header fields, not signed."""
    return HEAD.pack(*(read_fields(blob) | changes).values()) + blob[64:]


def sections(blob: bytes) -> tuple[int, int, int, int]:
    """Where class map, tables, index and payload begin, as the header says."""
    head = read_fields(blob)
    tables = 64 + -(-head["cols"] * class_bits(head["classes"]) // 8)
    index = tables + head["table_bytes"]
    return 64, tables, index, index + 16 * head["tiles"]


def sign(blob: bytes) -> bytes:
    """The same file with a matrix digest and a head digest that fit; not those of the tiles."""
    _, _, index, payload = sections(blob)
    digests = b"".join(blob[at : at + 8] for at in range(index, min(payload, len(blob)), 16))
    fields = with_fields(blob, matrix_digest=xxhash.xxh3_64_intdigest(digests))[:56]
    return fields + struct.pack("<Q", xxhash.xxh3_64_intdigest(fields + blob[64:payload])) + blob[64:]
