"""What a run would do and need, from config.json and the headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glmq.checkpoint.reader import Checkpoint
from glmq.model.config import ModelConfig
from glmq.quantize.recipe import Recipe
from glmq.quantize.stream import COPY_BYTES, OutputPlan, PartBytes, bytes_by_part
from glmq.spec import QuantType

PROCESS_BYTES = 450 * 2**20
"""Python with torch and transformers loaded; measured on Linux x86-64."""
WEIGHT_COPIES = 3
"""Float32 copies of a group's weights: as read, scaled, and compensated."""


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """What becomes of one linear."""

    name: str
    quant_type: QuantType
    rows: int
    cols: int
    rule: str
    """The option that decided, or empty for the default."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run would do and need."""

    linears: tuple[LinearPlan, ...]
    parts: tuple[PartBytes, ...]
    files: tuple[tuple[str, int], ...]
    """Weight files with their exact sizes, headers included."""
    output_bytes: int
    statistics_bytes: int
    """Disk that calibration needs; 0 where statistics are given."""
    peak_bytes: int
    """Estimated resident memory: the process, and the largest norm group in float32 three times with its second moment."""


def make_run_plan(
    source: Checkpoint, config: ModelConfig, recipe: Recipe, plan: OutputPlan, *, statistics_bytes: int, peak_bytes: int
) -> RunPlan:
    """Collect what is known before the first weight is read.

    Args:
        statistics_bytes: disk that a calibration needs first; 0 where statistics are given.
        peak_bytes: resident memory that it needs.
    """
    return RunPlan(
        linears=tuple(_linear_plans(plan, recipe)),
        parts=tuple(bytes_by_part(source, plan.shards)),
        files=tuple((file.name, file.nbytes) for file in plan.shards.files),
        output_bytes=plan.shards.nbytes,
        statistics_bytes=statistics_bytes,
        peak_bytes=max(peak_bytes, PROCESS_BYTES + _largest_group_bytes(plan)),
    )


def _linear_plans(plan: OutputPlan, recipe: Recipe) -> Sequence[LinearPlan]:
    plans = []
    for group in plan.groups.values():
        for linear in group.group.linears:
            rule = recipe.rule_of(linear.name)
            option = rule.option if rule is not None else ""
            plans.append(LinearPlan(linear.name, group.quant_type, linear.rows, linear.cols, option))
    return plans


def _largest_group_bytes(plan: OutputPlan) -> int:
    """The largest group that is quantized: float32 weights, as stored and scaled; its integers; four matrices of its input."""
    largest = COPY_BYTES * 2
    for group in plan.groups.values():
        if group.quant_type is not QuantType.FLOAT:
            weights = sum(linear.rows * linear.cols for linear in group.group.linears)
            largest = max(largest, WEIGHT_COPIES * 4 * weights + weights + 4 * 4 * group.group.width**2)
    return largest
