import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmq.checkpoint import reader
from glmq.checkpoint.header import DTYPE_BYTES
from glmq.checkpoint.reader import Checkpoint, dtype_code, torch_dtype
from glmq.errors import CheckpointError

GENERATOR = torch.Generator().manual_seed(1)
TENSORS = {
    "layers.2.weight": torch.randn(7, 5, generator=GENERATOR).bfloat16(),
    "layers.10.weight": torch.randint(-128, 128, (6, 3, 2), generator=GENERATOR).to(torch.int8),
    "layers.10.bias": torch.randn((), generator=GENERATOR),
    "empty": torch.zeros(0, 4, dtype=torch.int64),
    "mask": torch.tensor([True, False]),
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    first, second = list(TENSORS)[:2], list(TENSORS)[2:]
    save_file({name: TENSORS[name] for name in first}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: TENSORS[name] for name in second}, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    write_index(tmp_path, weight_map)
    return tmp_path


def test_reading_ahead_asks_for_exactly_the_tensors_bytes_in_pieces(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(reader, "AHEAD_BYTES", 32)
    monkeypatch.setattr(
        os, "posix_fadvise", lambda _, start, count, advice: asked.append((start, count)), raising=False
    )
    with Checkpoint.open(sharded) as checkpoint:
        checkpoint.prefetch(["layers.2.weight", "layers.10.bias"])
        first, second = (checkpoint.info(name).start for name in ("layers.2.weight", "layers.10.bias"))
    assert asked == [(first, 32), (first + 32, 32), (first + 64, 6), (second, 4)]


def write_index(directory: Path, weight_map: object) -> Path:
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    return str(caught.value)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_every_tensor_is_read_bit_for_bit(layout: str, request: pytest.FixtureRequest) -> None:
    with Checkpoint.open(request.getfixturevalue(layout)) as checkpoint:
        assert checkpoint.names() == ["empty", "layers.2.weight", "layers.10.bias", "layers.10.weight", "mask"]
        assert list(checkpoint) == checkpoint.names()
        assert len(checkpoint) == 5
        for name, tensor in TENSORS.items():
            found = checkpoint.read(name)
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert torch.equal(found, tensor)
            assert checkpoint.nbytes(name) == tensor.nbytes
            assert checkpoint[name] == checkpoint.info(name)
            assert name in checkpoint
        assert "layers.3.weight" not in checkpoint


def test_row_ranges_are_read_alone(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    for name in ("layers.2.weight", "layers.10.weight", "empty"):
        rows = TENSORS[name].shape[0]
        for start in range(rows + 1):
            for stop in range(start, rows + 1):
                assert torch.equal(checkpoint.read_rows(name, start, stop), TENSORS[name][start:stop])
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read_rows("layers.2.weight", 3, 8)
    assert str(caught.value) == (
        f"{single / 'model.safetensors'}: tensor 'layers.2.weight' has shape (7, 5), so rows 3..8 cannot be read"
    )
    with pytest.raises(CheckpointError, match=r"has shape \(\), so rows 0\.\.1 cannot be read"):
        checkpoint.read_rows("layers.10.bias", 0, 1)
    checkpoint.close()


def test_each_read_gives_fresh_memory(single: Path) -> None:
    with Checkpoint.open(single) as checkpoint:
        checkpoint.read("layers.2.weight").zero_()
        assert torch.equal(checkpoint.read("layers.2.weight"), TENSORS["layers.2.weight"])


def test_files_are_opened_when_needed_and_closed_at_the_end(sharded: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with Checkpoint.open(sharded) as checkpoint:
        assert set(os.listdir("/proc/self/fd")) == before
        checkpoint.read("mask")
        assert len(set(os.listdir("/proc/self/fd"))) == len(before) + 1
    assert set(os.listdir("/proc/self/fd")) == before
    assert torch.equal(checkpoint.read("mask"), TENSORS["mask"])
    checkpoint.close()


def test_threads_can_read_at_the_same_time(sharded: Path) -> None:
    names = list(TENSORS) * 40
    with Checkpoint.open(sharded) as checkpoint, ThreadPoolExecutor(8) as pool:
        for name, tensor in zip(names, pool.map(checkpoint.read, names), strict=True):
            assert torch.equal(tensor, TENSORS[name])


def test_files_and_places_of_a_sharded_checkpoint(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    first, second = checkpoint.files()
    assert (first.name, second.name) == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert checkpoint.file_of("layers.2.weight") == first
    assert checkpoint.file_of("mask") == second
    assert checkpoint.directory == sharded


def test_a_hub_cache_of_links_is_read(single: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    snapshot = tmp_path_factory.mktemp("snapshot")
    (snapshot / "model.safetensors").symlink_to(single / "model.safetensors")
    with Checkpoint.open(snapshot) as checkpoint:
        assert torch.equal(checkpoint.read("mask"), TENSORS["mask"])


def test_a_missing_tensor_is_refused_with_the_nearest_name(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("layers.2.wieght")
    assert str(caught.value) == f"{single}: has no tensor 'layers.2.wieght'; did you mean 'layers.2.weight'?"
    with pytest.raises(CheckpointError) as caught:
        checkpoint.info("zzz")
    assert str(caught.value) == f"{single}: has no tensor 'zzz'; it has 5 other tensors"


def test_nan_and_infinity_are_refused_where_finite_values_are_wanted(tmp_path: Path) -> None:
    values = torch.tensor([1.0, float("nan"), float("-inf"), 2.0], dtype=torch.bfloat16)
    save_file({"a": values, "b": torch.ones(2), "c": torch.zeros(0)}, tmp_path / "m.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.read_finite("b").tolist() == [1.0, 1.0]
        assert checkpoint.read_finite("c").numel() == 0
        for read in (checkpoint.read_finite, checkpoint.read_float):
            with pytest.raises(CheckpointError) as caught:
                read("a")
            assert str(caught.value) == (
                "m.safetensors: tensor 'a' holds 2 NaN or infinite values of 4; "
                "download the file again or repair the checkpoint"
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8])
def test_weights_are_widened_piece_by_piece(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"w": torch.randn(7, 5) * 9, "none": torch.zeros(0, 5), "one": torch.ones(())}
    tensors = {name: each.to(dtype) for name, each in values.items()}
    if dtype in (torch.float32, torch.float64):
        tensors["large"] = torch.full((3,), 1e5, dtype=dtype)
    save_file(tensors, tmp_path / "m.safetensors")
    monkeypatch.setattr(reader, "WIDENED_BYTES", 20)
    with Checkpoint.open(tmp_path) as checkpoint:
        for name, values in tensors.items():
            found = checkpoint.read_float(name)
            assert found.dtype == torch.float32
            assert torch.equal(found, values.float())
        assert checkpoint.beyond_float16 == tensors.keys() & {"large"}


def test_a_folder_without_weights_says_what_it_has(tmp_path: Path) -> None:
    advice = "wanted *.safetensors weight files, but there are none; "
    assert refusal(tmp_path) == f"{tmp_path}: {advice}is this the right folder?"
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / ".a.safetensors").touch()
    assert refusal(tmp_path) == f"{tmp_path}: {advice}found pytorch_model.bin; convert them to safetensors"
    (tmp_path / "GLM-Q4_K_M.gguf").touch()
    assert refusal(tmp_path) == (
        f"{tmp_path}: {advice}found GLM-Q4_K_M.gguf, which llama.cpp's tools have made; give the float release that it was "
        "made from"
    )
    assert refusal(tmp_path / "none") == (
        f"{tmp_path / 'none'}: is not a folder; give the folder that holds config.json and the weights"
    )


def test_a_folder_of_folders_with_weights_names_them(tmp_path: Path) -> None:
    advice = "wanted *.safetensors weight files, but there are none; its sub-folder"
    for name, said in {
        "._____temp": None,  # what ModelScope has not downloaded yet
        "checkpoint-500": "checkpoint-500",
        "checkpoint-1500": "s checkpoint-500, checkpoint-1500",
        "checkpoint-1000": "s checkpoint-500, checkpoint-1000, checkpoint-1500",
        "checkpoint-900": "s checkpoint-500, ..., checkpoint-1500",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
        if said is not None:
            newest = said.rpartition(" ")[2]
            said = said if said.startswith("s ") else f" {said}"
            assert refusal(tmp_path) == f"{tmp_path}: {advice}{said} may be meant; give {tmp_path / newest}"


def test_the_parts_of_single_ranks_are_no_model_and_are_never_advised(tmp_path: Path) -> None:
    files = {
        "mindie": ["part0-of-2/weights.safetensors", "part1-of-2/weights.safetensors"],
        "vllm": ["model-rank-0-part-0.safetensors", "model-rank-1-part-0.safetensors"],
    }
    for name, parts in files.items():
        for part in parts:
            (tmp_path / name / part).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / part).touch()
        listed = ", ".join(part.removesuffix("/weights.safetensors") for part in parts)
        assert refusal(tmp_path / name) == (
            f"{tmp_path / name}: is quantized already and cut into the parts of single ranks ({listed}); give the float model"
        )


@pytest.mark.parametrize("shards", [True, False])
def test_a_file_that_aria2_has_not_finished_is_refused(shards: bool, sharded: Path) -> None:
    if not shards:
        next(sharded.glob("*.index.json")).unlink()
    path = min(sharded.glob("*.safetensors"))
    (sharded / "README.md.aria2").touch()
    assert Checkpoint.open(sharded)
    control = sharded / f"{path.name}.aria2"
    control.touch()
    assert refusal(sharded) == (
        f"{control}: says that aria2 has not finished {path.name}; start the same download again, or remove the file if "
        "another program has fetched it whole"
    )


def test_two_indexes_are_refused(sharded: Path) -> None:
    (sharded / "other.safetensors.index.json").write_text("{}")
    assert refusal(sharded) == (
        f"{sharded}: has 2 indexes (model.safetensors.index.json, other.safetensors.index.json); "
        "remove those that do not belong to this checkpoint"
    )


@pytest.mark.parametrize(
    ("weight_map", "what"),
    [
        (None, "'weight_map' is None, wanted an object"),
        ([], "'weight_map' is [], wanted an object"),
        ({"mask": 3}, "weight_map: 'mask' is 3, wanted a text"),
        ({}, "its weight_map is empty"),
    ],
)
def test_an_index_without_a_weight_map_is_refused(single: Path, weight_map: object, what: str) -> None:
    path = write_index(single, weight_map)
    assert refusal(single) == f"{path}: {what}; download it again"


MOVE = "move all weight files beside it, and take the folders out of their names"
AGAIN = "download it again"


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("../model.safetensors", MOVE),
        ("sub/model.safetensors", MOVE),
        ("a\\b.safetensors", MOVE),
        ("/etc/model.safetensors", AGAIN),
        ("model.bin", AGAIN),
        ("x\0.safetensors", AGAIN),
    ],
)
def test_an_index_that_names_something_else_than_a_weight_file_is_refused(single: Path, file: str, advice: str) -> None:
    path = write_index(single, {"mask": file})
    assert refusal(single) == (
        f"{path}: says that 'mask' is in {file!r}, which is no name of a file beside it; {advice}"
    )


def test_numbered_files_without_an_index_are_all_wanted(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert len(Checkpoint.open(sharded)) > 1
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert refusal(sharded) == (
        f"{sharded}: is incomplete: model-00001-of-00002.safetensors is one of 2 files, of which "
        "model-00002-of-00002.safetensors is not there, nor is their index; download them"
    )


def test_an_index_that_names_a_missing_file_is_refused(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert refusal(sharded) == (
        f"{sharded / 'model.safetensors.index.json'}: names model-00002-of-00002.safetensors, "
        "which is not in the folder; download the missing file"
    )
    (sharded / "model-00001-of-00002.safetensors").unlink()
    assert refusal(sharded) == (
        f"{sharded / 'model.safetensors.index.json'}: names model-00001-of-00002.safetensors, "
        "model-00002-of-00002.safetensors, which are not in the folder; download the missing files"
    )


def test_an_index_and_files_that_disagree_are_refused(single: Path) -> None:
    path = write_index(single, dict.fromkeys([*TENSORS, "ghost"], "model.safetensors"))
    assert refusal(single) == f"{path}: says that 'ghost' is in model.safetensors, but it is not; download both again"
    write_index(single, dict.fromkeys(list(TENSORS)[1:], "model.safetensors"))
    assert refusal(single) == (
        f"{path}: does not list 'layers.2.weight', which is in model.safetensors; download both again"
    )


def test_a_tensor_in_two_files_is_refused(single: Path) -> None:
    save_file({"mask": TENSORS["mask"]}, single / "other.safetensors")
    assert refusal(single) == (
        f"{single}: tensor 'mask' is in model.safetensors and in other.safetensors; "
        "remove the file that does not belong to this checkpoint"
    )


def test_a_file_that_shrinks_or_vanishes_after_opening_is_refused(single: Path) -> None:
    path = single / "model.safetensors"
    checkpoint = Checkpoint.open(single)
    os.truncate(path, checkpoint.info("layers.2.weight").start + 1)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("layers.2.weight")
    assert str(caught.value) == (
        f"{path}: ended while tensor 'layers.2.weight' was read; do not change a file that is in use"
    )
    checkpoint.close()
    path.unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("layers.2.weight")
    assert str(caught.value) == (
        f"{path}: cannot be read (No such file or directory); check the path and its permissions"
    )


def test_the_fingerprint_follows_names_headers_and_config_but_not_the_place(
    single: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def fingerprint(directory: Path) -> str:
        with Checkpoint.open(directory) as checkpoint:
            return checkpoint.fingerprint()

    first = fingerprint(single)
    copy = tmp_path_factory.mktemp("copy")
    save_file(TENSORS, copy / "model.safetensors")
    assert fingerprint(copy) == first
    assert len(first) == 64
    (copy / "config.json").write_text("{}")
    with_config = fingerprint(copy)
    (copy / "model.safetensors").rename(copy / "renamed.safetensors")
    renamed = fingerprint(copy)
    save_file(TENSORS | {"mask": torch.zeros(2, dtype=torch.uint8)}, copy / "renamed.safetensors")
    assert len({first, with_config, renamed, fingerprint(copy)}) == 4


def test_dtype_codes_and_torch_dtypes_are_each_others_inverse() -> None:
    listed_alone = {"C64", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
    for code in set(DTYPE_BYTES) - listed_alone:
        assert dtype_code(torch_dtype(code)) == code
        assert torch_dtype(code).itemsize == DTYPE_BYTES[code]
    with pytest.raises(CheckpointError, match=r"^tensors of dtype F4 are listed, but their values cannot be read"):
        torch_dtype("F4")
    with pytest.raises(CheckpointError, match=r"^torch\.complex64 cannot be stored; use one of torch\.bool, "):
        dtype_code(torch.complex64)


def test_loading_with_the_formats_own_reader_agrees(single: Path) -> None:
    with Checkpoint.open(single) as checkpoint:
        for name, tensor in load_file(single / "model.safetensors").items():
            assert torch.equal(checkpoint.read(name), tensor)


def test_a_disk_that_fails_is_named_with_the_tensor(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with Checkpoint.open(single) as checkpoint, pytest.raises(CheckpointError) as caught:
        checkpoint.read("mask")
    assert str(caught.value) == (
        f"{single / 'model.safetensors'}: tensor 'mask' cannot be read (Input/output error); check its disk or network, "
        "and copy the file again if it is damaged"
    )


def test_nothing_depends_on_reading_ahead(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fadvise", fail)
    with Checkpoint.open(single) as checkpoint:
        checkpoint.prefetch(["mask"])  # a failure of its thread would be a warning, which is an error here
        assert torch.equal(checkpoint.read("mask"), TENSORS["mask"])
