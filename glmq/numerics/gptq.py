"""Error-compensated rounding: each column's rounding error is made up for in the columns that are rounded after it.

The loop of GPTQ (Frantar et al. 2022, arXiv 2210.17323) in the feedback form of QuIP (Chee et al. 2023, arXiv
2307.13304, LDLQ): with H = (I + U) D (I + U)^T, column k is rounded at

    target_k = w_k + sum over earlier columns i of (w_i - q_i * step) * U[i, k],

and the loss is sum_k D_k (target_k - q_k * step)^2. Reading U from the left needs no inverse and no update of columns
that wait. A wide block takes all earlier columns in one matrix product; inside it the compiled kernel goes column by
column, or, where that could not be built, narrow blocks take the wide block's.

Each integer is the best for the columns before it; the columns after it were not yet there. Where grids are coarse, sweeps
of coordinate descent look again: with all other errors e_i fixed, the loss is least at

    target_k = w_k + sum over all other columns i of e_i H[i, k] / H[k, k],

in the same order and with the same kernel, U[i, k] being H[i, k] / H[k, k] inside a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

import torch
from torch import Tensor

from glmq.numerics.hessian import Factor
from glmq.numerics.lone_threads import map_alone
from glmq.spec import IntGrid

try:
    from glmq.numerics import _rounding
except ImportError:  # installed without a compiler
    _kernels: tuple[str, ...] = ()
else:
    _kernels = _rounding.list_kernels()

KERNELS: Final = _kernels
"""The compiled kernels that this processor runs, fastest first; empty without a compiler."""

STRIP: Final = 32
"""Rows that the compiled kernel takes at once."""
ROWS_AT_ONCE: Final = 256
"""Rows that one thread rounds together: enough for fast products, few enough that their matrices stay near it. As many for
1 thread as for MANY_THREADS, because products of more rows may add in another order."""
MANY_THREADS: Final = 16
"""Beyond these, threads take fewer rows: a linear of the real size then has enough for 64 of them, in the same memory."""
ROWS_OF_MANY: Final = 64
WIDE: Final = 256
NARROW: Final = 8
ROUNDER: Final = 1.5 * 2.0**23
"""Adding and subtracting it rounds a float32 below 2^22 to the nearest integer, half to even, as torch.round does."""


def rounding_kernel() -> str:
    """What rounds inside a wide block: `avx2-fma`, `baseline` (every processor of the architecture), or `torch`.

    They add in another order or with another number of roundings, so their integers may differ where ties are near: whoever
    continues a run, or compares two, must have the same.
    """
    return KERNELS[0] if KERNELS else "torch"


@dataclass(frozen=True, slots=True)
class Rounded:
    """The integers of a weight, each row on one of several steps."""

    q: Tensor
    """int8 [N, K]."""
    choice: Tensor
    """int64 [N]: which of the steps."""
    loss: Tensor
    """float32 [N]: (w - q step) H (w - q step)^T, before any sweep; zeros where nobody asked."""


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
        int8 [N, K]. Needs about 10 bytes of temporaries for each of the weights that are rounded together.
    """
    return round_best(weight, [step], factor, grid).q


def round_best(
    weight: Tensor, choices: Sequence[Tensor], factor: Factor, grid: IntGrid, *, sweeps: int = 0, weigh: bool = False
) -> Rounded:
    """As `round_compensated`, each row on those of several steps that lose least.

    Args:
        weight: float32 [N, K].
        choices: one or more float32 [N, G], as there.
        factor: of the second moment, K wide.
        grid: the integers.
        sweeps: how often all integers are then rounded again, each to the best that it can be beside all others.
        weigh: say what the rows lose even if there is nothing to choose.
    """
    rows, columns = weight.shape
    found = Rounded(torch.empty(rows, columns, dtype=torch.int8), torch.zeros(rows).long(), torch.zeros(rows))
    rounder = _Rounder(factor, columns // choices[0].shape[1], grid, sweeps=sweeps)

    threads = torch.get_num_threads()
    together = min(ROWS_AT_ONCE if threads <= MANY_THREADS else ROWS_OF_MANY, -(-rows // STRIP) * STRIP)
    cuts = [slice(start, min(start + together, rows)) for start in range(0, rows, together)]
    free = SimpleQueue[list[_Rows]]()
    for _ in range(min(threads, len(cuts))):
        free.put([_Rows(columns, choice.shape[1], together) for choice in choices])

    def round_cut(cut: slice) -> None:
        parts = free.get()
        try:
            for number, (part, choice) in enumerate(zip(parts, choices, strict=True)):
                part.load(weight[cut], choice[cut], rounder.place_of)
                loss = rounder.round_rows(part, weigh=weigh or len(choices) > 1)
                better = loss < found.loss[cut] if number else torch.ones(len(loss), dtype=torch.bool)
                found.choice[cut][better] = number
                found.loss[cut][better] = loss[better]
                if number:
                    parts[0].take(part, better)
            for _ in range(sweeps):
                rounder.sweep(parts[0])
            parts[0].restore(found.q[cut], rounder.place_of)
        finally:
            free.put(parts)

    map_alone(round_cut, cuts)
    return found


class _Rows:
    """Some rows of a weight in processing order, [K, n], with their integers and errors; a column of the weight is contiguous.

    One after the other takes the same memory: fresh memory costs more than much of the arithmetic on it.
    """

    def __init__(self, columns: int, groups: int, rows: int) -> None:
        self.count = 0
        """Rows that there are; those up to n, a multiple of STRIP, are zeros."""
        self.weight = torch.empty(columns, rows)
        """float32 [K, n]."""
        self.steps = torch.empty(groups, rows)
        """float32 [G, n]."""
        self.error = torch.empty(columns, rows)
        """float32 [K, n]: weight - q * step."""
        self.q = torch.empty(columns, rows, dtype=torch.int8)
        """int8 [K, n]."""

    def load(self, weight: Tensor, steps: Tensor, place_of: Tensor) -> None:
        """Take rows as a linear has them, float32 [N, K] and [N, G]; int64 [K]: where each column goes."""
        self.count, columns = weight.shape
        self.weight[:, self.count :] = 0.0
        self.steps[:, self.count :] = 1.0
        self.steps[:, : self.count] = steps.T
        if KERNELS:
            plain, ordered = weight.contiguous().numpy(), self.weight.numpy()
            _rounding.arrange(plain, place_of.numpy(), ordered, self.count, columns, self.weight.shape[1])
        else:
            self.weight[place_of, : self.count] = weight.T

    def take(self, other: _Rows, rows: Tensor) -> None:
        """Take over rows of others of the same weight: bool [N]."""
        picked = rows.nonzero()[:, 0]
        for own, theirs in ((self.steps, other.steps), (self.error, other.error), (self.q, other.q)):
            own[:, picked] = theirs[:, picked]

    def restore(self, q: Tensor, place_of: Tensor) -> None:
        """Write the integers as a linear has them: int8 [N, K]."""
        if KERNELS:
            _rounding.restore(q.numpy(), place_of.numpy(), self.q.numpy(), self.count, *self.q.shape)
        else:
            q[:] = self.q[:, : self.count][place_of].T


class _Rounder:
    """Rounds rows, a wide block of columns at a time, in processing order."""

    def __init__(self, factor: Factor, group_size: int, grid: IntGrid, *, sweeps: int) -> None:
        columns = len(factor.order)
        self.place_of = factor.order.argsort()
        """int64 [K]: where each column comes in processing order."""
        self._factor, self._grid = factor, grid
        self._coupling = factor.coupling() if sweeps else None
        self._group_of = (factor.order // group_size).int()
        self._blocks = [slice(first, min(first + WIDE, columns)) for first in range(0, columns, WIDE)]
        self._own = [factor.feedback[block, block].T.contiguous() for block in self._blocks]
        self._round_block = _round_block if KERNELS else _round_block_in_torch

    def round_rows(self, rows: _Rows, *, weigh: bool) -> Tensor:
        """Round each column beside the columns before it. Returns the rows' losses, float32 [N]; zeros without `weigh`."""
        feedback, loss = self._factor.feedback, torch.zeros(rows.weight.shape[1])
        for block, own in zip(self._blocks, self._own, strict=True):
            target = rows.weight[block]
            if block.start:
                target = torch.addmm(target, feedback[: block.start, block].T, rows.error[: block.start])
            self._round(rows, block, target, own)
            if weigh:
                error = rows.error[block]
                lost = torch.addmm(error, own, error).add_(target).sub_(rows.weight[block])
                loss += self._factor.curvature[block] @ lost.square_()
        return loss[: rows.count]

    def sweep(self, rows: _Rows) -> None:
        """Round each column anew beside all others."""
        assert self._coupling is not None
        for block in self._blocks:
            own = self._coupling[block, block]
            target = torch.addmm(rows.weight[block], self._coupling[:, block].T, rows.error)
            target.addmm_(own.triu(1).T, rows.error[block], alpha=-1)  # these errors change before they are met
            self._round(rows, block, target, own.T.contiguous())

    def _round(self, rows: _Rows, block: slice, target: Tensor, feedback: Tensor) -> None:
        parts = (rows.weight[block], target, feedback, rows.steps, self._group_of[block])
        self._round_block(_BlockJob(*parts, rows.error[block], rows.q[block]), self._grid)


@dataclass(frozen=True, slots=True)
class _BlockJob:
    """A wide block of columns to round, for n rows."""

    weight: Tensor
    """float32 [columns, n]."""
    target: Tensor
    """float32 [columns, n]: with what the errors of other blocks ask for."""
    feedback: Tensor
    """float32 [columns, columns]: an error of 1 in column i asks for feedback[k, i] more in column k > i."""
    steps: Tensor
    """float32 [G, n]."""
    group_of: Tensor
    """int32 [columns]: row of `steps`."""
    error: Tensor
    """float32 [columns, n]: gets weight - q * step."""
    q: Tensor
    """int8 [columns, n]: gets the integers."""


def _round_block(job: _BlockJob, grid: IntGrid) -> None:
    columns, rows = job.weight.shape
    _rounding.round_block(
        KERNELS[0],
        job.weight.numpy(),
        job.target.numpy(),
        job.feedback.numpy(),
        job.steps.numpy(),
        job.group_of.numpy(),
        job.error.numpy(),
        job.q.numpy(),
        columns,
        rows,
        grid.qmin,
        grid.qmax,
    )


def _round_block_in_torch(job: _BlockJob, grid: IntGrid) -> None:
    """The same without the compiled kernel."""
    columns, groups = job.weight.shape[0], job.group_of.tolist()
    target = job.target.clone()
    for narrow in range(0, columns, NARROW):
        end = min(narrow + NARROW, columns)
        part = target[narrow:end]
        if narrow:
            part.addmm_(job.feedback[narrow:end, :narrow], job.error[:narrow])
        for column in range(narrow, end):
            step = job.steps[groups[column]]
            rounded = (part[column - narrow] / step).clamp_(grid.qmin, grid.qmax).add_(ROUNDER).sub_(ROUNDER)
            job.q[column] = rounded
            torch.addcmul(job.weight[column], rounded, step, value=-1, out=job.error[column])
            if column + 1 < end:
                part[column - narrow + 1 :].addcmul_(job.feedback[column + 1 : end, column, None], job.error[column])
