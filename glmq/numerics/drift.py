"""How a linear's inputs move once the linears before it have become integers, and weights that make up for part of it.

With X the inputs in the float model and Y those in the model quantized so far, both [T, K], the weights that give the float
outputs most nearly on the moved inputs are W + W C with C = E[(x - y) y^T] E[y y^T]^-1, the regression of the drift x - y on
y. Rounding aims at W + a W C and weighs its errors by E[y y^T]; a, the strength, keeps what the calibration tokens show by
chance from being learnt (Arai & Ichikawa 2025, Quantization Error Propagation, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from glmq.errors import StatisticsError
from glmq.numerics.hessian import input_deviation, shrunk_correlation
from glmq.numerics.moments import InputStats

ROWS_AT_ONCE: Final = 4096
"""Rows of a weight that are moved together."""


@dataclass(frozen=True, slots=True)
class Drift:
    """What has become of one input, and what its linears can do about it."""

    moment: Tensor
    """float32 [K, K]: the second moment that the input has by now."""
    correction: Tensor
    """float32 [K, K]: a C."""

    def applied(self, stats: InputStats) -> InputStats:
        """The statistics of the input in the float model, with the second moment and mean squares that it has by now."""
        return replace(stats, second_moment=self.moment, square_mean=self.moment.diagonal().clone())

    def aim(self, weight: Tensor) -> Tensor:
        """The weights to round towards: float32 [N, K], as `weight`."""
        aim = torch.empty_like(weight)
        for start in range(0, len(weight), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            torch.addmm(weight[rows], weight[rows], self.correction, out=aim[rows])
        return aim


class DriftAccumulator:
    """Sums over the tokens of one input, sample by sample.

    Args:
        width: K.
    """

    def __init__(self, width: int) -> None:
        self._tokens = 0
        self._moment, self._cross = torch.zeros(width, width), torch.zeros(width, width)

    def observe(self, x: Tensor, moved: Tensor) -> None:
        """Add the tokens of one sample: float32 [T, K] in the float model, and in the model quantized so far."""
        self._tokens += len(x)
        self._moment.addmm_(moved.T, moved)
        self._cross.addmm_((x - moved).T, moved)

    def finish(self, site: str, strength: float) -> Drift:
        """What was seen of the input of that name; the strength, a, is 0 to 1.

        Raises:
            StatisticsError: the moved inputs are not finite.
        """
        moment, cross = self._moment.div_(self._tokens), self._cross.div_(self._tokens)
        deviation = input_deviation(moment.diagonal().clone())
        root, failed = torch.linalg.cholesky_ex(shrunk_correlation(moment, deviation))
        if int(failed) or not root.diagonal().isfinite().all():  # LAPACK on aarch64 lets NaN pass
            raise StatisticsError(
                f"{site}: its inputs have no positive definite second moment once the linears before it are integers; "
                "leave --propagation out, or keep the layers before it float (--keep-float)"
            )
        solved = torch.cholesky_solve((cross / deviation).T, root)  # float32 [K, K]: (C D)^T
        return Drift(moment, (strength * solved / deviation[:, None]).T.contiguous())
