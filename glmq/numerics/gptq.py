"""Error-compensated rounding: each column's rounding error is made up for in the columns that are rounded after it.

The loop of GPTQ (Frantar et al. 2022, arXiv 2210.17323) in the feedback form of QuIP (Chee et al. 2023, arXiv
2307.13304, LDLQ): with H = (I + U) D (I + U)^T, column k is rounded at

    target_k = w_k + sum over earlier columns i of (w_i - q_i * step) * U[i, k],

and the loss is sum_k D_k (target_k - q_k * step)^2. Reading U from the left needs no inverse and no update of columns
that wait. A wide block takes all earlier columns in one matrix product; inside it the compiled kernel goes column by
column, or, where that could not be built, narrow blocks take the wide block's.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import torch
from torch import Tensor

from glmq.numerics.hessian import Factor
from glmq.spec import IntGrid

try:
    from glmq.numerics import _rounding
except ImportError:  # installed without a compiler
    _kernels: tuple[str, ...] = ()
else:
    _kernels = _rounding.list_kernels()

KERNELS: Final = _kernels
"""The compiled kernels that this processor runs, fastest first; empty without a compiler."""

STRIP: Final = 64
"""Rows that the compiled kernel takes at once."""
ROWS_AT_ONCE: Final = 4096
WIDE: Final = 256
NARROW: Final = 8
# With these, every elementwise step of the inner loop has fewer than 2^15 values, which torch does in the calling
# thread: handing 10 microseconds of work to a pool costs more than doing it, on a busy machine a thousand times more.
# (torch.round always uses the pool.)
ROUNDER: Final = 1.5 * 2.0**23
"""Adding and subtracting it rounds a float32 below 2^22 to the nearest integer, half to even, as torch.round does."""


def rounding_kernel() -> str:
    """What rounds inside a wide block: `avx2-fma`, `baseline` (every processor of the architecture), or `torch`.

    They add in another order or with another number of roundings, so their integers may differ where ties are near: whoever
    continues a run, or compares two, must have the same.
    """
    return KERNELS[0] if KERNELS else "torch"


def round_compensated(weight: Tensor, step: Tensor, factor: Factor, grid: IntGrid) -> Tensor:
    """Integers q that keep (weight - q * step) small under the factored second moment.

    Nearest rounding, half to even, of the compensated target; clamped to the grid, and what the clamp cuts is
    compensated too.

    Args:
        weight: float32 [N, K].
        step: float32 [N, G], positive; column k has the step of group k // (K / G). G = 1: one step per row.
        factor: of the second moment, K wide.
        grid: the integers.

    Returns:
        int8 [N, K]. Needs about 10 bytes of temporaries for each of ROWS_AT_ONCE * K weights.
    """
    rows, columns = weight.shape
    group_of = (factor.order // (columns // step.shape[1])).int()
    place_of = factor.order.argsort()
    round_rows = _round_rows if KERNELS else _round_rows_in_torch
    out = torch.empty(rows, columns, dtype=torch.int8)
    for start in range(0, rows, ROWS_AT_ONCE):
        cut = slice(start, min(start + ROWS_AT_ONCE, rows))
        count = cut.stop - start
        padded = -(-count // STRIP) * STRIP
        ordered = torch.zeros(columns, padded)  # [n, K] -> [K, n]: a column of the weight is contiguous
        ordered[:, :count] = weight[cut].T.contiguous()[factor.order]
        steps = torch.ones(step.shape[1], padded)  # [n, G] -> [G, n]
        steps[:, :count] = step[cut].T
        out[cut] = round_rows(ordered, steps, group_of, factor.feedback, grid)[:, :count][place_of].T
    return out


def _round_rows(weight: Tensor, steps: Tensor, group_of: Tensor, feedback: Tensor, grid: IntGrid) -> Tensor:
    """weight float32 [K, n] in processing order -> int8 [K, n]; n a multiple of STRIP."""
    columns, rows = weight.shape
    error = torch.empty_like(weight)
    q = torch.empty(weight.shape, dtype=torch.int8)
    threads = torch.get_num_threads()
    share = -(-rows // (threads * STRIP)) * STRIP
    firsts = range(0, rows, share)
    ends = [min(first + share, rows) for first in firsts]
    with ThreadPoolExecutor(threads) as pool:
        for wide in range(0, columns, WIDE):
            block = slice(wide, min(wide + WIDE, columns))
            target = weight[block]
            if wide:
                target = torch.addmm(target, feedback[:wide, block].T, error[:wide])
            round_cut = partial(
                _rounding.round_block,
                KERNELS[0],
                weight[block].numpy(),
                target.numpy(),
                feedback[block, block].T.contiguous().numpy(),
                steps.numpy(),
                group_of[block].numpy(),
                error[block].numpy(),
                q[block].numpy(),
                len(target),
                rows,
                grid.qmin,
                grid.qmax,
            )
            for _ in pool.map(round_cut, firsts, ends):
                pass
    return q


def _round_rows_in_torch(weight: Tensor, steps: Tensor, group_of: Tensor, feedback: Tensor, grid: IntGrid) -> Tensor:
    """The same without the compiled kernel."""
    columns, groups = weight.shape[0], group_of.tolist()
    error = torch.empty_like(weight)
    q = torch.empty(weight.shape, dtype=torch.int8)
    for wide in range(0, columns, WIDE):
        wide_end = min(wide + WIDE, columns)
        target = weight[wide:wide_end].clone()
        if wide:
            target.addmm_(feedback[:wide, wide:wide_end].T, error[:wide])
        for narrow in range(wide, wide_end, NARROW):
            end = min(narrow + NARROW, wide_end)
            part = target[narrow - wide : end - wide]
            if narrow > wide:
                part.addmm_(feedback[wide:narrow, narrow:end].T, error[wide:narrow])
            for column in range(narrow, end):
                step = steps[groups[column]]
                rounded = (part[column - narrow] / step).clamp_(grid.qmin, grid.qmax).add_(ROUNDER).sub_(ROUNDER)
                q[column] = rounded
                torch.addcmul(weight[column], rounded, step, value=-1, out=error[column])
                if column + 1 < end:
                    part[column - narrow + 1 :].addcmul_(feedback[column, column + 1 : end, None], error[column])
    return q
