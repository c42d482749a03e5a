"""What a sweep found: a row for each recipe, which of them no other beats, and all of it as JSON and CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glmq.checkpoint.json_file import JsonObject
from glmq.quoting import file_text

SWEEP: Final = "glmq_sweep"
"""Stem of the files that a sweep writes."""
SWEEP_SCHEMA: Final = "glmq.sweep/1"


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far a checkpoint's predicted tokens are from the float model's, over all positions that count."""

    positions: int
    kl: float
    """Mean KL(float || checkpoint), nats."""
    kl_error: float | None
    """Its standard error, from how far positions differ; None of a single position."""
    top1: float
    """Share of positions at which both prefer the same token."""


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One recipe: how large its checkpoint is, and how far from the float model."""

    name: str
    quant_type: str
    dtype: str
    bits: float
    """Bits per weight of the quantized linears: of sparse types the zero-order entropy of the integers, which an entropy coder
    comes close to, of others what is stored, steps included."""
    output_bytes: int
    """Of the tensors that `glmq quantize` writes."""
    expected_bytes: int
    """The same after `glmq compress`, from the entropy of the integers; of types that are not sparse the same number."""
    median_error: float
    """||y_q - y|| / ||y|| of the middle one of the quantized linears."""
    worst_error: float
    worst_linear: str
    kept_float: int
    """Linears that stay float."""
    divergence: Divergence | None
    """None where it was not measured."""
    seconds: float
    """That the recipe took, measuring included."""
    command: str
    """That makes this checkpoint alone, quoted for a shell."""


@dataclass(frozen=True, slots=True)
class SweepFailure:
    """A recipe that gives no checkpoint of this model."""

    name: str
    reason: str
    """The sentence that `glmq quantize` says."""
    command: str


@dataclass(frozen=True, slots=True)
class Sweep:
    """Several recipes of one model over the same statistics."""

    folder: Path
    """Where the reports lie."""
    model: Path
    statistics: Path
    float_bytes: int
    """Of the float model's tensors."""
    rows: tuple[SweepRow, ...]
    """From the smallest `expected_bytes` to the largest."""
    failures: tuple[SweepFailure, ...]
    samples: tuple[str, ...]
    """Names of those that KL was measured on; none where it was left out."""
    seconds: float
    """Of the whole run, without what an interrupted one had done before."""

    @property
    def commands(self) -> dict[str, str]:
        """By recipe, those that gave no checkpoint last."""
        made = {row.name: row.command for row in self.rows}
        return made | {failure.name: failure.command for failure in self.failures}

    @property
    def best_by_error(self) -> tuple[bool, ...]:
        """For each row, whether no other is both as small and as close by its median error."""
        return pareto_front([(row.expected_bytes, row.median_error) for row in self.rows])

    @property
    def best_by_kl(self) -> tuple[bool, ...]:
        """The same by KL; no row where that was not measured."""
        measured = [(row.expected_bytes, row.divergence.kl) for row in self.rows if row.divergence is not None]
        return pareto_front(measured) if len(measured) == len(self.rows) else (False,) * len(self.rows)


def pareto_front(points: Sequence[tuple[float, float]]) -> tuple[bool, ...]:
    """Which points (size, error) no other beats: none is as small and as good, and in one of both better."""
    return tuple(
        not any(x <= size and y <= error and (x, y) != (size, error) for x, y in points) for size, error in points
    )


def _finite(error: float) -> float | None:
    """JSON has no infinity, which a linear whose float output is zero may have."""
    return error if math.isfinite(error) else None


def sweep_document(found: Sweep) -> JsonObject:
    """`glmq sweep --json`, and glmq_sweep.json."""
    return {
        "schema": SWEEP_SCHEMA,
        "folder": file_text(str(found.folder)),
        "model": file_text(str(found.model)),
        "statistics": file_text(str(found.statistics)),
        "float_bytes": found.float_bytes,
        "samples": list(found.samples),
        "rows": [dict(row) for row in sweep_rows(found)],
        "failures": [
            {"name": one.name, "reason": one.reason, "command": file_text(one.command)} for one in found.failures
        ],
        "seconds": found.seconds,
    }


def sweep_rows(found: Sweep) -> list[JsonObject]:
    """One flat object for each row: glmq_sweep.csv."""
    return [
        {
            "name": row.name,
            "quant_type": row.quant_type,
            "dtype": row.dtype,
            "bits": row.bits,
            "output_bytes": row.output_bytes,
            "expected_bytes": row.expected_bytes,
            "median_error": _finite(row.median_error),
            "worst_error": _finite(row.worst_error),
            "worst_linear": row.worst_linear,
            "kept_float": row.kept_float,
            "positions": None if row.divergence is None else row.divergence.positions,
            "kl": None if row.divergence is None else row.divergence.kl,
            "kl_error": None if row.divergence is None else row.divergence.kl_error,
            "top1": None if row.divergence is None else row.divergence.top1,
            "best_by_error": by_error,
            "best_by_kl": by_kl,
            "seconds": row.seconds,
            "command": file_text(row.command),
        }
        for row, by_error, by_kl in zip(found.rows, found.best_by_error, found.best_by_kl, strict=True)
    ]
