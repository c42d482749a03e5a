"""The HTML pages of inspect and verify: what was found, as cards, charts and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from glmq.checkpoint.json_file import write_whole
from glmq.checkpoint.names import natural_key
from glmq.inspection.folder import Folder
from glmq.inspection.listing import (
    TensorRow,
    describe_folder,
    describe_layers,
    group_rows,
    tensor_rows,
    totals_by_area,
    totals_by_type,
)
from glmq.model.config import FAMILY
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
from glmq.reporting.documents import Comparison, Inspection, Verification
from glmq.reporting.page import Cell, Tone, card, cards, cell, figure, folded, grid, page, section, table
from glmq.verification.engines.check import Target, describe_engines
from glmq.verification.findings import Finding

if TYPE_CHECKING:
    from glmq.inspection.compare import KeyChange, WeightDiff
    from glmq.inspection.values import TensorValues
    from glmq.verification.behaviour import LinearBehaviour

POOR_ERROR: Final = 0.1
BAD_ERROR: Final = 0.2
"""From where on a relative error is marked."""
NEGLIGIBLE: Final = 1e-6
"""Casting bfloat16 to float16 loses a few subnormal numbers, no more."""
LISTED: Final = 60
"""Rows of a table that are shown at once; the rest is folded away."""


def write_page(path: Path, html: str) -> None:
    """Write the page whole or not at all."""
    write_whole(path, html.encode())


def inspection_page(found: Inspection) -> str:
    """`glmq inspect A --html`."""
    folder, every = found.folder, tensor_rows(found.folder)
    problems = [cell(problem, "bad") for problem in folder.problems]
    errors = len(problems)
    for target, findings in found.engines.items():
        own = [finding for finding in findings if finding.message not in folder.problems]
        errors += sum(finding.severity == "error" for finding in own)
        problems += [_engine_cell(target, finding) for finding in own]
    sections = [
        cards(
            card("Kind", folder.quant_type or folder.kind.name.lower().capitalize(), note=describe_folder(folder)),
            card("Tensors", f"{len(folder.tensors):,}"),
            card("Bytes", size(folder.nbytes), note=f"{folder.nbytes:,}"),
            card("Problems", str(errors), "bad" if errors else "good", f"{len(problems) - errors} notes"),
        ),
        section("For which engine", f"<p>{describe_engines(folder)}</p>".replace("`", ""), _list(problems)),
        section(
            "Bytes by part",
            stacked_bars({"stored": {t.label: t.nbytes for t in totals_by_area(every)}}, "bytes by part"),
            table(
                ("type and dtype", "tensors", "bytes", "share"),
                [(t.label, f"{t.tensors:,}", size(t.nbytes), percent(t.nbytes / max(1, folder.nbytes)))
                 for t in totals_by_type(every)],
            ),
        ),
    ]  # fmt: skip
    if found.values:
        ranges = _stored_ranges(found)
        if ranges:
            sections.append(
                section(
                    "Input ranges",
                    range_chart(ranges, "input ranges"),
                    note="What the static int8 activation of each linear covers, logarithmic away from zero.",
                )
            )
        sections.append(
            section(
                "Values",
                _split_table(_VALUE_HEADER, [_value_row(row, found.values[row.name]) for row in found.rows], 2),
                note="Histograms from minimum to maximum; heights are square roots of counts. "
                "Outliers are more than 4 standard deviations from the mean.",
            )
        )
    groups = [
        (describe_layers(g.layers), g.role, g.quant_type, g.dtypes, " x ".join(map(str, g.shape)), size(g.nbytes))
        for g in group_rows(found.rows)
    ]
    sections.append(
        section("Layers", _split_table(("layers", "role", "type", "tensors", "shape", "bytes each"), groups, 4))
    )
    return page(f"glmq inspect: {folder.directory.name}", [str(folder.directory), describe_folder(folder)], *sections)


_VALUE_HEADER: Final = ("tensor", "histogram", "minimum", "maximum", "std", "bits", "zeros", "outliers")


def _value_row(row: TensorRow, values: TensorValues) -> list[str | Cell]:
    return [
        cell(FAMILY.short_name(row.name), code=True),
        Cell(sparkline(values.histogram)),
        f"{values.minimum:.4g}",
        f"{values.maximum:.4g}",
        f"{values.std:.4g}",
        "" if values.entropy_bits is None else f"{values.entropy_bits:.2f}",
        percent(values.zero_share),
        percent(values.outlier_share),
    ]


def _stored_ranges(found: Inspection) -> list[RangeBar]:
    """Of every static linear whose values were read: (-128 - offset) * scale to (127 - offset) * scale."""
    bars = []
    for name, scale in found.values.items():
        offset = found.values.get(name.replace(".input_scale", ".input_offset"))
        if name.endswith(".input_scale") and offset is not None:
            low = (-128 - offset.minimum) * scale.minimum
            high = (127 - offset.minimum) * scale.minimum
            bars.append(RangeBar(FAMILY.short_name(name.removesuffix(".input_scale")), low, high, None, None))
    return bars


def comparison_page(found: Comparison) -> str:
    """`glmq inspect A B --html`."""
    total = next((layer for layer in found.layers if layer.layer == "total"), None)
    matrices = [diff for diff in found.diffs if diff.name.endswith(".weight") and "norm" not in diff.role]
    error = 0.0 if total is None else total.relative_l2
    changed = sum(not diff.identical for diff in found.diffs)
    names_differ = len(found.only_a) + len(found.only_b) + len(found.incomparable)
    columns = list(dict.fromkeys(d.layer for d in matrices if "." in d.layer and "visual" not in d.layer))
    columns = sorted(columns, key=natural_key)
    roles = list(dict.fromkeys(diff.role for diff in sorted(matrices, key=lambda d: d.name) if diff.layer in columns))
    layers = [layer for layer in found.layers if layer.layer != "total" and layer.relative_l2 > NEGLIGIBLE]
    rest = len(found.layers) - 1 - len(layers)
    sections = [
        cards(
            card("Difference", percent(error), _tone(error), "||B - A|| / ||A|| over all tensors"),
            card("Tensors that differ", f"{changed:,} of {len(found.diffs):,}"),
            card("Worst", "none" if total is None else percent(total.worst_relative_l2),
                 "plain" if total is None else _tone(total.worst_relative_l2),
                 "" if total is None else FAMILY.short_name(total.worst)),
            card("Only in one of them", str(names_differ), note="patterns of names"),
            card("Bytes", f"{size(found.a.nbytes)} → {size(found.b.nbytes)}"),
        ),
        section("Error by layer and linear", heat_map(columns, roles, {(d.layer, d.role): d.relative_l2 for d in matrices},
                "relative error"), note="||B - A|| / ||A|| of each weight, darker is worse, logarithmic.")
        if columns else "",
        section("Error by layer", columns_chart([x.layer for x in layers], [x.relative_l2 for x in layers], "relative error"),
                note=f"{rest} others differ by less than a millionth, or not at all."),
        section("Bytes by part", stacked_bars({"A": _part_bytes(found.a), "B": _part_bytes(found.b)}, "bytes by part")),
    ]  # fmt: skip
    if found.histograms:
        pairs = [
            figure(f"{FAMILY.short_name(pair.name)}", histogram_pair(pair.a, pair.b, pair.low, pair.high, pair.name))
            for pair in found.histograms
        ]
        sections.append(
            section(
                "The worst weights, before and after",
                grid(*pairs),
                note="Filled: A. Line: B. Heights are square roots.",
            )
        )
    header = ("tensor", "types", "relative", "SQNR dB", "max abs", "cosine", "changed", "step ratio", "bits")
    sections.append(
        section(
            "Tensors, worst first",
            _split_table(header, [_diff_row(diff) for diff in found.diffs], 2),
            note="Smoothing is taken out through the norms, so that a difference is one of the function.",
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


def _diff_row(diff: WeightDiff) -> list[str | Cell]:
    bits = "" if diff.entropy_b is None else f"{diff.entropy_b:.2f}"
    if diff.entropy_a is not None and diff.entropy_b is not None:
        bits = f"{diff.entropy_a:.2f} → {diff.entropy_b:.2f}"
    return [
        cell(FAMILY.short_name(diff.name), code=True),
        f"{diff.type_a} → {diff.type_b}",
        cell(percent(diff.relative_l2), _tone(diff.relative_l2)),
        "∞" if math.isinf(diff.sqnr_db) else f"{diff.sqnr_db:.1f}",
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
    return _split_table(("key", "A", "B"), rows, 3)


def verification_page(found: Verification) -> str:
    """`glmq verify --html`."""
    errors = sum(f.severity == "error" for f in found.findings)
    warnings = len(found.findings) - errors
    predictions, limits = found.predictions, found.limits
    top = [
        card("Verdict", "passed" if found.passed else "failed", "good" if found.passed else "bad"),
        card("Errors", str(errors), "bad" if errors else "good"),
        card("Warnings", str(warnings), "warn" if warnings else "good"),
    ]
    if predictions is not None:
        top += [
            card("KL from float", f"{predictions.kl:.2g}", "good" if predictions.kl <= limits.max_kl else "bad", "nats"),
            card("Same top token", percent(predictions.top1), "good" if predictions.top1 >= limits.min_top1 else "bad",
                 f"{predictions.positions:,} positions"),
        ]  # fmt: skip
        if predictions.nll_float is not None and predictions.nll_candidate is not None:
            top.append(
                card(
                    "NLL of answers", f"{predictions.nll_candidate:.4f}", note=f"float {predictions.nll_float:.4f} nats"
                )
            )
    note = f"Not checked: {'; '.join(found.not_checked)}." if found.not_checked else ""
    sections = [cards(*top), section("Findings", _findings_table(found), note=note)]
    behaviours = list(found.behaviours.values())
    if found.blocks:
        errors_built = [block.error for block in found.blocks]
        names = [FAMILY.short_name(block.done.name) for block in found.blocks]
        sections.append(
            section(
                "Error built up, block after block",
                columns_chart(names, errors_built, "built-up error"),
                note="||h_q - h|| / ||h|| of the hidden states, each model on its own.",
            )
        )
    if behaviours:
        cells = {_place(linear.name): linear.error for linear in behaviours}
        roles = list(dict.fromkeys(role for _, role in cells))
        sections.append(
            section(
                "Error of each linear",
                heat_map(list(dict.fromkeys(layer for layer, _ in cells)), roles, cells, "output error"),
                note="||y_q - y|| / ||y|| in the NPU's arithmetic, both fed the float model's hidden states.",
            )
        )
        bars = _seen_ranges(behaviours)
        if bars:
            sections.append(
                section(
                    "Input ranges",
                    range_chart(bars, "input ranges"),
                    note="Wide: what the int8 activation covers. Line: what was seen, red where it lies outside.",
                )
            )
    sections.append(section("Linears, worst first", _linears_table(found)))
    if predictions is not None:
        rows = [
            (
                s.name,
                str(s.positions),
                f"{s.kl:.3g}",
                percent(s.top1),
                _optional(s.nll_float),
                _optional(s.nll_candidate),
            )
            for s in sorted(predictions.samples, key=lambda s: -s.kl)
        ]
        header = ("sample", "positions", "KL nats", "same top", "NLL float", "NLL candidate")
        sections.append(section("Samples, worst first", _split_table(header, rows, 1)))
    if found.captions:
        captions = [(c.name, c.reference, c.candidate) for c in found.captions]
        sections.append(
            section("Captions side by side", table(("picture", "float", "candidate"), captions, text_columns=3))
        )
    subtitle = [f"{found.candidate} ({found.what})"]
    if found.reference is not None:
        subtitle.append(f"against {found.reference}")
    return page(f"glmq verify: {found.candidate.name}", subtitle, *sections)


def _seen_ranges(behaviours: Sequence[LinearBehaviour]) -> list[RangeBar]:
    """Covered and seen input ranges of the static linears; one bar for those that share an input."""
    bars: dict[tuple[str, float, float, float, float], RangeBar] = {}
    for x in behaviours:
        if x.covered_high > x.covered_low:
            key = (_place(x.name)[0], x.covered_low, x.covered_high, x.seen_low, x.seen_high)
            bar = RangeBar(FAMILY.short_name(x.name), x.covered_low, x.covered_high, x.seen_low, x.seen_high)
            bars.setdefault(key, bar)
    return list(bars.values())


def _findings_table(found: Verification) -> str:
    rows = [
        (
            cell(finding.severity, "bad" if finding.severity == "error" else "warn"),
            finding.check.title,
            cell(finding.tensor, code=True),
            finding.message,
        )
        for finding in found.findings
    ]
    return _split_table(("severity", "check", "tensor", "what"), rows, 4)


def _linears_table(found: Verification) -> str:
    behaviours = found.behaviours
    arithmetic = {linear.name: linear for linear in found.linears}
    names = sorted(
        arithmetic.keys() | behaviours.keys(), key=lambda n: (-behaviours[n].error if n in behaviours else 0.0, n)
    )
    rows: list[list[str | Cell]] = []
    for name in names:
        one, other = behaviours.get(name), arithmetic.get(name)
        against = None if other is None else other.against
        rows.append(
            [
                cell(FAMILY.short_name(name), code=True),
                "" if one is None else cell(percent(one.error), _tone(one.error)),
                "" if against is None else percent(against.relative_l2),
                "" if other is None else f"{other.entropy_bits:.2f}",
                "" if one is None else percent(one.clipped_share),
                "" if one is None or one.excess == 0 else f"{percent(one.excess)} on {one.excess_sample}",
                "" if other is None else percent(other.accumulator_share),
                "" if one is None else f"{one.largest_output:.3g}",
            ]
        )
    header = ("linear", "output error", "weight error", "bits", "clipped", "farthest", "of int32", "max |y|")
    return _split_table(header, rows, 1)


def _engine_cell(target: Target, finding: Finding) -> Cell:
    where = f"{finding.tensor}: " if finding.tensor else ""
    return cell(f"{target.value}: {where}{finding.message}", "bad" if finding.severity == "error" else "warn")


def _list(cells: Sequence[Cell]) -> str:
    if not cells:
        return '<p class="good"><span class="mark">✓</span> Nothing wrong was found in headers and JSON files.</p>'
    return _split_table(("what is wrong",), [(item,) for item in cells], 1)


def _split_table(header: Sequence[str], rows: Sequence[Sequence[str | Cell]], text_columns: int) -> str:
    """The first LISTED rows; the rest folded."""
    shown = table(header, rows[:LISTED], text_columns=text_columns)
    if len(rows) <= LISTED:
        return shown
    rest = table(header, rows[LISTED:], text_columns=text_columns)
    return shown + folded(f"{len(rows) - LISTED} more", rest)


def _part_bytes(folder: Folder) -> dict[str, int]:
    return {total.label: total.nbytes for total in totals_by_area(tensor_rows(folder))}


def _tone(error: float) -> Tone:
    if not error < BAD_ERROR:
        return "bad"
    return "warn" if error >= POOR_ERROR else "good"


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _place(name: str) -> tuple[str, str]:
    """Layer and role of a linear."""
    short = FAMILY.short_name(name)
    pieces = short.split(".")
    cut = next((i + 1 for i, piece in enumerate(pieces) if piece.isdigit()), 1)
    return ".".join(pieces[:cut]), ".".join(pieces[cut:]) or short
