"""Write and read a GQSC file but for the tiles' contents: header, class map, tables, index. FORMAT.md is the format."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from glmq.errors import CodecError

RAW: Final = 0
CONSTANT: Final = 1
RANS: Final = 2

ESCAPE: Final = 0x80
LANES: Final = 32
PROB_BITS: Final = 11
FREQUENCY_SUM: Final = 1 << PROB_BITS
MAX_CLASSES: Final = 8
STATE_BYTES: Final = 4 * LANES
STATE_LOW: Final = 1 << 15
STATE_TOP: Final = 1 << 31
MAX_TILE_BYTES: Final = 1 << 28
TAIL: Final = bytes(64)

_MAGIC: Final = b"GQSC"
_FIELDS: Final = struct.Struct("<4s6BHIQQIIQQ")
_DIGEST: Final = struct.Struct("<Q")
_HEADER_BYTES: Final = _FIELDS.size + _DIGEST.size
_ENTRY: Final = struct.Struct("<QII")
_VARINTS: Final = tuple(bytes([n]) if n < 0x80 else bytes([n & 0x7F | 0x80, n >> 7]) for n in range(FREQUENCY_SUM))
_VERSION: Final = 1
_ROW_MAJOR: Final = 0


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile, as the index describes it."""

    kind: int
    """RAW, CONSTANT or RANS."""
    rows: int
    start: int
    """Offset of the payload from the beginning of the file, bytes."""
    size: int
    """Bytes of the payload."""
    escapes: int
    """Escaped bytes at the end of a RANS payload."""
    digest: int
    """xxh3-64 of the decoded tile."""


@dataclass(frozen=True, slots=True)
class Container:
    """Everything of a file but the payload."""

    rows: int
    cols: int
    tile_rows: int
    class_of_column: NDArray[np.uint8]
    """[cols]; zeros where the file has 0 or 1 classes."""
    frequencies: NDArray[np.uint16]
    """[classes, 256]; each row sums to 2048."""
    tiles: Sequence[Tile]
    matrix_digest: int
    """xxh3-64 of the tiles' digests in order: equal for equal matrices in tiles of the same height."""
    file_bytes: int


def digest_matrix(digests: Sequence[int]) -> int:
    """The matrix digest of tiles with these digests."""
    return xxhash.xxh3_64_intdigest(np.array(digests, dtype="<u8").tobytes())


def write_container(
    rows: int,
    cols: int,
    tile_rows: int,
    class_of_column: NDArray[np.uint8],
    frequencies: NDArray[np.uint16],
    payloads: Sequence[tuple[int, bytes, int, int]],
) -> bytes:
    """The whole file.

    Args:
        rows: of the matrix; so `cols`, `tile_rows`.
        class_of_column: uint8 [cols], below the number of classes.
        frequencies: uint16 [classes, 256]; not stored if no tile is RANS.
        payloads: kind, payload, escapes and digest of each tile.
    """
    if not any(kind == RANS for kind, _, _, _ in payloads):
        frequencies = frequencies[:0]
    class_map = _pack_class_map(class_of_column, len(frequencies))
    tables = _pack_frequencies(frequencies)
    index = b"".join(
        _ENTRY.pack(digest, kind << 30 | len(payload), escapes) for kind, payload, escapes, digest in payloads
    )
    payload_bytes = sum(len(payload) for _, payload, _, _ in payloads)
    fields = _FIELDS.pack(
        _MAGIC,
        _VERSION,
        _ROW_MAJOR,
        len(frequencies),
        PROB_BITS,
        LANES,
        ESCAPE,
        0,
        tile_rows,
        rows,
        cols,
        len(payloads),
        len(tables),
        payload_bytes,
        digest_matrix([digest for _, _, _, digest in payloads]),
    )
    sides = [class_map, tables, index]
    head = xxhash.xxh3_64_intdigest(b"".join([fields, *sides]))
    return b"".join([fields, _DIGEST.pack(head), *sides, *(payload for _, payload, _, _ in payloads), TAIL])


def read_container(file: memoryview) -> Container:
    """Check and read everything but the payload.

    Args:
        file: the whole file, bytes.

    Raises:
        CodecError: any field that a writer cannot have written.
    """
    if len(file) < _HEADER_BYTES:
        raise CodecError(
            f"compressed weight: {len(file)} bytes are shorter than a header of {_HEADER_BYTES}; it is truncated"
        )
    # fmt: off
    (magic, version, layout, classes, prob_bits, lanes, escape, reserved, tile_rows, rows, cols, tiles, table_bytes,
     payload_bytes, matrix_digest) = _FIELDS.unpack_from(file)
    # fmt: on
    if magic != _MAGIC:
        raise CodecError(
            f"compressed weight: begins with {magic!r}, not {_MAGIC!r}; glmq's portable codec did not write it"
        )
    _expect("version", version, _VERSION)
    _expect("layout", layout, _ROW_MAJOR)
    _expect("log2 of the table sum", prob_bits, PROB_BITS)
    _expect("lanes", lanes, LANES)
    _expect("escape", escape, ESCAPE)
    _expect("reserved field", reserved, 0)
    _check_sizes(classes, rows, cols, tile_rows)
    _expect("number of tiles", tiles, -(-rows // tile_rows))
    bits = class_bits(classes)
    map_at = _HEADER_BYTES
    tables_at = map_at + -(-cols * bits // 8)
    index_at = tables_at + table_bytes
    payload_at = index_at + tiles * _ENTRY.size
    wanted = payload_at + payload_bytes + len(TAIL)
    if len(file) != wanted:
        state = "truncated" if len(file) < wanted else "altered"
        raise CodecError(f"compressed weight: has {len(file)} bytes, its header wants {wanted}; it is {state}")
    (head_digest,) = _DIGEST.unpack_from(file, _FIELDS.size)
    found = xxhash.xxh3_64_intdigest(b"".join([file[: _FIELDS.size], file[map_at:payload_at]]))
    if found != head_digest:
        raise CodecError(
            f"compressed weight: checksum of its head is {found:016x}, stored is {head_digest:016x}; it is altered"
        )
    if file[payload_at + payload_bytes :] != TAIL:
        raise CodecError("compressed weight: the 64 bytes at its end are not zero; it is altered")
    return Container(
        rows=rows,
        cols=cols,
        tile_rows=tile_rows,
        class_of_column=_unpack_class_map(file[map_at:tables_at], cols, classes),
        frequencies=_unpack_frequencies(file[tables_at:index_at], classes),
        tiles=_read_index(
            file[index_at:payload_at], rows, cols, tile_rows, classes, payload_at, payload_bytes, matrix_digest
        ),
        matrix_digest=matrix_digest,
        file_bytes=len(file),
    )


def _check_sizes(classes: int, rows: int, cols: int, tile_rows: int) -> None:
    """Raise CodecError unless the format can hold such a matrix in such tiles."""
    if classes > MAX_CLASSES:
        raise CodecError(
            f"compressed weight: {classes} column classes, at most {MAX_CLASSES} are possible; it is altered"
        )
    if not (1 <= rows < 1 << 48 and 1 <= cols <= MAX_TILE_BYTES):
        raise CodecError(f"compressed weight: a matrix of {rows} x {cols} is not possible; it is altered")
    if not (1 <= tile_rows <= rows and (tile_rows == 1 or tile_rows * cols <= MAX_TILE_BYTES)):
        raise CodecError(
            f"compressed weight: tiles of {tile_rows} rows for {rows} x {cols} are not possible; it is altered"
        )


def largest_file_bytes(rows: int, cols: int, tile_rows: int) -> int:
    """Bytes that no file of a rows x cols matrix in tiles of `tile_rows` exceeds, whatever its values."""
    sides = -(-cols * class_bits(MAX_CLASSES) // 8) + MAX_CLASSES * (32 + 2 * 256) + -(-rows // tile_rows) * _ENTRY.size
    return _HEADER_BYTES + sides + rows * cols + len(TAIL)


def class_bits(classes: int) -> int:
    """Bits of one column in the class map."""
    return max(classes - 1, 0).bit_length()


def _expect(field: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise CodecError(f"compressed weight: {field} is {found}, wanted {wanted}; it is altered or of a newer glmq")


def _pack_class_map(class_of_column: NDArray[np.uint8], classes: int) -> bytes:
    bits = class_bits(classes)
    spread = class_of_column[:, None] >> np.arange(bits, dtype=np.uint8) & 1  # [cols, bits]
    return np.packbits(spread.reshape(-1), bitorder="little").tobytes()


def _unpack_class_map(packed: memoryview, cols: int, classes: int) -> NDArray[np.uint8]:
    bits = class_bits(classes)
    flat = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), bitorder="little")
    if flat[cols * bits :].any():
        raise CodecError("compressed weight: class map: the bits after the last column are not zero; it is altered")
    spread = flat[: cols * bits].reshape(cols, bits)
    class_of_column: NDArray[np.uint8] = (spread << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)
    highest = int(np.max(class_of_column))
    if highest >= max(classes, 1):
        raise CodecError(f"compressed weight: class map: a column of class {highest}, of {classes}; it is altered")
    return class_of_column


def _pack_frequencies(frequencies: NDArray[np.uint16]) -> bytes:
    live = frequencies != 0
    presence = np.packbits(live, axis=1, bitorder="little").tobytes()
    varints = iter([_VARINTS[frequency - 1] for frequency in frequencies[live].tolist()])
    parts: list[bytes] = []
    for number, count in enumerate(live.sum(1).tolist()):
        parts += [presence[32 * number : 32 * (number + 1)], *islice(varints, count)]
    return b"".join(parts)


def _unpack_frequencies(packed: memoryview, classes: int) -> NDArray[np.uint16]:
    frequencies = np.zeros((classes, 256), dtype=np.uint16)
    at = 0
    for number in range(classes):
        live = np.flatnonzero(
            np.unpackbits(np.frombuffer(packed[at : at + 32], dtype=np.uint8), bitorder="little")
        ).tolist()
        at += 32
        total = 0
        for value in live:
            varint = bytes(packed[at : at + 2])
            size = 1 if varint and varint[0] < 0x80 else 2
            if len(varint) < size or (size == 2 and not 0 < varint[1] < 0x80):
                raise CodecError(f"compressed weight: table {number}: no frequency for value {value}; it is altered")
            frequency = 1 + (varint[0] if size == 1 else varint[0] - 0x80 + (varint[1] << 7))
            at += size
            total += frequency
            frequencies[number, value] = frequency
        if total != FREQUENCY_SUM or ESCAPE not in live:
            raise CodecError(
                f"compressed weight: table {number}: frequencies sum to {total}, wanted {FREQUENCY_SUM} with one for the "
                "escape; it is altered"
            )
    if at != len(packed):
        raise CodecError(
            f"compressed weight: tables: {classes} of them need {at} bytes, found {len(packed)}; it is altered"
        )
    return frequencies


def _read_index(
    index: memoryview,
    rows: int,
    cols: int,
    tile_rows: int,
    classes: int,
    payload_at: int,
    payload_bytes: int,
    matrix_digest: int,
) -> tuple[Tile, ...]:
    tiles = []
    start = payload_at
    for number, (digest, kind_size, escapes) in enumerate(_ENTRY.iter_unpack(index)):
        kind, size = kind_size >> 30, kind_size & ((1 << 30) - 1)
        height = min(tile_rows, rows - number * tile_rows)
        if kind == RANS:
            valid = classes > 0 and 0 <= escapes <= size - STATE_BYTES and (size - escapes) % 2 == 0
        else:
            valid = escapes == 0 and size == {RAW: height * cols, CONSTANT: 1}.get(kind)
        if not valid:
            raise CodecError(
                f"compressed weight: tile {number}: kind {kind} with {size} bytes and {escapes} escapes is not possible for "
                f"{height} x {cols}; it is altered"
            )
        tiles.append(Tile(kind=kind, rows=height, start=start, size=size, escapes=escapes, digest=digest))
        start += size
    if start != payload_at + payload_bytes:
        raise CodecError(
            f"compressed weight: index: tiles hold {start - payload_at} bytes, the payload has {payload_bytes}; it is altered"
        )
    found = digest_matrix([tile.digest for tile in tiles])
    if found != matrix_digest:
        raise CodecError(
            f"compressed weight: digest of the tiles is {found:016x}, stored is {matrix_digest:016x}; it is altered"
        )
    return tuple(tiles)
