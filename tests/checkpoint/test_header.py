import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glmq.checkpoint.header import DTYPE_BITS, DTYPE_BYTES, TensorInfo, parse_header, read_header
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import CheckpointError

AGAIN = "; the file is damaged or incomplete, download or copy it again"


def entry(dtype: object = "I8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, header: object, data: bytes = b"\1\2\3\4", *, announced: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if announced is None else announced).to_bytes(8, "little") + text + data)
    return path


def refusal(path: Path) -> str:
    """The message about `path`, without its name and the advice."""
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.endswith(AGAIN)
    return message.removeprefix(f"{path}: ").removesuffix(AGAIN)


def test_header_of_a_real_file_gives_absolute_offsets_in_offset_order(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"b": torch.zeros(2, 3), "a": torch.zeros(5, dtype=torch.int8)}, path, metadata={"format": "pt"})
    header = read_header(path)
    start = header.data_start
    assert list(header.tensors.values()) == [
        TensorInfo("b", "F32", (2, 3), start, start + 24),
        TensorInfo("a", "I8", (5,), start + 24, start + 29),
    ]
    assert header.metadata == {"format": "pt"}
    assert header.file_bytes == start + 29 == path.stat().st_size
    assert header.tensors["b"].nbytes == 24


def test_header_lists_dtypes_as_the_format_orders_them(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", "0.7", reason="writes every dtype")
    dtypes = {
        "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
        "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "F64": torch.float64,
        "I64": torch.int64, "U64": torch.uint64, "C64": torch.complex64,
    }  # fmt: skip
    newer = {"F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"}
    dtypes |= {code: getattr(torch, name) for code, name in newer.items() if hasattr(torch, name)}
    save_file({code: torch.zeros(1, dtype=dtype) for code, dtype in dtypes.items()}, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    assert [info.dtype for info in header.tensors.values()] == [c for c in reversed(DTYPE_BYTES) if c in dtypes]
    assert all(info.name == info.dtype and info.nbytes == DTYPE_BYTES[info.dtype] for info in header.tensors.values())


def test_empty_tensors_and_scalars_are_accepted(tmp_path: Path) -> None:
    tensors = {"empty": entry(shape=[0, 3], offsets=[1, 1]), "scalar": entry(shape=[], offsets=[0, 1])}
    header = read_header(write(tmp_path / "a", tensors, b"\7"))
    assert [(info.name, info.shape) for info in header.tensors.values()] == [("scalar", ()), ("empty", (0, 3))]


def test_a_git_lfs_pointer_is_called_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(caught.value) == (
        f"{path}: is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`, or download it"
    )


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(CheckpointError) as caught:
            read_header(path)
        assert str(caught.value) == f"{path}: cannot be read ({why}); check the path and its permissions"


def test_files_that_are_too_short_for_their_announcement_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1234567")
    assert refusal(path) == "7 bytes are too few for a safetensors file, which has at least 8"
    write(path, {}, b"", announced=3)
    assert refusal(path) == "a header of 3 bytes was announced, but only 2 bytes follow"
    write(path, {}, b"", announced=16_000_001)
    assert refusal(path) == "header length 16000001 is above the limit of 16000000 bytes"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b"{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (b"\xff{}", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (b"{} {}", "Extra data: line 1 column 4 (char 3)"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number has 5000 digits, 40 are read"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "more than 64 lists and objects lie within each other"),
        (b'{"a":1,"a":2}', "the key 'a' appears twice"),
        (b'{"a":{"dtype":"I8","dtype":"U8"}}', "the key 'dtype' appears twice"),
        (b'{"\\ud800":{}}', "'\\ud800' has half of a surrogate pair, which is no character"),
    ],
)
def test_a_header_that_is_not_json_is_refused(tmp_path: Path, text: bytes, why: str) -> None:
    assert refusal(write(tmp_path / "a", text, b"")) == f"the header is not JSON ({why})"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([1], "the header is not a JSON object"),
        ({"__metadata__": []}, "__metadata__ is not a JSON object"),
        ({"__metadata__": {"x": 1}}, "__metadata__ entry 'x' is not a string"),
        ({"a\n": entry()}, r"tensor name 'a\n' has characters that cannot be printed"),
        ({"a": 1}, "tensor 'a' is not described by dtype, shape and data_offsets"),
        ({"a": {"dtype": "I8"}}, "tensor 'a' is not described by dtype, shape and data_offsets"),
        ({"a": entry() | {"x": 1}}, "tensor 'a' is not described by dtype, shape and data_offsets"),
        ({"a": entry("F5")}, f"tensor 'a' has the unknown dtype 'F5'; known are {', '.join(DTYPE_BITS)}"),
        ({"a": entry(["I8"])}, f"tensor 'a' has the unknown dtype ['I8']; known are {', '.join(DTYPE_BITS)}"),
        ({"a": entry("F4")}, "tensor 'a' spans 4 bytes, but shape (4,) of F4 needs 2"),
        ({"a": entry(shape=4)}, "tensor 'a' has the shape 4, which is not a list of non-negative integers"),
        ({"a": entry(shape=[-4])}, "tensor 'a' has the shape [-4], which is not a list of non-negative integers"),
        ({"a": entry(shape=[4.0])}, "tensor 'a' has the shape [4.0], which is not a list of non-negative integers"),
        ({"a": entry(shape=[True])}, "tensor 'a' has the shape [True], which is not a list of non-negative integers"),
        ({"a": entry(shape=[0, 2**61, 4])}, f"tensor 'a' has the impossible shape [0, {2**61}, 4]"),
        (
            {"a": entry(offsets=[4, 0])},
            "tensor 'a' has the data_offsets [4, 0], which are not two ascending integers",
        ),
        (
            {"a": entry(offsets=[-4, 0])},
            "tensor 'a' has the data_offsets [-4, 0], which are not two ascending integers",
        ),
        (
            {"a": entry(offsets=[0, 4, 8])},
            "tensor 'a' has the data_offsets [0, 4, 8], which are not two ascending integers",
        ),
        ({"a": entry("F16")}, "tensor 'a' spans 4 bytes, but shape (4,) of F16 needs 8"),
        ({"a": entry(shape=[5])}, "tensor 'a' spans 4 bytes, but shape (5,) of I8 needs 5"),
    ],
)
def test_a_lying_header_is_refused_with_the_reason(tmp_path: Path, header: object, message: str) -> None:
    assert refusal(write(tmp_path / "a", header)) == message


@pytest.mark.slow
def test_more_tensors_than_any_model_has_are_refused_before_they_are_looked_at(tmp_path: Path) -> None:
    text = b"{" + b",".join(b'"%d":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}' % i for i in range(50_001)) + b"}"
    assert refusal(write(tmp_path / "a", text, b"")) == (
        "50001 tensors are more than a GLM-4.1V or GLM-4.6V-Flash has, 50000 are read"
    )


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    for opening in (lambda: read_header(tmp_path / "a.safetensors"), lambda: Checkpoint.open(tmp_path)):
        with pytest.raises(CheckpointError) as caught:
            opening()
        assert str(caught.value) == (
            f"{tmp_path / 'a.safetensors'}: is a pipe, a regular file is needed; give the file itself"
        )


def test_a_header_alone_says_how_large_its_file_is(tmp_path: Path) -> None:
    raw = small_file(tmp_path / "a")
    header = read_header(tmp_path / "a")
    assert header.raw == raw[: header.data_start]
    assert parse_header(tmp_path / "a", header.raw) == header
    for damaged in (header.raw[:-1], header.raw + b" ", header.raw[:7]):
        with pytest.raises(CheckpointError) as caught:
            parse_header(Path("a"), damaged)
        assert str(caught.value) == f"a: {len(damaged)} bytes are not a header of the length that it announces{AGAIN}"


def test_overlaps_and_holes_between_tensors_are_refused(tmp_path: Path) -> None:
    two = {"a": entry(shape=[3], offsets=[0, 3]), "b": entry(shape=[2], offsets=[2, 4])}
    start = 8 + len(json.dumps(two))
    assert refusal(write(tmp_path / "a", two)) == (
        f"tensor 'b' starts at byte {start + 2}, which overlaps the one before it (wanted {start + 3})"
    )
    two["a"] = entry(shape=[1], offsets=[0, 1])
    assert refusal(write(tmp_path / "a", two)) == (
        f"tensor 'b' starts at byte {start + 2}, which leaves a hole before it (wanted {start + 1})"
    )


def test_truncated_data_and_trailing_bytes_are_refused(tmp_path: Path) -> None:
    end = 8 + len(json.dumps({"a": entry()})) + 4
    assert refusal(write(tmp_path / "a", {"a": entry()}, b"123")) == (
        f"the file is truncated: its tensors end at byte {end}, but it has {end - 1} bytes"
    )
    assert refusal(write(tmp_path / "a", {"a": entry()}, b"12345")) == (
        f"the file has trailing bytes: its tensors end at byte {end}, but it has {end + 1} bytes"
    )


def small_file(path: Path) -> bytes:
    tensors = {"w.1": torch.arange(6, dtype=torch.int8).reshape(2, 3), "w.10": torch.ones(3, dtype=torch.bfloat16)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path.read_bytes()


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_the_header_is_refused_or_leaves_a_consistent_file(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.safetensors"
    raw = bytearray(small_file(path))
    header_end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(header_end, len(raw)) - 1))
        match data.draw(st.sampled_from(["set", "delete", "insert"])):
            case "set":
                raw[at] = data.draw(st.sampled_from(b'0123456789",:[]{} -eFIB\x00\xff'))
            case "delete":
                del raw[at]
            case _:
                raw.insert(at, data.draw(st.sampled_from(b'0123456789",:[]{}-e\\')))
    path.write_bytes(raw)
    try:
        with Checkpoint.open(tmp_path) as checkpoint:
            total = sum(checkpoint.read(name).nbytes for name in checkpoint)
            header = read_header(path)
    except CheckpointError:
        return
    assert header.data_start + total == len(raw)


def test_the_undamaged_file_of_the_mutation_test_is_accepted(tmp_path: Path) -> None:
    small_file(tmp_path / "a.safetensors")
    loaded = load_file(tmp_path / "a.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.names() == ["w.1", "w.10"]
        assert all(torch.equal(checkpoint.read(name), loaded[name]) for name in checkpoint)
