"""Altered files: every one is refused, by every backend, with a sentence that names what is wrong."""

import re
import struct

import numpy as np
import pytest
import xxhash
from forge import HEAD, read_fields, sections, sign, with_fields

from glmq.codec import codec
from glmq.codec.container import class_bits
from glmq.errors import CodecError, SpaceError

BACKENDS = ("numpy", *codec.KERNELS)
compiled = pytest.mark.skipif(not codec.KERNELS, reason="the compiled coder is not built")


def make_matrix():
    """37 x 320 in tiles of 10, 10, 10 and 7 rows: coded, constant, raw and coded; several classes, a few escapes."""
    rng = np.random.default_rng(11)
    matrix = np.rint(rng.standard_normal((37, 40)) * np.where(np.arange(40) % 8 == 0, 20, 2)).astype(np.int8)
    matrix[1, 5] = -128
    matrix[10:20] = 3
    matrix[20:30] = rng.integers(-128, 128, (10, 40))
    return np.tile(matrix, (1, 8))


@pytest.fixture(scope="module")
def matrix():
    return make_matrix()


@pytest.fixture(scope="module")
def blob(matrix):
    blob = codec.encode(matrix, tile_bytes=3200)
    info = codec.read_info(blob)
    assert (info.tiles, info.constant_tiles, info.raw_tiles) == (4, 1, 1)
    assert len(info.columns_of_class) > 1
    assert info.escapes > 0
    return blob


def alter(blob, at, new):
    return sign(blob[:at] + new + blob[at + len(new) :])


def refusal(blob, backend="auto"):
    with pytest.raises(CodecError) as caught:
        codec.decode(blob, backend=backend)
    return str(caught.value)


def test_signing_an_unaltered_file_changes_nothing(blob):
    assert sign(blob) == blob


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_flipped_bit_goes_unnoticed(blob, backend):
    """Every third byte of header, tables and index, and one in some twenty of what the tiles hold."""
    rng = np.random.default_rng(1)
    payload, end = sections(blob)[3], len(blob) - 64
    head = range(BACKENDS.index(backend) % 3, payload, 3 if backend != "numpy" else 41)
    for at in (
        *head,
        *range(payload + 4 * BACKENDS.index(backend), end, 23 if backend != "numpy" else 41),
        *range(end, len(blob), 7),
    ):
        altered = bytearray(blob)
        altered[at] ^= 1 << rng.integers(8)
        assert refusal(bytes(altered), backend).startswith("compressed weight: ")


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_flipped_bit_goes_unnoticed_even_with_forged_head_checksums(matrix, blob, backend):
    """The tables, the class map and the index then decode to something else, which the tiles' checksums tell."""
    rng = np.random.default_rng(2)
    end = sections(blob)[3]
    for at in range(4 + BACKENDS.index(backend) % 3, end, 1 if backend == "scalar" else 5):
        altered = bytearray(blob)
        altered[at] ^= 1 << rng.integers(8)
        try:
            back = codec.decode(sign(bytes(altered)), backend=backend)
        except CodecError:
            continue
        # Signing undoes a flipped checksum; a class or frequency that no tile uses may change.
        assert np.array_equal(back, matrix)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_noise_in_the_payload_goes_unnoticed(blob, backend):
    payload = sections(blob)[3]
    rng = np.random.default_rng(3)
    for _ in range(150 if backend != "numpy" else 30):
        altered = bytearray(blob)
        at = int(rng.integers(payload, len(blob) - 64))
        size = int(rng.integers(1, 40))
        noise = rng.bytes(size)[: len(blob) - 64 - at]
        if altered[at : at + len(noise)] == noise:
            continue
        altered[at : at + len(noise)] = noise
        assert "tile" in refusal(bytes(altered), backend)


def test_no_truncation_goes_unnoticed(blob):
    for size in range(0, len(blob), 5):
        refusal(blob[:size])
    assert refusal(blob[:63]) == "compressed weight: 63 bytes are shorter than a header of 64; it is truncated"
    wanted = len(blob)
    assert (
        refusal(blob[:-1]) == f"compressed weight: has {wanted - 1} bytes, its header wants {wanted}; it is truncated"
    )
    assert (
        refusal(blob + b"x") == f"compressed weight: has {wanted + 1} bytes, its header wants {wanted}; it is altered"
    )
    assert refusal(b"") == "compressed weight: 0 bytes are shorter than a header of 64; it is truncated"


NEWER = "it is altered or of a newer glmq"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"magic": b"PK\3\4"}, "begins with b'PK\\x03\\x04', not b'GQSC'; glmq's portable codec did not write it"),
        ({"version": 2}, f"version is 2, wanted 1; {NEWER}"),
        ({"layout": 1}, f"layout is 1, wanted 0; {NEWER}"),
        ({"prob_bits": 12}, f"log2 of the table sum is 12, wanted 11; {NEWER}"),
        ({"lanes": 64}, f"lanes is 64, wanted 32; {NEWER}"),
        ({"escape": 127}, f"escape is 127, wanted 128; {NEWER}"),
        ({"reserved": 1}, f"reserved field is 1, wanted 0; {NEWER}"),
        ({"classes": 9}, "9 column classes, at most 8 are possible; it is altered"),
        ({"rows": 0}, "a matrix of 0 x 320 is not possible; it is altered"),
        ({"rows": 1 << 48}, f"a matrix of {1 << 48} x 320 is not possible; it is altered"),
        ({"cols": 0}, "a matrix of 37 x 0 is not possible; it is altered"),
        ({"cols": (1 << 28) + 1}, f"a matrix of 37 x {(1 << 28) + 1} is not possible; it is altered"),
        ({"tile_rows": 0}, "tiles of 0 rows for 37 x 320 are not possible; it is altered"),
        ({"tile_rows": 38}, "tiles of 38 rows for 37 x 320 are not possible; it is altered"),
        ({"cols": 1 << 26}, f"tiles of 10 rows for 37 x {1 << 26} are not possible; it is altered"),
        ({"tiles": 5}, f"number of tiles is 5, wanted 4; {NEWER}"),
        ({"rows": 41}, f"number of tiles is 4, wanted 5; {NEWER}"),
    ],
)
def test_a_header_that_no_writer_makes_is_refused(blob, changes, sentence):
    assert refusal(with_fields(blob, **changes)) == f"compressed weight: {sentence}"


def test_an_altered_head_is_told_by_its_checksum(blob):
    altered = bytearray(blob)
    altered[sections(blob)[1] + 40] ^= 1
    message = refusal(bytes(altered))
    assert message.startswith("compressed weight: checksum of its head is ")
    assert message.endswith("; it is altered")


def test_bits_after_the_class_map_are_refused():
    blob = codec.encode(make_matrix()[:, :317], tile_bytes=3200)
    assert class_bits(len(codec.read_info(blob).columns_of_class)) * 317 % 8 != 0
    tables = sections(blob)[1]
    message = refusal(alter(blob, tables - 1, bytes([blob[tables - 1] | 0x80])))
    assert message == "compressed weight: class map: the bits after the last column are not zero; it is altered"


def test_a_column_of_no_class_is_refused():
    matrix = np.zeros((64, 96), dtype=np.int8)
    matrix[:, 0::3] = np.arange(64)[:, None] % 2
    matrix[:, 1::3] = np.arange(64)[:, None] % 4 * 30
    blob = codec.encode(matrix)
    assert len(codec.read_info(blob).columns_of_class) == 3
    message = refusal(alter(blob, 64, b"\xff"))
    assert message == "compressed weight: class map: a column of class 3, of 3; it is altered"


def test_tables_that_do_not_fit_are_refused(blob):
    _, tables, index, _ = sections(blob)
    grown = bytes([blob[tables + 32] + 1])
    total = refusal(alter(blob, tables + 32, grown))
    assert total == (
        "compressed weight: table 0: frequencies sum to 2049, wanted 2048 with one for the escape; it is altered"
    )
    without_escape = refusal(alter(blob, tables + 16, bytes([blob[tables + 16] & 0xFE])))
    assert without_escape.startswith("compressed weight: table 0: frequencies sum to ")
    cut = with_fields(blob[: index - 1] + blob[index:], table_bytes=index - tables - 1)
    assert "no frequency for value" in refusal(sign(cut))
    longer = with_fields(blob[:index] + b"\0" + blob[index:], table_bytes=index - tables + 1)
    classes = len(codec.read_info(blob).columns_of_class)
    assert refusal(sign(longer)) == (
        f"compressed weight: tables: {classes} of them need {index - tables} bytes, found {index - tables + 1}; it is altered"
    )


def test_an_index_that_does_not_fit_is_refused(blob):
    index = sections(blob)[2]
    kinds = {0: "raw", 1: "constant", 2: "rANS", 3: "none"}
    for kind in kinds:
        message = refusal(alter(blob, index + 8, struct.pack("<II", kind << 30 | 127, 0)))
        assert message == (
            f"compressed weight: tile 0: kind {kind} with 127 bytes and 0 escapes is not possible for 10 x 320; it is altered"
        )
    size = struct.unpack_from("<I", blob, index + 8)[0] & 0x3FFFFFFF
    assert "tiles hold" in refusal(alter(blob, index + 8, struct.pack("<I", 2 << 30 | (size + 2))))
    assert "is not possible" in refusal(alter(blob, index + 12, struct.pack("<I", size - 126)))
    assert "is not possible" in refusal(alter(blob, index + 24, struct.pack("<II", 1 << 30 | 1, 1)))


def test_a_tail_that_is_not_zero_is_refused(blob):
    assert refusal(blob[:-1] + b"\1") == "compressed weight: the 64 bytes at its end are not zero; it is altered"


def test_a_forged_matrix_digest_is_refused(blob):
    head = read_fields(blob)
    fields = HEAD.pack(*(head | {"matrix_digest": 5}).values())[:56]
    forged = fields + struct.pack("<Q", xxhash.xxh3_64_intdigest(fields + blob[64 : sections(blob)[3]])) + blob[64:]
    assert refusal(forged) == (
        f"compressed weight: digest of the tiles is {head['matrix_digest']:016x}, stored is 0000000000000005; it is altered"
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("what", "at", "new"),
    [
        ("a state below the range", 0, struct.pack("<I", 2**15 - 1)),
        ("a state above the range", 124, struct.pack("<I", 2**31)),
        ("a state of zero", 60, struct.pack("<I", 0)),
        ("words that run out", 0, struct.pack("<32I", *[2**15] * 32)),
    ],
)
def test_a_stream_that_no_encoder_writes_is_refused(blob, backend, what, at, new):
    payload = sections(blob)[3]
    assert refusal(alter(blob, payload + at, new), backend) == "compressed weight: tile 0: its stream is altered"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_number_of_escapes_is_refused(blob, backend):
    index = sections(blob)[2]
    (escapes,) = struct.unpack_from("<I", blob, index + 12)
    for other in (escapes - 2, escapes + 2):
        if other >= 0:
            message = refusal(alter(blob, index + 12, struct.pack("<I", other)), backend)
            assert message == "compressed weight: tile 0: its stream is altered"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_message_names_the_tile(blob, backend):
    end = len(blob) - 64
    altered = blob[: end - 40] + bytes(8) + blob[end - 32 :]
    assert refusal(altered, backend).startswith("compressed weight: tile 3: ")
    with pytest.raises(CodecError, match="tile 3"):
        codec.decode_rows(altered, 36, 37, backend=backend)
    codec.decode_rows(altered, 0, 30, backend=backend)
    raw = sections(blob)[3] + sum(
        struct.unpack_from("<I", blob, sections(blob)[2] + 16 * i + 8)[0] & 0x3FFFFFFF for i in (0, 1)
    )
    altered = blob[:raw] + bytes([blob[raw] ^ 1]) + blob[raw + 1 :]
    message = refusal(altered, backend)
    assert message.startswith("compressed weight: tile 2: checksum is ")
    assert message.endswith("; it is altered")


def test_a_matrix_beyond_memory_is_named():
    """A forger needs few bytes to announce a matrix of constant tiles that no machine can hold."""
    tile = codec.encode(np.full((1, 1 << 10), 9, dtype=np.int8))
    head = read_fields(tile)
    rows = (1 << 40) + 1
    head |= {"rows": rows, "cols": 1 << 28, "tile_rows": 1, "tiles": 1}
    with pytest.raises(CodecError, match=r"^compressed weight: number of tiles is 1, wanted 1099511627777"):
        codec.decode(sign(HEAD.pack(*head.values()) + tile[64:]))


def test_no_memory_is_a_sentence(monkeypatch, blob):
    def refuse(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(codec.np, "empty", refuse)
    with pytest.raises(SpaceError) as caught:
        codec.decode(blob)
    assert str(caught.value) == "compressed weight: no memory for its 37 x 320 = 11840 bytes; free some"


@compiled
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kernel": "avx1024"}, "no kernel avx1024 on this machine"),
        ({"height": 0}, "tiles must be whole ones of height x cols"),
        ({"height": 3}, "tiles must be whole ones of height x cols"),
        ({"height": 2**62}, "tiles must be whole ones of height x cols"),  # times 40 is 0 in 64 bits
        ({"cols": 0}, "cols must be from 1 to 268435456"),
        ({"cols": 2**63 - 1}, "cols must be from 1 to 268435456"),
        ({"cols": 65}, "ids has 64 bytes, 96 are needed"),
        ({"ids": np.full(64, 2, np.uint8)}, "a column of a class without a table"),
        ({"table": np.zeros((2, 256), np.uint32)}, "a table entry with an impossible frequency"),
        ({"table": np.zeros(513, np.uint32)}, "table has 2052 bytes, 2048 are needed"),
    ],
)
def test_the_compiled_encoder_refuses_buffers_that_do_not_fit(changes, sentence):
    table = np.full((2, 256), 8 << 12, np.uint32)
    arguments = {"kernel": "scalar", "tiles": np.zeros((2, 5, 40), np.int8), "height": 5, "cols": 40,
                 "ids": np.zeros(64, np.uint8), "table": table}  # fmt: skip
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        codec._codec.encode_tiles(*(arguments | changes).values())


@compiled
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"jobs": np.zeros(7, np.int64)}, "jobs has 56 bytes, 40 are needed"),
        *[
            ({"jobs": np.array([job], np.int64)}, "job 0 reaches beyond blob or out")
            for job in ([0, 137, 0, 1, 0], [0, 128, 0, 5, 0], [0, 128, 0, 1, 121], [2**63 - 1, 128, 0, 1, 0],
                        [0, 128, 0, 2**62, 0], [0, 128, 0, 1, 2**63 - 1], [-1, 128, 0, 1, 0], [0, -1, 0, 1, 0])
        ],
        ({"cols": 2**40}, "cols must be from 1 to 268435456"),
        ({"blob": np.zeros(63, np.uint8)}, "job 0 reaches beyond blob or out"),
    ],
)  # fmt: skip
def test_the_compiled_decoder_refuses_buffers_that_do_not_fit(changes, sentence):
    arguments = {"kernel": "scalar", "blob": np.zeros(200, np.uint8), "jobs": np.array([[0, 136, 0, 1, 0]], np.int64),
                 "cols": 40, "ids": np.zeros(64, np.uint8), "table": np.zeros((1, 2048), np.uint32),
                 "out": np.zeros(160, np.int8)}  # fmt: skip
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        codec._codec.decode_tiles(*(arguments | changes).values())


@compiled
@pytest.mark.parametrize(("rows", "cols"), [(0, 4), (4, -1), (2**32, 2**32), (2**62, 4)])
def test_the_compiled_choice_of_tables_refuses_sizes_that_do_not_fit(rows, cols):
    with pytest.raises(ValueError, match=r"^(rows and cols must be positive|matrix has 16 bytes, -1 are needed)$"):
        codec._codec.choose_tables(np.zeros(16, np.int8), rows, cols)
