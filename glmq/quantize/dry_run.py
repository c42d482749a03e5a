"""What a run would do and need, from config.json and the headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glmq.checkpoint.reader import Checkpoint
from glmq.model.config import ModelConfig
from glmq.model.glm4v import all_blocks
from glmq.quantize.recipe import Recipe
from glmq.quantize.stream import OutputPlan, PartBytes, bytes_by_part
from glmq.spec import QuantType

PROCESS_BYTES = 450 * 2**20
"""Python with torch and transformers loaded; measured on Linux x86-64."""


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
    source: Checkpoint, config: ModelConfig, recipe: Recipe, plan: OutputPlan, *, statistics_bytes: int
) -> RunPlan:
    """Collect what is known before the first weight is read."""
    return RunPlan(
        linears=tuple(_linear_plans(plan, recipe)),
        parts=tuple(bytes_by_part(source, plan.shards)),
        files=tuple((file.name, file.nbytes) for file in plan.shards.files),
        output_bytes=plan.shards.nbytes,
        statistics_bytes=statistics_bytes,
        peak_bytes=PROCESS_BYTES + _largest_group_bytes(config),
    )


def _linear_plans(plan: OutputPlan, recipe: Recipe) -> Sequence[LinearPlan]:
    plans = []
    for group in plan.groups.values():
        for linear in group.group.linears:
            rule = recipe.rule_of(linear.name)
            option = rule.option if rule is not None else ""
            plans.append(LinearPlan(linear.name, group.quant_type, linear.rows, linear.cols, option))
    return plans


def _largest_group_bytes(config: ModelConfig) -> int:
    largest = 0
    for block in all_blocks(config):
        block_weights = 4 * sum(linear.rows * linear.cols for group in block.groups for linear in group.linears)
        moments = 4 * sum(group.width**2 for group in block.groups if group.width <= config.hidden_size)
        for group in block.groups:
            weights = 4 * sum(linear.rows * linear.cols for linear in group.linears)
            largest = max(largest, 3 * weights + 4 * 4 * min(group.width, config.hidden_size) ** 2)
        if block.name != "lm_head":
            largest = max(largest, block_weights + moments)
    return largest
