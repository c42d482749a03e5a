"""The page and the chart of a sweep: the best are told from the others by more than a colour, and names do not collide."""

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from reporting.test_charts import EVIL, Checker

from glmq.reporting.scatter import NAME_WIDTH, SIDE, Point, scatter_chart
from glmq.reporting.sweep_page import sweep_page
from glmq.reporting.sweeps import Divergence, Sweep, SweepFailure, SweepRow, sweep_document
from glmq.reporting.words import percent


def row(name: str, nbytes: int, error: float, kl: float | None) -> SweepRow:
    divergence = None if kl is None else Divergence(100, kl, kl / 10, 0.9)
    return SweepRow(
        name, "W8A8S", "float16", 3.0, nbytes + 5, nbytes, error, 2 * error, "model.x", 6, divergence, 1.0, f"q {EVIL}"
    )


def sweep(*rows: SweepRow) -> Sweep:
    failures = (SweepFailure("few", EVIL, "glmq quantize --x"),)
    samples = () if rows[0].divergence is None else ("a.png",)
    return Sweep(Path("out"), Path("float"), Path("stats"), 2**30, rows, failures, samples, 3.0)


def test_the_page_marks_what_no_other_row_beats_and_holds_each_command() -> None:
    found = sweep(row("a", 2**28, 0.3, 0.3), row("b", 2**29, 0.1, 0.1), row("c", 2**30, 0.2, 0.05))
    assert (found.best_by_error, found.best_by_kl) == ((True, True, False), (True, True, True))
    page = sweep_page(found)
    checker = Checker()
    checker.feed(page)
    assert (checker.open, checker.fetched, "script" in checker.seen) == ([], [], True)
    assert "<script>alert" not in page
    assert page.count('class="dot"') == 5
    assert page.count('class="ring"') == 1
    assert "10.0 % *" in page
    assert "0.05 * ± 0.005" in page
    assert page.count("<code>q ") == 3
    assert "2 that no other beats" not in page
    assert "3 that no other beats" in page


def test_a_sweep_without_kl_has_one_chart_and_says_nothing_of_it() -> None:
    found = sweep(row("a", 10, 0.3, None), row("b", 20, 0.1, None))
    assert found.best_by_kl == (False, False)
    page = sweep_page(found)
    assert page.count("<svg") == 1
    assert "KL" not in page
    assert [one["kl"] for one in sweep_document(found)["rows"]] == [None, None]


def test_an_error_without_bounds_is_null_in_json_and_said_on_the_page() -> None:
    found = sweep(row("a", 10, math.inf, None), row("b", 20, 0.1, None))
    assert json.loads(json.dumps(sweep_document(found), allow_nan=False))["rows"][0]["worst_error"] is None
    assert found.best_by_error == (True, True)
    assert "inf" in sweep_page(found)


@pytest.mark.parametrize("count", [1, 2, 12])
def test_names_in_the_chart_stay_inside_and_apart(count: int) -> None:
    points = [Point(f"recipe-{n}", 10**9 + n * 10**7, 0.1 / (1 + n), 0.001, n % 3 > 0) for n in range(count)]
    drawn = scatter_chart(points, "error", percent)
    svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", drawn, re.S)[0])  # type: ignore[index]
    names = [text for text in svg.iter("text") if (text.text or "").startswith("recipe-")]
    assert len(names) == count
    boxes = []
    for text in names:
        x, y, wide = float(text.attrib["x"]), float(text.attrib["y"]), NAME_WIDTH * len(text.text or "")
        left = x - wide if text.attrib["text-anchor"] == "end" else x
        assert 0 < left < left + wide <= SIDE
        boxes.append((left, y - 10, left + wide, y + 2))
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            apart = one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]
            assert apart, (one, other)


def test_values_that_are_near_each_other_have_ticks_too() -> None:
    drawn = scatter_chart([Point("a", 10, 0.0395, 0.0, True), Point("b", 20, 0.0221, 0.0, True)], "error", percent)
    ticks = [text for text in re.findall(r">([^<]+)</text>", drawn) if text.endswith("%")]
    assert ticks == ["2.00 %", "3.00 %", "4.00 %"]


def test_a_chart_of_equal_sizes_and_of_zeros_can_be_drawn() -> None:
    same = [Point("a", 100, 0.0, 0.0, True), Point("b", 100, 0.5, 0.0, False)]
    assert "<svg" in scatter_chart([*same, Point("c", 100, math.inf, 0.0, False)], "error", percent)
    assert (
        scatter_chart([Point("a", 100, 0.0, 0.0, True)], "error", percent)
        == '<p class="muted">No error above zero.</p>'
    )
