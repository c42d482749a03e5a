"""Whether the samples of a calibration were enough, as results carry it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from glmq.calibration.convergence import Assessment, assess
from glmq.calibration.stats import Statistics
from glmq.jobs.notes import describe_convergence

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settled:
    """Whether the samples were enough for statistics that further ones would hardly change."""

    assessment: Assessment | None
    """None: one sample alone does not show it."""
    unanswered: int
    """Samples without an answer, which is most of what a thinking model computes."""


def assess_settled(statistics: Statistics) -> Settled:
    """Whether the samples were enough; the log gets it line by line."""
    unanswered = sum(not sample.has_answer for sample in statistics.samples())
    settled = Settled(assess(statistics.settled()), unanswered)
    for line in describe_convergence(settled.assessment, unanswered=unanswered):
        log.info("%s", line)
    return settled
