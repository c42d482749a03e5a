import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest
import torch
from helpers import StandInNpu

from glmq import device, machine
from glmq.errors import DeviceError
from glmq.jobs.settings import compute_dtype

ANY_ACCELERATOR = torch.device("meta")
"""Stands for an NPU: what matters is that it is no CPU."""


def install(monkeypatch: pytest.MonkeyPatch, npu: StandInNpu) -> StandInNpu:
    monkeypatch.setattr(device, "_load_npu", lambda: npu)
    return npu


def test_a_cpu_needs_no_npu_library() -> None:
    assert device.resolve("cpu") == torch.device("cpu")
    assert device.default_compute_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)
    device.release(torch.device("cpu"))


@pytest.mark.parametrize(
    ("cpuinfo", "dtype"),
    [
        ("flags\t: fpu avx2 avx512f avx512_bf16\n", torch.bfloat16),
        ("processor\t: 0\nflags\t: fpu amx_bf16 amx_tile\nflags\t: fpu\n", torch.bfloat16),
        ("flags\t: fpu avx2 avx512f avx512_fp16\n", torch.float32),
        ("Features\t: fp asimd bf16\n", torch.float32),
    ],
)
def test_a_cpu_computes_in_bfloat16_only_if_it_has_such_products(
    cpuinfo: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert device.default_compute_dtype(torch.device("cpu")) is torch.float32
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert device.default_compute_dtype(torch.device("cpu")) is dtype


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing is missing."""
    state = SimpleNamespace(missing=list)
    monkeypatch.setattr(device, "find_ascend", lambda: state)


def test_a_torch_npu_that_cannot_be_imported_is_explained_by_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    monkeypatch.setattr(device, "find_ascend", lambda: SimpleNamespace(missing=lambda: ["one is missing", "so is two"]))
    with pytest.raises(DeviceError) as caught:
        device.resolve("npu")
    assert str(caught.value) == (
        "--device-type npu: one is missing; so is two; "
        "torch_npu cannot be imported (import of torch_npu halted; None in sys.modules); or use --device-type cpu"
    )
    assert caught.value.exit_code == 5


@pytest.mark.usefixtures("whole")
def test_a_torch_npu_without_an_npu_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandInNpu(available=False))
    with pytest.raises(DeviceError) as caught:
        device.resolve("npu")
    assert str(caught.value) == (
        "--device-type npu: torch_npu finds no NPU; check `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES; "
        "or use --device-type cpu"
    )


def test_others_do_not_find_torch_npu_where_it_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with device.without_npu():
        assert importlib.util.find_spec("torch_npu") is None
    assert importlib.util.find_spec("torch_npu") is not None
    loaded = ModuleType("torch_npu")
    monkeypatch.setitem(sys.modules, "torch_npu", loaded)
    with device.without_npu():  # transformers 4.53 would import einops with it
        assert importlib.util.find_spec("torch_npu") is None
    assert sys.modules["torch_npu"] is loaded
    with device.without_npu(), device.without_npu():
        assert sys.modules["torch_npu"] is None
    assert sys.modules["torch_npu"] is loaded
    monkeypatch.delitem(sys.modules, "torch_npu")
    with device.without_npu(), device.without_npu():
        assert sys.modules["torch_npu"] is None
    assert "torch_npu" not in sys.modules


@pytest.mark.slow
def test_a_cpu_run_does_not_need_what_torch_npu_needs(small: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "torch_npu-2.13.0.dist-info").mkdir(parents=True)
    (site / "torch_npu-2.13.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.13.0\n"
    )
    (site / "torch_npu-2.13.0.dist-info" / "entry_points.txt").write_text(
        "[torch.backends]\ntorch_npu = torch_npu:load\n"
    )
    (site / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import os, glmq\n"
        f"options = glmq.CalibrationOptions(limit=1, texts=False)\n"
        f"glmq.calibrate({str(small)!r}, out={str(tmp_path / 'stats')!r}, options=options, dry_run=True)\n"
        "assert 'TORCH_DEVICE_BACKEND_AUTOLOAD' not in os.environ\n"
        "import glmq.cli.app\n"
        "assert os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] == '0'\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_visible_npu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    npu = install(monkeypatch, StandInNpu())
    asked: list[object] = []
    monkeypatch.setattr(device, "_npu_device", lambda found: asked.append(found) or ANY_ACCELERATOR)
    assert device.resolve("npu") is ANY_ACCELERATOR
    assert asked == [npu]
    assert npu.calls == ["jit_compile=False"]


def test_an_npu_without_bfloat16_computes_in_float16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandInNpu(bf16=False, name="Ascend310P3"))
    assert compute_dtype("auto", ANY_ACCELERATOR) is compute_dtype("fp16", ANY_ACCELERATOR) is torch.float16
    for name, dtype in (("bf16", "bfloat16"), ("fp32", "float32")):
        with pytest.raises(DeviceError) as caught:
            compute_dtype(name, ANY_ACCELERATOR)
        assert str(caught.value) == (
            f"--device-type npu: the Atlas 300I Duo multiplies in float16 alone, not in {dtype}; "
            "use --compute-dtype fp16, or --device-type cpu"
        )
    install(monkeypatch, StandInNpu())
    assert compute_dtype("fp32", ANY_ACCELERATOR) is torch.float32
    assert compute_dtype("fp32", torch.device("cpu")) is torch.float32


@pytest.mark.parametrize("local_rank", [0, 3])
def test_each_process_takes_the_npu_of_its_number(local_rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    npu = install(monkeypatch, StandInNpu(count=4))
    monkeypatch.setattr(device, "_npu_device", lambda found: found.current_device())
    assert device.resolve("npu", local_rank=local_rank, world=8) == local_rank
    assert npu.current_device() == local_rank


def test_more_processes_than_npus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandInNpu(count=2))
    with pytest.raises(DeviceError) as caught:
        device.resolve("npu", local_rank=2, world=3)
    assert str(caught.value) == (
        "--device-type npu: process 2 of this machine has no NPU of its own, 2 are visible; start at most 2 processes per "
        "machine, or show more by ASCEND_RT_VISIBLE_DEVICES"
    )


def test_several_processes_on_the_300i_duo_are_refused_and_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandInNpu(count=2, name="Ascend310P3"))
    monkeypatch.setattr(device, "_npu_device", lambda _: ANY_ACCELERATOR)
    with pytest.raises(DeviceError) as caught:
        device.resolve("npu", local_rank=1, world=2)
    assert str(caught.value) == (
        "--device-type npu: the Atlas 300I Duo series does not support multi-card quantization (its chip is Ascend310P3); "
        "run one process, without torchrun, or use --device-type cpu"
    )
    assert device.resolve("npu") is ANY_ACCELERATOR
    assert device.resolve("cpu", local_rank=1, world=2) == torch.device("cpu")


def test_free_memory_is_the_devices_own(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandInNpu())
    assert device.free_bytes(ANY_ACCELERATOR) == 3 * 2**30
    assert 0 < device.free_bytes(torch.device("cpu")) < psutil.virtual_memory().total


def test_torch_npu_is_imported_before_torchs_npu_module_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    npu = StandInNpu()
    imported: list[str] = []

    def import_module(name: str) -> object:
        imported.append(name)
        return SimpleNamespace(npu=npu)

    monkeypatch.setattr(device.importlib, "import_module", import_module)
    assert device._load_npu() is npu
    assert imported == ["torch_npu", "torch"]


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_an_npu_computes_in_the_best_half_precision_that_it_has(
    bf16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, StandInNpu(bf16=bf16))
    assert device.default_compute_dtype(ANY_ACCELERATOR) is dtype


def test_releasing_waits_for_the_npu_before_its_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    npu = install(monkeypatch, StandInNpu())
    device.release(ANY_ACCELERATOR)
    assert npu.calls == ["synchronize", "empty_cache"]
