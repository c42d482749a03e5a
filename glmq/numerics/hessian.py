"""The quadratic form that error-compensated rounding minimises: shrink it, order it, factor it. Float32.

Rounding a row w of a weight to q loses E[((w - q) x)^2] = (w - q) H (w - q)^T with H = E[x x^T]. When the columns are
rounded one after the other and each error is made up for in the columns that follow, column k costs curvature_k per
squared unit: the variance of x_k that the columns after it cannot imitate.

Damping. H comes from a few thousand calibration tokens; inputs met later span directions that they never showed, and a
plain inverse would trust the emptiness. H is therefore shrunk towards its own diagonal, (1 - a) H + a diag(H), the
classic estimator of Ledoit & Wolf (2004) with a diagonal target. Unlike a multiple of the identity (Frantar et al.
2022), it commutes with channel scales, so smoothing and rounding see the same form.

Order. The sum of the curvatures depends on the order. The greedy order from the end (the column with the least
remaining variance goes last, then is projected out) is the pivoted Cholesky rule, known from decoding of multi-antenna
signals (Wolniansky et al. 1998, V-BLAST); it is taken in blocks, so that it runs at matrix-product speed, and on
channels of unit variance, so that it does not depend on their units: one factorization serves every choice of channel
scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glmq.errors import StatisticsError
from glmq.numerics.moments import InputStats

SHRINKAGE: Final = 0.05
"""Weight of the diagonal. Results move by some 3 % between 0.03 and 0.1."""
DIAGONAL_FLOOR: Final = 1e-6
"""A channel that calibration never used still costs this share of the mean channel."""
ORDER_BLOCKS: Final = 32
COMPACT_AT: Final = 0.8
"""Columns that are done are carried along until fewer than this share are open: compacting costs as much as a block."""
ROOT_COLUMNS: Final = 256
"""Columns of a Cholesky factor that are found together."""
ROOT_ROWS: Final = 1024
"""Rows of what is left that one product updates, up to its diagonal: half of the square."""


@dataclass(frozen=True, slots=True)
class Order:
    """In which order columns are rounded, and what errors in them then cost: all that choosing scales and bits needs."""

    columns: Tensor
    """int64 [K]: the column that is rounded first, second, ..."""
    curvature: Tensor
    """float32 [K]: cost of a squared unit of rounding error, in that order."""

    def by_column(self) -> Tensor:
        """The curvature in the order of the weight's columns: float32 [K]."""
        return _by_column(self.curvature, self.columns)

    def scaled(self, ratio: Tensor) -> Order:
        """That of inputs whose channel k is multiplied by ratio[k]: float32 [K], positive."""
        return Order(self.columns, self.curvature * ratio[self.columns].square())


@dataclass(frozen=True, slots=True)
class Factor:
    """H[order][:, order] = (I + U) diag(curvature) (I + U)^T with U strictly upper triangular."""

    order: Tensor
    """int64 [K]: the column that is rounded first, second, ..."""
    feedback: Tensor
    """float32 [K, K]: U in processing order; an error of 1 in column i asks for U[i, k] more in column k."""
    curvature: Tensor
    """float32 [K]: cost of a squared unit of rounding error, in processing order."""

    def by_column(self) -> Tensor:
        """The curvature in the order of the weight's columns: float32 [K]."""
        return _by_column(self.curvature, self.order)

    def coupling(self) -> Tensor:
        """H[i, k] / H[k, k] in processing order, zero on the diagonal: float32 [K, K]."""
        root = self.feedback * self.curvature.sqrt()
        root.diagonal().copy_(self.curvature.sqrt())  # (I + U) D^(1/2)
        moment = root @ root.T
        moment.div_(moment.diagonal().clone())
        moment.diagonal().zero_()
        return moment

    def scaled(self, ratio: Tensor) -> Factor:
        """The factor of the second moment of inputs whose channel k is multiplied by ratio[k]: float32 [K], positive.

        With R = diag(ratio[order]): R (I + U) D (I + U)^T R = (I + R U / R) (R D R) (I + R U / R)^T.
        """
        r = ratio[self.order]
        return Factor(self.order, (self.feedback * r[:, None]).div_(r), self.curvature * r.square())


def _by_column(curvature: Tensor, order: Tensor) -> Tensor:
    out = torch.empty_like(curvature)
    out[order] = curvature
    return out


def order_inputs(stats: InputStats) -> Order | None:
    """In which order the columns that read this input are rounded; None where the statistics hold no second moment.

    The second moment is shrunk towards its diagonal, with a floor under the diagonal.

    Raises:
        StatisticsError: not positive definite.
    """
    if stats.second_moment is None:
        return None
    deviation = input_deviation(stats.square_mean)
    return rounding_order(shrunk_correlation(stats.second_moment, deviation)).scaled(deviation)


def factor_inputs(stats: InputStats, order: Order) -> Factor:
    """The factor of the input's second moment, shrunk and floored as in `order_inputs`, which gave the order.

    Raises:
        StatisticsError: not positive definite.
    """
    assert stats.second_moment is not None
    deviation = input_deviation(stats.square_mean)
    return factor(shrunk_correlation(stats.second_moment, deviation), order.columns).scaled(deviation)


def shrunk_correlation(second_moment: Tensor, deviation: Tensor) -> Tensor:
    """Second moment of the channels divided by their deviations, shrunk towards ones on the diagonal: float32 [K, K]."""
    moment = second_moment / deviation[:, None]
    moment.div_(deviation).mul_(1 - SHRINKAGE).diagonal().fill_(1.0)
    return moment


def input_deviation(square_mean: Tensor) -> Tensor:
    """Root mean square of each channel, above zero: float32 [K]."""
    mean = float(square_mean.mean())
    floor = DIAGONAL_FLOOR * mean if mean > 0 else 1.0  # an input that is always zero: any integers do
    return square_mean.clamp_min(floor).sqrt()


def factor(moment: Tensor, order: Tensor | None = None) -> Factor:
    """Order and factor a positive definite second moment; `moment` is not changed.

    The upper-times-lower form is the ordinary Cholesky factor of the matrix with rows and columns reversed, reversed
    again: no inverse is formed, and float32 serves.

    Args:
        moment: float32 [K, K] from `shrunk_correlation`.
        order: int64 [K], the columns of an `Order`; None: `rounding_order` searches for it.

    Raises:
        StatisticsError: not positive definite: the statistics hold NaN, or are no second moment at all.
    """
    order = rounding_order(moment).columns if order is None else order
    backwards = order.flip(0)
    upper = _root(moment[backwards][:, backwards], len(order)).flip(0, 1)
    scale = upper.diagonal().clone()
    feedback = upper.div_(scale)  # zeros below the diagonal, as the Cholesky factor has above
    feedback.diagonal().zero_()
    return Factor(order, feedback, scale.square_())


def rounding_order(moment: Tensor) -> Order:
    """The order in which columns are rounded: those with the least remaining variance last, K / 32 at a time.

    What remains of a column's variance when it is taken is its curvature: the factor's, up to float32's last bits.

    Args:
        moment: float32 [K, K], positive definite.

    Raises:
        StatisticsError: not positive definite.
    """
    size = moment.shape[0]
    block = -(-size // ORDER_BLOCKS)
    # `left` is over the columns `names`, some of them done; numpy picks from small arrays in a tenth of torch's time.
    left, names = moment.clone(), np.arange(size)
    remaining = np.arange(size)  # positions in `left`
    taken, roots = list[NDArray[np.int64]](), list[Tensor]()
    while True:
        rank = left.numpy().diagonal()[remaining].argsort(kind="stable")
        now, remaining = remaining[rank[:block]], remaining[rank[block:]]
        side = torch.from_numpy(left.numpy()[now])
        root = _root(torch.from_numpy(side.numpy()[:, now]), size)
        taken.append(names[now])
        roots.append(root.diagonal().clone())
        if not len(remaining):
            columns = torch.from_numpy(np.concatenate(taken)[::-1].copy())
            return Order(columns, torch.cat(roots).flip(0).square_())
        if len(remaining) < COMPACT_AT * len(left):
            open_ = torch.from_numpy(remaining)  # twice as fast as indexing
            left = left.index_select(0, open_).index_select(1, open_)
            side, names = side.index_select(1, open_), names[remaining]
            remaining = np.arange(len(remaining))
        half = torch.linalg.solve_triangular(root, side, upper=False)  # [block, columns of left]
        left.addmm_(half.T, half, alpha=-1)


def _root(moment: Tensor, channels: int) -> Tensor:
    """The lower Cholesky factor; what `moment` held is lost where it is large.

    A large matrix is taken a few columns at a time (right-looking), with products for all that is right of them: twice as
    fast as the library's own factorization, and in the same memory.

    Raises:
        StatisticsError: not positive definite: the statistics hold NaN, or are no second moment at all.
    """
    size = len(moment)
    if size <= ROOT_COLUMNS:
        return _small_root(moment, channels)
    for start in range(0, size, ROOT_COLUMNS):
        end = min(start + ROOT_COLUMNS, size)
        corner = _small_root(moment[start:end, start:end], channels)
        moment[start:end, start:end] = corner
        inverse = torch.linalg.solve_triangular(corner, torch.eye(end - start), upper=False)
        below = moment[end:, start:end] = moment[end:, start:end] @ inverse.T
        for first in range(0, size - end, ROOT_ROWS):
            rows = below[first : first + ROOT_ROWS]
            reach = end + first + len(rows)
            moment[end + first : reach, end:reach].addmm_(rows, below[: reach - end].T, alpha=-1)
    return moment.tril_()


def _small_root(moment: Tensor, channels: int) -> Tensor:
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(moment)
    if info.item() != 0 or not np.isfinite(lower.numpy().diagonal()).all():
        raise StatisticsError(
            f"the second moment of an input with {channels} channels is not positive definite: calibrate again"
        )
    return lower
