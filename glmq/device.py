"""Where tensors are computed: the only file that knows torch_npu.

The NPU path has run against a stand-in device module only, never on hardware.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from glmq.errors import DeviceError


def resolve(device_type: str) -> torch.device:
    """The device for `cpu` or `npu`.

    On a machine with several NPUs it is the first one that ASCEND_RT_VISIBLE_DEVICES leaves visible.

    Raises:
        DeviceError: `npu` without torch_npu, or without a visible NPU.
    """
    if device_type == "cpu":
        return torch.device("cpu")
    npu = _load_npu()
    if not npu.is_available():
        raise DeviceError(
            "--device-type npu: torch_npu finds no NPU; check `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES, "
            "or use --device-type cpu"
        )
    return _npu_device(npu)


def default_compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the calibration forward.

    float32 on a CPU, where half precision products are the slow path (fp16) or lose accuracy for little (bf16);
    bfloat16 on NPUs that have it, float16 on those that do not (300I Duo).
    """
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if _load_npu().is_bf16_supported() else torch.float16


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
