"""What a run will do, pass by pass, with the time that each block is expected to take: told before the first pass begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from glmq.calibration.dry_run import CalibrationPlan, guess_steps, try_calibration
from glmq.calibration.generate import GenerationPlan
from glmq.calibration.samples import Sample
from glmq.calibration.stats import Settings, Statistics
from glmq.checkpoint.reader import Checkpoint
from glmq.model.config import ModelConfig
from glmq.model.inputs import Preprocessor
from glmq.model.streamed import StreamedModel
from glmq.numerics.moments import InputStats
from glmq.progress import PassPlan, StepPlan
from glmq.quantization.dry_run import TextLoad, plan_passes, trial_order, try_speed, usual_speed
from glmq.quantization.output import OutputPlan
from glmq.quantization.recipe import Recipe
from glmq.verification.int8_model import placed
from glmq.verification.trial import Load, guess_forward, time_of_token, try_forward

TRIED_BYTES: Final = 100 * 2**20
"""Of the float weights: a smaller model is done before a trial would be."""
USUAL_READING: Final = 1e9
"""Weights a second that one token goes through, on a small machine."""
NOTHING_SEEN: Final[Mapping[str, InputStats]] = {}


def is_large(source: Checkpoint) -> bool:
    """Whether one block is a small part of the run, so that it may be run once beforehand."""
    return sum(source.nbytes(name) for name in source) >= TRIED_BYTES


def forecast_calibration_passes(
    model: StreamedModel,
    samples: Sequence[Sample],
    preprocessor: Preprocessor,
    settings: Settings,
    plan: CalibrationPlan,
    generation: GenerationPlan | None,
) -> tuple[tuple[PassPlan, ...], Mapping[str, InputStats]]:
    """The passes of a calibration, and the statistics of some inputs over one sample; of a small model without a trial."""
    if is_large(model.source):
        trial = try_calibration(model, samples, preprocessor, settings, plan)
        steps, seen = trial.steps, trial.inputs
    else:
        steps, seen = guess_steps(model.config, plan), NOTHING_SEEN
    passes = (PassPlan("calibrate", steps),)
    if generation is None:
        return passes, seen
    return (PassPlan("generate", (StepPlan("answers", "other", generation.read_seconds),)), *passes), seen


def forecast_weight_passes(
    source: Checkpoint,
    config: ModelConfig,
    recipe: Recipe,
    plan: OutputPlan,
    seen: Statistics | Mapping[str, InputStats],
    load: TextLoad,
    *,
    measures: bool,
    reports: bool,
) -> tuple[PassPlan, ...]:
    """The passes of a quantization over the weights.

    Args:
        seen: the statistics, or those of a few inputs over one sample, to try one group with.
        load: of the statistics.
        measures: every group is quantized once before, to see which stay float.
        reports: each quantized linear is compared with its float original.
    """
    speed = usual_speed(recipe, load)
    if is_large(source):
        quantized = sorted((g.group for g in plan.groups.values() if g.is_quantized), key=trial_order)
        if isinstance(seen, Statistics):
            seen = {quantized[0].site: seen.input(quantized[0].site)}
        if any(group.site in seen for group in quantized):
            speed = try_speed(source, seen, recipe, plan, load, reports=reports)
    return plan_passes(source, config, recipe, plan, speed, measures=measures)


def forecast_forward(model: StreamedModel, load: Load) -> tuple[StepPlan, ...]:
    """The blocks that cases go through, each with the seconds that it is expected to take; of a small model without a trial."""
    return try_forward(model, load) if is_large(model.source) else guess_forward(model.config, load)


def forecast_token(model: StreamedModel) -> float:
    """Seconds that one token of an answer is expected to take where the whole model lies in memory."""
    config, layer = model.config, model.config.family.text_block(model.config, 0)
    if not is_large(model.source):
        return (
            config.layers * sum(one.rows * one.cols for group in layer.groups for one in group.linears) / USUAL_READING
        )
    with placed(model, layer.name):
        return config.layers * time_of_token(model, layer.name)
