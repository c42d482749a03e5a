import math

import pytest

from glmq.cli.inspect_view import percent, sparkline


def test_a_sparkline_has_two_bins_a_character() -> None:
    assert sparkline([0, 0, 1, 0, 50, 50, 0, 1]) == " ▁█▁"
    assert sparkline([0] * 4) == "  "


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (0.0, "0.000%"),
        (1e-6, "<0.001%"),
        (0.03492, "3.492%"),
        (12.0, "1200.000%"),
        (12345.0, "1.2e+06%"),
        (math.inf, "inf"),
        (math.nan, "inf"),
    ],
)
def test_relative_errors_are_said_in_percent(error: float, said: str) -> None:
    assert percent(error) == said
