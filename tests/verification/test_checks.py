"""What verify makes of its numbers."""

from __future__ import annotations

import pytest

from glmq.verification.checks import judge_predictions
from glmq.verification.limits import Limits, binomial_tail
from glmq.verification.predictions import Predictions


def predicted(same: int, positions: int, ties: int = 0) -> Predictions:
    return Predictions(positions, 0.01, 0.001, same / positions, ties, None, None, ())


@pytest.mark.parametrize(
    ("same", "positions", "severity", "message"),
    [
        (17, 18, None, ""),
        (900, 1000, None, ""),
        (
            16,
            18,
            "warning",
            "agrees on the most likely token at 16 of 18 positions (88.9%), wanted at least 90%; so few may be chance: give "
            "more pictures with --calib-images, or --cases with answers",
        ),
        (
            0,
            1,
            "warning",
            "agrees on the most likely token at 0 of 1 position (0.0%), wanted at least 90%; so few may be chance: give more "
            "pictures with --calib-images, or --cases with answers",
        ),
        (13, 18, "error", "agrees on the most likely token at 13 of 18 positions (72.2%), wanted at least 90%"),
        (880, 1000, "error", "agrees on the most likely token at 880 of 1000 positions (88.0%), wanted at least 90%"),
    ],
)
def test_top_tokens_that_differ_are_an_error_where_chance_is_not_why(
    same: int, positions: int, severity: str | None, message: str
) -> None:
    assert Limits().below(same, positions) == severity
    found = [(finding.severity, finding.message) for finding in judge_predictions(predicted(same, positions), Limits())]
    assert found == ([] if severity is None else [(severity, message)])


def test_a_token_that_the_float_model_finds_as_likely_is_as_good() -> None:
    assert list(judge_predictions(predicted(10, 18, ties=7), Limits())) == []
    (found,) = judge_predictions(predicted(880, 1000, ties=1), Limits())
    message = "agrees on the most likely token at 880 of 1000 positions (88.0%), at 1 more a tie, wanted at least 90%"
    assert (found.severity, found.message) == ("error", message)


@pytest.mark.parametrize(
    ("most", "trials", "share", "probability"),
    [
        (0, 2, 0.5, 0.25),
        (1, 2, 0.5, 0.75),
        (2, 2, 0.5, 1.0),
        (16, 18, 0.9, 1 - 0.9**18 - 18 * 0.1 * 0.9**17),
        (3, 4, 1.0, 0.0),
        (4, 4, 1.0, 1.0),
        (4500, 5000, 0.9, 0.50690),
    ],
)
def test_the_tail_of_a_binomial_distribution(most: int, trials: int, share: float, probability: float) -> None:
    assert binomial_tail(most, trials, share) == pytest.approx(probability, abs=2e-5)
