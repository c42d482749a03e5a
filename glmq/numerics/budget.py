"""How many bits the flags ask for: the entropy of the integers that the vendor's step rules would write.

--use_sigma, --fraction and --co_sparse do not name a size; they name a rule, and the rule applied to the vendor's
smoothed weights has an entropy. That entropy is the budget that compensated rounding may spend. The vendor scales
channels whose half-range h_j exceeds a threshold by sqrt(h_j / max|W_j|), and searches the threshold from the standard
deviation of the input to its maximum. Which one it finds depends on its first sample and is not known here, so the
budget is the mean entropy over that search range, moved a quarter of the way to the least. (Measured: the vendor's
package spent 0.01 bits less to 0.07 more than the mean.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from glmq.numerics.affine import quantize_weight
from glmq.numerics.lowbit import grid_of, safe_steps
from glmq.numerics.metrics import count_int8, entropy_bits
from glmq.numerics.moments import InputStats
from glmq.numerics.rows import column_max, even_rows
from glmq.spec import WeightScheme

THRESHOLDS: Final = 12
"""Thresholds tried, by how many channels lie above: 0 to all above the standard deviation, denser towards few."""
BUDGET_ROWS: Final = 512
"""Rows of a linear that the budget is measured on, evenly spaced."""


TOWARDS_LEAST: Final = 0.25


def rule_bits(weights: Sequence[Tensor], stats: InputStats, scheme: WeightScheme, *, smoothed: bool) -> list[float]:
    """Bits per weight that the scheme's step rule spends on each linear of a group.

    Args:
        weights: float32 [N_i, K], before smoothing.
        stats: of their common input, unscaled.
        scheme: a sparse one, with its rule.
        smoothed: whether the vendor would smooth this group (it has a norm in front, and smoothing is on).

    Returns:
        One entropy per linear.
    """
    rows = [even_rows(w, BUDGET_ROWS) for w in weights]
    if not smoothed:
        return [_entropy(w, scheme) for w in rows]
    half_range = (stats.maximum - stats.minimum) / 2
    top = torch.stack([column_max(w) for w in weights]).amax(0)
    wanted = (half_range / top.clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
    spread = (stats.square_mean.mean() - stats.mean.mean().square()).clamp_min(0).sqrt()
    loudest = torch.where(top > 0, half_range, 0.0).argsort(descending=True, stable=True)
    most = int((half_range > spread).sum())
    tried = []
    for scaled in sorted({round(most * (i / THRESHOLDS) ** 2) for i in range(THRESHOLDS + 1)}):
        scales = torch.ones_like(wanted)
        scales[loudest[:scaled]] = wanted[loudest[:scaled]]
        tried.append([_entropy(w * scales, scheme) for w in rows])
    least = min(tried, key=lambda bits: sum(b * w.numel() for b, w in zip(bits, weights, strict=True)))
    mean = [sum(bits) / len(tried) for bits in zip(*tried, strict=True)]
    return [a + TOWARDS_LEAST * (b - a) for a, b in zip(mean, least, strict=True)]


def _entropy(weight: Tensor, scheme: WeightScheme) -> float:
    return entropy_bits(count_int8(quantize_weight(weight, safe_steps(weight, scheme), grid_of(scheme))))
