import errno
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import xxhash
from helpers import tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from glmq.checkpoint.disk import check_room
from glmq.checkpoint.layout import ShardPlan, TensorSpec, plan_shards
from glmq.checkpoint.reader import Checkpoint, dtype_code
from glmq.checkpoint.writer import ShardWriter, write_tensors
from glmq.errors import CheckpointError, SpaceError

GENERATOR = torch.Generator().manual_seed(2)
TENSORS = {
    "b.weight": torch.randint(-128, 128, (3, 5), generator=GENERATOR).to(torch.int8),
    "b.deq_scale": torch.arange(3),
    'quoted "é" \\ name': torch.randn(2, 2, generator=GENERATOR).half(),
    "a": torch.randn(4, generator=GENERATOR).bfloat16(),
    "b.quant_bias": torch.arange(3, dtype=torch.int32),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "flags": torch.tensor([True, False]),
    "a.bytes": torch.arange(3, dtype=torch.uint8),
}
STEM = "quant_model_weight_w8a8s"


def specs_of(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]


def write_and_interrupt(plan: ShardPlan, directory: Path, tensors: dict[str, Tensor]) -> None:
    with ShardWriter(plan, directory, keep_partial=True) as sink:
        for name, tensor in tensors.items():
            sink.write(name, tensor)
        raise KeyboardInterrupt


def golden(tensors: dict[str, Tensor], path: Path) -> bytes:
    save_file(tensors, path, metadata={"format": "pt"})
    return path.read_bytes()


def test_a_single_file_has_the_bytes_of_the_formats_own_writer(tmp_path: Path) -> None:
    plan = plan_shards(specs_of(TENSORS), STEM, None)
    with ShardWriter(plan, tmp_path / "out") as sink:
        for name in sorted(TENSORS):
            sink.write(name, TENSORS[name])
    path = tmp_path / "out" / f"{STEM}.safetensors"
    assert list((tmp_path / "out").iterdir()) == [path]
    assert path.read_bytes() == golden(TENSORS, tmp_path / "golden")
    assert plan.nbytes == path.stat().st_size
    assert plan.tensor_bytes == sum(tensor.nbytes for tensor in TENSORS.values())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=100).filter(
            lambda name: name.isprintable() and name != "__metadata__"
        ),
        st.tuples(
            st.sampled_from([torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        max_size=8,
    )
)
def test_any_set_of_tensors_gives_the_bytes_of_the_formats_own_writer(
    tmp_path: Path, chosen: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    tensors = {name: torch.full(shape, len(name), dtype=dtype) for name, (dtype, shape) in chosen.items()}
    with ShardWriter(plan_shards(specs_of(tensors), "m", None), tmp_path) as sink:
        for name, tensor in tensors.items():
            sink.write(name, tensor)
    assert (tmp_path / "m.safetensors").read_bytes() == golden(tensors, tmp_path / "golden")


def test_parts_are_numbered_filled_in_order_and_indexed(tmp_path: Path) -> None:
    tensors = {name: torch.full((100,), fill, dtype=torch.int8) for fill, name in enumerate("edcba")}
    plan = plan_shards(specs_of(tensors), STEM, 400)
    assert [[info.name for info in file.tensors] for file in plan.files] == [["d", "e"], ["b", "c"], ["a"]]
    with ShardWriter(plan, tmp_path) as sink:
        for name in "abcde":
            sink.write(name, tensors[name])
        sink.finish()
    names = [f"{STEM}-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = tmp_path / f"{STEM}.safetensors.index.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, index.name])
    assert (
        index.read_text()
        == json.dumps(
            {
                "metadata": {"total_size": 500},
                "weight_map": {"a": names[2], "b": names[1], "c": names[1], "d": names[0], "e": names[0]},
            },
            indent=2,
        )
        + "\n"
    )
    for file, members in zip(names, ("ed", "cb", "a"), strict=True):
        expected = golden({name: tensors[name] for name in members}, tmp_path / "golden")
        assert (tmp_path / file).read_bytes() == expected
        (tmp_path / "golden").unlink()
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.names() == list("abcde")


@pytest.mark.parametrize(
    ("sizes", "limit", "parts"),
    [
        ([100_000, 99_900], 200_000, [[0], [1]]),  # with their header they would reach the limit
        ([100_000, 99_800], 200_000, [[0, 1]]),
        ([500, 1, 500], 200, [[0], [1], [2]]),  # a tensor above the limit has a file of its own
        ([10], 200, [[0]]),
        ([], 200, [[]]),
    ],
)
def test_a_new_part_starts_before_the_tensor_that_would_reach_the_limit(
    sizes: list[int], limit: int, parts: list[list[int]]
) -> None:
    plan = plan_shards([TensorSpec(str(i), "I8", (size,)) for i, size in enumerate(sizes)], "m", limit)
    assert [[int(info.name) for info in file.tensors] for file in plan.files] == parts
    assert all(file.nbytes < limit for file in plan.files if len(file.tensors) > 1)
    count = f"{len(parts):05d}"
    assert [file.name for file in plan.files] == [
        f"m-{number:05d}-of-{count}.safetensors" for number in range(1, len(parts) + 1)
    ]


def test_files_are_readable_by_the_group_and_folders_too_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with ShardWriter(plan_shards(specs_of(TENSORS), "m", 1), tmp_path / "out") as sink:
            for name, tensor in TENSORS.items():
                sink.write(name, tensor)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_transposed_and_strided_tensors_are_written_in_their_logical_order(tmp_path: Path) -> None:
    tensors = {"t": torch.arange(6.0).reshape(2, 3).T, "s": torch.arange(10, dtype=torch.int8)[::2]}
    with ShardWriter(plan_shards(specs_of(tensors), "m", None), tmp_path) as sink:
        for name, tensor in tensors.items():
            sink.write(name, tensor)
    loaded = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_can_be_written_in_row_parts(tmp_path: Path) -> None:
    whole = torch.arange(35, dtype=torch.int32).reshape(7, 5)
    with ShardWriter(plan_shards([TensorSpec("a", "I32", (7, 5))], "m", None), tmp_path) as sink:
        for start, stop in ((0, 3), (3, 3), (3, 7)):
            sink.write_rows("a", start, whole[start:stop])
    assert (tmp_path / "m.safetensors").read_bytes() == golden({"a": whole}, tmp_path / "golden")


@pytest.mark.parametrize(
    ("start", "rows"),
    [
        (1, torch.zeros(1, 5, dtype=torch.int8)),
        (0, torch.zeros(8, 5, dtype=torch.int8)),
        (0, torch.zeros(1, 4, dtype=torch.int8)),
        (0, torch.zeros(1, 5)),
    ],
)
def test_row_parts_that_do_not_fit_are_refused(tmp_path: Path, start: int, rows: Tensor) -> None:
    plan = plan_shards([TensorSpec("a", "I8", (7, 5))], "m", None)
    with pytest.raises(CheckpointError) as caught, ShardWriter(plan, tmp_path) as sink:
        sink.write_rows("a", start, rows)
    assert str(caught.value) == (
        f"tensor 'a' was planned as I8 (7, 5) with row 0 next, but {dtype_code(rows.dtype)} {tuple(rows.shape)} "
        f"was to be written at row {start}; this is a bug in the caller"
    )


def test_an_unfinished_tensor_in_row_parts_counts_as_missing(tmp_path: Path) -> None:
    sink = ShardWriter(plan_shards([TensorSpec("a", "I8", (7, 5))], "m", None), tmp_path)
    sink.write_rows("a", 0, torch.zeros(6, 5, dtype=torch.int8))
    with pytest.raises(CheckpointError) as caught:
        sink.finish()
    assert str(caught.value) == (
        f"{tmp_path}: 1 of 1 planned tensors were not written, the first is 'a'; this is a bug in the caller"
    )


def write_unknown(sink: ShardWriter) -> None:
    sink.write("x", torch.zeros(1))


def write_twice(sink: ShardWriter) -> None:
    sink.write("a", torch.zeros(2))
    sink.write("a", torch.zeros(2))


def write_other_dtype(sink: ShardWriter) -> None:
    sink.write("a", torch.zeros(2).half())


def write_other_shape(sink: ShardWriter) -> None:
    sink.write("a", torch.zeros(2, 1))


def write_nothing(sink: ShardWriter) -> None:
    pass


def mark_unknown(sink: ShardWriter) -> None:
    sink.mark_written({"x": ""})


BUG = "; this is a bug in the caller"


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (write_unknown, "tensor 'x' is not in the plan" + BUG),
        (mark_unknown, "tensor 'x' is not in the plan" + BUG),
        (write_twice, "tensor 'a' was already written" + BUG),
        (write_other_dtype, "tensor 'a' was planned as F32 (2,), but F16 (2,) was to be written" + BUG),
        (write_other_shape, "tensor 'a' was planned as F32 (2,), but F32 (2, 1) was to be written" + BUG),
        (write_nothing, "{out}: 1 of 1 planned tensors were not written, the first is 'a'" + BUG),
    ],
)
@pytest.mark.parametrize("shard_bytes", [None, 100])
def test_a_wrong_write_is_refused_and_leaves_nothing(
    tmp_path: Path, act: Callable[[ShardWriter], None], message: str, shard_bytes: int | None
) -> None:
    plan = plan_shards([TensorSpec("a", "F32", (2,))], "m", shard_bytes)
    with pytest.raises(CheckpointError) as caught, ShardWriter(plan, tmp_path) as sink:
        act(sink)
    assert str(caught.value) == message.format(out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_name_planned_twice_is_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        plan_shards([TensorSpec("a", "I8", (1,)), TensorSpec("a", "I8", (1,))], "m", None)
    assert str(caught.value) == "tensor 'a' is planned twice; each tensor is written once"


def test_a_tensor_cannot_have_the_name_of_the_headers_notes() -> None:
    with pytest.raises(CheckpointError) as caught:
        plan_shards([TensorSpec("__metadata__", "I8", (1,))], "m", None)
    assert str(caught.value) == ("no tensor can be called __metadata__: a safetensors header keeps its own notes there")


def test_a_header_that_readers_would_refuse_is_refused_at_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmq.checkpoint.layout.MAX_HEADER_BYTES", 80)
    with pytest.raises(CheckpointError) as caught:
        plan_shards([TensorSpec("a", "I8", (1,))], "m", None)
    assert str(caught.value) == "m.safetensors: its header needs 88 bytes, readers stop at 80; use shards"


def test_the_checksum_of_a_tensor_is_that_of_its_bytes_however_it_is_written(tmp_path: Path) -> None:
    values = torch.arange(12, dtype=torch.int16).reshape(6, 2)
    plan = plan_shards([TensorSpec(name, "I16", (6, 2)) for name in "ab"] + [TensorSpec("c", "I8", ())], "m", None)
    with ShardWriter(plan, tmp_path) as sink:
        sink.write_rows("b", 0, values[:1])
        sink.write("a", values)
        sink.write_rows("b", 1, values[1:])
        assert list(sink.checksums) == ["a", "b"]
        sink.write("c", torch.tensor(5, dtype=torch.int8))
    whole = xxhash.xxh3_128_hexdigest(values.numpy().tobytes())
    assert sink.checksums == {"a": whole, "b": whole, "c": xxhash.xxh3_128_hexdigest(b"\x05")}


def test_partial_files_are_kept_on_request_and_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    plan = plan_shards(specs_of(TENSORS), "m", 30)
    names = list(TENSORS)
    with pytest.raises(KeyboardInterrupt):
        write_and_interrupt(plan, tmp_path / "a", {name: TENSORS[name] for name in names[:4]})
    assert {path.name for path in (tmp_path / "a").iterdir()} == {f".{file.name}.partial" for file in plan.files}
    with ShardWriter(plan, tmp_path / "a", resume=True) as sink:
        sink.mark_written(dict.fromkeys(names[:4], "of the earlier run"))
        for name in names[4:]:
            sink.write(name, TENSORS[name])
    with ShardWriter(plan, tmp_path / "b") as other:
        for name in names:
            other.write(name, TENSORS[name])
    assert sink.checksums == dict.fromkeys(names[:4], "of the earlier run") | {n: other.checksums[n] for n in names[4:]}
    unbroken = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == unbroken


def test_several_writers_fill_the_files_of_one_and_the_last_finishes_them(tmp_path: Path) -> None:
    plan = plan_shards(specs_of(TENSORS), "m", 30)
    names = list(TENSORS)
    with ShardWriter(plan, tmp_path / "a") as first:
        with ShardWriter(plan, tmp_path / "a", resume=True) as other:
            for name in names[1::2]:
                other.write(name, TENSORS[name])
            other.sync()
            other.leave()
        for name in names[::2]:
            first.write(name, TENSORS[name])
        first.mark_written(other.checksums)
    with ShardWriter(plan, tmp_path / "b") as sink:
        for name in names:
            sink.write(name, TENSORS[name])
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert first.checksums == sink.checksums


def test_a_run_killed_between_renames_is_resumed(tmp_path: Path) -> None:
    plan = plan_shards([TensorSpec("a", "I8", (2,)), TensorSpec("b", "I8", (2,))], "m", 1)
    with pytest.raises(KeyboardInterrupt):
        write_and_interrupt(plan, tmp_path, dict.fromkeys("ab", torch.ones(2, dtype=torch.int8)))
    first = plan.files[0].name
    (tmp_path / f".{first}.partial").rename(tmp_path / first)
    with ShardWriter(plan, tmp_path, resume=True) as sink:
        sink.mark_written({"a": "1", "b": "2"})
    assert load_file(tmp_path / first)["a"].tolist() == [1, 1]
    assert not list(tmp_path.glob(".*"))


def test_partial_files_of_another_plan_or_none_are_not_resumed_and_not_touched(tmp_path: Path) -> None:
    plan = plan_shards([TensorSpec("a", "I8", (8,))], "m", None)
    partial = tmp_path / ".m.safetensors.partial"
    with pytest.raises(CheckpointError) as caught:
        ShardWriter(plan, tmp_path, resume=True)
    assert str(caught.value) == (
        f"{partial}: cannot be resumed (No such file or directory); start again without resuming"
    )
    other = plan_shards([TensorSpec("b", "I8", (8,))], "m", None)
    with pytest.raises(KeyboardInterrupt):
        write_and_interrupt(other, tmp_path, {})
    with pytest.raises(CheckpointError) as caught:
        ShardWriter(plan, tmp_path, resume=True)
    size = plan.nbytes
    assert other.nbytes == size
    assert str(caught.value) == (
        f"{partial}: was begun with other settings ({size} bytes, wanted {size} and the same header); "
        "start again without resuming"
    )
    assert partial.stat().st_size == size


@pytest.mark.parametrize("keep", [False, True])
def test_a_failure_while_renaming_takes_finished_names_away_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    plan = plan_shards([TensorSpec("a", "I8", (2,)), TensorSpec("b", "I8", (2,))], "m", 1)
    real = os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(target).name == plan.files[1].name:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    sink = ShardWriter(plan, tmp_path, keep_partial=keep)
    for name in "ab":
        sink.write(name, torch.ones(2, dtype=torch.int8))
    with pytest.raises(OSError, match="Input/output error"), sink:
        sink.finish()
    expected = {f".{file.name}.partial" for file in plan.files} if keep else set()
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    check_room(tmp_path / "not" / "yet", 100)
    plan = plan_shards([TensorSpec("a", "I8", (8,))], "m", None)
    with pytest.raises(SpaceError) as caught:
        ShardWriter(plan, tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path / 'out'}: {plan.nbytes} bytes are to be written, but its disk has 100 free; "
        "make room or choose another disk"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_does_not_know_its_size_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"total": 0}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=sizes["total"], free=0))
    check_room(tmp_path, 10**15)
    sizes["total"] = 100
    with pytest.raises(SpaceError):
        check_room(tmp_path, 1)


def test_a_disk_that_fills_up_is_reported_with_its_free_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    real = os.pwrite

    def full(handle: int, data: memoryview, offset: int) -> int:
        if offset == start + 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data[:5], offset)

    plan = plan_shards([TensorSpec("a", "I8", (8,))], "m", None)
    start = plan.files[0].tensors[0].start
    sink = ShardWriter(plan, tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 1000, 1))
    with pytest.raises(SpaceError) as caught, sink:
        sink.write("a", torch.zeros(8, dtype=torch.int8))
    assert str(caught.value) == (
        f"{tmp_path / 'm.safetensors'}: 3 bytes are to be written, but its disk has 1 free; "
        "make room or choose another disk"
    )
    assert list(tmp_path.iterdir()) == []


def test_other_write_errors_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = ShardWriter(plan_shards([TensorSpec("a", "I8", (8,))], "m", None), tmp_path)

    def broken(handle: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(OSError, match="Input/output error") as caught, sink:
        sink.write("a", torch.zeros(8, dtype=torch.int8))
    assert Path(caught.value.filename).parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_small_file_has_the_bytes_of_the_formats_own_writer(tmp_path: Path) -> None:
    tensors = TENSORS | {"turned": torch.arange(6).reshape(2, 3).T}
    digest = write_tensors(tmp_path / "small", tensors)
    written = (tmp_path / "small").read_bytes()
    assert written == save({name: tensor.contiguous() for name, tensor in tensors.items()})
    assert digest == xxhash.xxh3_128_hexdigest(written)
    assert os.listdir(tmp_path) == ["small"]
