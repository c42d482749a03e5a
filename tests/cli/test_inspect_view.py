from glmq.cli.inspect_view import sparkline


def test_a_sparkline_has_two_bins_a_character() -> None:
    assert sparkline([0, 0, 1, 0, 50, 50, 0, 1]) == " ▁█▁"
    assert sparkline([0] * 4) == "  "
