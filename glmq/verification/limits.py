"""What behaviour of a checkpoint is still right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from glmq.values import check_between, check_least
from glmq.verification.findings import Severity

CHANCE: Final = 0.05
"""What chance does at least this often is no evidence."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What behaviour is still right."""

    max_kl: float = 0.1
    """Mean KL(float || candidate), nats. Good 8-bit checkpoints have under 0.01, sparse ones under 0.05."""
    min_top1: float = 0.9
    """Share of positions with the same most likely token, or one that the float model finds almost as likely; less is a warning
    where the positions are too few to tell."""
    max_error: float = 0.3
    """||y_q - y|| / ||y|| of the worst linear."""
    max_clipped: float = 0.02
    """Share of a linear's inputs outside what its int8 activation covers; more is a warning."""
    max_wasted_bits: float = 2.0
    """Bits of a static int8 activation that no input uses."""

    def __post_init__(self) -> None:
        check_least("--max-kl", self.max_kl, 0.0)
        check_between("--min-top1", self.min_top1, 0.0, 1.0)
        check_least("--max-error", self.max_error, 0.0)
        check_between("--max-clipped", self.max_clipped, 0.0, 1.0)
        check_between("--max-wasted-bits", self.max_wasted_bits, 0.0, 8.0)

    def below(self, good: int, positions: int) -> Severity | None:
        """Whether too few positions have a good most likely token: an error; a warning where chance may be why.

        Chance may be why if models that have one with probability `min_top1` at each position would do so at as few or
        fewer at least once in twenty times.
        """
        if good / max(1, positions) >= self.min_top1:
            return None
        return "warning" if binomial_tail(good, positions, self.min_top1) >= CHANCE else "error"


def binomial_tail(most: int, trials: int, share: float) -> float:
    """The probability of at most `most` successes in some trials, each a success with the probability `share`."""
    if share >= 1:
        return float(most >= trials)
    log_paths = (math.lgamma(trials + 1) - math.lgamma(n + 1) - math.lgamma(trials - n + 1) for n in range(most + 1))
    return sum(
        math.exp(paths + n * math.log(share) + (trials - n) * math.log1p(-share)) for n, paths in enumerate(log_paths)
    )
