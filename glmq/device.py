"""Where tensors are computed: the only file that knows torch_npu.

The NPU path has run against a stand-in device module only, never on hardware.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Final, cast

import torch

from glmq.cann import find_ascend
from glmq.errors import DeviceError
from glmq.first_calls import make_first_calls
from glmq.machine import available_memory, processor_features

DUO_CHIP: Final = "310P"
"""Part of the name that torch_npu gives to the chips of the Atlas 300I Duo, e.g. `Ascend310P3`."""
BF16_FLAGS: Final = frozenset({"avx512_bf16", "amx_bf16"})

make_first_calls()  # as glmq.numerics does: on import, since these two are what computes, in whatever order they come


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
        unseen = "torch_npu finds no NPU; check `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES"
        raise _no_npu([unseen, *find_ascend().missing()])
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
    # The 300I Duo's default is to compile each operator for each new shape, which takes minutes.
    npu.set_compile_mode(jit_compile=False)
    return _npu_device(npu)


def has_float16_alone(device: torch.device) -> bool:
    """Whether it multiplies in float16 alone: an NPU without bfloat16, which takes float32 for float16 as well."""
    return device.type != "cpu" and not _load_npu().is_bf16_supported()


def check_dtype(device: torch.device, dtype: torch.dtype, *, advice: str = "use --compute-dtype fp16") -> None:
    """Raise DeviceError, with the advice, if the device does not multiply in that dtype."""
    if dtype is not torch.float16 and has_float16_alone(device):
        raise DeviceError(
            f"--device-type npu: the Atlas 300I Duo multiplies in float16 alone, not in {str(dtype).removeprefix('torch.')}; "
            f"{advice}, or --device-type cpu"
        )


def default_compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the calibration forward.

    On a CPU bfloat16 where it multiplies bfloat16 with float32 sums in hardware (AVX512-BF16, AMX), else float32, never
    float16, which is the slow path there. On an NPU bfloat16 where it has it, float16 where not (300I Duo).
    """
    if device.type == "cpu":
        return torch.bfloat16 if BF16_FLAGS.intersection(processor_features()) else torch.float32
    return torch.bfloat16 if _load_npu().is_bf16_supported() else torch.float16


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


@contextmanager
def without_npu() -> Iterator[None]:
    """Keep others from importing torch_npu inside.

    transformers imports it wherever it is installed, which fails on a machine without CANN although nothing asks for an NPU;
    and with it transformers 4.53 imports einops, which nobody may have installed, for attention that glmq does not use.
    """
    was_there = "torch_npu" in sys.modules
    before = sys.modules.get("torch_npu")
    sys.modules["torch_npu"] = cast(ModuleType, None)  # what Python takes for "there is none"
    try:
        yield
    finally:
        del sys.modules["torch_npu"]
        if was_there:
            sys.modules["torch_npu"] = cast(ModuleType, before)


def _load_npu() -> ModuleType:
    try:
        importlib.import_module("torch_npu")
    except (ImportError, RuntimeError, OSError) as error:  # whatever its libraries trip over
        reason = f"torch_npu cannot be imported ({f'{error}'.partition(chr(10))[0]:.200})"
        raise _no_npu([*find_ascend().missing(), reason]) from error
    module: ModuleType = importlib.import_module("torch").npu
    return module


def _no_npu(reasons: Sequence[str]) -> DeviceError:
    return DeviceError(f"--device-type npu: {'; '.join(reasons)}; or use --device-type cpu")


def _npu_device(npu: ModuleType) -> torch.device:
    return torch.device("npu", int(npu.current_device()))
