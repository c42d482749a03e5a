from pathlib import Path

from glmq.calibration.convergence import assess
from glmq.calibration.stats import Statistics
from glmq.jobs.notes import describe_convergence


def test_settled_statistics_are_told_in_two_lines(tiny_stats: Path) -> None:
    lines = list(describe_convergence(assess(Statistics.open(tiny_stats).settled()), unanswered=0))
    assert lines[0].startswith("settled: against half of the samples, ranges changed by 5%, mean squares 8%, corr")
    assert lines[1].startswith("  most at layers.")
    assert len(lines) == 2


def test_one_sample_alone_is_told_to_show_nothing() -> None:
    assert list(describe_convergence(None, unanswered=0)) == [
        "warning: one sample alone does not show whether the statistics have settled; give more images"
    ]
