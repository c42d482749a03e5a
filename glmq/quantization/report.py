"""glmq_report.json and glmq_report.csv beside the weights: what was done, per linear and by area of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Final

from glmq.checkpoint.json_file import JsonObject, JsonValue, write_json, write_whole
from glmq.quantization.output import AreaBytes
from glmq.quantization.recipe import Recipe
from glmq.quoting import csv_text
from glmq.records import REPORT, LinearReport, report_row
from glmq.version import __version__

SCHEMA: Final = "glmq.quantize/1"


def report_document(
    reports: Sequence[LinearReport],
    areas: Sequence[AreaBytes],
    recipe: Recipe,
    samples_digest: str,
    checksums_digest: str,
) -> JsonObject:
    """The report as one JSON object.

    Args:
        checksums_digest: of the tensors' entries in glmq_checksums.json, so that a lost or replaced one is noticed.
    """
    weight = recipe.scheme.weight
    return {
        "schema": SCHEMA,
        "glmq": __version__,
        "quant_type": recipe.quant_type.value,
        "dtype": recipe.dtype.value,
        "method": weight.method.value,
        "step_rule": weight.step_rule.value,
        "smoothing": recipe.scheme.smoothing.value,
        "act_range": recipe.scheme.act_range.name.lower(),
        "samples_sha256": samples_digest,
        "checksums": checksums_digest,
        "bytes": [{"part": p.area.value, "before": p.before, "after": p.after} for p in areas],
        "linears": [_row(report) for report in reports],
    }


def write_report(folder: Path, document: JsonObject, reports: Sequence[LinearReport]) -> None:
    """Write both files into `folder`, mode 0640."""
    write_json(folder / f"{REPORT}.json", document, indent=1)
    columns = [field.name for field in fields(LinearReport) if field.name != "seconds"]
    write_whole(folder / f"{REPORT}.csv", csv_text(columns, map(_row, reports)).encode())


def _row(report: LinearReport) -> dict[str, JsonValue]:
    """A report without its time, so that equal runs write equal bytes."""
    return {key: value for key, value in report_row(report).items() if key != "seconds"}
