"""What every pass over the weights shares: its inputs, its blocks dealt out to the ranks, one group read and quantized."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from glmq.checkpoint.journal import Journal
from glmq.checkpoint.json_file import JsonObject
from glmq.checkpoint.reader import Checkpoint
from glmq.model.config import ModelConfig
from glmq.model.family import Block, InputGroup
from glmq.numerics.budget import BUDGET_ROWS, THRESHOLDS
from glmq.numerics.drift import Drift
from glmq.numerics.moments import InputStats
from glmq.numerics.rows import is_one_number
from glmq.progress import BlockStep, Step, Stopwatch, no_step, resident_bytes
from glmq.quantization.fold import RowFolds
from glmq.quantization.group import FloatLinear, GroupScheme, PreparedGroup, RowFold, prepare_group
from glmq.quantization.layer import GroupResult, measure_group, quantize_group
from glmq.quantization.plan import GroupPlan
from glmq.quantization.recipe import Recipe
from glmq.ranks import Ranks
from glmq.records import BlockDone, LinearReport, parse_row
from glmq.spec import Allocation


@dataclass(frozen=True, slots=True)
class QuantizationRun:
    """What all passes over the weights share: what they read, and the journal of the blocks that are done."""

    source: Checkpoint
    config: ModelConfig
    folds: RowFolds
    journal: Journal
    ranks: Ranks
    """They divide the blocks among themselves."""
    clock: Stopwatch = field(default_factory=Stopwatch)
    """Of this rank's work."""
    prepared: dict[tuple[str, GroupScheme, str], PreparedGroup] = field(default_factory=dict)
    """What an earlier pass of this process chose, by site, scheme and label of the row fold; without the factors."""
    step: Step = no_step
    """Is told how far the block is that this rank works on."""
    reports: bool = True
    """Each quantized linear is compared with its float original."""


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """One block is written: a step of the progress bar and the rows of its error table, if one was asked for."""

    done: BlockDone
    reports: tuple[LinearReport, ...]


def each_block(
    run: QuantizationRun, blocks: Sequence[Block], pass_name: str, work: Callable[[int, Block], JsonObject]
) -> Iterator[tuple[Block, JsonObject, float]]:
    """Do the work of each block on one of the ranks, unless the journal has it already, and journal what it returned.

    A float survives JSON unchanged, so it does not matter which rank did the work, or whether an earlier run did.

    Yields:
        On every rank each block, what was returned for it, and seconds.
    """
    rank, world = run.ranks.place.rank, run.ranks.place.world
    for first in range(0, len(blocks), world):
        row = blocks[first : first + world]
        started = time.perf_counter()
        own = ""
        if rank < len(row) and pass_name + row[rank].name not in run.journal.finished:
            after = blocks[first + world + rank : first + world + rank + 1]
            run.source.prefetch(name for block in after for name in run.source if name.startswith(f"{block.name}."))
            own = json.dumps(work(first + rank, row[rank]))
        texts = run.ranks.all_gather(own)
        for block, text in zip(row, texts):
            key = pass_name + block.name
            if key not in run.journal.finished:
                run.journal.record(key, json.loads(text))
            yield block, run.journal.finished[key], (time.perf_counter() - started) / len(row)


def each_group(run: QuantizationRun, index: int, block: Block, plans: Sequence[GroupPlan]) -> Iterator[GroupPlan]:
    """These groups of block `index` in turn, telling the run's `step` of each when it begins."""
    efforts = [effort(plan.group) for plan in plans]
    for done, plan in enumerate(plans):
        share = sum(efforts[:done]) / sum(efforts)
        run.step(BlockStep(block.name, index, done, len(plans), "inputs", share))
        yield plan


def effort(group: InputGroup) -> float:
    """What quantizing a group takes, up to a factor: what depends on its width alone, and the products of its rows.

    Measured at widths of 1024 and 4096: choosing scales and factoring the second moment take as long as 4096 rows do.
    """
    return group.width**2 * (1 + sum(linear.rows for linear in group.linears) / 4096)


def rating_effort(group: InputGroup) -> float:
    """The same of measuring what the linears lose at how many bits: order and range of the input, and the budget of the flags.

    Measured at widths of 1024 and 4096. The vendor's rule is tried at many thresholds where the vendor would smooth.
    """
    tried = 1 if group.norm is None else THRESHOLDS + 1
    sampled = sum(min(linear.rows, BUDGET_ROWS) for linear in group.linears)
    return group.width * (group.width + tried * sampled / 4 + sum(linear.rows for linear in group.linears) / 10)


def quantize_plan(
    run: QuantizationRun,
    recipe: Recipe,
    groups: Mapping[str, GroupPlan],
    plan: GroupPlan,
    bits: Mapping[str, float],
    drift: Drift | None = None,
) -> GroupResult:
    """Read one group's weights and quantize them, for inputs that have drifted where that is known."""
    linears, norm, stats, fold = read_group(run.folds, recipe, groups, plan.group, run.clock)
    scheme = recipe.scheme_of(plan.quant_type)
    key = plan.group.site, scheme, fold.label
    known = run.prepared.get(key)
    if drift is not None:
        with run.clock.stage("smoothing"):
            known = known or prepare_group(linears, stats, scheme, norm, recipe.dtype, fold)
        known = replace(known, drift=drift)
    result = quantize_group(
        linears,
        stats,
        scheme,
        norm_weight=norm,
        dtype=recipe.dtype,
        fold=fold,
        bits=[bits[linear.name] for linear in linears] if plan.group.linears[0].name in bits else None,
        known=known,
    )
    if run.reports:
        result = measure_group(linears, stats, scheme, result)
    run.prepared[key] = replace(result.prepared, drift=None)
    run.clock.include(result.stages)
    return replace(result, smoothed=())  # while it is written, the weights need not stay in memory


def read_group(
    folds: RowFolds,
    recipe: Recipe,
    groups: Mapping[str, GroupPlan],
    group: InputGroup,
    clock: Stopwatch,
) -> tuple[list[FloatLinear], Tensor | None, InputStats, RowFold]:
    """Read what quantizing a group needs.

    Returns:
        The float linears with the divisors of their rows; the norm's weight, or None without a norm; the statistics of the
        input; and the scales of an input without a norm.

    Raises:
        CheckpointError: a weight with NaN or infinity.
        StatisticsError: the statistics lack the input.
    """
    with clock.stage("read"):
        # First, so that the weights of only one group are in memory at a time.
        divisors = folds.divisors(recipe, groups, group)
        fold = folds.fold(recipe, groups, group)
        source = folds.source
        norm = None if group.norm is None else source.read_finite(f"{group.norm}.weight")
        linears = [
            FloatLinear(
                shape.name,
                source.read_float(f"{shape.name}.weight"),
                source.read_float(f"{shape.name}.bias") if shape.has_bias else None,
                divisors.get(shape.name),
            )
            for shape in group.linears
        ]
        stats = folds.statistics.input(group.site)
        if recipe.allocation is Allocation.ANSWER and stats.sensitivity is not None:
            parts = stats.sensitivity.split([shape.rows for shape in group.linears])
            linears = [  # rows of one number stay alike, and exact
                linear if is_one_number(linear.weight) else replace(linear, sensitivity=part)
                for linear, part in zip(linears, parts, strict=True)
            ]
    weights = sum(source.nbytes(f"{shape.name}.weight") for shape in group.linears)
    clock.count("read", nbytes=weights + stats.nbytes)
    return linears, norm, stats, fold


def parse_reports(payload: JsonObject) -> list[LinearReport]:
    """The reports of a block as the journal has them."""
    rows = payload["reports"]
    assert isinstance(rows, list)
    return [parse_row(row) for row in rows]


def block_done(name: str, index: int, total: int, seconds: float, run: QuantizationRun) -> BlockDone:
    """The record of a finished block, with this rank's stage times since the last one."""
    return BlockDone(name, index, total, seconds, resident_bytes(), run.clock.take())
