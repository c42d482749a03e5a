"""What a run would do and need: from config.json and the headers, and its time from one group."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from glmq.calibration.stats import Statistics
from glmq.checkpoint.reader import Checkpoint
from glmq.model.config import ModelConfig
from glmq.progress import Stopwatch
from glmq.quantization.fold import RowFolds
from glmq.quantization.layer import quantize_group
from glmq.quantization.output import AreaBytes, OutputPlan, bytes_by_area
from glmq.quantization.passes import read_group
from glmq.quantization.plan import GroupPlan
from glmq.quantization.recipe import Recipe
from glmq.quantization.stream import COPY_BYTES
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
    areas: tuple[AreaBytes, ...]
    files: tuple[tuple[str, int], ...]
    """Weight files with their exact sizes, headers included."""
    output_bytes: int
    statistics_bytes: int
    """Disk that calibration needs; 0 where statistics are given."""
    calibration_seconds: float | None
    """Estimated time of the calibration that comes first; None where statistics are given."""
    quantization_seconds: float | None
    """Estimated time of the rest; None without statistics to try it with."""
    peak_bytes: int
    """Estimated resident memory: the process, and the largest norm group in float32 three times with its second moment."""
    obstacles: tuple[str, ...] = ()
    """What lies where the output would, and stops a real run: a sentence each."""


@dataclass(frozen=True, slots=True)
class CalibrationNeeds:
    """What a calibration that comes first needs."""

    disk_bytes: int
    peak_bytes: int
    seconds: float


def make_run_plan(
    source: Checkpoint,
    config: ModelConfig,
    recipe: Recipe,
    plan: OutputPlan,
    first: CalibrationNeeds | Statistics,
) -> RunPlan:
    """Collect what is known before the run; with statistics, the smallest group is quantized to see how long it takes.

    Args:
        first: the statistics to quantize with, or what making them needs.
    """
    disk, peak, calibration, rest = 0, PROCESS_BYTES + _largest_group_bytes(plan), None, None
    match first:
        case Statistics():
            rest = _estimate_seconds(source, first, recipe, plan)
        case CalibrationNeeds():
            disk, peak, calibration = first.disk_bytes, max(peak, first.peak_bytes), first.seconds
    return RunPlan(
        linears=tuple(_linear_plans(plan, recipe)),
        areas=tuple(bytes_by_area(source, plan.shards)),
        files=tuple((file.name, file.nbytes) for file in plan.shards.files),
        output_bytes=plan.shards.nbytes,
        statistics_bytes=disk,
        calibration_seconds=calibration,
        quantization_seconds=rest,
        peak_bytes=peak,
    )


def _estimate_seconds(source: Checkpoint, statistics: Statistics, recipe: Recipe, plan: OutputPlan) -> float:
    """Seconds that quantizing and copying take, by those of the smallest group.

    Time is taken to grow with the weights of the quantized linears, and with the bytes of tensors that are copied.
    """
    groups = [group for group in plan.groups.values() if group.is_quantized]
    clock = Stopwatch()
    copied = sum(source.nbytes(name) for name in source if name.rpartition(".")[0] not in plan.linears)
    smallest = min(groups, key=_weights)
    linears, norm, stats, fold = read_group(RowFolds(source, statistics), recipe, plan.groups, smallest.group, clock)
    scheme = recipe.scheme_of(smallest.quant_type)
    started = time.perf_counter()
    quantize_group(linears, stats, scheme, norm_weight=norm, dtype=recipe.dtype, fold=fold)
    quantizing = time.perf_counter() - started
    (read,) = clock.take()
    share = sum(map(_weights, groups)) / _weights(smallest)
    # What is copied is read and written, at about the same rate.
    return share * (quantizing + read.seconds) + 2 * copied * read.seconds / read.nbytes


def _weights(plan: GroupPlan) -> int:
    return sum(linear.rows * linear.cols for linear in plan.group.linears)


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
        if group.is_quantized:
            weights = _weights(group)
            largest = max(largest, WEIGHT_COPIES * 4 * weights + weights + 4 * 4 * group.group.width**2)
    return largest
