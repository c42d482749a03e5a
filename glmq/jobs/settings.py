"""What a run's output depends on beside its inputs, as an interrupted one keeps it: options, versions, threads."""

from __future__ import annotations

from typing import Final

import torch

from glmq.calibration.stats import Settings
from glmq.device import check_dtype, default_compute_dtype
from glmq.machine import version_of
from glmq.version import __version__

COMPUTE_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype that --compute-dtype names.

    Raises:
        DeviceError: the device does not compute in it.
    """
    dtype = default_compute_dtype(device) if name == "auto" else COMPUTE_DTYPES[name]
    check_dtype(device, dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def calibration_settings(samples_sha256: object, settings: Settings) -> dict[str, str]:
    """What the bytes of statistics depend on beside the model, by the option that decides it."""
    by_dtype = {dtype_name(dtype): name for name, dtype in COMPUTE_DTYPES.items()}
    return {
        "samples": str(samples_sha256),
        "--compute-dtype": by_dtype.get(settings.compute_dtype, settings.compute_dtype),
        "--max-pixels": "" if settings.max_pixels is None else str(settings.max_pixels),
        "--wide-moments": str(settings.wide_moments),
        "--text-inputs": str(settings.text_inputs),
    }


def machine_settings() -> dict[str, str]:
    """What the last bits of a float32 product depend on, beside its inputs."""
    return {
        "glmq": __version__,
        "torch": torch.__version__,
        "transformers": version_of("transformers") or "",
        "threads": str(torch.get_num_threads()),
    }
