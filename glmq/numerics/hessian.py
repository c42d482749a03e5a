"""The quadratic form that error-compensated rounding minimises: damp it, order it, factor it. Float32.

For one row w of a weight with inputs x, quantizing to q loses E[(w.x - q.xq)^2]. With xq = x + e, where e is the rounding noise of
the int8 activation (independent, variance v per channel), this is (w - q) H (w - q)^T + v |q|^2, H = E[x x^T].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from glmq.errors import StatisticsError

RETRIES: Final = 6


@dataclass(frozen=True, slots=True)
class Factor:
    """H[order][:, order] = (I + U) diag(curvature) (I + U)^T with U strictly upper triangular."""

    order: Tensor
    """int64 [K]: the column that is rounded first, second, ..."""
    feedback: Tensor
    """float32 [K, K]: U, strictly upper triangular, in processing order."""
    curvature: Tensor
    """float32 [K]: what a unit of rounding error costs once the columns after it have compensated, in processing order."""


def factor(moment: Tensor, damping: float) -> Factor:
    """Factor a second moment for columns processed by falling curvature.

    The upper-times-lower form is the ordinary Cholesky factor of the matrix with rows and columns reversed, reversed again; no
    inverse is formed, so float32 serves. When the factorisation fails (a moment that is not positive definite
    in float32), the damping is multiplied by 10, at most RETRIES times.

    Args:
        moment: float32 [K, K], symmetric, positive semi-definite; not changed.
        damping: added to the diagonal, as a share of its mean.

    Raises:
        StatisticsError: not factorable even with the largest damping, e.g. because it holds NaN.
    """
    diagonal = moment.diagonal()
    mean = diagonal.mean()
    if not mean > 0:
        mean = torch.ones(())  # an input that is always zero: any integers do
    order = diagonal.argsort(descending=True, stable=True)
    backwards = order.flip(0)
    flipped = moment[backwards][:, backwards]
    for attempt in range(RETRIES + 1):
        damped = flipped + torch.eye(len(order)) * (damping * 10**attempt * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if info.item() == 0:
            upper = lower.flip(0, 1)
            scale = upper.diagonal().clone()
            return Factor(order, (upper / scale).triu_(1), scale.square())
    raise StatisticsError(
        f"the second moment of {len(order)} input channels is not positive definite even with a damping of "
        f"{damping * 10**RETRIES:g}: calibrate again"
    )
