"""What `glmq inspect` shows of statistics: of one folder, and of two against each other."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from glmq.cli.console import stdout
from glmq.cli.render import SHOWN_ROWS
from glmq.cli.tables import Cell, Column, FittedTable
from glmq.inspection.folder import layer_of, role_of
from glmq.inspection.listing import describe_place
from glmq.model.config import FAMILY
from glmq.wording import size

if TYPE_CHECKING:
    from glmq.inspection.statistics import InputChange, InputSummary, StatisticsComparison, StatisticsSummary


def show_statistics(found: StatisticsSummary, nbytes: int, sites: Collection[str], *, one_by_one: bool) -> None:
    """What was calibrated on, whether it has settled, and what the inputs look like.

    Args:
        nbytes: of the folder's tensors.
        sites: the inputs that were asked for.
        one_by_one: list inputs instead of lines of layers that are alike.
    """
    from glmq.inspection.statistics import OUTLIER_FACTOR
    from glmq.jobs.notes import describe_convergence

    stdout.say(f"{found.directory}: calibration statistics of glmq {found.glmq}, {size(nbytes)}", style="bold")
    stdout.say("for: the input of `glmq quantize --stats`")
    stdout.say(found.in_words)
    for line in describe_convergence(found.assessment, unanswered=found.unanswered):
        stdout.say(line)
    grouped: dict[tuple[str, str], list[InputSummary]] = {}
    for entry in found.inputs:
        if entry.site in sites:
            name = f"{entry.site}.weight"
            layer = layer_of(name) if one_by_one else re.sub("[0-9]+", "N", layer_of(name))
            grouped.setdefault((layer, role_of(name)), []).append(entry)
    columns = [
        Column("layers and role", left=True),
        Column("channels", drop=4),
        Column("tokens", drop=3),
        Column("range"),
        Column(
            "outliers",
            note=f"outliers: channels whose largest magnitude is beyond {OUTLIER_FACTOR} times the median channel's",
        ),
        Column("over median", drop=2, note="over median: the largest of them"),
        Column("grew", drop=1, note="grew: the range, with the second half of the samples"),
    ]
    rows = [_input_cells(role, entries) for (_, role), entries in grouped.items()]
    stdout.print(FittedTable("Inputs of the linears", columns, rows))


def show_statistics_comparison(found: StatisticsComparison, *, limit: int | None, verbose: bool) -> None:
    """What differs between two statistics folders, the inputs that changed most first."""
    for letter, summary in (("A", found.a), ("B", found.b)):
        verdict = summary.assessment
        settled = "one sample" if verdict is None else verdict.in_words
        stdout.say(f"{letter} {summary.directory}: {summary.in_words}; {settled}")
    stdout.say("of the same float model" if found.same_model else "! of different float models")
    stdout.say("from the same samples" if found.same_samples else "from different samples")
    for key, a, b in found.settings:
        stdout.say(f"{key}: {a} in A, {b} in B")
    shown = found.changes[: limit or (len(found.changes) if verbose else SHOWN_ROWS)]
    left = len(found.changes) - len(shown)
    stdout.print(
        FittedTable(
            "Inputs of B against A, largest change of mean squares first",
            [
                Column("input", left=True),
                Column("mean squares"),
                Column("range B / A"),
                Column("outliers", drop=1),
                Column("tokens", drop=2),
            ],
            [_change_cells(change) for change in shown],
            caption=f"{left} changed less; -v shows all" if left else "",
        )
    )
    for letter, sites in (("A", found.only_a), ("B", found.only_b)):
        if sites:
            stdout.say(f"only in {letter}: {', '.join(map(FAMILY.short_name, sites))}")


def _change_cells(change: InputChange) -> list[Cell]:
    return [
        FAMILY.short_name(change.site),
        f"{change.mean_squares:.1%}",
        "inf" if math.isinf(change.widened) else f"{change.widened:.3f}",
        _before_after(*change.outliers),
        _before_after(*change.tokens),
    ]


def _before_after(a: int, b: int) -> str:
    return f"{a}" if a == b else f"{a} > {b}"


def _input_cells(role: str, entries: Sequence[InputSummary]) -> list[Cell]:
    """One line for inputs of a role: the range that covers all of them, the rest as least..most."""
    grown = [entry.settled.range_gap for entry in entries if entry.settled is not None]
    return [
        describe_place([layer_of(f"{entry.site}.weight") for entry in entries], role),
        _span([entry.width for entry in entries], "d"),
        _span([entry.tokens for entry in entries], "d"),
        f"{min(entry.low for entry in entries):.4g}..{max(entry.high for entry in entries):.4g}",
        _span([entry.outliers for entry in entries], "d"),
        _span([entry.largest for entry in entries], ".1f"),
        _span(grown, ".0%") if grown else "",
    ]


def _span(numbers: Sequence[float], form: str) -> str:
    low, high = f"{min(numbers):{form}}", f"{max(numbers):{form}}"
    return low if low == high else f"{low}..{high}"
