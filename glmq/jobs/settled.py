"""Whether the samples of a calibration were enough, as results carry it."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from glmq.calibration.convergence import Assessment, assess
from glmq.calibration.stats import Statistics
from glmq.jobs.notes import describe_convergence
from glmq.spec import QuantType

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settled:
    """Whether the samples were enough for statistics that further ones would hardly change."""

    assessment: Assessment | None
    """None: one sample alone does not show it."""
    unanswered: int
    """Samples without an answer, which is most of what a thinking model computes."""
    is_dense: bool | None
    """All quantized weights are dense 8-bit ones, for which less is enough; None where that is not known yet."""

    @property
    def is_settled(self) -> bool | None:
        """Whether they were enough for what was quantized, or for anything; None where one sample alone does not show it."""
        found = self.assessment
        return None if found is None else found.suffices(is_dense=bool(self.is_dense))


def assess_settled(statistics: Statistics, types: Collection[QuantType] = ()) -> Settled:
    """Whether the samples were enough, for linears of these types where they are given; the log gets it line by line."""
    is_dense = all(quant_type.spec.weight_bits == 8 for quant_type in types) if types else None
    samples = statistics.samples()
    unanswered = sum(not sample.has_answer for sample in samples)
    settled = Settled(assess(statistics.settled(), samples=len(samples)), unanswered, is_dense)
    for line in describe_convergence(settled.assessment, unanswered=unanswered):
        log.info("%s", line)
    return settled
