"""Quantize: a float checkpoint, its statistics and a recipe -> a quantized checkpoint with its report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, overload

from glmq.calibration.stats import Statistics
from glmq.checkpoint.checksums import read_checksums
from glmq.checkpoint.disk import check_file_size, check_room
from glmq.checkpoint.folder import OutputFolder, check_apart, tidy_up
from glmq.checkpoint.journal import Journal
from glmq.checkpoint.json_file import JsonObject
from glmq.checkpoint.reader import Checkpoint
from glmq.checkpoint.run_note import RunNote
from glmq.checkpoint.sidecar import list_side_files
from glmq.checkpoint.workplace import STATISTICS, Workplace, check_output, foreseen, stored_bytes
from glmq.engines import Chip, Engine
from glmq.errors import LaunchError, UsageError
from glmq.jobs.calibrate import Calibration, CalibrationResult, sources_of, write_statistics
from glmq.jobs.calibration_options import CalibrationOptions
from glmq.jobs.forecast import forecast_weight_passes
from glmq.jobs.given_statistics import open_statistics, reopen_statistics
from glmq.jobs.joined_ranks import join_ranks
from glmq.jobs.measured import deal_bits, fall_back
from glmq.jobs.notes import describe_large_weights, describe_recipe
from glmq.jobs.propagated import open_propagation
from glmq.jobs.quantization_job import QuantizationJob
from glmq.jobs.run_log import run_log
from glmq.jobs.run_report import calibration_facts, describe, run_facts
from glmq.jobs.settings import machine_settings
from glmq.jobs.settled import Settled, assess_settled
from glmq.jobs.shared_folder import SharedFolder
from glmq.jobs.watcher import Watcher
from glmq.model.config import ModelConfig
from glmq.model.side_files import check_needed_files, engine_side_files
from glmq.model.source import SourceOptions, open_source
from glmq.numerics import gptq
from glmq.numerics.rate import RateCurve
from glmq.progress import Watch
from glmq.quantization.bits import settle_allocation
from glmq.quantization.dry_run import CalibrationNeeds, RunPlan, TextLoad, make_run_plan
from glmq.quantization.fallback import check_topk
from glmq.quantization.fold import RowFolds
from glmq.quantization.output import AreaBytes, OutputPlan, bytes_by_area, plan_output
from glmq.quantization.passes import QuantizationRun
from glmq.quantization.plan import loading_engines, plan_groups
from glmq.quantization.recipe import Recipe
from glmq.quantization.report import Report, kept_float
from glmq.quantization.stream import quantize_checkpoint
from glmq.ranks import Place, Ranks, read_place
from glmq.records import LinearReport, PassTime
from glmq.spec import ASCEND_FORMS, FloatDtype
from glmq.values import to_path


@dataclass(frozen=True, slots=True)
class QuantizationResult:
    """What quantizing gave; the same on every rank."""

    folder: Path
    recipe: Recipe
    reports: tuple[LinearReport, ...]
    """The error table; empty where none was asked for."""
    areas: tuple[AreaBytes, ...]
    engines: Mapping[Engine, tuple[Chip, ...]]
    """Those that load it, by the engines' table, each with the chips on which it does; with a target that one alone."""
    document: JsonObject
    """As glmq_report.json holds it; without `linears` where none was asked for."""
    times: tuple[PassTime, ...]
    """Of each pass over the model, on rank 0."""
    settled: Settled
    """Of the statistics."""
    curves: tuple[RateCurve, ...]
    """What each sparse linear loses at how many bits, where that was measured."""
    seconds: float
    """Of the whole run, on rank 0."""


@overload
def quantize(
    model: str | Path,
    stats: str | Path | CalibrationResult | None = ...,
    *,
    out: str | Path,
    recipe: Recipe | None = ...,
    overwrite: bool = ...,
    resume: bool = ...,
    dry_run: Literal[False] = ...,
    watch: Watch | None = ...,
) -> QuantizationResult: ...
@overload
def quantize(
    model: str | Path,
    stats: str | Path | CalibrationResult | None = ...,
    *,
    out: str | Path,
    recipe: Recipe | None = ...,
    overwrite: bool = ...,
    resume: bool = ...,
    dry_run: Literal[True],
    watch: Watch | None = ...,
) -> RunPlan: ...
@overload
def quantize(
    model: str | Path,
    stats: str | Path | CalibrationResult | None = ...,
    *,
    out: str | Path,
    recipe: Recipe | None = ...,
    overwrite: bool = ...,
    resume: bool = ...,
    dry_run: bool,
    watch: Watch | None = ...,
) -> QuantizationResult | RunPlan: ...
def quantize(
    model: str | Path,
    stats: str | Path | CalibrationResult | None = None,
    *,
    out: str | Path,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    watch: Watch | None = None,
) -> QuantizationResult | RunPlan:
    """Quantize a float checkpoint.

    >>> import glmq
    >>> result = glmq.quantize("GLM-4.1V", "stats", out="w8a8s", recipe=glmq.Recipe.w8a8s(sigma=3.0, dtype="fp16"))
    >>> result.recipe.quant_type.value
    'W8A8S'

    Args:
        model: folder of the float weights.
        stats: what `calibrate` gave, or its folder, which is written first if it does not exist; None takes statistics
            of the 30 pictures that come with glmq and keeps none.
        out: folder to write the quantized weights into.
        recipe: the quantization type and how to get there; None is W8A8 in bfloat16, for the Atlas 800I A2.
        overwrite: replace what lies in `out`, once the new weights are whole.
        resume: go on after the last finished block of an interrupted run.
        dry_run: only say what it would do; nothing is written.
        watch: is called with the events of the run.

    Returns:
        The error of every linear and where the weights lie, or with `dry_run` the plan.

    Raises:
        UsageError: options that contradict each other, or an output folder that may not be written.
        InputError: a model, a sample or statistics that cannot be used.
        ResourceError: no disk, memory or device.
    """
    stats_path = stats.folder if isinstance(stats, CalibrationResult) else None if stats is None else to_path(stats)
    recipe = recipe or Recipe.w8a8()
    options = CalibrationOptions(text_inputs=recipe.propagation > 0)
    job = QuantizationJob(to_path(model), to_path(out), recipe, options, stats_path)
    if dry_run:
        return forecast_quantization(job, overwrite=overwrite, watch=watch)
    return run_quantization(job, overwrite=overwrite, resume=resume, watch=watch)


def run_quantization(job: QuantizationJob, *, overwrite: bool, resume: bool, watch: Watch | None) -> QuantizationResult:
    """As `quantize`, on one rank of all. Everything that can be refused is refused before the first weight is read."""
    place = read_place()
    watcher = Watcher(watch if place.is_first else None)
    _check_places(job, overwrite=overwrite, resume=resume)
    with _planned(job, watcher) as (source, config, plan):
        check_room(job.out_path, plan.shards.nbytes - stored_bytes(job.out_path, job.work_dir))
        run = RunNote("quantize", job.command, job.chosen())
        output = OutputFolder(job.out_path, overwrite=overwrite, resume=resume, work_dir=job.work_dir, run=run)
        with (
            join_ranks(place, {"job": job, "overwrite": overwrite, "resume": resume}) as ranks,
            SharedFolder(output, ranks) as folder,
        ):
            with run_log(folder.work, job.out_path, job, ranks, watcher):
                statistics = _statistics(source, config, plan, job, folder, ranks, watcher, resume=resume)
                result = _write_weights(source, config, plan, statistics, job, folder, ranks, watcher)
            folder.finish()
            return replace(result, seconds=watcher.seconds(ranks))


def forecast_quantization(job: QuantizationJob, *, overwrite: bool, watch: Watch | None) -> RunPlan:
    """As `quantize` with `dry_run`: read config.json and headers, touch nothing."""
    if read_place().world > 1:
        raise LaunchError("--dry-run: needs no torchrun, one process plans for all; run `glmq quantize` itself")
    obstacles: list[str] = []
    with foreseen(obstacles):
        _check_places(job, overwrite=overwrite, resume=True)
    with _planned(job, Watcher(watch)) as (source, config, plan):
        found = _forecast(job, source, config, plan, watch)
        with foreseen(obstacles):
            wanted = found.output_bytes + found.work_bytes
            check_room(job.out_path, wanted - stored_bytes(job.out_path, job.work_dir))
        return replace(found, obstacles=tuple(obstacles))


def _forecast(
    job: QuantizationJob, source: Checkpoint, config: ModelConfig, plan: OutputPlan, watch: Watch | None
) -> RunPlan:
    if job.stats_path is not None and Workplace.of(job.stats_path).contents():
        statistics = open_statistics(source, job.calibration, job.stats_path, Watcher(watch))
        return make_run_plan(source, config, job.recipe, plan, statistics, measures=job.measures, reports=job.reports)
    work = Calibration.prepare(source, config, job.calibration, Place(0, 1), Watcher(watch))
    disk = work.plan.output_bytes + work.plan.work_bytes
    load = TextLoad.of(work.plan.samples, work.settings)
    needs = CalibrationNeeds(disk, work.plan.peak_bytes, work.seconds(), load)
    return make_run_plan(source, config, job.recipe, plan, needs, measures=job.measures, reports=job.reports)


def _check_places(job: QuantizationJob, *, overwrite: bool, resume: bool) -> None:
    """Refuse output folders that cannot be written, or hold what is read, and several ranks where one does the work."""
    if job.recipe.scheme.bias_correction and not job.reports:
        raise UsageError("--no-report: verify checks what --bias-correction did by the report; leave one of them out")
    if job.recipe.propagation and read_place().world > 1:
        raise LaunchError(
            "--propagation: each layer waits for the one before, so torchrun's processes cannot share them; run "
            "`glmq quantize` itself"
        )
    inputs = {"the float weights": job.model_path, **sources_of(job.calibration), "the statistics": job.stats_path}
    check_apart(job.out_path, "--save_directory", inputs)
    if job.stats_path is not None:
        check_apart(job.stats_path, "--stats", {"the float weights": job.model_path, **sources_of(job.calibration)})
    check_output(job.out_path, overwrite=overwrite, resume=resume, work_dir=job.work_dir)
    if job.stats_path is not None and not Workplace.of(job.stats_path).contents():
        check_output(job.stats_path, overwrite=False, resume=resume, work_dir=job.work_dir)


@contextmanager
def _planned(job: QuantizationJob, watcher: Watcher) -> Iterator[tuple[Checkpoint, ModelConfig, OutputPlan]]:
    """The open source and the plan of the whole output, from options, config.json and headers."""
    opened = open_source(job.model_path, SourceOptions(job.calibration.dequantize, job.keep_extra))
    config = opened.config
    with opened.checkpoint as source:
        for sentence in opened.notes:
            watcher.note(f"note: {sentence}")
        groups = plan_groups(job.recipe, config)
        check_topk(groups, job.fallback_topk)
        list_side_files(job.model_path)  # refuses what could not be copied at the end
        check_needed_files(job.model_path)
        template, for_mindie = job.calibration.chat_template, job.recipe.form in ASCEND_FORMS
        side_files = engine_side_files(job.model_path, config.family, for_mindie=for_mindie, chat_template=template)
        plan = plan_output(source, config, job.recipe, groups, job.shard_bytes, side_files)
        check_file_size(job.out_path, max(file.nbytes for file in plan.shards.files))
        for sentence in describe_recipe(job.recipe, groups.values(), config, job.out_path):
            watcher.note(sentence)
        yield source, config, plan


def _statistics(
    source: Checkpoint,
    config: ModelConfig,
    plan: OutputPlan,
    job: QuantizationJob,
    folder: SharedFolder,
    ranks: Ranks,
    watcher: Watcher,
    *,
    resume: bool,
) -> Statistics:
    """The statistics to quantize with: the given folder's, or fresh ones, kept if a folder was named."""
    options, stats_path = job.calibration, job.stats_path
    # Those that nobody named lie where there is room for gigabytes; /tmp is often small.
    place = stats_path or folder.work / STATISTICS
    if ranks.place.is_first and stats_path is not None:
        tidy_up(stats_path, job.work_dir)
    ranks.barrier()
    passes = partial(
        forecast_weight_passes, source, config, job.recipe, plan, measures=job.measures, reports=job.reports
    )
    if Workplace.of(place).contents():
        if stats_path is None:
            statistics = reopen_statistics(source, options, place, folder.work, job.chosen())
        else:
            statistics = open_statistics(source, options, stats_path, watcher)
        if watcher.is_watched:
            load = TextLoad.of(statistics.samples(), statistics.settings())
            watcher.plan(passes(statistics, load))
    else:
        work = Calibration.prepare(source, config, options, ranks.place, watcher)
        if watcher.is_watched:
            first, seen = work.forecast()
            load = TextLoad.of(work.plan.samples, work.settings)
            watcher.plan([*first, *passes(seen, load)])
        work_dir = job.work_dir if stats_path else None  # others grow in the work folder already
        run = RunNote("quantize", job.command, job.chosen())
        output = OutputFolder(place, overwrite=False, resume=resume, work_dir=work_dir, run=run)
        with SharedFolder(output, ranks) as own:
            write_statistics(work, own, ranks, watcher, run)
            own.finish()
        statistics = Statistics.open(place)
    source.contents = statistics.weights_wanted()
    return statistics


def _write_weights(
    source: Checkpoint,
    config: ModelConfig,
    plan: OutputPlan,
    statistics: Statistics,
    job: QuantizationJob,
    folder: SharedFolder,
    ranks: Ranks,
    watcher: Watcher,
) -> QuantizationResult:
    """Quantize into `folder`."""
    recipe = job.recipe
    settings = {
        "model": source.fingerprint(),
        "statistics": statistics.digest,
        **recipe.settings(),
        **job.settings(),
        "rounding": gptq.rounding_kernel(),
        **machine_settings(),
    }
    journal = Journal(folder.work, settings, writes=ranks.place.is_first, options=job.chosen())
    folds = RowFolds(source, statistics)
    work = QuantizationRun(source, config, folds, journal, ranks, step=watcher.step, reports=job.reports)
    propagation = open_propagation(work, recipe, plan, statistics, folder, job.calibration.device_type, watcher)
    recipe, note = settle_allocation(recipe, plan.groups, statistics)
    if note:
        watcher.note(note)
    bits, curves = deal_bits(work, recipe, plan, watcher, job.curves)
    if job.measures:
        recipe = fall_back(work, recipe, plan, bits, watcher, topk=job.fallback_topk, max_error=job.max_error)
        plan = plan_output(source, config, recipe, plan_groups(recipe, config), job.shard_bytes, plan.side_files)
        bits, _ = deal_bits(work, recipe, plan, watcher, curves)
    reports: list[LinearReport] = []
    blocks = [block.name for block in config.family.blocks(config)]
    with watcher.blocks("quantize", len(blocks) + 1, finished=sum(map(journal.has, blocks))) as advance:
        for block in quantize_checkpoint(work, recipe, plan, folder.path, bits=bits, propagation=propagation):
            reports += block.reports
            advance(block.done)
    if recipe.dtype is FloatDtype.FP16:
        for sentence in describe_large_weights(plan.linears, source.beyond_float16):
            watcher.note(sentence)
    table, areas = tuple(reports), tuple(bytes_by_area(source, plan.shards))
    engines = loading_engines(recipe, plan.groups.values())
    ranks.barrier()  # rank 0 has written the checksums
    times = watcher.times(ranks)
    checksums = read_checksums(folder.path).tensors_digest
    kept = kept_float(plan.groups, recipe, job.recipe)
    run = run_facts(job.model_path, job.stats_path, job.out_path, times)
    report = Report(recipe, table, areas, kept, checksums, calibration_facts(statistics), run, engines)
    document = describe(report, folder.path if job.reports else None, ranks)
    settled = assess_settled(statistics, plan.linears.values())
    return QuantizationResult(job.out_path, recipe, table, areas, engines, document, times, settled, curves, 0.0)
