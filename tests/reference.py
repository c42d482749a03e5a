"""Slow, obvious versions of the numeric functions: one value at a time, in NumPy float32 scalars or float64 matrices."""

import math
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from glmq.numerics.moments import InputAccumulator, InputStats

F32 = np.float32


def nearest_integer(value: float) -> int:
    """Python rounds half to even."""
    return round(value)


def clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))


def activation_qparams(low: float, high: float) -> tuple[float, int]:
    bottom, top = min(F32(low), F32(0)), max(F32(high), F32(0))
    scale = max(F32(F32(top - bottom) / F32(255)), F32(257 * 2.0**-24))
    return float(scale), clamp(nearest_integer(float(F32(F32(-128) - F32(bottom / scale)))), -128, 127)


def quantize(x: float, scale: float, zero: int, low: int, high: int) -> int:
    return clamp(nearest_integer(float(F32(F32(F32(x) / F32(scale)) + F32(zero)))), low, high)


def sigma_step(row: list[float], factor: float) -> float:
    """Largest magnitude not above factor * sample standard deviation of the magnitudes, over 7."""
    a = np.abs(np.array(row, dtype=np.float32))
    threshold = F32(factor) * a.astype(np.float64).std(ddof=1)
    below = [v for v in a if v <= threshold]
    return float(max(below, default=F32(0)) / F32(7))


def fraction_step(row: list[float], fraction: float) -> float:
    """The k-th largest magnitude over 7, k = int(fraction * columns)."""
    a = sorted((F32(abs(v)) for v in row), reverse=True)
    return float(a[int(fraction * len(row)) - 1] / F32(7))


def tensor_fraction_steps(rows: list[list[float]], fraction: float) -> list[float]:
    """Per row, the largest magnitude not above the k-th largest of the tensor, over 7."""
    everything = sorted((F32(abs(v)) for row in rows for v in row), reverse=True)
    threshold = everything[int(fraction * len(everything)) - 1]
    return [float(max((F32(abs(v)) for v in row if F32(abs(v)) <= threshold), default=F32(0)) / F32(7)) for row in rows]


def two_stage(row: list[float], group_size: int) -> tuple[list[int], float, list[int]]:
    """W4A8 integers of one row, its step, and the second scale of each group."""
    step = F32(max(F32(abs(v)) for v in row) / F32(119))
    w8 = [nearest_integer(float(F32(v) / step)) for v in row]
    q, second = [], []
    for start in range(0, len(row), group_size):
        group = w8[start : start + group_size]
        scale = max(1, nearest_integer(float(F32(max(abs(v) for v in group)) / F32(7))))
        second.append(scale)
        q += [clamp(nearest_integer(float(F32(v) / F32(scale))), -8, 7) for v in group]
    return q, float(step), second


def entropy_bits(values: list[int]) -> float:
    counts = Counter(values)
    return -math.fsum(n / len(values) * math.log2(n / len(values)) for n in counts.values())


def compensated(
    weight: Tensor, steps: Tensor, moment: Tensor, order: list[int], low: int, high: int
) -> list[list[int]]:
    """Error-compensated rounding as in its first paper: after each column, the best update of all that wait, in float64.

    weight [N, K], steps [N, K], moment [K, K]. The update follows from minimising the quadratic form over the waiting
    columns, solved anew for each column.
    """
    w, h = weight.double().clone(), moment.double()
    q = torch.zeros(w.shape, dtype=torch.int64)
    for position, column in enumerate(order):
        step = steps[:, column].double()
        q[:, column] = torch.round(w[:, column] / step).clamp(low, high).long()
        error = w[:, column] - q[:, column] * step
        waiting = order[position + 1 :]
        if waiting:
            update = torch.linalg.solve(h[waiting][:, waiting], h[waiting, column])
            w[:, waiting] += error[:, None] * update
    return q.tolist()


def stats_of(x: Tensor) -> InputStats:
    """The calibration statistics of one sample of tokens [T, K], all tokens kept."""
    accumulator = InputAccumulator("site", x.shape[1], with_moment=True)
    accumulator.update(x, keep_rows=x.shape[0])
    return accumulator.finish()
