import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from random_w8a8s import write_stand_in

from glmq.compression import executor
from glmq.compression.executor import AscendCodec, find_executor, how_to_build, index_bytes
from glmq.compression.fractal import to_nz
from glmq.errors import CodecError, DeviceError, SpaceError, UsageError

pytestmark = pytest.mark.slow

MATRIX = np.random.default_rng(3).integers(-8, 8, (150, 300), dtype=np.int8)
NAME = "layers.0.mlp.gate_up_proj"
USELESS = "its result cannot be used, check that the program fits this CANN and this NPU"


def make(folder: Path, mode: str = "honest", time_limit: float = 60) -> tuple[AscendCodec, Path]:
    """The codec with a stand-in, and an empty work folder."""
    work = folder / "work"
    work.mkdir()
    return AscendCodec(write_stand_in(folder, mode), time_limit), work


def test_the_program_gets_fractals_and_its_outputs_become_three_tensors(tmp_path: Path) -> None:
    codec, work = make(tmp_path)
    compressed = codec.compress(NAME, MATRIX, work)
    weight, index, info = compressed.tensors
    packed = weight.path.read_bytes()
    assert zlib.decompress(packed) == to_nz(MATRIX).tobytes()
    assert (weight.suffix, weight.dtype, weight.shape) == (".weight", "I8", (len(packed),))
    # ceil(300 / 256) * ceil(150 / 128) * 8
    assert (index.suffix, index.dtype, index.shape) == (".index", "I8", (32,))
    assert index.path.stat().st_size == 32
    assert (info.suffix, info.dtype, info.shape) == (".info", "I64", (5,))
    assert struct.unpack("<5q", info.path.read_bytes()) == (8, 8, 300, 150, 1)
    assert compressed.class_gain_bits is None
    assert not (work / "input").exists()


@pytest.mark.parametrize(
    ("rows", "cols", "wanted"),
    [(4608, 4096, 4608), (2304, 4096, 2304), (4096, 4096, 4096), (4096, 2048, 2048), (27392, 4096, 27392), (1, 1, 8)],
)
def test_the_index_has_the_lengths_of_the_real_model(rows: int, cols: int, wanted: int) -> None:
    assert index_bytes(rows, cols) == wanted


@pytest.mark.parametrize(
    ("mode", "what"),
    [
        ("no weight", "it wrote no weight file"),
        ("no index", "it wrote no index file"),
        ("no info", "it wrote no info file"),
        ("linked info", "it wrote no info file"),
        ("writes nothing", "it wrote no weight file"),
        ("short info", "its info file has 8 bytes, wanted 12 (three numbers)"),
        ("other tiling", "its tilings are 8 and 4, and the engine's kernel knows only 8 and 8"),
        ("empty weight", "its weight file has 0 bytes, wanted 1 to 51200"),
        ("large weight", "its weight file has 51201 bytes, wanted 1 to 51200"),
        ("short index", "its index file has 31 bytes, wanted 32"),
    ],
)
def test_status_0_is_no_success_when_an_output_is_wrong(tmp_path: Path, mode: str, what: str) -> None:
    codec, work = make(tmp_path, mode)
    with pytest.raises(DeviceError) as caught:
        codec.compress(NAME, MATRIX, work)
    assert str(caught.value) == (
        f"{NAME}: compress_excutor ended with status 0, but {what} (it said: graph built); {USELESS}"
    )


def test_a_weight_file_of_another_size_than_announced_is_refused(tmp_path: Path) -> None:
    codec, work = make(tmp_path, "wrong size")
    with pytest.raises(DeviceError) as caught:
        codec.compress(NAME, MATRIX, work)
    packed = len(zlib.compress(to_nz(MATRIX).tobytes(), 1))
    assert f"its weight file has {packed} bytes, its info file says {packed + 1} " in str(caught.value)


def test_stale_outputs_are_not_taken_for_new_ones(tmp_path: Path) -> None:
    codec, work = make(tmp_path)
    codec.compress(NAME, MATRIX, work)
    write_stand_in(tmp_path, "writes nothing")
    with pytest.raises(DeviceError, match="it wrote no weight file"):
        codec.compress(NAME, MATRIX, work)


def test_a_failing_program_is_quoted(tmp_path: Path) -> None:
    codec, work = make(tmp_path, "fails")
    with pytest.raises(DeviceError) as caught:
        codec.compress(NAME, MATRIX, work)
    assert str(caught.value) == (
        f"{NAME}: compress_excutor failed with exit status 255 (it said: GE init failed); "
        "source CANN's set_env.sh in this shell and see `npu-smi info`"
    )


def test_a_program_that_does_not_start_is_refused(tmp_path: Path) -> None:
    codec, work = make(tmp_path)
    (tmp_path / "compress_excutor").write_text("#!/no/such/interpreter\n")
    with pytest.raises(DeviceError) as caught:
        codec.compress(NAME, MATRIX, work)
    program = tmp_path / "compress_excutor"
    assert str(caught.value) == f"{program}: cannot be started (No such file or directory); {how_to_build()}"


def test_a_hanging_program_is_killed_at_the_time_limit(tmp_path: Path) -> None:
    codec, work = make(tmp_path, "hangs", time_limit=0.3)
    with pytest.raises(DeviceError) as caught:
        codec.compress(NAME, MATRIX, work)
    assert str(caught.value) == (
        f"{NAME}: compress_excutor did not finish in 0.3 s; is the NPU busy or hung? see `npu-smi info`"
    )
    assert not codec._running


def test_a_program_that_ends_while_it_is_stopped_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, _ = make(tmp_path)
    ended = subprocess.Popen(["true"], start_new_session=True)
    ended.wait()
    monkeypatch.setattr(ended, "poll", lambda: None)  # as asked just before it ended
    codec._running.add(ended)
    codec.stop()


def test_stop_ends_a_running_program_and_starts_no_other(tmp_path: Path) -> None:
    codec, work = make(tmp_path, "hangs")
    caught: list[Exception] = []

    def run() -> None:
        try:
            codec.compress(NAME, MATRIX, work)
        except DeviceError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while not codec._running:
        time.sleep(0.01)
    codec.stop()
    thread.join(30)
    assert [str(error) for error in caught] == [
        f"{NAME}: compress_excutor failed with exit status -9; source CANN's set_env.sh in this shell and see `npu-smi info`"
    ]
    with pytest.raises(DeviceError, match=r"^compress_excutor: was stopped$"):
        codec.compress(NAME, MATRIX, work)


def test_a_weight_above_the_programs_limit_is_refused(tmp_path: Path) -> None:
    codec, _ = make(tmp_path)
    with pytest.raises(CodecError) as caught:
        codec.check(NAME, 50_001, 1)
    assert str(caught.value) == (
        f"{NAME}: is 50001 x 1, the engine's compression ends at 50000 per dimension; "
        "split it over more ranks (--tp) or keep it float"
    )
    codec.check(NAME, 50_000, 50_000)


def test_a_path_that_the_program_refuses_is_refused_first(tmp_path: Path) -> None:
    codec, _ = make(tmp_path)
    work = tmp_path / "a b"
    work.mkdir()
    with pytest.raises(UsageError) as caught:
        codec.compress(NAME, MATRIX, work)
    assert str(caught.value) == (
        f"{work}: compress_excutor takes only paths of letters, digits, `_`, `-` and `.`, at most 32 folders deep; "
        "choose another --save_directory"
    )


def test_a_full_disk_is_a_space_error(tmp_path: Path) -> None:
    codec, work = make(tmp_path)
    (work / "input").symlink_to("/dev/full")
    with pytest.raises(SpaceError) as caught:
        codec.compress(NAME, MATRIX, work)
    assert str(caught.value) == f"{work / 'input'}: 51200 bytes are to be written, but its disk is full; make room"


def test_the_given_program_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not executable")
    for path in (tmp_path / "none", tmp_path / "text", tmp_path):
        with pytest.raises(DeviceError) as caught:
            find_executor(path)
        assert str(caught.value) == f"--executor {path}: is not a program; {how_to_build()}"


def test_the_installed_package_is_searched_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "msmodelslim"
    build = package / "pytorch" / "weight_compression" / "compress_graph" / "build"
    build.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_executor(None) is None
    program = write_stand_in(build)
    assert find_executor(None) == program


def test_the_stand_in_refuses_what_the_program_refuses(tmp_path: Path) -> None:
    program = write_stand_in(tmp_path)
    assert subprocess.run([program, "1"], check=False).returncode == 255
    (tmp_path / "input").write_bytes(bytes(511))
    arguments = ["1", "1", "1", "1", "1", "0", "0", *(str(tmp_path / name) for name in ("input", "w", "i", "o"))]
    assert subprocess.run([program, *arguments], check=False).returncode == 255
    assert os.access(program, os.X_OK)
    assert sys.executable in program.read_text()


def test_the_limit_is_the_vendors() -> None:
    assert (executor.MAX_DIMENSION, executor.TIME_LIMIT, executor.TILING) == (50_000, 600.0, 8)
