"""The affine integer grid: choose parameters, quantize, dequantize.

Rounding is half to even everywhere (torch.round), and scaling is a division, not a product with the reciprocal: both
are what the engines' kernels and the vendor's tool do, and agreement is wanted to the bit.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from glmq.records import ActivationQParams
from glmq.spec import INT8, FloatDtype, IntGrid

SMALLEST_SCALE: Final = {FloatDtype.FP16: 257 * 2.0**-24, FloatDtype.BF16: torch.finfo(torch.float32).eps}
"""An input that never leaves zero still gets a positive scale: in bfloat16 2^-23, as in PyTorch's observers, in float16 the
first number above 1 / 65504. Engines multiply by 1 / scale in the run dtype, and infinity times zero is no number."""

NEIGHBOURS: Final = torch.tensor([0, 1, -1, 2, -2, 3], dtype=torch.int16)
"""Steps to the next numbers of a half-precision type, the nearest first: a tie is the nearest's."""
TORCH_DTYPE: Final = {FloatDtype.FP16: torch.float16, FloatDtype.BF16: torch.bfloat16}


def activation_qparams(low: float, high: float, *, dtype: FloatDtype = FloatDtype.FP16) -> ActivationQParams:
    """Scale and offset of an int8 activation that covers low..high.

    low = min(low, 0), high = max(high, 0); scale = (high - low) / 255, at least SMALLEST_SCALE;
    offset = round(-128 - low / scale), clamped to -128..127. Float32 arithmetic.

    Args:
        low: smallest value to represent.
        high: largest value to represent.
        dtype: of the written model. A bfloat16 model stores the scale as bfloat16, so it is rounded before the offset
            is chosen.
    """
    bottom = torch.tensor(low, dtype=torch.float32).clamp_max(0.0)
    top = torch.tensor(high, dtype=torch.float32).clamp_min(0.0)
    scale = ((top - bottom) / 255).clamp_min(SMALLEST_SCALE[dtype])
    if dtype is FloatDtype.BF16:
        scale = scale.bfloat16().float()
    return ActivationQParams(scale=float(scale), offset=_offset(bottom, scale))


def steady_qparams(low: float, high: float, *, dtype: FloatDtype) -> ActivationQParams:
    """As `activation_qparams`, with a scale that means the same to engines that divide by it and to those that multiply.

    vLLM-Ascend and SGLang multiply inputs by 1 / scale, computed in the run dtype, and MindIE casts the scale to that dtype
    first. In bfloat16 that may be 0.4 % more or less, on every input. So the scale is one of the run dtype's numbers next to
    the wanted one, that whose product with its rounded reciprocal is nearest to 1; deq_scale follows the scale.
    """
    half = TORCH_DTYPE[dtype]
    plain = activation_qparams(low, high, dtype=dtype)
    bits = torch.tensor(plain.scale, dtype=torch.float32).to(half).view(torch.int16) + NEIGHBOURS
    scales = bits.view(half).float()
    gains = scales * (1 / scales).to(half).float()
    usable = (scales > 0) & gains.isfinite()
    if not bool(usable.any()):
        return plain
    distance = torch.where(usable, (gains - 1).abs(), torch.inf)
    scale = scales[distance.argmin()]
    bottom = torch.tensor(low, dtype=torch.float32).clamp_max(0.0)
    return ActivationQParams(scale=float(scale), offset=_offset(bottom, scale))


def _offset(bottom: Tensor, scale: Tensor) -> int:
    """The integer that stands for zero."""
    return int(torch.round(-128 - bottom / scale).clamp(INT8.qmin, INT8.qmax))


def covered_range(params: ActivationQParams) -> tuple[float, float]:
    """The smallest and the largest value that the int8 activation represents."""
    return (INT8.qmin - params.offset) * params.scale, (INT8.qmax - params.offset) * params.scale


def quantize(x: Tensor, scale: Tensor, zero: Tensor, grid: IntGrid) -> Tensor:
    """Round `x` onto the integer grid: clamp(round(x / scale + zero), qmin, qmax).

    The offset is added before rounding, as the activation kernels do.

    Args:
        x: float.
        scale: positive, broadcastable to `x`.
        zero: integer-valued, broadcastable to `x`.
        grid: the integers.

    Returns:
        int8, shape of `x`.
    """
    return (x / scale).add_(zero).round_().clamp_(grid.qmin, grid.qmax).to(torch.int8)


def dequantize(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(q - zero) * scale in float32, shape of `q`."""
    return (q.float() - zero) * scale


def quantize_weight(weight: Tensor, step: Tensor, grid: IntGrid) -> Tensor:
    """Nearest integers of a weight: clamp(round(weight / step), qmin, qmax).

    Args:
        weight: float32 [N, K].
        step: float32 [N, 1], positive.
        grid: the integers.

    Returns:
        int8 [N, K].
    """
    return (weight / step).round_().clamp_(grid.qmin, grid.qmax).to(torch.int8)
