"""Charts and pages: well-formed, self-contained, and nothing from a checkpoint is taken for markup."""

import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from glmq.reporting.charts import (
    DARK_SHARE,
    RangeBar,
    _shade,
    columns_chart,
    heat_map,
    histogram_pair,
    integer_histogram,
    percent,
    range_chart,
    size,
    sparkline,
    stacked_bars,
)
from glmq.reporting.page import (
    LISTED,
    SCRIPT,
    STYLE,
    Cell,
    anchor_of,
    breakable,
    card,
    cards,
    cell,
    figure,
    folded,
    page,
    picture,
    section,
    split_table,
    table,
)

EVIL = '<script>alert(1)</script> & "quotes"'
VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}


class Checker(HTMLParser):
    """Fails on tags that are not closed in order; remembers what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        given = [value or "" for name, value in attrs if name in ("src", "href", "data", "action")]
        self.fetched += [value for value in given if not value.startswith(("#", "data:image/jpeg;base64,"))]
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
    assert html.count("<script") == html.count(f"<script>{SCRIPT}</script>") == 1
    assert not re.search(r"https?://|url\(|@import|fetch|XMLHttp|import\(|eval", html)
    return checker


CHARTS = {
    "heat map": heat_map(
        ["layers.0", "layers.1"], ["q", EVIL], {("layers.0", "q"): 0.1, ("layers.1", EVIL): 0.0}, EVIL
    ),
    "columns": columns_chart(["layers.0", EVIL], [0.1, math.inf], EVIL),
    "stacked bars": stacked_bars({"A": {"text": 100, EVIL: 50}, EVIL: {"text": 70}}, EVIL),
    "histograms": histogram_pair([0, 4, 9], [1, 1, 1], -1.0, 2.0, EVIL),
    "integers": integer_histogram([1, 0, 5], -1, EVIL),
    "sparkline": sparkline([0, 1, 100, 3]),
    "ranges": range_chart([RangeBar(EVIL, -1.0, 20.0, -2.0, 5.0), RangeBar("b", 0.0, 1.0, None, None)], EVIL),
}


@pytest.mark.parametrize("chart", CHARTS.values(), ids=CHARTS)
def test_a_chart_is_well_formed_and_escapes_names(chart: str) -> None:
    root = ElementTree.fromstring(chart)
    assert root.tag == "svg" or [child.tag for child in root] in (["svg"], ["div", "div"], ["div", "p"])
    assert root.tag == "svg" or root[0].tag == "svg" or root[0].find(".//svg") is not None
    assert "<script" not in chart


def test_a_page_holds_everything_it_needs_and_escapes_names() -> None:
    content = section(EVIL, table(("a", EVIL), [(EVIL, cell(EVIL, "bad")), ("1", "2")]), folded(EVIL, "x"), note=EVIL)
    html = page(EVIL, [EVIL], cards(card(EVIL, EVIL, "warn", EVIL)), content, *CHARTS.values())
    assert check_page(html).seen >= {"html", "head", "style", "title", "svg", "table", "details"}
    assert html.count("prefers-color-scheme: dark") == 1
    assert "alert(1)</script>" not in html


def test_heat_darkens_with_the_error_over_its_last_twentieth_and_zero_is_no_colour() -> None:
    values = {("0", "q"): 0.2, ("1", "q"): 0.01, ("2", "q"): 1e-9, ("3", "q"): 0.0}
    chart = heat_map(["0", "1", "2", "3"], ["q"], values, "error", {("0", "q"): "integers-a"})
    cells = re.findall(r'<title>([^<]*)</title><rect (?:fill="([^"]*)"|class="nothing")', chart)
    assert cells == 2 * [
        ("0 q: 20.0 %", "#7a1616"),
        ("1 q: 1.00 %", "#fff4d6"),
        ("2 q: &lt; 0.001 %", "#fff4d6"),
        ("3 q: 0 %", ""),
    ]
    assert '<a href="#integers-a"><title>0 q: 20.0 %</title>' in chart
    legend = re.findall(r">([^<>]+)<", chart.partition('class="legend"')[2])
    assert legend == ["error", "up to 1.00 %", "20.0 %", "logarithmic; darker is larger", "exactly 0"]


@pytest.mark.parametrize("share", [step / 50 for step in range(51)])
def test_the_number_in_a_cell_has_contrast(share: float) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ink = "#ffffff" if share > DARK_SHARE else "#1b1f24"
    assert f"fill: {ink}" in STYLE
    low, high = sorted((luminance(_shade(share)), luminance(ink)))
    assert (high + 0.05) / (low + 0.05) >= 4


def test_columns_are_as_tall_as_their_values() -> None:
    heights = [
        float(found) for found in re.findall(r'class="bar"[^>]*height="([\d.]+)"', columns_chart("ab", [1, 0.5], ""))
    ]
    assert heights == 2 * [146.0, 73.0]


def test_a_small_column_is_seen_and_a_zero_is_none() -> None:
    chart = columns_chart("abc", [1, 1e-9, 0.0], "output error", "layer")
    assert [float(found) for found in re.findall(r'class="bar"[^>]*height="([\d.]+)"', chart)] == 2 * [146.0, 1.5]
    assert '<circle class="nothing"' in chart
    assert ">output error</text>" in chart
    assert ">layer</text>" in chart


@pytest.mark.parametrize("count", [1, 8, 25, 40, 66])
@pytest.mark.parametrize("index", [0, 1])
def test_no_label_of_a_chart_of_layers_is_cut_or_touches_another_on_a_page_or_a_phone(count: int, index: int) -> None:
    layers, roles = [f"layers.{number}" for number in range(count)], ["self_attn.q_proj", "self_attn.query_key_value"]
    errors = {(layer, role): 0.05 for layer in layers for role in roles}
    for chart in (heat_map(layers, roles, errors, "error"), columns_chart(layers, [0.05] * count, "error")):
        svg = list(ElementTree.fromstring(chart).iter("svg"))[index]
        width = (960, 350)[index]
        assert svg.attrib["viewBox"].startswith(f"0 0 {width} ")
        lines: dict[str, list[tuple[float, float]]] = {}
        for text in svg.iter("text"):
            wide = 6.2 * len(text.text or "")  # of a letter of 12 pixels in the mean, as Chromium draws it
            share = {"start": 0.0, "middle": 0.5, "end": 1.0}[text.attrib["text-anchor"]]
            left = float(text.attrib["x"]) - share * wide
            lines.setdefault(text.attrib["y"], []).append((left, left + wide))
        for boxes in lines.values():
            boxes.sort()
            assert boxes[0][0] >= -1
            assert boxes[-1][1] <= width + 1
            assert all(end < start for (_, end), (start, _) in pairwise(boxes))


def test_a_histogram_of_integers_has_a_column_for_each_that_occurs() -> None:
    chart = integer_histogram([1, 0, 100], -1, "integers")
    assert re.findall(r" d=\"([^\"]*)\"", chart)[0].count("M") == 2
    texts = re.findall(r">([^<>]+)</text>", chart)
    assert texts == ["-1", "1", "integer; height: square root of the count", "0"]


def test_names_are_broken_behind_points_and_slashes_alone() -> None:
    assert breakable("layers.3.mlp.gate_up_proj") == "layers.<wbr>3.<wbr>mlp.<wbr>gate_up_proj"
    assert breakable("/a/<b>") == "/<wbr>a/&lt;b&gt;"


def test_a_link_leads_to_an_anchor_whatever_the_name() -> None:
    anchor = anchor_of("integers", EVIL)
    assert re.fullmatch(r"integers-[A-Za-z0-9_.-]+", anchor)
    assert f'<figure id="{anchor}">' in figure(EVIL, "x", anchor=anchor)
    assert cell("a", code=True, link=anchor).html == f'<a href="#{anchor}"><code>a</code></a>'


def test_both_halves_of_a_split_table_have_the_same_columns() -> None:
    rows = [(str(number), "late" if number == LISTED else "") for number in range(LISTED + 1)]
    html = split_table(("a", "b"), rows, 1)
    assert html.count("<th ") == 4
    assert html.startswith('<div class="split">')
    assert f"<summary>{len(rows) - LISTED} more</summary>" in html


def test_a_picture_lies_within_the_page() -> None:
    assert picture(b"jpeg", EVIL).html.startswith('<img alt="&lt;script&gt;')
    check_page(page("", [], picture(b"jpeg", "a").html))


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
    assert html.count("<th ") == 1
    assert table(("a",), []) == '<p class="muted">None.</p>'


def test_the_value_of_a_card_is_not_broken_before_its_unit() -> None:
    assert ">35.2\xa0MiB → 25.8\xa0MiB<" in card("Bytes", "35.2 MiB → 25.8 MiB")
    assert ">KL 0.03<" in card("Closest", "KL 0.03")


def test_a_tone_is_a_mark_as_well_as_a_colour() -> None:
    assert cell("7 %", "bad").html == '<span class="bad"><span class="mark">✗</span> 7 %</span>'
    assert cell("", "bad") == Cell("")
