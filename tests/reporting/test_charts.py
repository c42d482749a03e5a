"""Charts and pages: well-formed, self-contained, and nothing from a checkpoint is taken for markup."""

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from glmq.reporting.charts import (
    RangeBar,
    columns_chart,
    heat_map,
    histogram_pair,
    percent,
    range_chart,
    size,
    sparkline,
    stacked_bars,
)
from glmq.reporting.page import Cell, card, cards, cell, folded, page, section, table

EVIL = '<script>alert(1)</script> & "quotes"'
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Checker(HTMLParser):
    """Fails on tags that are not closed in order; remembers what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert checker.fetched == []
    assert "script" not in checker.seen
    assert not re.search(r"https?://|url\(|@import", html)
    return checker


CHARTS = {
    "heat map": heat_map(
        ["layers.0", "layers.1"], ["q", EVIL], {("layers.0", "q"): 0.1, ("layers.1", EVIL): 0.0}, EVIL
    ),
    "columns": columns_chart(["layers.0", EVIL], [0.1, math.inf], EVIL),
    "stacked bars": stacked_bars({"A": {"text": 100, EVIL: 50}, EVIL: {"text": 70}}, EVIL),
    "histograms": histogram_pair([0, 4, 9], [1, 1, 1], -1.0, 2.0, EVIL),
    "sparkline": sparkline([0, 1, 100, 3]),
    "ranges": range_chart([RangeBar(EVIL, -1.0, 20.0, -2.0, 5.0), RangeBar("b", 0.0, 1.0, None, None)], EVIL),
}


@pytest.mark.parametrize("chart", CHARTS.values(), ids=CHARTS)
def test_a_chart_is_well_formed_and_escapes_names(chart: str) -> None:
    assert ElementTree.fromstring(chart).tag == "svg"
    assert "<script" not in chart


def test_a_page_holds_everything_it_needs_and_escapes_names() -> None:
    content = section(EVIL, table(("a", EVIL), [(EVIL, cell(EVIL, "bad")), ("1", "2")]), folded(EVIL, "x"), note=EVIL)
    html = page(EVIL, [EVIL], cards(card(EVIL, EVIL, "warn", EVIL)), content, *CHARTS.values())
    assert check_page(html).seen >= {"html", "head", "style", "title", "svg", "table", "details"}
    assert html.count("prefers-color-scheme: dark") == 1
    assert "<script" not in html


def test_heat_grows_with_the_error_over_its_last_twentieth() -> None:
    chart = heat_map(["0", "1", "2"], ["q"], {("0", "q"): 0.2, ("1", "q"): 0.01, ("2", "q"): 1e-9}, "error")
    opacity = [float(found) for found in re.findall(r'fill-opacity="([\d.]+)"', chart)]
    assert opacity == [1.0, 0.08, 0.08]


def test_columns_are_as_tall_as_their_values() -> None:
    heights = [
        float(found) for found in re.findall(r'class="bar"[^>]*height="([\d.]+)"', columns_chart("ab", [1, 0.5], ""))
    ]
    assert heights == [146.0, 73.0]


def test_the_part_of_a_range_that_clips_is_marked() -> None:
    assert 'class="clip"' not in range_chart([RangeBar("a", -1.0, 1.0, -0.5, 0.5)], "")
    assert range_chart([RangeBar("a", -1.0, 1.0, -2.0, 3.0)], "").count('class="clip"') == 2


@pytest.mark.parametrize(
    "chart",
    [heat_map(["0"], ["q"], {("0", "q"): 0.0}, "error"), columns_chart(["a"], [0.0], "error"),
     stacked_bars({}, "error"), range_chart([], "error"), columns_chart([], [], "error")],
)  # fmt: skip
def test_a_chart_of_nothing_says_so(chart: str) -> None:
    assert re.fullmatch(r'<p class="muted">No error( above zero)?\.</p>', chart)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.0387, "3.87 %"), (0.5, "50.0 %"), (4e-4, "0.040 %"), (1e-9, "< 0.001 %"),
     (math.inf, "inf")],
)  # fmt: skip
def test_shares_are_written_for_people(value: float, text: str) -> None:
    assert percent(value) == text


@pytest.mark.parametrize(
    ("nbytes", "text"), [(512, "512 B"), (2048, "2.0 KiB"), (3 << 20, "3.0 MiB"), (5 << 30, "5.00 GiB")]
)
def test_bytes_are_written_for_people(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_empty_columns_are_left_out_and_an_empty_table_says_so() -> None:
    html = table(("a", "b", "c"), [("1", "", Cell("")), ("2", "", "")])
    assert html.count("<th") == 1 + html.count("<thead")
    assert table(("a",), []) == '<p class="muted">None.</p>'


def test_a_tone_is_a_mark_as_well_as_a_colour() -> None:
    assert cell("7 %", "bad").html == '<span class="bad"><span class="mark">✗</span> 7 %</span>'
    assert cell("", "bad") == Cell("")
