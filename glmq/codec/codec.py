"""Our own lossless codec for int8 weights, GQSC: bytes <-> bytes, with random access by tile.

Static rANS (Duda 2013, arXiv 1311.2540) with 32 interleaved lanes (Giesen 2014, arXiv 1402.3392), one table per class of
columns of like scale, and an escape for rare values. FORMAT.md states the file byte by byte, `tables.py` how classes
and tables are chosen, `rans.py` and `_rans.h` are the coder in numpy and in C. The same matrix gives the same file on every
machine, from every backend and number of threads.

A decoder checks the xxh3-64 of the header, tables and index, and of each tile that it decodes: altered data never come back
as a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Final, Literal, TypeAlias, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from glmq.codec import rans
from glmq.codec.container import (
    CONSTANT,
    FREQUENCY_SUM,
    MAX_TILE_BYTES,
    RANS,
    RAW,
    Container,
    Tile,
    largest_file_bytes,
    read_container,
    write_container,
)
from glmq.codec.tables import choose_tables, decoder_table, encoder_table, padded_classes
from glmq.errors import CodecError, KernelError, MemoryShortError

try:
    from glmq.codec import _codec
except ImportError:  # no compiler when glmq was installed
    _kernels: tuple[str, ...] = ()
else:
    _kernels = _codec.list_kernels()

KERNELS: Final = _kernels
"""The kernels of the compiled coder that this processor runs, fastest first; empty without one."""

Backend: TypeAlias = Literal["auto", "c", "numpy", "avx512", "avx512-gather", "avx2", "neon", "scalar"]
"""`auto`: the compiled coder if it is there, else numpy. `c`: its fastest kernel. The others: that kernel."""
Blob: TypeAlias = bytes | bytearray | memoryview | NDArray[np.uint8]
"""A whole GQSC file."""

TILE_BYTES: Final = 256 * 1024
"""Decoded size of a tile: 4 MiB tiles would save 0.1 %, 64 KiB tiles cost 0.3 %."""
_C_BATCH: Final = 4
"""Tiles per call: the compiled decoder runs two side by side, and four still lie in the cache for their checksum."""
_NUMPY_BATCH: Final = 128
_NUMPY_BATCH_BYTES: Final = 1 << 25
"""Decoded size that the numpy coder takes at a time; it needs some five times as much beside."""

_HISTOGRAM_VALUES: Final = 2**17
"""Values that numpy counts at a time, widened to 8 bytes each."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class CodecInfo:
    """What a file says about itself, its payload unread."""

    rows: int
    cols: int
    stored_bytes: int
    """Size of the whole file."""
    tiles: int
    tile_rows: int
    """Rows of a tile; the last may have fewer."""
    raw_tiles: int
    constant_tiles: int
    escapes: int
    """Values written as escapes, in all tiles."""
    columns_of_class: tuple[int, ...]
    """Columns of each class; empty if no tile is entropy-coded."""
    entropy_bits: float | None
    """Zero-order entropy that the tables describe, escapes taken as one value: bits per weight of one table for all columns."""
    class_entropy_bits: float | None
    """The same with one table per class; both None if no tile is entropy-coded."""
    matrix_digest: int
    """xxh3-64 of the tiles' digests: equal for equal matrices in tiles of the same height."""

    @property
    def bits_per_weight(self) -> float:
        """8 * stored_bytes / (rows * cols)."""
        return 8 * self.stored_bytes / (self.rows * self.cols)


def encode(
    matrix: NDArray[np.int8], *, tile_bytes: int = TILE_BYTES, backend: Backend = "auto", threads: int = 1
) -> bytes:
    """Compress a matrix.

    Args:
        matrix: int8 [rows, cols], not empty.
        tile_bytes: decoded size of a tile, rounded down to whole rows, at least one.
        backend: which coder; the bytes are the same from each.
        threads: tiles coded at a time; the bytes are the same for each number.

    Raises:
        CodecError: a matrix that the format cannot hold.
        DeviceError: a backend that is not on this machine.
    """
    kernel = _resolve(backend)
    if matrix.dtype != np.int8 or matrix.ndim != 2:
        raise CodecError(f"matrix to compress: wanted int8 with 2 dimensions, found {matrix.dtype} with {matrix.ndim}")
    rows, cols = matrix.shape
    if matrix.size == 0 or cols > MAX_TILE_BYTES:
        raise CodecError(
            f"matrix to compress: {rows} x {cols} is not possible; wanted 1 row or more, 1 to 2^28 columns"
        )
    matrix = np.ascontiguousarray(matrix)
    tile_rows = _tile_rows(rows, cols, tile_bytes)
    if kernel is None:
        class_of_column, frequencies = choose_tables(matrix)
        table = encoder_table(frequencies)
    else:
        classes, packed, packed_table = _codec.choose_tables(matrix, rows, cols)
        class_of_column = np.frombuffer(classes, dtype=np.uint8)
        frequencies = np.frombuffer(packed, dtype=np.uint16).reshape(-1, 256)
        table = np.frombuffer(packed_table, dtype=np.uint32).reshape(-1, 256)
    ids = padded_classes(class_of_column, len(frequencies))

    def encode_stretch(stretch: NDArray[np.int8]) -> list[tuple[int, bytes, int, int]]:
        tiles = stretch.reshape(-1, min(tile_rows, len(stretch)), cols)
        if kernel is None:
            coded = rans.encode_tiles(tiles, ids, table)
        else:
            coded = _codec.encode_tiles(kernel, tiles, tiles.shape[1], cols, ids, table)
        return [_smallest(tile, payload, escapes) for tile, (payload, escapes) in zip(tiles, coded)]

    pairs_a_thread = -(-rows // tile_rows // (2 * threads))
    size = _numpy_batch(tile_rows * cols) if kernel is None else 2 * pairs_a_thread
    stretches = _stretches(matrix, tile_rows, size)
    payloads = [payload for done in _map(encode_stretch, stretches, threads) for payload in done]
    return write_container(rows, cols, tile_rows, class_of_column, frequencies, payloads)


def decode(blob: Blob, *, backend: Backend = "auto", threads: int = 1) -> NDArray[np.int8]:
    """The whole matrix, int8 [rows, cols].

    Args:
        blob: a whole file.
        backend: which coder.
        threads: batches of tiles decoded at a time.

    Raises:
        CodecError: anything in the file that is not as it was written; names the field or tile.
        SpaceError: no memory for the matrix.
        DeviceError: a backend that is not on this machine.
    """
    file = _bytes_of(blob)
    container = read_container(file.data)
    return _decode(file, container, 0, len(container.tiles), backend, threads)


def decode_tile(blob: Blob, index: int, *, backend: Backend = "auto") -> NDArray[np.int8]:
    """Tile `index` alone, int8 [rows of the tile, cols]. Raises as `decode`; IndexError for a tile that is not there."""
    file = _bytes_of(blob)
    container = read_container(file.data)
    if not 0 <= index < len(container.tiles):
        raise IndexError(f"tile {index} of {len(container.tiles)}")
    return _decode(file, container, index, index + 1, backend, threads=1)


def decode_rows(blob: Blob, start: int, stop: int, *, backend: Backend = "auto") -> NDArray[np.int8]:
    """Rows `start` to `stop` (excluded), int8 [stop - start, cols], reading only their tiles.

    Raises as `decode`; IndexError unless 0 <= start < stop <= rows.
    """
    file = _bytes_of(blob)
    container = read_container(file.data)
    if not 0 <= start < stop <= container.rows:
        raise IndexError(f"rows {start} to {stop} of {container.rows}")
    first, last = start // container.tile_rows, -(-stop // container.tile_rows)
    skipped = first * container.tile_rows
    return _decode(file, container, first, last, backend, threads=1)[start - skipped : stop - skipped]


def read_info(blob: Blob) -> CodecInfo:
    """What the file says about itself; checks everything but the payload. Raises CodecError as `decode`."""
    container = read_container(_bytes_of(blob).data)
    kinds = [tile.kind for tile in container.tiles]
    columns = np.bincount(container.class_of_column, minlength=1)[: len(container.frequencies)]
    coded = len(container.frequencies) > 0
    share = columns / container.cols
    return CodecInfo(
        rows=container.rows,
        cols=container.cols,
        stored_bytes=container.file_bytes,
        tiles=len(kinds),
        tile_rows=container.tile_rows,
        raw_tiles=kinds.count(RAW),
        constant_tiles=kinds.count(CONSTANT),
        escapes=sum(tile.escapes for tile in container.tiles),
        columns_of_class=tuple(columns.tolist()),
        entropy_bits=_entropy_bits(share @ container.frequencies, FREQUENCY_SUM) if coded else None,
        class_entropy_bits=float(share @ [_entropy_bits(row, FREQUENCY_SUM) for row in container.frequencies])
        if coded
        else None,
        matrix_digest=container.matrix_digest,
    )


def zero_order_entropy(matrix: NDArray[np.int8]) -> float:
    """Entropy of the histogram of all values of a contiguous matrix, bits per value."""
    return _entropy_bits(count_bytes(matrix), matrix.size)


def count_bytes(matrix: NDArray[np.int8]) -> NDArray[np.int64]:
    """How often each byte occurs in a contiguous matrix: int64 [256], entry i counts the value i, or i - 256 from 128 on."""
    counts = np.zeros(256, dtype=np.int64)
    if KERNELS:
        counts += np.frombuffer(_codec.count_values(matrix), dtype=np.int64)
        return counts
    flat = matrix.reshape(-1).view(np.uint8)
    for start in range(0, flat.size, _HISTOGRAM_VALUES):
        counts += np.bincount(flat[start : start + _HISTOGRAM_VALUES], minlength=256)
    return counts


def at_most_bytes(rows: int, cols: int) -> int:
    """Bytes that `encode` never exceeds for a rows x cols matrix in tiles of TILE_BYTES."""
    return largest_file_bytes(rows, cols, _tile_rows(rows, cols, TILE_BYTES))


def _tile_rows(rows: int, cols: int, tile_bytes: int) -> int:
    return min(max(min(tile_bytes, MAX_TILE_BYTES) // cols, 1), rows)


def _numpy_batch(tile_bytes: int) -> int:
    """Tiles that the numpy coder steps together."""
    return max(min(_NUMPY_BATCH, _NUMPY_BATCH_BYTES // tile_bytes), 1)


def _decode(
    file: NDArray[np.uint8], container: Container, first: int, last: int, backend: Backend, threads: int
) -> NDArray[np.int8]:
    """Tiles `first` to `last` (excluded), checked: int8 [their rows, cols]."""
    kernel = _resolve(backend)
    tiles = container.tiles[first:last]
    rows, cols = sum(tile.rows for tile in tiles), container.cols
    try:
        out = np.empty((rows, cols), dtype=np.int8)
    except (MemoryError, ValueError) as error:
        raise MemoryShortError(
            f"compressed weight: no memory for its {rows} x {cols} = {rows * cols} bytes; free some"
        ) from error
    ids = padded_classes(container.class_of_column, len(container.frequencies))
    table = decoder_table(container.frequencies)

    def decode_batch(numbers: Sequence[int]) -> None:
        for kind, run in groupby(numbers, key=lambda number: tiles[number].kind):
            chosen = list(run)
            batch = [tiles[number] for number in chosen]
            begin = chosen[0] * container.tile_rows
            part = out[begin : begin + sum(tile.rows for tile in batch)]
            if kind == RANS:
                damaged = (
                    rans.decode_tiles(file, batch, ids, table, part)
                    if kernel is None
                    else _codec.decode_tiles(kernel, file, _jobs(batch, cols), cols, ids, table, part)
                )
                if damaged >= 0:
                    raise CodecError(f"compressed weight: tile {first + chosen[damaged]}: its stream is altered")
            for number, tile in zip(chosen, batch):
                at = number * container.tile_rows
                decoded = out[at : at + tile.rows]
                if kind != RANS:
                    stored = file[tile.start : tile.start + tile.size].view(np.int8)
                    decoded[:] = stored.reshape(decoded.shape) if kind == RAW else stored
                found = xxhash.xxh3_64_intdigest(decoded.data)
                if found != tile.digest:
                    raise CodecError(
                        f"compressed weight: tile {first + number}: checksum is {found:016x}, stored is {tile.digest:016x}; "
                        "it is altered"
                    )

    size = _numpy_batch(container.tile_rows * cols) if kernel is None else _C_BATCH
    numbers = range(len(tiles))
    for _ in _map(decode_batch, [numbers[at : at + size] for at in range(0, len(tiles), size)], threads):
        pass
    return out


def _resolve(backend: Backend) -> str | None:
    """The kernel to use, or None for numpy."""
    if backend == "numpy" or (backend == "auto" and not KERNELS):
        return None
    if not KERNELS:
        raise KernelError(
            f"codec backend {backend!r}: glmq was installed without a C compiler; reinstall with one, or use numpy"
        )
    if backend in ("auto", "c"):
        return KERNELS[0]
    if backend not in KERNELS:
        raise KernelError(
            f"codec backend {backend!r}: this processor does not run it; it runs {', '.join(KERNELS)} and numpy"
        )
    return backend


def _smallest(tile: NDArray[np.int8], payload: bytes, escapes: int) -> tuple[int, bytes, int, int]:
    """Kind, payload, escapes and digest of a tile, in the kind that takes the fewest bytes."""
    digest = xxhash.xxh3_64_intdigest(tile.data)
    if (tile[0] == tile[0, 0]).all() and (tile == tile[0, 0]).all():
        return CONSTANT, tile[0, :1].tobytes(), 0, digest
    if len(payload) >= tile.size:
        return RAW, tile.tobytes(), 0, digest
    return RANS, payload, escapes, digest


def _stretches(matrix: NDArray[np.int8], tile_rows: int, size: int) -> Iterator[NDArray[np.int8]]:
    """Up to `size` neighbouring tiles at a time, all of one height."""
    whole = len(matrix) // tile_rows * tile_rows
    for at in range(0, whole, size * tile_rows):
        yield matrix[at : min(at + size * tile_rows, whole)]
    if whole < len(matrix):
        yield matrix[whole:]


def _jobs(tiles: Sequence[Tile], cols: int) -> NDArray[np.int64]:
    """int64 [tiles, 5]: start, size, escapes, rows and place of neighbouring tiles, as the compiled decoder reads them."""
    jobs = np.array([(tile.start, tile.size, tile.escapes, tile.rows, 0) for tile in tiles], dtype=np.int64)
    jobs[1:, 4] = np.cumsum(jobs[:-1, 3]) * cols
    return jobs


def _map(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Results in order, `threads` at a time."""
    if threads == 1:
        yield from map(function, items)
    else:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(function, items)


def _bytes_of(blob: Blob) -> NDArray[np.uint8]:
    return np.frombuffer(blob, dtype=np.uint8)


def _entropy_bits(counts: NDArray[np.float64] | NDArray[np.uint16] | NDArray[np.int64], total: int) -> float:
    """Entropy of a distribution from its counts of sum `total`, bits."""
    p = counts[counts > 0] / total
    return float(-(p * np.log2(p)).sum()) + 0.0  # no negative zero for one value alone
