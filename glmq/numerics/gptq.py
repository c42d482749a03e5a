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

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
ROWS_AT_ONCE: Final = 1024
"""Rows that are rounded together, at least; a strip for each thread. Few, so that their matrices are taken from memory that the
process has had before: fresh memory costs more than the arithmetic on it."""
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
    group_size = columns // choices[0].shape[1]
    coupling = factor.coupling() if sweeps else None
    place_of = factor.order.argsort()
    found = Rounded(torch.empty(rows, columns, dtype=torch.int8), torch.zeros(rows).long(), torch.zeros(rows))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        rounder = _Rounder(factor, group_size, grid, pool)
        together = max(ROWS_AT_ONCE, STRIP * torch.get_num_threads())
        for start in range(0, rows, together):
            cut = slice(start, min(start + together, rows))
            count = cut.stop - start
            padded = -(-count // STRIP) * STRIP
            ordered = torch.empty(columns, padded)  # [n, K] -> [K, n]: a column of the weight is contiguous
            ordered[:, count:] = 0.0
            _arrange(pool, weight[cut], place_of, ordered)
            strips: list[_Strip] = []
            for number, choice in enumerate(choices):
                steps = torch.ones(choice.shape[1], padded)  # [n, G] -> [G, n]
                steps[:, :count] = choice[cut].T
                strips.append(_Strip(ordered, steps))
                loss = rounder.round_rows(strips[-1], weigh=weigh or len(choices) > 1)[:count]
                better = loss < found.loss[cut] if number else torch.ones(count, dtype=torch.bool)
                found.choice[cut][better] = number
                found.loss[cut][better] = loss[better]
                if number:
                    strips[0].take(strips.pop(), better)
            if coupling is not None:
                for _ in range(sweeps):
                    rounder.sweep(strips[0], coupling)
            _restore(pool, strips[0].q, place_of, found.q[cut])
    return found


class _Strip:
    """Some rows of a weight in processing order, [K, n], with their integers and errors."""

    def __init__(self, weight: Tensor, steps: Tensor) -> None:
        self.weight = weight
        """float32 [K, n], n a multiple of STRIP."""
        self.steps = steps
        """float32 [G, n]."""
        self.error = torch.empty_like(weight)
        """float32 [K, n]: weight - q * step."""
        self.q = torch.empty(weight.shape, dtype=torch.int8)
        """int8 [K, n]."""

    def take(self, other: _Strip, rows: Tensor) -> None:
        """Take over rows of another strip of the same weight: bool [at most n]."""
        picked = rows.nonzero()[:, 0]
        for own, theirs in ((self.steps, other.steps), (self.error, other.error), (self.q, other.q)):
            own[:, picked] = theirs[:, picked]


class _Rounder:
    """Rounds strips, a wide block of columns at a time, in processing order."""

    def __init__(self, factor: Factor, group_size: int, grid: IntGrid, pool: ThreadPoolExecutor) -> None:
        self._factor, self._grid = factor, grid
        self._group_of = (factor.order // group_size).int()
        columns = len(factor.order)
        self._blocks = [slice(first, min(first + WIDE, columns)) for first in range(0, columns, WIDE)]
        self._round_block = partial(_round_block, pool) if KERNELS else _round_block_in_torch

    def round_rows(self, strip: _Strip, *, weigh: bool) -> Tensor:
        """Round each column beside the columns before it. Returns the rows' losses, float32 [n]; zeros without `weigh`."""
        feedback, loss = self._factor.feedback, torch.zeros(strip.weight.shape[1])
        for block in self._blocks:
            target = strip.weight[block]
            if block.start:
                target = torch.addmm(target, feedback[: block.start, block].T, strip.error[: block.start])
            self._round(strip, block, target, feedback[block, block])
            if weigh:
                error = strip.error[block]
                lost = torch.addmm(error, feedback[block, block].T, error).add_(target).sub_(strip.weight[block])
                loss += self._factor.curvature[block] @ lost.square_()
        return loss

    def sweep(self, strip: _Strip, coupling: Tensor) -> None:
        """Round each column anew beside all others."""
        for block in self._blocks:
            own = coupling[block, block]
            target = torch.addmm(strip.weight[block], coupling[:, block].T, strip.error)
            target.addmm_(own.triu(1).T, strip.error[block], alpha=-1)  # these errors change before they are met
            self._round(strip, block, target, own)

    def _round(self, strip: _Strip, block: slice, target: Tensor, feedback: Tensor) -> None:
        parts = (strip.weight[block], target, feedback, strip.steps, self._group_of[block])
        self._round_block(_BlockJob(*parts, strip.error[block], strip.q[block]), self._grid)


@dataclass(frozen=True, slots=True)
class _BlockJob:
    """A wide block of columns to round, for n rows."""

    weight: Tensor
    """float32 [columns, n]."""
    target: Tensor
    """float32 [columns, n]: with what the errors of other blocks ask for."""
    feedback: Tensor
    """float32 [columns, columns]: an error of 1 in column i asks for feedback[i, k] more in column k > i."""
    steps: Tensor
    """float32 [G, n]."""
    group_of: Tensor
    """int32 [columns]: row of `steps`."""
    error: Tensor
    """float32 [columns, n]: gets weight - q * step."""
    q: Tensor
    """int8 [columns, n]: gets the integers."""


def _arrange(pool: ThreadPoolExecutor, weight: Tensor, place_of: Tensor, ordered: Tensor) -> None:
    """Put each column of a weight [n, K] in its place: into float32 [K, at least n]."""
    rows, columns = weight.shape
    if not KERNELS:
        ordered[place_of, :rows] = weight.T.contiguous()
        return
    parts = (weight.contiguous().numpy(), place_of.numpy(), ordered.numpy(), rows, columns, ordered.shape[1])
    _over_rows(pool, rows, partial(_rounding.arrange, *parts))


def _restore(pool: ThreadPoolExecutor, ordered: Tensor, place_of: Tensor, q: Tensor) -> None:
    """Take each column of int8 [n, K] from its place in [K, at least n]."""
    rows, columns = q.shape
    if not KERNELS:
        q[:] = ordered[:, :rows][place_of].T
        return
    parts = (q.numpy(), place_of.numpy(), ordered.numpy(), rows, columns, ordered.shape[1])
    _over_rows(pool, rows, partial(_rounding.restore, *parts))


def _over_rows(pool: ThreadPoolExecutor, rows: int, work: Callable[[int, int], None]) -> None:
    """Whole strips of rows, from the first to the last and excluded one, for each thread."""
    share = -(-rows // (torch.get_num_threads() * STRIP)) * STRIP
    firsts = range(0, rows, share)
    if len(firsts) == 1:
        work(0, rows)  # a thread would take longer to start
        return
    for _ in pool.map(work, firsts, [min(first + share, rows) for first in firsts]):
        pass


def _round_block(pool: ThreadPoolExecutor, job: _BlockJob, grid: IntGrid) -> None:
    columns, rows = job.weight.shape
    round_cut = partial(
        _rounding.round_block,
        KERNELS[0],
        job.weight.numpy(),
        job.target.numpy(),
        job.feedback.T.contiguous().numpy(),
        job.steps.numpy(),
        job.group_of.numpy(),
        job.error.numpy(),
        job.q.numpy(),
        columns,
        rows,
        grid.qmin,
        grid.qmax,
    )
    _over_rows(pool, rows, round_cut)


def _round_block_in_torch(job: _BlockJob, grid: IntGrid) -> None:
    """The same without the compiled kernel."""
    columns, groups = job.weight.shape[0], job.group_of.tolist()
    target = job.target.clone()
    for narrow in range(0, columns, NARROW):
        end = min(narrow + NARROW, columns)
        part = target[narrow:end]
        if narrow:
            part.addmm_(job.feedback[:narrow, narrow:end].T, job.error[:narrow])
        for column in range(narrow, end):
            step = job.steps[groups[column]]
            rounded = (part[column - narrow] / step).clamp_(grid.qmin, grid.qmax).add_(ROUNDER).sub_(ROUNDER)
            job.q[column] = rounded
            torch.addcmul(job.weight[column], rounded, step, value=-1, out=job.error[column])
            if column + 1 < end:
                part[column - narrow + 1 :].addcmul_(job.feedback[column, column + 1 : end, None], job.error[column])
