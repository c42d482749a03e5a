"""Statistics on the HTML pages of `glmq inspect`: the inputs of one folder, and two folders against each other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from glmq.model.config import FAMILY
from glmq.reporting.charts import RangeBar, range_chart
from glmq.reporting.page import Cell, card, cards, cell, page, section, split_table
from glmq.reporting.words import percent

if TYPE_CHECKING:
    from glmq.calibration.convergence import Assessment
    from glmq.inspection.statistics import StatisticsComparison, StatisticsSummary


def statistics_sections(found: StatisticsSummary) -> list[str]:
    """The samples, and of each input its range, its outlier channels and how far it has settled."""
    bars = [RangeBar(FAMILY.short_name(entry.site), entry.low, entry.high, None, None) for entry in found.inputs]
    rows = [
        (
            cell(FAMILY.short_name(entry.site), code=True),
            f"{entry.low:.4g}",
            f"{entry.high:.4g}",
            f"{entry.outliers} of {entry.width}",
            "inf" if math.isinf(entry.largest) else f"{entry.largest:.1f}",
            "" if entry.settled is None else percent(entry.settled.range_gap),
            f"{entry.tokens:,}",
        )
        for entry in found.inputs
    ]
    header = ("input", "least", "largest", "outlier channels", "largest over median", "range grew", "tokens")
    return [
        cards(
            card("Samples", str(found.samples), note=found.in_words),
            _settled_card(found.assessment),
        ),
        section("Ranges of the inputs", range_chart(bars, "input ranges", "seen"), note="Logarithmic away from zero."),
        section(
            "Inputs",
            split_table(header, rows, 1),
            note="Largest over median: of the channels' magnitudes. Range grew: by the second half of the samples.",
        ),
    ]


def _settled_card(assessment: Assessment | None) -> str:
    note = "by the median change over the text inputs"
    if assessment is None:
        return card("Settled", "unknown", "warn", "one sample does not show it")
    if assessment.is_settled:
        return card("Settled", "yes", "good", note)
    return card("Settled", "for 8-bit" if assessment.has_settled_ranges else "no", "warn", note)


def statistics_comparison_page(found: StatisticsComparison) -> str:
    """`glmq inspect STATS_A STATS_B --html`."""
    rows: list[list[str | Cell]] = [
        [
            cell(FAMILY.short_name(change.site), code=True),
            percent(change.mean_squares),
            "inf" if math.isinf(change.widened) else f"{change.widened:.3f}",
            *map(str, change.outliers),
            *(f"{tokens:,}" for tokens in change.tokens),
        ]
        for change in found.changes
    ]
    header = ("input", "mean squares", "range B / A", "outliers A", "outliers B", "tokens A", "tokens B")
    return page(
        f"glmq inspect: {found.a.directory.name} and {found.b.directory.name}",
        [f"A {found.a.directory}: {found.a.in_words}", f"B {found.b.directory}: {found.b.in_words}"],
        cards(
            card("Float model", "the same" if found.same_model else "another", "plain" if found.same_model else "warn"),
            card("Samples", "the same" if found.same_samples else "others"),
            *(card(key, f"{a} / {b}", note="A / B") for key, a, b in found.settings),
        ),
        section("Inputs, largest change of mean squares first", split_table(header, rows, 1)),
    )
