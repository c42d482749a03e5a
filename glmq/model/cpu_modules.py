"""Modules that are computed on the CPU whatever the device: small ones whose operations an NPU lacks or makes coarse.

The chip of the Atlas 300I Duo has no bicubic grid_sample, which fits the vision tower's position embeddings to a picture, and
multiplies float32 matrices in float16, which would turn the rotary angles of the 2,000th token by up to half a radian.
(CANN's tables of operators; MindIE's own vision tower goes round grid_sample there.)
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

CPU: Final = torch.device("cpu")


def keep_on_cpu(module: nn.Module, device: torch.device) -> None:
    """Give a module, whose tensors lie on the CPU, its arguments there, and everybody else its results on `device`."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _moved(args, CPU), _moved(kwargs, CPU)

    def after(_: nn.Module, __: tuple[Any, ...], result: Any) -> Any:
        return _moved(result, device)

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(one, device) for one in value)
    if isinstance(value, dict):
        return {key: _moved(one, device) for key, one in value.items()}
    return value
