"""The HTML page of `glmq inspect A`: kind, engines, bytes, layers, and values if they were read."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Final

from glmq.engines import Engine
from glmq.inspection.folder import Kind
from glmq.inspection.listing import (
    TensorRow,
    describe_folder,
    describe_layers,
    group_rows,
    tensor_rows,
    totals_by_area,
    totals_by_type,
)
from glmq.inspection.parts import describe_part, group_parts
from glmq.model.config import FAMILY
from glmq.reporting.charts import (
    RangeBar,
    range_chart,
    sparkline,
    stacked_bars,
)
from glmq.reporting.documents import Inspection
from glmq.reporting.page import Cell, card, cards, cell, page, section, split_table, table
from glmq.reporting.statistics_page import statistics_sections
from glmq.reporting.words import (
    percent,
)
from glmq.verification.engines.check import describe_engines, is_for
from glmq.verification.findings import Finding
from glmq.wording import counted, dimensions, size

if TYPE_CHECKING:
    from glmq.inspection.values import TensorValues


def inspection_page(found: Inspection) -> str:
    """`glmq inspect A --html`."""
    folder, every = found.folder, tensor_rows(found.folder)
    problems = [cell(problem, "bad") for problem in folder.problems]
    errors = len(problems)
    for target, findings in found.engines.items():
        if not is_for(folder, target):
            continue  # the sentence above the list says who does
        own = [finding for finding in findings if finding.message not in folder.problems]
        errors += sum(finding.severity == "error" for finding in own)
        problems += [_engine_cell(target, finding) for finding in own]
    sections = [
        cards(
            card("Kind", folder.quant_type or folder.kind.name.lower().capitalize(), note=describe_folder(folder)),
            card("Tensors", f"{len(folder.tensors):,}"),
            card("Bytes", size(folder.nbytes), note=f"{folder.nbytes:,}"),
            card("Problems", str(errors), "bad" if errors else "good", counted(len(problems) - errors, "note")),
        ),
        section("What it is for", f"<p>{describe_engines(folder)}</p>".replace("`", ""), _list(problems)),
        *([] if found.member is None else [section("Which model", f"<p>{escape(found.member)}</p>")]),
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
    if found.statistics is not None:
        sections += statistics_sections(found.statistics)
    if found.values:
        ranges = _stored_ranges(found)
        if ranges:
            sections.append(
                section(
                    "Input ranges",
                    range_chart(ranges, "input value"),
                    note="What the static int8 activation of each linear covers, logarithmic away from zero.",
                )
            )
        sections.append(
            section(
                "Values",
                split_table(_VALUE_HEADER, [_value_row(row, found.values[row.name]) for row in found.rows], 2),
                note="Histograms from minimum to maximum; heights are square roots of counts. "
                "Outliers are more than 4 standard deviations from the mean.",
            )
        )
    sections.append(_parts(found) if folder.kind in (Kind.PARTS, Kind.SHARDED, Kind.PORTABLE) else _layers(found))
    return page(f"glmq inspect: {folder.directory.name}", [str(folder.directory), describe_folder(folder)], *sections)


def _layers(found: Inspection) -> str:
    groups = [
        (describe_layers(g.layers), g.role, g.quant_type, g.dtypes, dimensions(g.shape), size(g.nbytes))
        for g in group_rows(found.rows)
    ]
    return section("Layers", split_table(("layers", "role", "type", "tensors", "shape", "bytes each"), groups, 4))


def _parts(found: Inspection) -> str:
    """Compressed parts: what is alike over ranks and layers in one line."""
    rows = [
        (describe_layers(row.layers), row.role, *describe_part(row)) for row in group_parts(found.rows, found.packed)
    ]
    header = ("layers", "role", "type", "ranks", "shape in a rank", "bytes", "bits", "ratio")
    note = (
        "Bits: of a weight as it is stored. Ratio: int8 bytes over those stored."
        if found.packed
        else "Without its report nothing says how large the packed weights were."
    )
    return section("Parts, all ranks together", split_table(header, rows, 3), note=note)


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


def _engine_cell(engine: Engine, finding: Finding) -> Cell:
    where = f"{finding.tensor}: " if finding.tensor else ""
    return cell(f"{engine.value}: {where}{finding.message}", "bad" if finding.severity == "error" else "warn")


def _list(cells: Sequence[Cell]) -> str:
    if not cells:
        return '<p class="good"><span class="mark">✓</span> Nothing wrong was found in headers and JSON files.</p>'
    return split_table(("what was found",), [(item,) for item in cells], 1)
