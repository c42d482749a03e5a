"""The HTML page of `glmq sweep`: size against KL and error, the recipes that no other beats, and the command of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from glmq.reporting.page import Cell, card, cards, cell, command, figure, page, pair, section, table
from glmq.reporting.scatter import Point, scatter_chart
from glmq.reporting.words import percent, tone_of
from glmq.wording import counted, size

if TYPE_CHECKING:
    from glmq.reporting.sweeps import Sweep, SweepRow

BEST = "*"
"""Behind the number of a row that no other beats."""


def sweep_page(found: Sweep) -> str:
    """`glmq_sweep.html`."""
    sections = [
        cards(*_cards(found)),
        section("Size against error", pair(*_charts(found)), note=_MARKS),
        section("Recipes", _rows_table(found), note=_NOTE),
    ]
    if found.failures:
        rows = [(one.name, one.reason) for one in found.failures]
        sections.append(section("Not made", table(("recipe", "why"), rows, text_columns=2)))
    commands = [figure(name, command(line)) for name, line in found.commands.items()]
    note = "Each makes the checkpoint of its row, to the bit. Paths are as they were given to the sweep."
    sections.append(section("Commands", *commands, note=note))
    subtitle = [f"{found.model}, statistics {found.statistics}", f"float model: {size(found.float_bytes)}"]
    return page(f"glmq sweep: {found.folder.name}", subtitle, *sections)


_MARKS = "Filled: no other recipe is both as small and as close; a line joins these."
_HEADER = ("recipe", "type", "bits", "size", "written", "median error", "worst", "KL", "same top", "float")
_NOTE = (
    f"{BEST}: no other recipe is both as small and as close to the float model, by that column. Size: of the tensors as they "
    "are served; of sparse types after `glmq compress`, from the entropy of the integers. Written: as `glmq quantize` writes "
    "them. Bits: entropy of the integers per weight. Float: linears that stay so."
)


def _charts(found: Sweep) -> list[str]:
    errors = [
        Point(row.name, row.expected_bytes, row.median_error, 0.0, best)
        for row, best in zip(found.rows, found.best_by_error, strict=True)
    ]
    measured = [row.divergence for row in found.rows if row.divergence is not None]
    made = []
    if measured:
        kl = [
            Point(row.name, row.expected_bytes, row.divergence.kl, row.divergence.kl_error or 0.0, best)
            for row, best in zip(found.rows, found.best_by_kl, strict=True)
            if row.divergence is not None
        ]
        samples = counted(len(found.samples), "sample")
        note = f"nats, over {measured[0].positions:,} positions of {samples}; bars: standard error"
        made.append(figure("KL from the float model", scatter_chart(kl, "KL", lambda value: f"{value:.2g}"), note=note))
    note = "||y_q - y|| / ||y|| of the middle linear, on calibration tokens"
    return [*made, figure("Median output error", scatter_chart(errors, "error", percent), note=note)]


def _cards(found: Sweep) -> list[str]:
    smallest, closest = found.rows[0], min(found.rows, key=_distance)
    best = found.best_by_kl if any(found.best_by_kl) else found.best_by_error
    share = percent(smallest.expected_bytes / max(1, found.float_bytes))
    return [
        card("Recipes", str(len(found.rows)), note=f"{sum(best)} that no other beats"),
        card(
            "Smallest",
            size(smallest.expected_bytes),
            note=f"{smallest.name}: {share} of the float model, {_say_distance(smallest)}",
        ),
        card("Closest", _say_distance(closest), note=f"{closest.name}: {size(closest.expected_bytes)}"),
    ]


def _distance(row: SweepRow) -> float:
    return row.median_error if row.divergence is None else row.divergence.kl


def _say_distance(row: SweepRow) -> str:
    return f"error {percent(row.median_error)}" if row.divergence is None else f"KL {row.divergence.kl:.2g}"


def _say_kl(row: SweepRow, sign: str) -> str:
    found = row.divergence
    if found is None:
        return ""
    return f"{found.kl:.3g}{sign}" + ("" if found.kl_error is None else f" ± {found.kl_error:.1g}")


def _rows_table(found: Sweep) -> str:
    rows: list[Sequence[str | Cell]] = [
        [
            row.name,
            row.quant_type,
            f"{row.bits:.2f}",
            size(row.expected_bytes),
            size(row.output_bytes),
            cell(percent(row.median_error) + (f" {BEST}" if by_error else ""), tone_of(row.median_error)),
            cell(percent(row.worst_error), tone_of(row.worst_error)),
            _say_kl(row, f" {BEST}" if by_kl else ""),
            "" if row.divergence is None else percent(row.divergence.top1),
            str(row.kept_float),
        ]
        for row, by_error, by_kl in zip(found.rows, found.best_by_error, found.best_by_kl, strict=True)
    ]
    return table(_HEADER, rows, text_columns=2)
