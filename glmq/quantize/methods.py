"""METHODS: how the weight of one linear becomes integers, one entry per Method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from glmq.numerics import lowbit, w4a8
from glmq.numerics.affine import TORCH_DTYPE, quantize_weight
from glmq.spec import FloatDtype, Method, QuantType, WeightScheme


@dataclass(frozen=True, slots=True)
class Integers:
    """The integers of one weight with their steps."""

    q: Tensor
    """int8 [N, K]; int4 values for W4A8_DYNAMIC."""
    step: Tensor
    """float32 [N, 1]."""
    second: Tensor | None = None
    """float32 [N, K / group_size]; W4A8_DYNAMIC only."""


Rounding = Callable[[Tensor, WeightScheme, FloatDtype], Integers]
"""(weight float32 [N, K] after smoothing, scheme, model dtype) -> Integers."""


def plain(weight: Tensor, scheme: WeightScheme, dtype: FloatDtype) -> Integers:
    """Nearest integers with the rule's step, repaired so that nothing is lost."""
    if scheme.quant_type is QuantType.W4A8_DYNAMIC:
        return Integers(*w4a8.quantize_two_stage(weight, scheme.group_size))
    step = storable_steps(lowbit.safe_steps(weight, scheme), scheme, dtype)
    return Integers(nearest(weight, step, scheme), step)


def reference(weight: Tensor, scheme: WeightScheme, dtype: FloatDtype) -> Integers:
    """The integers that the vendor's tool writes, saturation and all."""
    match scheme.quant_type:
        case QuantType.W4A8_DYNAMIC:
            return Integers(*w4a8.quantize_two_stage(weight, scheme.group_size))
        case QuantType.W8A8 | QuantType.W8A8_DYNAMIC:
            return Integers(*lowbit.quantize_in_storage_dtype(weight, dtype))
        case _:
            step = lowbit.rule_steps(weight, scheme)
            step = torch.where(step > 0, step, torch.ones_like(step))  # the vendor divides by zero here
            return Integers(nearest(weight, step, scheme), step)


def storable_steps(step: Tensor, scheme: WeightScheme, dtype: FloatDtype) -> Tensor:
    """Round steps to values that the checkpoint can hold: W8A8 types store them in the model dtype, the others in float32.

    A half-precision step may be 1/256 smaller than asked for, which moves the largest weight by less than half a step.
    """
    if scheme.quant_type not in (QuantType.W8A8, QuantType.W8A8_DYNAMIC):
        return step
    half = TORCH_DTYPE[dtype]
    return step.to(half).float().clamp_min(torch.finfo(half).smallest_normal)


def nearest(weight: Tensor, step: Tensor, scheme: WeightScheme) -> Tensor:
    """Nearest integers, rows in chunks. float32 [N, K], float32 [N, 1] -> int8 [N, K]."""
    q = torch.empty(weight.shape, dtype=torch.int8)
    for rows in lowbit.row_chunks(weight):
        q[rows] = quantize_weight(weight[rows], step[rows], lowbit.grid_of(scheme))
    return q


METHODS: Final[Mapping[Method, Rounding]] = {
    Method.PLAIN: plain,
    Method.REFERENCE: reference,
    Method.COMPENSATED: plain,
}
