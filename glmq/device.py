"""Where tensors are computed: the only file that knows torch_npu.

The NPU path has run against a stand-in device module only, never on hardware.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Final

import torch

from glmq.errors import DeviceError
from glmq.machine import available_memory

DUO_CHIP: Final = "310P"
"""Part of the name that torch_npu gives to the chips of the Atlas 300I Duo, e.g. `Ascend310P3`."""
CPUINFO: Final = Path("/proc/cpuinfo")
BF16_FLAGS: Final = frozenset({"avx512_bf16", "amx_bf16"})


def resolve(device_type: str, *, local_rank: int = 0, world: int = 1) -> torch.device:
    """The device for `cpu` or `npu`.

    On a machine with several NPUs, process r of torchrun takes the r-th that ASCEND_RT_VISIBLE_DEVICES leaves visible.

    Args:
        device_type: `cpu` or `npu`.
        local_rank: number of this process on this machine.
        world: number of processes.

    Raises:
        DeviceError: `npu` without torch_npu, without a visible NPU for this process, or several processes on the 300I Duo.
    """
    if device_type == "cpu":
        return torch.device("cpu")
    npu = _load_npu()
    if not npu.is_available():
        raise DeviceError(
            "--device-type npu: torch_npu finds no NPU; check `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES, "
            "or use --device-type cpu"
        )
    count = int(npu.device_count())
    if local_rank >= count:
        raise DeviceError(
            f"--device-type npu: process {local_rank} of this machine has no NPU of its own, {count} are visible; "
            f"start at most {count} processes per machine, or show more by ASCEND_RT_VISIBLE_DEVICES"
        )
    name = str(npu.get_device_name(local_rank))
    if world > 1 and DUO_CHIP in name:
        raise DeviceError(
            f"--device-type npu: the Atlas 300I Duo series does not support multi-card quantization (its chip is {name}); "
            "run one process, without torchrun, or use --device-type cpu"
        )
    npu.set_device(local_rank)
    return _npu_device(npu)


def default_compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the calibration forward.

    On a CPU bfloat16 where it multiplies bfloat16 with float32 sums in hardware (AVX512-BF16, AMX), else float32, never
    float16, which is the slow path there. On an NPU bfloat16 where it has it, float16 where not (300I Duo).
    """
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_flags() & BF16_FLAGS else torch.float32
    return torch.bfloat16 if _load_npu().is_bf16_supported() else torch.float16


def _cpu_flags() -> set[str]:
    """What the CPU can do, as Linux says it; empty elsewhere."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def free_bytes(device: torch.device) -> int:
    """Memory of the device that is not in use."""
    if device.type == "cpu":
        return available_memory()
    return int(_load_npu().mem_get_info()[0])


def release(device: torch.device) -> None:
    """Give cached device memory back after a block; nothing to do on a CPU."""
    if device.type != "cpu":
        npu = _load_npu()
        npu.synchronize()
        npu.empty_cache()


def _load_npu() -> ModuleType:
    try:
        importlib.import_module("torch_npu")
    except ImportError as error:
        raise DeviceError(
            f"--device-type npu: torch_npu cannot be imported ({error}); install it with `pip install glmq[npu]` "
            "on a machine with CANN, or use --device-type cpu"
        ) from error
    module: ModuleType = importlib.import_module("torch").npu
    return module


def _npu_device(npu: ModuleType) -> torch.device:
    return torch.device("npu", int(npu.current_device()))
