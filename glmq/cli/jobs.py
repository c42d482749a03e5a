"""Calibrate and quantize as the commands run them: check everything, then the engines under a progress bar."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import torch

from glmq.calibrate.samples import WANTED_IMAGES, Sample, default_images, list_images, read_samples
from glmq.calibrate.stats import Settings, Statistics, StatsWriter, expected_bytes
from glmq.calibrate.stream import calibrate_checkpoint
from glmq.checkpoint.folder import OutputFolder, check_target
from glmq.checkpoint.json_file import JsonObject
from glmq.checkpoint.reader import Checkpoint
from glmq.checkpoint.writer import check_room
from glmq.cli.render import BlockProgress, stderr
from glmq.device import default_compute_dtype, resolve
from glmq.errors import UsageError
from glmq.model.blocks import StreamedModel
from glmq.model.config import ModelConfig, read_config
from glmq.model.inputs import DEFAULT_PROMPT, Preprocessor
from glmq.quantize.recipe import Options, Recipe, count_matches, make_recipe, plan_groups
from glmq.quantize.report import report_document, write_report
from glmq.quantize.stream import (
    OutputPlan,
    PartBytes,
    bytes_by_part,
    check_source,
    plan_output,
    quantize_checkpoint,
)
from glmq.records import LinearReport


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Where samples come from and how they are run."""

    images: Path | None = None
    samples_file: Path | None = None
    prompt: str = DEFAULT_PROMPT
    limit: int | None = None
    max_pixels: int | None = None
    skip_bad: bool = False
    wide_moments: bool = False
    device_type: str = "cpu"
    compute_dtype: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class QuantizationResult:
    """What `glmq quantize` shows at its end."""

    folder: Path
    recipe: Recipe
    reports: tuple[LinearReport, ...]
    parts: tuple[PartBytes, ...]
    document: JsonObject


def calibrate_folder(
    model_path: Path, stats_path: Path, options: CalibrationOptions, *, overwrite: bool, quiet: bool
) -> Statistics:
    """Run `glmq calibrate`: write the statistics folder and open it."""
    check_target(stats_path, overwrite=overwrite)
    config = read_config(model_path)
    with Checkpoint.open(model_path) as source:
        samples = load_samples(options, quiet=quiet)
        with OutputFolder(stats_path, overwrite=overwrite) as folder:
            _calibrate(source, config, samples, options, folder.path, quiet=quiet)
            folder.finish()
    return Statistics.open(stats_path)


def quantize_folder(
    model_path: Path,
    out_path: Path,
    options: Options,
    calibration: CalibrationOptions,
    *,
    stats_path: Path | None,
    shard_bytes: int | None,
    overwrite: bool,
    quiet: bool,
) -> QuantizationResult:
    """Run `glmq quantize`: everything that can be refused is refused before the first weight is read."""
    recipe = make_recipe(options)
    if out_path.resolve() == model_path.resolve():
        raise UsageError(f"{out_path}: is the folder of the float weights; choose another --save_directory")
    check_target(out_path, overwrite=overwrite)
    config = read_config(model_path)
    with Checkpoint.open(model_path) as source:
        groups = plan_groups(recipe, config)
        plan = plan_output(source, config, recipe, groups, shard_bytes)
        _say_patterns(recipe, config, quiet=quiet)
        check_room(out_path, plan.shards.nbytes)
        with _statistics(source, config, calibration, stats_path, out_path, quiet=quiet) as statistics:
            return _quantize(source, config, recipe, plan, statistics, out_path, overwrite=overwrite, quiet=quiet)


def load_samples(options: CalibrationOptions, *, quiet: bool) -> tuple[Sample, ...]:
    """The calibration samples that the options name: images first, then the lines of the samples file."""
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
    return samples


@contextmanager
def _statistics(
    source: Checkpoint,
    config: ModelConfig,
    options: CalibrationOptions,
    stats_path: Path | None,
    out_path: Path,
    *,
    quiet: bool,
) -> Iterator[Statistics]:
    """The statistics to quantize with: the given folder's, or fresh ones, kept if a folder was named."""
    if stats_path is not None and stats_path.exists() and any(stats_path.iterdir()):
        statistics = Statistics.open(stats_path)
        statistics.check_model(source.fingerprint())
        yield statistics
        return
    samples = load_samples(options, quiet=quiet)
    if stats_path is not None:
        with OutputFolder(stats_path, overwrite=False) as folder:
            _calibrate(source, config, samples, options, folder.path, quiet=quiet)
            folder.finish()
        yield Statistics.open(stats_path)
        return
    out_path.absolute().parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, where there is room for gigabytes; /tmp is often small.
    temporary = Path(mkdtemp(prefix=f".{out_path.name}.statistics-", dir=out_path.absolute().parent))
    try:
        _calibrate(source, config, samples, options, temporary, quiet=quiet)
        yield Statistics.open(temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _calibrate(
    source: Checkpoint,
    config: ModelConfig,
    samples: tuple[Sample, ...],
    options: CalibrationOptions,
    folder: Path,
    *,
    quiet: bool,
) -> None:
    check_source(source, config)
    check_room(folder, expected_bytes(config, wide_moments=options.wide_moments))
    device = resolve(options.device_type)
    dtype = compute_dtype(options.compute_dtype, device)
    settings = Settings(str(dtype).removeprefix("torch."), options.max_pixels, options.wide_moments)
    preprocessor = Preprocessor(
        source.directory, config, max_pixels=options.max_pixels, trust_remote_code=options.trust_remote_code
    )
    model = StreamedModel(source, config, device=device, dtype=dtype)
    sink = StatsWriter(folder, source.fingerprint(), samples, settings)
    with BlockProgress("calibrate", quiet=quiet) as progress:
        for done in calibrate_checkpoint(model, samples, preprocessor, sink, settings):
            progress.advance(done)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype that --compute-dtype names."""
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return default_compute_dtype(device) if name == "auto" else known[name]


def _quantize(
    source: Checkpoint,
    config: ModelConfig,
    recipe: Recipe,
    plan: OutputPlan,
    statistics: Statistics,
    out_path: Path,
    *,
    overwrite: bool,
    quiet: bool,
) -> QuantizationResult:
    reports: list[LinearReport] = []
    with OutputFolder(out_path, overwrite=overwrite) as folder:
        with BlockProgress("quantize", quiet=quiet) as progress:
            for block in quantize_checkpoint(source, config, statistics, recipe, plan, folder.path):
                reports += block.reports
                progress.advance(block.done)
        parts = bytes_by_part(source, plan.shards)
        document = report_document(reports, parts, recipe, statistics.samples_digest)
        write_report(folder.path, document, reports)
        folder.finish()
    return QuantizationResult(out_path, recipe, tuple(reports), tuple(parts), document)


def _say_patterns(recipe: Recipe, config: ModelConfig, *, quiet: bool) -> None:
    if not quiet:
        for pattern in recipe.keep_float:
            stderr.print(f"--keep-float {pattern!r} matches {count_matches(pattern, config)} linears", soft_wrap=True)
