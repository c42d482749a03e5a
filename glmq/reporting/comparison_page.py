"""The HTML page of `glmq inspect A B`: differences by layer, the weights that differ most, names, config.json, description."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from glmq.checkpoint.names import natural_key
from glmq.inspection.folder import Folder
from glmq.inspection.listing import (
    describe_folder,
    tensor_rows,
    totals_by_area,
)
from glmq.model.config import FAMILY
from glmq.reporting.charts import (
    columns_chart,
    heat_map,
    histogram_pair,
    stacked_bars,
)
from glmq.reporting.page import Cell, anchor_of, card, cards, cell, figure, grid, page, section, split_table, table
from glmq.reporting.words import (
    percent,
)
from glmq.wording import counted, size

if TYPE_CHECKING:
    from glmq.inspection.compare import WeightDiff
    from glmq.inspection.compare_keys import KeyChange
    from glmq.inspection.comparison import Comparison

NEGLIGIBLE: Final = 1e-6
"""Casting bfloat16 to float16 loses a few subnormal numbers, no more."""


def comparison_page(found: Comparison, limit: int | None) -> str:
    """`glmq inspect A B --html`; at most `limit` rows of tensors."""
    sections = [_cards(found), *_charts(found, limit)]
    if found.histograms:
        pairs = [
            figure(
                FAMILY.short_name(pair.name),
                histogram_pair(pair.a, pair.b, pair.low, pair.high, pair.name),
                anchor=anchor_of("histogram", pair.name),
            )
            for pair in found.histograms
        ]
        sections.append(
            section(
                "The weights that differ most, before and after",
                grid(*pairs),
                note="Filled: A. Line: B. Heights are square roots.",
            )
        )
    header = ("tensor", "types", "relative", "SQNR dB", "max abs", "cosine", "changed", "step ratio", "bits")
    sections.append(
        section(
            "Tensors, largest difference first",
            split_table(header, [_diff_row(diff) for diff in found.diffs[:limit]], 2),
            note="Smoothing is taken out through the norms, so that a difference is one of the function."
            + (f" {found.verdict_place} `{found.verifying_command}`" if found.verdict_place else ""),
        )
    )
    sections += [
        section(
            "Not comparable", table(("tensor", "why"), [(x.name, x.reason) for x in found.incomparable], text_columns=2)
        ),
        section("Only in A", table(("tensors", "count"), [(x.pattern, str(x.count)) for x in found.only_a])),
        section("Only in B", table(("tensors", "count"), [(x.pattern, str(x.count)) for x in found.only_b])),
        section("config.json", _changes_table(found.config)),
        section("Description", _changes_table(found.description)),
    ]
    subtitle = [
        f"A: {found.a.directory} ({describe_folder(found.a)})",
        f"B: {found.b.directory} ({describe_folder(found.b)})",
    ]
    return page(f"glmq inspect: {found.a.directory.name} and {found.b.directory.name}", subtitle, *sections)


def _cards(found: Comparison) -> str:
    total = next((layer for layer in found.layers if layer.layer == "total"), None)
    equal = sum(diff.equal_within is not None for diff in found.diffs)
    changed = sum(not diff.identical for diff in found.diffs) - equal
    names_differ = len(found.only_a) + len(found.only_b) + len(found.incomparable)
    error, worst = (
        (0.0, card("Largest", "none"))
        if total is None
        else (
            total.relative_l2,
            card(
                "Largest",
                percent(total.worst_relative_l2),
                note=FAMILY.short_name(total.worst),
            ),
        )
    )
    return cards(
        card("Difference", percent(error), note="||B - A|| / ||A|| over all tensors"),
        card(
            "Tensors that differ",
            f"{changed:,} of {len(found.diffs):,}",
            note=f"{counted(equal, 'more is', 'more are')} equal within the dtypes" if equal else "",
        ),
        worst,
        card("Only in one of them", str(names_differ), note="patterns of names"),
        card("Bytes", f"{size(found.a.nbytes)} → {size(found.b.nbytes)}"),
    )


def _charts(found: Comparison, limit: int | None) -> list[str]:
    matrices = [diff for diff in found.diffs if diff.name.endswith(".weight") and "norm" not in diff.role]
    columns = sorted({d.layer for d in matrices if "." in d.layer and "visual" not in d.layer}, key=natural_key)
    roles = list(dict.fromkeys(diff.role for diff in sorted(matrices, key=lambda d: d.name) if diff.layer in columns))
    layers = [layer for layer in found.layers if layer.layer != "total" and layer.relative_l2 > NEGLIGIBLE]
    rest = len(found.layers) - 1 - len(layers)
    errors = {(d.layer, d.role): d.relative_l2 for d in matrices}
    sections = [
        section(
            "Difference by layer",
            columns_chart([x.layer for x in layers], [x.relative_l2 for x in layers], "relative difference", "layer"),
            note=f"{counted(rest, 'other differs', 'others differ')} by less than a millionth, or not at all."
            if rest
            else "",
        ),
        section("Bytes by part", stacked_bars({"A": _area_bytes(found.a), "B": _area_bytes(found.b)}, "bytes by part")),
    ]
    if not columns:
        return sections
    drawn = {pair.name for pair in found.histograms}
    rows = {diff.name for diff in found.diffs[:limit]}
    links = {
        (d.layer, d.role): anchor_of("histogram" if d.name in drawn else "tensor", d.name)
        for d in matrices
        if d.name in drawn or d.name in rows
    }
    chart = heat_map(columns, roles, errors, "relative difference", links)
    note = "||B - A|| / ||A|| of each weight, darker is larger, logarithmic. A cell leads to the histogram or the row of that "
    note += "weight."
    return [section("Difference by layer and linear", chart, note=note), *sections]


def _diff_row(diff: WeightDiff) -> list[str | Cell]:
    bits = "" if diff.entropy_b is None else f"{diff.entropy_b:.2f}"
    if diff.entropy_a is not None and diff.entropy_b is not None:
        bits = f"{diff.entropy_a:.2f} → {diff.entropy_b:.2f}"
    return [
        cell(FAMILY.short_name(diff.name), code=True, anchor=anchor_of("tensor", diff.name)),
        f"{diff.type_a}\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}{diff.type_b}",
        percent(diff.relative_l2),
        f"{diff.sqnr_db:.1f}".replace("inf", "∞"),
        f"{diff.max_abs:.3g}",
        f"{diff.cosine:.5f}",
        "" if diff.changed_share is None else percent(diff.changed_share),
        "" if diff.step_ratio is None else "{:.3g} … {:.3g} … {:.3g}".format(*diff.step_ratio),
        bits,
    ]


def _changes_table(changes: Sequence[KeyChange]) -> str:
    rows = [
        (cell(c.key, code=True), "absent" if c.a is None else c.a, "absent" if c.b is None else c.b) for c in changes
    ]
    return split_table(("key", "A", "B"), rows, 3)


def _area_bytes(folder: Folder) -> dict[str, int]:
    return {total.label: total.nbytes for total in totals_by_area(tensor_rows(folder))}
