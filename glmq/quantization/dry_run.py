"""What a run would do and need: from config.json and the headers, and its time from one group."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from glmq.calibration.manifest import SampleTokens
from glmq.calibration.stats import Settings, Statistics
from glmq.checkpoint.reader import Checkpoint
from glmq.model.config import ModelConfig
from glmq.model.family import Block, InputGroup
from glmq.numerics.moments import InputStats
from glmq.numerics.rate import mean_rule_bits, solve_bits
from glmq.progress import PassPlan, StepPlan
from glmq.quantization.bits import needs_curves
from glmq.quantization.group import FloatLinear
from glmq.quantization.layer import measure_group, quantize_group, rate_curves
from glmq.quantization.measure import measured_blocks, rated_blocks
from glmq.quantization.output import AreaBytes, OutputPlan, bytes_by_area
from glmq.quantization.passes import effort, rating_effort
from glmq.quantization.recipe import Recipe
from glmq.quantization.stream import COPY_BYTES, REST
from glmq.spec import QuantType

PROCESS_BYTES = 450 * 2**20
"""Python with torch and transformers loaded; measured on Linux x86-64."""
WEIGHT_COPIES = 3
"""Float32 copies of a group's weights: as read, scaled, and compensated."""
CARRIED: Final = 3.3
"""How often every token meets the weights of a text layer with propagation: two models, each on its way to each group and then
through the layer; and the second moments of the inputs, which cost as much as 0.5 of it."""
TRIED_TOKENS: Final = 512
USUAL_MEETING: Final = 1e-10
"""Seconds in which a token meets one weight, on a small machine."""


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
    work_bytes: int
    """Disk that hidden states take beside the output while it runs; 0 without propagation."""
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
    load: TextLoad


@dataclass(frozen=True, slots=True)
class TextLoad:
    """What goes through the text layers of a calibration, and of a quantization with propagation."""

    tokens: int
    """Of all samples."""
    dtype: torch.dtype
    """Of the hidden states."""

    @classmethod
    def of(cls, samples: Iterable[SampleTokens], settings: Settings) -> TextLoad:
        return cls(sum(sample.tokens for sample in samples), settings.dtype)


def make_run_plan(
    source: Checkpoint,
    config: ModelConfig,
    recipe: Recipe,
    plan: OutputPlan,
    first: CalibrationNeeds | Statistics,
    *,
    measures: bool,
    reports: bool,
) -> RunPlan:
    """Collect what is known before the run; with statistics, the smallest group is quantized to see how long it takes.

    Args:
        first: the statistics to quantize with, or what making them needs.
        measures: every group is quantized once before, to see which stay float.
        reports: each quantized linear is compared with its float original.
    """
    disk, peak, calibration, rest = 0, 0, None, None
    match first:
        case Statistics():
            load = TextLoad.of(first.samples(), first.settings())
            site = min((g.group for g in plan.groups.values() if g.is_quantized), key=trial_order).site
            speed = try_speed(source, {site: first.input(site)}, recipe, plan, load, reports=reports)
            rest = seconds_of(plan_passes(source, config, recipe, plan, speed, measures=measures))
        case CalibrationNeeds():
            disk, peak, calibration, load = first.disk_bytes, first.peak_bytes, first.seconds, first.load
    return RunPlan(
        linears=tuple(_linear_plans(plan, recipe)),
        areas=tuple(bytes_by_area(source, plan.shards)),
        files=tuple((file.name, file.nbytes) for file in plan.shards.files),
        output_bytes=plan.shards.nbytes,
        statistics_bytes=disk,
        work_bytes=kept_states_bytes(config, recipe, load),
        calibration_seconds=calibration,
        quantization_seconds=rest,
        peak_bytes=max(peak, estimated_peak(config, recipe, plan, load)),
    )


def estimated_peak(config: ModelConfig, recipe: Recipe, plan: OutputPlan, load: TextLoad) -> int:
    """Resident memory of a quantization, in bytes: the process, and the largest group that becomes integers.

    With propagation also the hidden states of two models, and beside them what that group's weights are to come near to, and
    two matrices of its input; or, if that is more, a layer's weights twice.
    """
    rounding = _largest_group_bytes(plan)
    if not recipe.propagation:
        return PROCESS_BYTES + rounding
    layer = config.family.text_block(config, 0)
    carried = [group for group in layer.groups if plan.groups[group.site].is_quantized]
    rounding += max((4 * _weights(group) + 2 * 4 * group.width**2 for group in carried), default=0)
    running = 2 * _weights_in(layer) * load.dtype.itemsize
    return PROCESS_BYTES + _states_bytes(config, load) + max(rounding, running)


def kept_states_bytes(config: ModelConfig, recipe: Recipe, load: TextLoad) -> int:
    """Disk for the hidden states that propagation keeps in the work folder, of two layers, so that a stopped run can go on."""
    return 2 * _states_bytes(config, load) if recipe.propagation else 0


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast this machine quantizes: seconds for each unit of effort, and for each byte of a tensor that is copied."""

    rate: float
    """Of the pass that measures what sparse linears lose at how many bits, for each unit of `rating_effort`."""
    quantize: float
    """For each unit of `effort`."""
    copy: float
    carry: float = 0.0
    """For each weight of a text layer, with propagation."""


USUAL_SPEED: Final = Speed(1e-7, 2e-7, 4e-9)
"""Of a small machine: for small models, where a trial would take as long as the run."""


def usual_speed(recipe: Recipe, load: TextLoad) -> Speed:
    """The same with what the samples need in the text layers, if they go through them."""
    return replace(USUAL_SPEED, carry=CARRIED * load.tokens * USUAL_MEETING) if recipe.propagation else USUAL_SPEED


def trial_order(group: InputGroup) -> tuple[bool, float]:
    """The first in this order is tried: behind a norm, as most of the weights are, and of the least effort."""
    return group.norm is None, effort(group)


def try_speed(
    source: Checkpoint,
    inputs: Mapping[str, InputStats],
    recipe: Recipe,
    plan: OutputPlan,
    load: TextLoad,
    *,
    reports: bool,
) -> Speed:
    """Read and quantize one group, the first in `trial_order` of those whose statistics are given; nothing is written.

    Args:
        inputs: statistics of some quantized inputs, by site.
        load: what goes through the text layers if the recipe asks for propagation.
        reports: each quantized linear is compared with its float original.
    """
    groups = [group for group in plan.groups.values() if group.is_quantized and group.group.site in inputs]
    chosen = min(groups, key=lambda one: trial_order(one.group))
    scheme, shapes, norm = recipe.scheme_of(chosen.quant_type), chosen.group.linears, chosen.group.norm
    started = time.perf_counter()
    linears = [FloatLinear(shape.name, source.read_float(f"{shape.name}.weight"), None) for shape in shapes]
    norm_weight = None if norm is None else source.read_finite(f"{norm}.weight")
    read = time.perf_counter() - started
    copy = read / sum(source.nbytes(f"{shape.name}.weight") for shape in shapes)
    stats, rate, known, bits = inputs[chosen.group.site], 0.0, None, None
    started = time.perf_counter()
    if needs_curves(recipe) and chosen.quant_type.spec.is_sparse:
        curves, known = rate_curves(linears, stats, scheme, norm_weight=norm_weight, dtype=recipe.dtype)
        bits = solve_bits(curves, mean_rule_bits(curves))
        rate, started = (read + time.perf_counter() - started) / rating_effort(chosen.group), time.perf_counter()
    result = quantize_group(linears, stats, scheme, norm_weight=norm_weight, dtype=recipe.dtype, known=known, bits=bits)
    if reports:
        measure_group(linears, stats, scheme, result)
    quantize = (read + time.perf_counter() - started) / effort(chosen.group)
    carry = CARRIED * load.tokens * _time_of_weight(linears[0].weight.to(load.dtype)) if recipe.propagation else 0.0
    return Speed(rate, quantize, 2 * copy, carry)  # what is copied is read and written


def _time_of_weight(weight: Tensor) -> float:
    """Seconds in which a token meets one weight."""
    tokens = torch.ones(TRIED_TOKENS, weight.shape[1], dtype=weight.dtype)
    torch.nn.functional.linear(tokens, weight)  # the first one may start threads
    started = time.perf_counter()
    torch.nn.functional.linear(tokens, weight)
    return (time.perf_counter() - started) / (TRIED_TOKENS * weight.numel())


def plan_passes(
    source: Checkpoint, config: ModelConfig, recipe: Recipe, plan: OutputPlan, speed: Speed, *, measures: bool
) -> tuple[PassPlan, ...]:
    """The passes over the weights, each block with the time that it is expected to take.

    Time is taken to grow with `effort` and `rating_effort`, and with the bytes of tensors that are copied.

    Args:
        measures: every group is quantized once before, to see which stay float.
    """
    blocks = config.family.blocks(config)
    kinds = {block.name: config.family.kind_of(block.name) for block in blocks}
    copied = dict.fromkeys([*kinds, ""], 0)
    for name in source:
        if name.rpartition(".")[0] not in plan.linears:
            copied[next((block for block in kinds if name.startswith(f"{block}.")), "")] += source.nbytes(name)

    def pass_over(
        title: str, chosen: Sequence[Block], seconds: float, copy: float, size: Callable[[InputGroup], float] = effort
    ) -> PassPlan:
        return PassPlan(
            title,
            tuple(
                StepPlan(
                    block.name,
                    kinds[block.name],
                    copy * copied[block.name]
                    + seconds * sum(size(g) for g in block.groups if plan.groups[g.site].is_quantized),
                )
                for block in chosen
            ),
        )

    passes = []
    if needs_curves(recipe):
        passes.append(pass_over("rate", rated_blocks(config, plan.groups), speed.rate, 0.0, rating_effort))
    if measures:
        passes.append(pass_over("measure", measured_blocks(config, plan.groups), speed.quantize, 0.0))
    last = pass_over("quantize", blocks, speed.quantize, speed.copy)
    carried = {block.name: speed.carry * _weights_in(block) for block in config.family.text_blocks(config)}
    last = replace(last, steps=tuple(replace(s, seconds=s.seconds + carried.get(s.name, 0.0)) for s in last.steps))
    rest = StepPlan(REST, "other", speed.copy * copied[""])
    return (*passes, PassPlan(last.title, (*last.steps, rest)))


def seconds_of(passes: Iterable[PassPlan]) -> float:
    """The time that all these passes are expected to take."""
    return sum(step.seconds for one in passes for step in one.steps)


def _states_bytes(config: ModelConfig, load: TextLoad) -> int:
    """Of two models, at one layer."""
    return 2 * load.tokens * config.hidden_size * load.dtype.itemsize


def _weights(group: InputGroup) -> int:
    return sum(linear.rows * linear.cols for linear in group.linears)


def _weights_in(block: Block) -> int:
    return sum(map(_weights, block.groups))


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
            weights = _weights(group.group)
            largest = max(largest, WEIGHT_COPIES * 4 * weights + weights + 4 * 4 * group.group.width**2)
    return largest
