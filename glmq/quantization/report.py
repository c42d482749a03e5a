"""glmq_report.json and glmq_report.csv beside the weights: what was done, per linear and by area of the model, and the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Final

from glmq.calibration.manifest import SampleTokens
from glmq.checkpoint.json_file import JsonObject, JsonValue, write_json, write_whole
from glmq.engines import Chip, Engine
from glmq.quantization.output import AreaBytes
from glmq.quantization.plan import GroupPlan
from glmq.quantization.recipe import Recipe
from glmq.quoting import csv_text
from glmq.records import REPORT, LinearReport, PassTime, report_row
from glmq.version import __version__

SCHEMA: Final = "glmq.quantize/1"
RUN_NOTE: Final = (
    "of this run alone: equal runs differ here and nowhere else, so leave `run` out when reports are compared"
)
TABLE_LEAVES_OUT: Final = ("seconds", "first_integer", "integers")
"""Fields of a linear's report that are no column of the table."""


@dataclass(frozen=True, slots=True)
class KeptFloat:
    """A linear that was not quantized."""

    name: str
    why: str
    """The option that asked for it, or that it is the default."""


@dataclass(frozen=True, slots=True)
class CalibrationFacts:
    """What the statistics were taken from."""

    samples_sha256: str
    samples: tuple[SampleTokens, ...]
    settings: Mapping[str, JsonValue]
    """What they depend on beside the model and the samples."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What no two runs share."""

    finished: str
    """Date and time, ISO 8601, UTC."""
    command: str
    """As it was typed."""
    model: str
    """Folder of the float model."""
    statistics: str | None
    """Folder of the statistics; None where the run took its own and kept none."""
    output: str
    platform: str
    processor: str
    cores: int
    memory_bytes: int
    """Of the machine."""
    versions: Mapping[str, str]
    """Of Python and of the packages that compute."""
    passes: tuple[PassTime, ...]
    """Where the time went."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the report, its page and the model card say."""

    recipe: Recipe
    linears: tuple[LinearReport, ...]
    areas: tuple[AreaBytes, ...]
    kept_float: tuple[KeptFloat, ...]
    checksums: str
    """Digest of the tensors' entries in glmq_checksums.json, so that a lost or replaced one is noticed."""
    calibration: CalibrationFacts
    run: RunFacts
    engines: Mapping[Engine, tuple[Chip, ...]]
    """Those that load the checkpoint, each with the chips on which it does."""


def report_document(report: Report) -> JsonObject:
    """The report as one JSON object."""
    recipe = report.recipe
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
        "recipe": _plain(asdict(recipe)),
        "samples_sha256": report.calibration.samples_sha256,
        "calibration": {
            "samples": [_plain(asdict(sample)) for sample in report.calibration.samples],
            **report.calibration.settings,
        },
        "checksums": report.checksums,
        "bytes": [{"part": p.area.value, "before": p.before, "after": p.after} for p in report.areas],
        "linears": [_row(linear) for linear in report.linears],
        "kept_float": [_plain(asdict(kept)) for kept in report.kept_float],
        "run": {"note": RUN_NOTE, **_mapping(asdict(report.run))},
    }


def kept_float(groups: Mapping[str, GroupPlan], recipe: Recipe, asked: Recipe) -> tuple[KeptFloat, ...]:
    """The linears that stay float, and why, in model order.

    Args:
        groups: the plan that was carried out.
        recipe: that it follows.
        asked: the recipe of the options, before --fallback-topk and --max-error added the worst groups.
    """
    found = []
    for plan in groups.values():
        for linear in plan.group.linears if not plan.is_quantized else ():
            rule = recipe.rule_of(linear.name)
            assert rule is not None, "a linear without a rule has the model's type"
            if not rule.option:
                why = f"by default ({rule.pattern})"
            else:
                why = rule.option if rule in asked.rules else "one of the worst (--fallback-topk, --max-error)"
            found.append(KeptFloat(linear.name, why))
    return tuple(found)


def write_report(folder: Path, document: JsonObject, reports: Sequence[LinearReport]) -> None:
    """Write both files into `folder`, mode 0640."""
    write_json(folder / f"{REPORT}.json", document, indent=1)
    columns = [field.name for field in fields(LinearReport) if field.name not in TABLE_LEAVES_OUT]
    write_whole(folder / f"{REPORT}.csv", csv_text(columns, map(_row, reports)).encode())


def _row(report: LinearReport) -> JsonObject:
    """A report without its time, so that equal runs write equal rows."""
    return {key: value for key, value in report_row(report).items() if key != "seconds"}


def _mapping(record: Mapping[str, object]) -> JsonObject:
    return {key: _plain(value) for key, value in record.items()}


def _plain(value: object) -> JsonValue:
    """A record's value as JSON: enums by their value."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    assert isinstance(value, (list, tuple)), value
    return [_plain(item) for item in value]
