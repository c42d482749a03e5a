"""Calibrate: samples and a float checkpoint -> a folder of statistics. Also the first step of `quantize`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, overload

import torch

from glmq.calibration.dry_run import CalibrationPlan, plan_calibration, try_calibration
from glmq.calibration.generate import GenerationPlan, generate_answers, plan_generation, with_answers
from glmq.calibration.pictures import PictureRules
from glmq.calibration.resume import CalibrationJournal
from glmq.calibration.samples import Sample, builtin_texts, default_images, digest, list_images, read_samples
from glmq.calibration.stats import Settings, Statistics
from glmq.calibration.stats_writer import StatsWriter
from glmq.calibration.stream import calibrate_checkpoint
from glmq.checkpoint.disk import check_file_size, check_room
from glmq.checkpoint.folder import OutputFolder, check_apart
from glmq.checkpoint.reader import Checkpoint
from glmq.checkpoint.run_note import RunNote
from glmq.checkpoint.workplace import check_output, foreseen
from glmq.device import resolve
from glmq.errors import LaunchError, UsageError
from glmq.jobs.calibration_options import CalibrationOptions
from glmq.jobs.forecast import forecast_calibration_passes
from glmq.jobs.joined_ranks import join_ranks
from glmq.jobs.notes import describe_few, describe_findings, describe_generation, describe_large_pictures
from glmq.jobs.run_log import run_log
from glmq.jobs.settings import calibration_settings, compute_dtype, dtype_name, machine_settings
from glmq.jobs.settled import Settled, assess_settled
from glmq.jobs.shared_folder import SharedFolder
from glmq.jobs.watcher import Watcher
from glmq.model.config import FAMILY, ModelConfig
from glmq.model.inputs import Preprocessor
from glmq.model.source import SourceOptions, open_source
from glmq.model.streamed import StreamedModel
from glmq.numerics.moments import InputStats
from glmq.progress import PassPlan, Watch
from glmq.ranks import Place, Ranks, read_place
from glmq.records import PassTime
from glmq.values import to_path


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """What calibrating gave; the same on every rank."""

    folder: Path
    """Where the statistics lie."""
    statistics: Statistics
    times: tuple[PassTime, ...]
    """Of each pass over the model, on rank 0."""
    settled: Settled
    seconds: float
    """Of the whole run, on rank 0."""


@dataclass(frozen=True, slots=True)
class CalibrationForecast:
    """What calibrating would do, need and take."""

    plan: CalibrationPlan
    seconds: float
    """Estimated, from one sample through one block of each tower."""
    obstacles: tuple[str, ...] = ()
    """What lies where the output would, and stops a real run: a sentence each."""


@overload
def calibrate(
    model: str | Path,
    *,
    out: str | Path,
    images: str | Path | None = ...,
    options: CalibrationOptions = ...,
    overwrite: bool = ...,
    resume: bool = ...,
    dry_run: Literal[False] = ...,
    watch: Watch | None = ...,
) -> CalibrationResult: ...
@overload
def calibrate(
    model: str | Path,
    *,
    out: str | Path,
    images: str | Path | None = ...,
    options: CalibrationOptions = ...,
    overwrite: bool = ...,
    resume: bool = ...,
    dry_run: Literal[True],
    watch: Watch | None = ...,
) -> CalibrationForecast: ...
@overload
def calibrate(
    model: str | Path,
    *,
    out: str | Path,
    images: str | Path | None = ...,
    options: CalibrationOptions = ...,
    overwrite: bool = ...,
    resume: bool = ...,
    dry_run: bool,
    watch: Watch | None = ...,
) -> CalibrationResult | CalibrationForecast: ...
def calibrate(
    model: str | Path,
    *,
    out: str | Path,
    images: str | Path | None = None,
    options: CalibrationOptions = CalibrationOptions(),
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    watch: Watch | None = None,
) -> CalibrationResult | CalibrationForecast:
    """Run calibration samples through the float model, one block in memory at a time, and write their statistics.

    >>> import glmq
    >>> stats = glmq.calibrate("GLM-4.1V", images="photos", out="stats")
    >>> len(stats.statistics.samples())
    10

    Args:
        model: folder of the float weights.
        out: folder to write the statistics into.
        images: folder of pictures; the same as `options.images`.
        options: the samples, the device, the dtype.
        overwrite: replace what lies in `out`, once the statistics are whole.
        resume: go on after the last finished block of an interrupted run.
        dry_run: only say what it would do; nothing is written.
        watch: is called with the events of the run.

    Returns:
        The statistics, or with `dry_run` the forecast.

    Raises:
        UsageError: options that contradict each other, or an output folder that may not be written.
        InputError: a model or a sample that cannot be used.
        ResourceError: no disk, memory or device.
    """
    if images is not None and options.images is not None:
        raise UsageError("images with options.images: they name the same folder; give one of them")
    if images is not None:
        options = replace(options, images=to_path(images))
    if dry_run:
        return forecast_calibration(to_path(model), to_path(out), options, overwrite=overwrite, watch=watch)
    return run_calibration(to_path(model), to_path(out), options, overwrite=overwrite, resume=resume, watch=watch)


def run_calibration(
    model_path: Path,
    stats_path: Path,
    options: CalibrationOptions,
    *,
    overwrite: bool,
    resume: bool,
    watch: Watch | None,
    command: str = "",
) -> CalibrationResult:
    """As `calibrate`, on one rank of all; `command` is what resumes it, for whom finds it interrupted."""
    place = read_place()
    watcher = Watcher(watch if place.is_first else None)
    check_apart(stats_path, "--stats", {"the float weights": model_path, **sources_of(options)})
    check_output(stats_path, overwrite=overwrite, resume=resume, work_dir=options.work_dir)
    opened = open_source(model_path, SourceOptions(options.dequantize))
    with opened.checkpoint as source:
        for sentence in opened.notes:
            watcher.note(f"note: {sentence}")
        work = Calibration.prepare(source, opened.config, options, place, watcher)
        if watcher.is_watched:
            watcher.plan(work.forecast()[0])
        run = RunNote("calibrate", command, {"--model_path": str(model_path), **options.chosen()})
        output = OutputFolder(stats_path, overwrite=overwrite, resume=resume, work_dir=options.work_dir, run=run)
        given = {"model": model_path, "out": stats_path, "options": options, "overwrite": overwrite, "resume": resume}
        with join_ranks(place, given) as ranks, SharedFolder(output, ranks) as folder:
            with run_log(folder.work, stats_path, options, ranks, watcher):
                write_statistics(work, folder, ranks, watcher, run)
            times = watcher.times(ranks)
            folder.finish()
            seconds = watcher.seconds(ranks)
    statistics = Statistics.open(stats_path)
    return CalibrationResult(stats_path, statistics, times, assess_settled(statistics), seconds)


def forecast_calibration(
    model_path: Path, stats_path: Path, options: CalibrationOptions, *, overwrite: bool, watch: Watch | None
) -> CalibrationForecast:
    """As `calibrate` with `dry_run`."""
    if read_place().world > 1:
        raise LaunchError("--dry-run: needs no torchrun, one process plans for all; run `glmq calibrate` itself")
    obstacles: list[str] = []
    with foreseen(obstacles):
        check_apart(stats_path, "--stats", {"the float weights": model_path, **sources_of(options)})
        check_output(stats_path, overwrite=overwrite, resume=True, work_dir=options.work_dir)
    watcher = Watcher(watch)
    opened = open_source(model_path, SourceOptions(options.dequantize))
    with opened.checkpoint as source:
        for sentence in opened.notes:
            watcher.note(f"note: {sentence}")
        work = Calibration.prepare(source, opened.config, options, Place(0, 1), watcher)
        with foreseen(obstacles):
            check_room(stats_path, work.plan.output_bytes + work.plan.work_bytes)
        return CalibrationForecast(work.plan, work.seconds(), tuple(obstacles))


@dataclass(frozen=True, slots=True)
class Calibration:
    """Everything that a calibration needs, checked, before its first block."""

    model: StreamedModel
    samples: tuple[Sample, ...]
    preprocessor: Preprocessor
    settings: Settings
    plan: CalibrationPlan
    generation: GenerationPlan | None
    """How samples without an answer get one; None: they stay as they are."""

    @classmethod
    def prepare(
        cls, source: Checkpoint, config: ModelConfig, options: CalibrationOptions, place: Place, watcher: Watcher
    ) -> Calibration:
        samples = load_samples(options, watcher)
        device = resolve(options.device_type, local_rank=place.local_rank, world=place.world)
        settings = settings_of(options, device)
        dtype = settings.dtype
        preprocessor = Preprocessor(
            source.directory,
            config,
            max_pixels=options.max_pixels,
            trust_remote_code=options.trust_remote_code,
            chat_template=options.chat_template,
        )
        plan = plan_calibration(
            config,
            source,
            samples,
            preprocessor,
            settings,
            element_bytes=dtype.itemsize,
            read=watcher.counter(f"of {len(samples)} samples brought into tokens and patches"),
        )
        for line in describe_large_pictures(plan.patches, config.patch_size):
            watcher.note(line)
        model, most = StreamedModel(source, config, device=device, dtype=dtype), settings.generate
        generation = None if most is None else plan_generation(model, samples, preprocessor, most)
        return cls(model, samples, preprocessor, settings, plan, generation)

    def seconds(self) -> float:
        """About how long it takes: one sample is run through one block of each tower; and reading weights for answers."""
        trial = try_calibration(self.model, self.samples, self.preprocessor, self.settings, self.plan)
        seconds = sum(step.seconds for step in trial.steps)
        return seconds if self.generation is None else seconds + self.generation.read_seconds

    def forecast(self) -> tuple[tuple[PassPlan, ...], Mapping[str, InputStats]]:
        """The passes with the time that each block is expected to take, and statistics of some inputs over one sample."""
        return forecast_calibration_passes(
            self.model, self.samples, self.preprocessor, self.settings, self.plan, self.generation
        )

    def answered(self, journal: CalibrationJournal, ranks: Ranks, watcher: Watcher) -> Calibration:
        """The same with the model's own answers to samples that have none, where they are asked for."""
        plan, model, samples, preprocessor = self.generation, self.model, self.samples, self.preprocessor
        if plan is None:
            return self
        watcher.note(describe_generation(plan))
        with watcher.blocks("generate", len(plan.rounds) * plan.max_tokens, "tokens") as advance:
            for done in generate_answers(model, samples, preprocessor, plan, journal, ranks):
                advance(done)
        return replace(self, samples=with_answers(samples, plan, journal))


def write_statistics(work: Calibration, folder: SharedFolder, ranks: Ranks, watcher: Watcher, run: RunNote) -> None:
    """Calibrate into `folder`, block by block."""
    settings, fingerprint = work.settings, work.model.source.fingerprint()
    journal = CalibrationJournal(
        folder.work,
        folder.path,
        {
            "model": fingerprint,
            **calibration_settings(digest(work.samples, settings.generate), settings),
            "--device-type": work.model.device.type,
            **machine_settings(),
        },
        work.model.source,
        work.model.config.family,
        ranks,
        run.options,
    )
    if journal.note:
        watcher.note(f"note: {journal.note}")
    if not journal.is_resumed:
        check_room(folder.work, work.plan.output_bytes + work.plan.work_bytes)
        check_file_size(folder.path, max(size for _, size in work.plan.files))
    work = work.answered(journal, ranks, watcher)
    sink = StatsWriter(folder.path, fingerprint, work.samples, settings)
    model, config = work.model, work.model.config
    with watcher.blocks("calibrate", len(config.family.blocks(config)), finished=len(journal.finished)) as advance:
        for done in calibrate_checkpoint(
            model, work.samples, work.preprocessor, sink, settings, journal, ranks, watcher.step
        ):
            advance(done)


def load_samples(options: CalibrationOptions, watcher: Watcher) -> tuple[Sample, ...]:
    """The calibration samples that the options name: images, the lines of the samples file, built-in texts."""
    samples: tuple[Sample, ...] = ()
    rules = PictureRules(FAMILY, shrinks=options.max_pixels is not None)
    if options.images is not None or options.samples_file is None:
        found = list_images(
            options.images or default_images(),
            options.prompt,
            skip_bad=options.skip_bad,
            limit=options.limit,
            recursive=options.recursive,
            rules=rules,
            read=watcher.counter("pictures of the folder read"),
        )
        samples = found.samples
        for line in (*describe_findings(found, "images"), *describe_few(len(samples))):
            watcher.note(line)
    if options.samples_file is not None:
        found = read_samples(
            options.samples_file,
            limit=options.limit,
            skip_bad=options.skip_bad,
            rules=rules,
            read=watcher.counter("samples of the file read"),
        )
        samples += found.samples
        for line in describe_findings(found, "samples"):
            watcher.note(line)
    return samples + builtin_texts() if options.texts else samples


def sources_of(options: CalibrationOptions) -> dict[str, Path | None]:
    """Where calibration samples come from."""
    return {"the calibration images": options.images, "the calibration samples": options.samples_file}


def settings_of(options: CalibrationOptions, device: torch.device) -> Settings:
    dtype = compute_dtype(options.compute_dtype, device)
    return Settings(dtype_name(dtype), options.max_pixels, options.wide_moments, options.generate, options.text_inputs)
