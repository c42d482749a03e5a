import hashlib
import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from glmq.codec import codec
from glmq.errors import CodecError, DeviceError

BACKENDS = ("numpy", *codec.KERNELS)

compiled = pytest.mark.skipif(not codec.KERNELS, reason="the compiled coder is not built")


def weights(rows, cols, seed=0, *, outliers=True, step=0.3):
    """Integers as the quantizer leaves them: rows of one step each, some columns several times larger."""
    rng = np.random.default_rng(seed)
    scale = np.exp(0.15 * rng.standard_normal(cols))
    if outliers:
        scale[rng.permutation(cols)[: cols // 16]] *= 10
    weight = rng.standard_t(5, (rows, cols)) * scale
    return np.clip(np.rint(weight / (weight.std(1, keepdims=True) * step + 1e-9)), -127, 127).astype(np.int8)


def entropy_bits(matrix):
    p = np.bincount(matrix.view(np.uint8).reshape(-1)) / matrix.size
    p = p[p > 0]
    return -(p * np.log2(p)).sum()


def matrices():
    """Shapes around the multiples of 32, and contents from constant to incompressible."""

    def make(rows, cols, kind, seed):
        rng = np.random.default_rng(seed)
        match kind:
            case "weights":
                return weights(rows, cols, seed)
            case "equal":
                return np.full((rows, cols), seed % 256 - 128, dtype=np.int8)
            case "distinct":
                return np.arange(rows * cols).astype(np.int8).reshape(rows, cols)
            case "escapes":
                return np.where(rng.random((rows, cols)) < 0.9, -128, 3).astype(np.int8)
            case "noise":
                return rng.integers(-128, 128, (rows, cols), dtype=np.int8)
            case "zeros":
                return (rng.random((rows, cols)) < 0.01).astype(np.int8)
        raise AssertionError(kind)

    kinds = st.sampled_from(["weights", "equal", "distinct", "escapes", "noise", "zeros"])
    cols = st.one_of(st.integers(1, 100), st.sampled_from([31, 32, 33, 64, 96, 128, 257]))
    return st.builds(make, st.integers(1, 40), cols, kinds, st.integers(0, 2**16))


def reference_decode(blob):
    """A decoder written from the docstring of container.py alone, one byte at a time. Returns rows of a matrix."""
    head = struct.unpack("<4sBBBBBBHIQQIIQQQ", blob[:64])
    (
        magic,
        version,
        layout,
        classes,
        prob_bits,
        lanes,
        escape,
        zero,
        tile_rows,
        rows,
        cols,
        tiles,
        table_bytes,
        *rest,
    ) = head
    payload_bytes, matrix_digest, head_digest = rest
    assert (magic, version, layout, prob_bits, lanes, escape, zero) == (b"GQSC", 1, 0, 11, 32, 0x80, 0)
    bits = [0, 0, 1, 2, 2, 3, 3, 3, 3][classes]
    at = 64 + (cols * bits + 7) // 8
    whole = int.from_bytes(blob[64:at], "little")
    class_of = [whole >> (c * bits) & ((1 << bits) - 1) for c in range(cols)]
    tables_end = at + table_bytes
    slots = []
    for _ in range(classes):
        live = [s for s in range(256) if blob[at + s // 8] >> s % 8 & 1]
        at += 32
        ranges = []
        for s in live:
            f = blob[at] & 127
            if blob[at] & 128:
                at += 1
                f += blob[at] << 7
            at += 1
            ranges += [(s, f + 1, i) for i in range(f + 1)]
        assert len(ranges) == 2048
        slots.append(ranges)
    assert at == tables_end
    index_end = at + 16 * tiles
    assert xxhash.xxh3_64_intdigest(blob[:56] + blob[64:index_end]) == head_digest
    index = [struct.unpack_from("<QII", blob, at + 16 * i) for i in range(tiles)]
    assert xxhash.xxh3_64_intdigest(b"".join(struct.pack("<Q", entry[0]) for entry in index)) == matrix_digest
    at, matrix = index_end, []
    for number, (digest, kind_size, escapes) in enumerate(index):
        height = min(tile_rows, rows - number * tile_rows)
        kind, size = kind_size >> 30, kind_size & 0x3FFFFFFF
        stored = blob[at : at + size]
        at += size
        if kind == 0:
            decoded = bytearray(stored)
        elif kind == 1:
            decoded = bytearray(stored * (height * cols))
        else:
            state = list(struct.unpack_from("<32I", stored))
            words = iter(struct.unpack(f"<{(size - 128 - escapes) // 2}H", stored[128 : size - escapes]))
            decoded = bytearray()
            for place in range(height * cols):
                c = place % cols
                x = state[c % 32]
                s, f, offset = slots[class_of[c]][x % 2048]
                x = f * (x >> 11) + offset
                state[c % 32] = x << 16 | next(words) if x < 2**15 else x
                decoded.append(s)
            assert next(words, None) is None
            assert state == [2**15] * 32
            escaped = iter(stored[size - escapes :])
            decoded = bytearray(next(escaped) if byte == 0x80 else byte for byte in decoded)
            assert next(escaped, None) is None
        assert xxhash.xxh3_64_intdigest(bytes(decoded)) == digest
        matrix.append(decoded)
    assert blob[at:] == bytes(64)
    assert len(blob) == index_end + payload_bytes + 64
    return np.frombuffer(b"".join(matrix), dtype=np.int8).reshape(rows, cols)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=40)
@given(matrix=matrices(), tile_bytes=st.sampled_from([1, 100, 1000, 1 << 18]))
def test_what_comes_back_is_what_went_in(backend, matrix, tile_bytes):
    blob = codec.encode(matrix, tile_bytes=tile_bytes, backend=backend)
    back = codec.decode(blob, backend=backend)
    assert back.dtype == np.int8
    assert np.array_equal(back, matrix)


@compiled
@settings(deadline=None, max_examples=80)
@given(matrix=matrices(), tile_bytes=st.sampled_from([1, 100, 1000, 1 << 18]))
def test_every_backend_writes_the_same_bytes(matrix, tile_bytes):
    blobs = {codec.encode(matrix, tile_bytes=tile_bytes, backend=backend) for backend in BACKENDS}
    assert len(blobs) == 1


@compiled
@pytest.mark.parametrize("shape", [(3000, 480), (700, 2100), (2**16, 33)])
def test_every_backend_chooses_the_same_tables_where_rows_are_sampled(shape):
    matrix = weights(*shape, seed=5)
    by_numpy = codec.choose_tables(matrix)
    classes, frequencies, table = codec._codec.choose_tables(matrix, *shape)
    assert classes == by_numpy[0].tobytes()
    assert frequencies == by_numpy[1].tobytes()
    assert table == codec.encoder_table(by_numpy[1]).tobytes()


@pytest.mark.parametrize("decoder", BACKENDS)
@pytest.mark.parametrize("encoder", BACKENDS)
def test_every_backend_reads_every_backend(encoder, decoder):
    matrix = weights(150, 200, seed=1)
    matrix[3, :50] = -128
    blob = codec.encode(matrix, tile_bytes=8000, backend=encoder)
    assert codec.read_info(blob).tiles == 4
    assert codec.read_info(blob).escapes >= 50
    assert np.array_equal(codec.decode(blob, backend=decoder), matrix)


@pytest.mark.parametrize("kind", ["coded", "raw", "constant"])
def test_a_decoder_written_from_the_description_reads_the_file(kind):
    matrix = weights(70, 90, seed=2)
    if kind == "raw":
        matrix = np.random.default_rng(0).integers(-128, 128, (7, 9), dtype=np.int8)
    if kind == "constant":
        matrix[:] = -128
    blob = codec.encode(matrix, tile_bytes=3000)
    assert np.array_equal(reference_decode(blob), matrix)


def test_the_bytes_of_a_file_never_change():
    r, c = np.mgrid[0:400, 0:90]
    hashed = (r * 2654435761 + c * 40503 + r * c * 97) % 4093
    matrix = hashed % 13 + hashed // 13 % 13 + hashed // 169 % 13 - 18
    matrix = (matrix * np.where(c % 10 == 3, 6, 1)).astype(np.int8)
    matrix[::97, 5] = -128
    blob = codec.encode(matrix, tile_bytes=16384)
    info = codec.read_info(blob)
    assert (info.columns_of_class, info.escapes, info.tiles) == ((81, 9), 5, 3)
    assert (
        hashlib.sha256(matrix.tobytes()).hexdigest()
        == "b33dd3c2e0f9f749eb04118938a0423271b32b5e2b154c69d062a0857a5ab8f7"
    )
    assert hashlib.sha256(blob).hexdigest() == "a98f28c80e5a45249d0357af1bc6f8e4e761a2aa003012b01f029051fe8066bf"


def test_the_number_of_threads_changes_nothing():
    matrix = weights(333, 256, seed=3)
    blob = codec.encode(matrix, tile_bytes=4096)
    assert codec.encode(matrix, tile_bytes=4096, threads=3) == blob
    assert np.array_equal(codec.decode(blob, threads=3), matrix)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_tile_and_any_rows_are_slices_of_the_whole(backend):
    matrix = weights(100, 48, seed=4)
    matrix[30:40] = 7
    matrix[40:50] = np.random.default_rng(0).integers(-128, 128, (10, 48))
    blob = codec.encode(matrix, tile_bytes=480)
    info = codec.read_info(blob)
    assert (info.tiles, info.tile_rows) == (10, 10)
    assert (info.constant_tiles, info.raw_tiles) == (1, 1)
    for index in range(10):
        assert np.array_equal(codec.decode_tile(blob, index, backend=backend), matrix[index * 10 : index * 10 + 10])
    for start, stop in [(0, 1), (0, 100), (9, 11), (10, 20), (37, 62), (99, 100)]:
        assert np.array_equal(codec.decode_rows(blob, start, stop, backend=backend), matrix[start:stop])


def test_what_is_not_there_is_an_index_error():
    blob = codec.encode(weights(10, 10))
    with pytest.raises(IndexError, match=r"^tile 1 of 1$"):
        codec.decode_tile(blob, 1)
    with pytest.raises(IndexError, match=r"^tile -1 of 1$"):
        codec.decode_tile(blob, -1)
    with pytest.raises(IndexError, match=r"^rows 3 to 3 of 10$"):
        codec.decode_rows(blob, 3, 3)
    with pytest.raises(IndexError, match=r"^rows 0 to 11 of 10$"):
        codec.decode_rows(blob, 0, 11)


def test_a_file_is_read_from_any_buffer():
    matrix = weights(20, 40)
    blob = codec.encode(matrix)
    for form in (bytearray(blob), memoryview(blob), np.frombuffer(blob, dtype=np.uint8)):
        assert np.array_equal(codec.decode(form), matrix)


def test_a_matrix_need_not_be_contiguous():
    matrix = weights(64, 64)
    assert np.array_equal(codec.decode(codec.encode(matrix.T)), matrix.T)
    assert codec.encode(matrix[::2, ::3]) == codec.encode(matrix[::2, ::3].copy())


@pytest.mark.parametrize(
    ("matrix", "sentence"),
    [
        (
            np.zeros((0, 5), np.int8),
            "matrix to compress: 0 x 5 is not possible; wanted 1 row or more, 1 to 2^28 columns",
        ),
        (
            np.zeros((5, 0), np.int8),
            "matrix to compress: 5 x 0 is not possible; wanted 1 row or more, 1 to 2^28 columns",
        ),
        (np.zeros((5, 5), np.uint8), "matrix to compress: wanted int8 with 2 dimensions, found uint8 with 2"),
        (np.zeros(5, np.int8), "matrix to compress: wanted int8 with 2 dimensions, found int8 with 1"),
    ],
)
def test_what_is_no_int8_matrix_is_refused(matrix, sentence):
    with pytest.raises(CodecError) as caught:
        codec.encode(matrix)
    assert str(caught.value) == sentence


def test_without_a_compiler_numpy_does_the_work(monkeypatch):
    matrix = weights(40, 64)
    blob = codec.encode(matrix)
    monkeypatch.setattr(codec, "KERNELS", ())
    assert codec.encode(matrix) == blob
    assert np.array_equal(codec.decode(blob), matrix)
    with pytest.raises(DeviceError) as caught:
        codec.encode(matrix, backend="c")
    assert str(caught.value) == (
        "codec backend 'c': glmq was installed without a C compiler; reinstall with one, or use numpy"
    )


def test_a_kernel_that_the_processor_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(codec, "KERNELS", ("scalar",))
    with pytest.raises(DeviceError) as caught:
        codec.encode(weights(4, 4), backend="avx512")
    assert str(caught.value) == "codec backend 'avx512': this processor does not run it; it runs scalar and numpy"


def test_outlier_columns_are_coded_below_the_entropy_of_the_matrix():
    matrix = weights(1024, 1024, seed=6)
    info = codec.read_info(codec.encode(matrix))
    assert len(info.columns_of_class) > 1
    assert info.bits_per_weight < 0.965 * entropy_bits(matrix)


def test_columns_alike_are_coded_at_the_entropy_of_the_matrix():
    matrix = weights(2048, 2048, seed=7, outliers=False)
    # The goal for any matrix of at least 4 MB.
    assert codec.read_info(codec.encode(matrix)).bits_per_weight <= 1.002 * entropy_bits(matrix)


def test_the_information_is_what_the_file_holds():
    matrix = np.zeros((64, 96), dtype=np.int8)
    matrix[:, 0::3] = np.arange(64)[:, None] % 2
    matrix[:, 1::3] = np.arange(64)[:, None] % 4 * 30
    blob = codec.encode(matrix)
    info = codec.read_info(blob)
    assert (info.rows, info.cols, info.stored_bytes, info.tiles, info.tile_rows) == (64, 96, len(blob), 1, 64)
    assert (info.raw_tiles, info.constant_tiles, info.escapes) == (0, 0, 0)
    assert info.columns_of_class == (32, 32, 32)
    assert info.bits_per_weight == 8 * len(blob) / (64 * 96)
    # Values 0, 1, 30, 60, 90 in (1 + 1/2 + 1/4, 1/2, 1/4, 1/4, 1/4) / 3, and 0, 1 and 2 bits given the class. The escape's
    # one slot of 2048 moves each by less than 0.01.
    p = np.array([1.75, 0.5, 0.25, 0.25, 0.25]) / 3
    assert abs(info.entropy_bits - -(p * np.log2(p)).sum()) < 0.01
    assert abs(info.class_entropy_bits - 1) < 0.01
    assert codec.read_info(codec.encode(matrix[:, :1] * 0)).entropy_bits is None


def test_the_matrix_digest_tells_equal_matrices():
    matrix = weights(50, 50)
    other = matrix.copy()
    other[49, 49] ^= 1
    digests = [codec.read_info(codec.encode(m)).matrix_digest for m in (matrix, matrix.copy(), other)]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (40, 64), (600, 1000)])
def test_no_file_is_larger_than_the_bound_and_noise_comes_close(shape: tuple[int, int]) -> None:
    noise = np.random.default_rng(3).integers(-128, 128, shape, dtype=np.int8)
    bound = codec.at_most_bytes(*shape)
    assert noise.size <= len(codec.encode(noise)) <= bound <= noise.size * 1.01 + 4600


@pytest.mark.parametrize("kernels", [codec.KERNELS, ()])
@pytest.mark.parametrize(
    ("values", "bits"),
    [([5], 0.0), ([1, 1, 1], 0.0), ([-128, 127], 1.0), ([0, 0, 1, -1], 1.5), (range(-128, 128), 8.0)],
)
def test_entropy_is_that_of_the_histogram(monkeypatch, kernels, values, bits):
    monkeypatch.setattr(codec, "KERNELS", kernels)
    repeated = np.tile(np.array(values, dtype=np.int8), (999, 1))
    assert codec.zero_order_entropy(repeated) == bits
