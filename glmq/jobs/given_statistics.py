"""Statistics that a quantization has not made: those of --stats and of an interrupted run, held to what the command asks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from glmq.calibration.samples import digest
from glmq.calibration.stats import Statistics
from glmq.checkpoint.journal import changed_error
from glmq.checkpoint.reader import Checkpoint
from glmq.device import resolve
from glmq.jobs.calibrate import load_samples, settings_of
from glmq.jobs.calibration_options import CalibrationOptions
from glmq.jobs.settings import COMPUTE_DTYPES, calibration_settings, dtype_name
from glmq.jobs.watcher import Watcher


def reopen_statistics(
    source: Checkpoint, options: CalibrationOptions, folder: Path, work: Path, chosen: Mapping[str, str]
) -> Statistics:
    """The statistics that an interrupted run has finished, if this run would calibrate as that one did.

    Args:
        source: the float weights.
        options: of this run.
        folder: with the statistics.
        work: the work folder of both runs.
        chosen: what the user chose, by option.

    Raises:
        ResumeError: this run would calibrate otherwise.
    """
    statistics = Statistics.open(folder)
    statistics.check_model(source.fingerprint())
    settings = settings_of(options, resolve(options.device_type))
    samples = load_samples(options, Watcher(None))
    had = calibration_settings(statistics.manifest.get("samples_sha256"), statistics.settings())
    has = calibration_settings(digest(samples, settings.generate), settings)
    changed = [key for key in had if had[key] != has[key]]
    if changed:
        raise changed_error(work, changed, had, has, chosen)
    return statistics


def open_statistics(source: Checkpoint, options: CalibrationOptions, folder: Path, watcher: Watcher) -> Statistics:
    """The finished statistics that --stats names.

    What contradicts them is refused; what asks for nothing else, but cannot have an effect any more, is said.
    """
    statistics = Statistics.open(folder)
    statistics.check_model(source.fingerprint())
    named = options.images is not None or options.samples_file is not None
    if named:
        statistics.check_samples(digest(load_samples(options, Watcher(None)), options.generate))
    statistics.check_settings(
        compute_dtype=None if options.compute_dtype == "auto" else dtype_name(COMPUTE_DTYPES[options.compute_dtype]),
        max_pixels=options.max_pixels,
    )
    default = CalibrationOptions()
    runs_model = options.text_inputs  # with propagation, which needs them
    idle = [
        (options.prompt != default.prompt and not named, "--prompt"),
        (options.limit is not None and not named, "--limit"),
        (options.skip_bad and not named, "--skip-bad-images"),
        (options.recursive and options.images is None, "--recursive"),
        (options.texts != default.texts and not named, "--no-texts"),
        (options.generate is not None and not named, "--generate"),
        (options.device_type != default.device_type and not runs_model, f"--device_type {options.device_type}"),
        (options.trust_remote_code, "--trust_remote_code True"),
    ]
    if not statistics.has_checksums:
        watcher.note(
            f"note: the statistics in {folder} have no checksums, an older glmq wrote them: only damage that makes them "
            "impossible is found, and not whether the weights are those that they come from"
        )
    given = [name for is_given, name in idle if is_given]
    if given:
        verb = "has" if len(given) == 1 else "have"
        watcher.note(
            f"note: {', '.join(given)} {verb} no effect: the statistics in {folder} are used"
            f"{'' if runs_model else ', so the model is not run'}"
        )
    return statistics
