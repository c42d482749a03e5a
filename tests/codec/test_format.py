"""FORMAT.md is enough to read a file: a decoder written from that page alone, in plain Python, reads what glmq writes."""

import struct
from importlib.resources import files

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from glmq.codec import codec


def read_by_the_page(blob: bytes) -> NDArray[np.int8]:
    magic, version, layout, classes, log2_sum, lanes, escape, zero, tile_rows, rows, cols, tiles, table_bytes, _ = (
        struct.unpack_from("<4s6BHIQQIIQ", blob)
    )
    matrix_digest, head_digest = struct.unpack_from("<QQ", blob, 48)
    assert (magic, version, layout, log2_sum, lanes, escape, zero) == (b"GQSC", 1, 0, 11, 32, 0x80, 0)
    bits = (classes - 1).bit_length() if classes else 0
    tables_at = 64 + -(-cols * bits // 8)
    index_at = tables_at + table_bytes
    payload_at = index_at + 16 * tiles
    assert xxhash.xxh3_64_intdigest(blob[:56] + blob[64:payload_at]) == head_digest
    packed = int.from_bytes(blob[64:tables_at], "little")
    class_of = [packed >> bits * c & (1 << bits) - 1 for c in range(cols)]
    tables, at = [], tables_at
    for _ in range(classes):
        present, at = int.from_bytes(blob[at : at + 32], "little"), at + 32
        slots: list[tuple[int, int, int]] = []  # value, first, frequency of each slot
        for value in (s for s in range(256) if present >> s & 1):
            frequency, at = blob[at], at + 1
            if frequency & 0x80:
                frequency, at = (frequency & 0x7F) | blob[at] << 7, at + 1
            slots += [(value, len(slots), frequency + 1)] * (frequency + 1)
        assert len(slots) == 2048
        tables.append(slots)
    assert at == index_at
    out, digests = bytearray(), b""
    for tile in range(tiles):
        digest, kind_size, escapes = struct.unpack_from("<QII", blob, index_at + 16 * tile)
        kind, size = divmod(kind_size, 1 << 30)
        payload, payload_at = blob[payload_at : payload_at + size], payload_at + size
        height = min(tile_rows, rows - tile * tile_rows)
        if kind == 0:
            decoded = bytearray(payload)
        elif kind == 1:
            decoded = bytearray(payload * (height * cols))
        else:
            state = list(struct.unpack_from("<32I", payload))
            words = iter(struct.unpack(f"<{(size - 128 - escapes) // 2}H", payload[128 : size - escapes]))
            decoded = bytearray()
            for c in list(range(cols)) * height:
                x = state[c % 32]
                value, first, frequency = tables[class_of[c]][x % 2048]
                x = frequency * (x >> 11) + x % 2048 - first
                state[c % 32] = x if x >= 1 << 15 else x << 16 | next(words)
                decoded.append(value)
            assert next(words, None) is None
            assert state == [1 << 15] * 32
            escaped = iter(payload[size - escapes :])
            decoded = bytearray(next(escaped) if value == 0x80 else value for value in decoded)
            assert next(escaped, None) is None
        assert xxhash.xxh3_64_intdigest(bytes(decoded)) == digest
        digests += struct.pack("<Q", digest)
        out += decoded
    assert xxhash.xxh3_64_intdigest(digests) == matrix_digest
    assert blob[payload_at:] == bytes(64)
    return np.frombuffer(bytes(out), dtype=np.int8).reshape(rows, cols)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (9, 70), (40, 33), (64, 200)])
def test_a_reader_written_from_the_page_reads_what_glmq_writes(rows: int, cols: int) -> None:
    generator = np.random.default_rng(rows)
    spread = np.where(np.arange(cols) % 7 == 0, 30.0, 3.0)
    matrix = np.clip(np.round(generator.standard_normal((rows, cols)) * spread), -128, 127).astype(np.int8)
    matrix[rows // 2 :, : cols // 2] = -128  # escapes
    matrix[: rows // 4] = 5  # constant tiles
    for tile_bytes in (cols * 4, codec.TILE_BYTES):
        assert np.array_equal(read_by_the_page(codec.encode(matrix, tile_bytes=tile_bytes)), matrix)


def test_the_page_is_part_of_the_package() -> None:
    assert files("glmq.codec").joinpath("FORMAT.md").read_text(encoding="utf-8").startswith("# GQSC, version 1")
