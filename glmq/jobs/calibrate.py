"""What `glmq calibrate` runs, and the first step of `glmq quantize`: samples -> statistics folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Final

import torch

from glmq import __version__
from glmq.calibration.convergence import assess
from glmq.calibration.dry_run import CalibrationPlan, estimate_seconds, plan_calibration
from glmq.calibration.generate import generate_answers, plan_generation, with_answers
from glmq.calibration.samples import (
    WANTED_IMAGES,
    Sample,
    builtin_texts,
    default_images,
    digest,
    list_images,
    read_samples,
)
from glmq.calibration.stats import Settings, Statistics, StatsWriter
from glmq.calibration.stream import calibrate_checkpoint
from glmq.checkpoint.disk import check_room
from glmq.checkpoint.folder import OutputFolder, check_apart, check_output
from glmq.checkpoint.journal import Journal
from glmq.checkpoint.reader import Checkpoint
from glmq.cli.render import BlockProgress, describe_convergence, describe_generation, stderr
from glmq.device import default_compute_dtype, resolve
from glmq.errors import UsageError
from glmq.jobs.shared_folder import SharedFolder
from glmq.model.config import ModelConfig, read_config
from glmq.model.inputs import DEFAULT_PROMPT, Preprocessor
from glmq.model.source import check_source
from glmq.model.streamed import StreamedModel
from glmq.ranks import Place, Ranks, read_place
from glmq.records import PassTime

COMPUTE_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Where samples come from and how they are run."""

    images: Path | None = None
    samples_file: Path | None = None
    texts: bool = True
    """Add the texts that come with glmq."""
    prompt: str = DEFAULT_PROMPT
    limit: int | None = None
    generate: int | None = None
    """Most tokens that the model answers itself to a sample without an answer."""
    max_pixels: int | None = None
    skip_bad: bool = False
    wide_moments: bool = False
    device_type: str = "cpu"
    compute_dtype: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """What `glmq calibrate` shows at its end."""

    statistics: Statistics
    times: tuple[PassTime, ...]


def calibrate_folder(
    model_path: Path, stats_path: Path, options: CalibrationOptions, *, overwrite: bool, resume: bool, quiet: bool
) -> CalibrationResult | None:
    """Run `glmq calibrate`: write the statistics folder and open it; None on the ranks above 0 of torchrun."""
    times: list[PassTime] = []
    place = read_place()
    quiet = quiet or not place.is_first
    check_apart(stats_path, "--stats", {"the float weights": model_path, **sources_of(options)})
    check_output(stats_path, overwrite=overwrite, resume=resume)
    config = read_config(model_path)
    with Checkpoint.open(model_path) as source:
        check_source(source, config)
        work = Calibration.prepare(source, config, options, place, quiet=quiet)
        output = OutputFolder(stats_path, overwrite=overwrite, resume=resume)
        with Ranks(place) as ranks, SharedFolder(output, ranks) as folder:
            run_calibration(work, folder.path, ranks, times, quiet=quiet)
            folder.finish()
    statistics = Statistics.open(stats_path)
    say_settled(statistics, quiet=quiet)
    return CalibrationResult(statistics, tuple(times)) if place.is_first else None


def plan_calibration_folder(
    model_path: Path, stats_path: Path, options: CalibrationOptions, *, overwrite: bool
) -> tuple[CalibrationPlan, float]:
    """Run `glmq calibrate --dry-run`: the plan, and seconds that the run would take. Touches nothing."""
    if read_place().world > 1:
        raise UsageError("--dry-run: needs no torchrun, one process plans for all; run `glmq calibrate` itself")
    check_apart(stats_path, "--stats", {"the float weights": model_path, **sources_of(options)})
    check_output(stats_path, overwrite=overwrite, resume=True)
    config = read_config(model_path)
    with Checkpoint.open(model_path) as source:
        check_source(source, config)
        work = Calibration.prepare(source, config, options, Place(0, 1), quiet=True)
        return work.plan, work.seconds()


@dataclass(frozen=True, slots=True)
class Calibration:
    """Everything that a calibration needs, checked, before its first block."""

    model: StreamedModel
    samples: tuple[Sample, ...]
    preprocessor: Preprocessor
    settings: Settings
    plan: CalibrationPlan

    @classmethod
    def prepare(
        cls, source: Checkpoint, config: ModelConfig, options: CalibrationOptions, place: Place, *, quiet: bool
    ) -> Calibration:
        samples = load_samples(options, quiet=quiet)
        device = resolve(options.device_type, local_rank=place.local_rank, world=place.world)
        settings = settings_of(options, device)
        dtype: torch.dtype = getattr(torch, settings.compute_dtype)
        preprocessor = Preprocessor(
            source.directory, config, max_pixels=options.max_pixels, trust_remote_code=options.trust_remote_code
        )
        plan = plan_calibration(
            config, source.fingerprint(), samples, preprocessor, settings, element_bytes=dtype.itemsize
        )
        model = StreamedModel(source, config, device=device, dtype=dtype)
        return cls(model, samples, preprocessor, settings, plan)

    def seconds(self) -> float:
        """About how long it takes: one sample is run through one block of each tower; and reading weights for answers."""
        seconds = estimate_seconds(self.model, self.samples, self.preprocessor, self.settings)
        if self.settings.generate is None:
            return seconds
        plan = plan_generation(self.model, self.samples, self.preprocessor, self.settings.generate)
        return seconds + plan.read_seconds

    def answered(self, journal: Journal, ranks: Ranks, times: list[PassTime], *, quiet: bool) -> Calibration:
        """The same with the model's own answers to samples that have none, where they are asked for."""
        if self.settings.generate is None:
            return self
        model, samples, preprocessor = self.model, self.samples, self.preprocessor
        plan = plan_generation(model, samples, preprocessor, self.settings.generate)
        if not quiet:
            stderr.print(describe_generation(plan), soft_wrap=True)
        with BlockProgress("generate", unit="tokens", quiet=quiet) as progress:
            for done in generate_answers(model, samples, preprocessor, plan, journal, ranks):
                progress.advance(done)
        times.append(progress.time())
        return replace(self, samples=with_answers(samples, journal))


def run_calibration(work: Calibration, folder: Path, ranks: Ranks, times: list[PassTime], *, quiet: bool) -> None:
    settings, fingerprint = work.settings, work.model.source.fingerprint()
    journal = Journal(
        folder,
        {
            "model": fingerprint,
            "samples": digest(work.samples, settings.generate),
            "compute dtype": settings.compute_dtype,
            "max pixels": str(settings.max_pixels),
            "wide moments": str(settings.wide_moments),
            **machine_settings(),
        },
        writes=ranks.place.is_first,
    )
    if not journal.finished:
        check_room(folder, work.plan.output_bytes + work.plan.work_bytes)
    work = work.answered(journal, ranks, times, quiet=quiet)
    sink = StatsWriter(folder, fingerprint, work.samples, settings)
    with BlockProgress("calibrate", quiet=quiet) as progress:
        for done in calibrate_checkpoint(
            work.model, work.samples, work.preprocessor, sink, settings, journal, folder, ranks
        ):
            progress.advance(done)
    times.append(progress.time())
    journal.remove()


def load_samples(options: CalibrationOptions, *, quiet: bool) -> tuple[Sample, ...]:
    """The calibration samples that the options name: images, the lines of the samples file, built-in texts."""
    samples: tuple[Sample, ...] = ()
    if options.images is not None or options.samples_file is None:
        found = list_images(
            options.images or default_images(), options.prompt, skip_bad=options.skip_bad, limit=options.limit
        )
        samples = found.samples
        if found.rejected and not quiet:
            for rejected in found.rejected:
                stderr.print(f"left out {rejected.path.name}: {rejected.reason}", soft_wrap=True)
            stderr.print(f"{len(found.rejected)} files left out, {len(samples)} images used")
        if len(samples) < WANTED_IMAGES and not quiet:
            stderr.print(f"note: {len(samples)} calibration images; {WANTED_IMAGES} are wanted for accuracy")
    if options.samples_file is not None:
        samples += read_samples(options.samples_file, limit=options.limit).samples
    return samples + builtin_texts() if options.texts else samples


def sources_of(options: CalibrationOptions) -> dict[str, Path | None]:
    """Where calibration samples come from."""
    return {"the calibration images": options.images, "the calibration samples": options.samples_file}


def settings_of(options: CalibrationOptions, device: torch.device) -> Settings:
    dtype = compute_dtype(options.compute_dtype, device)
    return Settings(dtype_name(dtype), options.max_pixels, options.wide_moments, options.generate)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype that --compute-dtype names."""
    return default_compute_dtype(device) if name == "auto" else COMPUTE_DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def machine_settings() -> dict[str, str]:
    """What the last bits of a float32 product depend on, beside its inputs."""
    return {
        "glmq": __version__,
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "threads": str(torch.get_num_threads()),
    }


def say_settled(statistics: Statistics, *, quiet: bool) -> None:
    """Whether the samples were enough."""
    if not quiet:
        unanswered = sum(not sample.has_answer for sample in statistics.samples())
        for line in describe_convergence(assess(statistics.settled()), unanswered=unanswered):
            stderr.print(line, soft_wrap=True)
