"""What inspect, verify and ask found: the records that their tables and pages are drawn from, and as JSON and CSV."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from glmq.checkpoint.json_file import JsonObject, JsonValue, write_named
from glmq.engines import Engine
from glmq.inspection.folder import Folder
from glmq.inspection.listing import TensorRow, describe_folder, tensor_rows, totals_by_area, totals_by_type
from glmq.inspection.parts import PackedWeight
from glmq.quoting import csv_text
from glmq.verification.engines.check import describe_engines
from glmq.verification.findings import Check, Finding

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from glmq.inspection.compare import WeightDiff
    from glmq.inspection.comparison import Comparison
    from glmq.inspection.statistics import StatisticsComparison, StatisticsSummary
    from glmq.inspection.values import TensorValues
    from glmq.verification.answering import AnswerPlan
    from glmq.verification.arithmetic import LinearArithmetic
    from glmq.verification.behaviour import BlockBehaviour, LinearBehaviour
    from glmq.verification.engines.schemes import ModuleScheme
    from glmq.verification.limits import Limits
    from glmq.verification.predictions import Predictions
    from glmq.verification.situations import Situation

INSPECT_SCHEMA: Final = "glmq.inspect/1"
COMPARE_SCHEMA: Final = "glmq.compare/1"
COMPARE_STATISTICS_SCHEMA: Final = "glmq.compare-statistics/1"
VERIFY_SCHEMA: Final = "glmq.verify/1"
VERIFY_CHECKS_SCHEMA: Final = "glmq.verify-checks/1"
ASK_SCHEMA: Final = "glmq.ask/1"


@dataclass(frozen=True, slots=True)
class Inspection:
    """Everything `glmq inspect A` found."""

    folder: Folder
    rows: Sequence[TensorRow]
    """Those that were asked for."""
    values: Mapping[str, TensorValues]
    """By tensor name; empty unless asked for."""
    engines: Mapping[Engine, Sequence[Finding]]
    packed: Mapping[tuple[int, str], PackedWeight]
    """Of compressed parts, by rank and linear, the weights as they were; empty of others."""
    member: str | None = None
    """Which released model it is or comes from, and what shows it; None where config.json does not say."""
    statistics: StatisticsSummary | None = None
    """Of a statistics folder; None of others."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said, and how fast."""

    folder: Path
    model: str
    """What the folder is, in one line."""
    image: Path | None
    prompt: str
    text: str
    """Without special tokens."""
    tokens: int
    """Of the answer, the one that ends it left out."""
    is_complete: bool
    """The model ended it by itself, rather than by reaching the longest answer that was allowed."""
    prompt_tokens: int
    """Of the picture and the prompt together."""
    prompt_seconds: float
    """To read them."""
    seconds: float
    """To write the answer."""
    plan: AnswerPlan
    """What a token was expected to take, and what stayed in memory."""


@dataclass(frozen=True, slots=True)
class Caption:
    """What both models say about one picture."""

    name: str
    reference: str
    candidate: str
    picture: bytes | None = field(default=None, repr=False)
    """The picture itself, small, as a JPEG file; None where there is none."""


@dataclass(frozen=True, slots=True)
class Verification:
    """Everything `glmq verify` found."""

    candidate: Path
    reference: Path | None
    what: str
    """The candidate in one line."""
    checked: Sequence[str]
    """What was looked at, with counts."""
    skipped: Sequence[str]
    """What could not be looked at, and in brackets what was missing for it."""
    findings: Sequence[Finding]
    linears: Sequence[LinearArithmetic]
    blocks: Sequence[BlockBehaviour]
    predictions: Predictions | None
    captions: Sequence[Caption]
    limits: Limits
    situation: Situation | None
    """What an un-sharded checkpoint could be compared with; None for others."""
    schemes: Mapping[Engine, Sequence[ModuleScheme]]
    """What each asked engine will build, module by module."""

    @property
    def passed(self) -> bool:
        """Something was looked at, and there is no error; warnings may be there."""
        return bool(self.checked) and not any(finding.severity == "error" for finding in self.findings)

    @property
    def not_checked(self) -> list[str]:
        """What was left out, and in brackets what it needs."""
        left = list(self.skipped)
        left += ["the float weights (--reference)"] if self.reference is None else []
        if self.predictions is None and self.linears:
            left.append("behaviour (--calib-images or --cases, with --reference)")
        return left if self.situation is None else [*left, self.situation.misses]

    @property
    def behaviours(self) -> dict[str, LinearBehaviour]:
        """By linear."""
        return {linear.name: linear for block in self.blocks for linear in block.linears}


# JSON and CSV


def to_json(record: DataclassInstance) -> JsonObject:
    """A record's fields as JSON values: enums by their value, paths as text, numbers that are not finite as null."""
    return {key: _json(value) for key, value in asdict(record).items()}


def _json(value: object) -> JsonValue:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return str(value)


def inspection_document(found: Inspection) -> JsonObject:
    """`glmq inspect A --json`."""
    folder, every = found.folder, tensor_rows(found.folder)
    return {
        "schema": INSPECT_SCHEMA,
        "folder": str(folder.directory),
        "what": describe_folder(folder),
        "model": found.member,
        "for": describe_engines(folder),
        "kind": folder.kind.name.lower(),
        "quant_type": folder.quant_type,
        "form": None if folder.form is None else folder.form.value,
        "tensors_total": len(folder.tensors),
        "bytes_total": folder.nbytes,
        "problems": list(folder.problems),
        "engines": {
            target.value: [finding_document(f) for f in findings] for target, findings in found.engines.items()
        },
        "parts": [to_json(total) for total in totals_by_area(every)],
        "types": [to_json(total) for total in totals_by_type(every)],
        "statistics": None if found.statistics is None else to_json(found.statistics),
        "tensors": [_row_document(row, found.values.get(row.name)) for row in found.rows],
    }


def finding_document(finding: Finding) -> JsonObject:
    """One finding; its check is a number."""
    return {
        "check": finding.check.number,
        "severity": finding.severity,
        "tensor": finding.tensor,
        "message": finding.message,
    }


def checks_document() -> JsonObject:
    """`glmq verify --list-checks --json`."""
    checks: list[JsonValue] = [
        {"check": check.number, "title": check.title, "severities": list(check.severities)} for check in Check
    ]
    return {"schema": VERIFY_CHECKS_SCHEMA, "checks": checks}


def _row_document(row: TensorRow, values: TensorValues | None) -> JsonObject:
    document: JsonObject = {
        "name": row.name,
        "layer": row.layer,
        "role": row.role,
        "part": row.area.value,
        "quant_type": row.quant_type,
        "dtype": row.dtype,
        "shape": list(row.shape),
        "bytes": row.nbytes,
        "file": row.tensor.file.name,
    }
    return document if values is None else {**document, "values": to_json(values)}


def inspection_csv(found: Inspection) -> list[JsonObject]:
    """One row per tensor."""
    rows: list[JsonObject] = []
    for row in found.rows:
        document = _row_document(row, None)
        document["shape"] = "x".join(str(n) for n in row.shape)
        values = found.values.get(row.name)
        if values is not None:
            numbers = to_json(values)
            del numbers["histogram"]
            document |= numbers
        rows.append(document)
    return rows


def diff_document(diff: WeightDiff) -> JsonObject:
    """One compared tensor, derived numbers included."""
    return {**to_json(diff), "relative_l2": _json(diff.relative_l2), "sqnr_db": _json(diff.sqnr_db)}


def comparison_document(found: Comparison) -> JsonObject:
    """`glmq inspect A B --json`."""
    return {
        "schema": COMPARE_SCHEMA,
        "a": str(found.a.directory),
        "b": str(found.b.directory),
        "what_a": describe_folder(found.a),
        "what_b": describe_folder(found.b),
        "tensors": [diff_document(diff) for diff in found.diffs],
        "layers": [to_json(layer) for layer in found.layers],
        "incomparable": [to_json(row) for row in found.incomparable],
        "only_in_a": [to_json(row) for row in found.only_a],
        "only_in_b": [to_json(row) for row in found.only_b],
        "config": [to_json(row) for row in found.config],
        "description": [to_json(row) for row in found.description],
    }


def comparison_csv(found: Comparison) -> list[JsonObject]:
    """One row per compared tensor; pairs and triples in columns of their own."""
    rows: list[JsonObject] = []
    for diff in found.diffs:
        document = diff_document(diff)
        low, high = diff.undone or (None, None)
        smallest, median, largest = diff.step_ratio or (None, None, None)
        del document["undone"], document["step_ratio"]
        document |= {"undone_min": low, "undone_max": high}
        document |= {"step_ratio_min": smallest, "step_ratio_median": median, "step_ratio_max": largest}
        rows.append(document)
    return rows


def statistics_comparison_document(found: StatisticsComparison) -> JsonObject:
    """`glmq inspect STATS_A STATS_B --json`."""
    return {
        "schema": COMPARE_STATISTICS_SCHEMA,
        "same_model": found.same_model,
        "same_samples": found.same_samples,
        **to_json(found),
    }


def statistics_comparison_csv(found: StatisticsComparison) -> list[JsonObject]:
    """One row per input that both folders have."""
    return [
        {
            "site": change.site,
            "mean_squares": change.mean_squares,
            "widened": _json(change.widened),
            "outliers_a": change.outliers[0],
            "outliers_b": change.outliers[1],
            "tokens_a": change.tokens[0],
            "tokens_b": change.tokens[1],
        }
        for change in found.changes
    ]


def verification_document(found: Verification) -> JsonObject:
    """`glmq verify --json`."""
    counts: dict[str, JsonValue] = {}
    for finding in found.findings:
        key = finding.check.title
        before = counts.get(key, 0)
        assert isinstance(before, int)
        counts[key] = before + 1
    return {
        "schema": VERIFY_SCHEMA,
        "candidate": str(found.candidate),
        "reference": None if found.reference is None else str(found.reference),
        "what": found.what,
        "passed": found.passed,
        "errors": sum(f.severity == "error" for f in found.findings),
        "warnings": sum(f.severity == "warning" for f in found.findings),
        "schemes": {
            engine.value: {one.module: one.scheme for one in schemes} for engine, schemes in found.schemes.items()
        },
        "checked": list(found.checked),
        "not_checked": found.not_checked,
        "counts": counts,
        "findings": [finding_document(finding) for finding in found.findings],
        "linears": [to_json(linear) for linear in found.linears],
        "blocks": [to_json(block) for block in found.blocks],
        "predictions": None if found.predictions is None else to_json(found.predictions),
        "captions": [{"name": c.name, "reference": c.reference, "candidate": c.candidate} for c in found.captions],
        "limits": to_json(found.limits),
    }


def answer_document(found: Answer) -> JsonObject:
    """`glmq ask --json`."""
    return {
        "schema": ASK_SCHEMA,
        "folder": str(found.folder),
        "model": found.model,
        "image": None if found.image is None else str(found.image),
        "prompt": found.prompt,
        "text": found.text,
        "tokens": found.tokens,
        "is_complete": found.is_complete,
        "prompt_tokens": found.prompt_tokens,
        "prompt_seconds": found.prompt_seconds,
        "seconds": found.seconds,
        "plan": to_json(found.plan),
    }


def write_csv(path: Path, rows: Sequence[JsonObject]) -> None:
    """Write rows with the same keys, all or none."""
    write_named(path, csv_text(list(rows[0]), rows).encode() if rows else b"")
