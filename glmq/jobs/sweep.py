"""Sweep: several recipes of one model over the same statistics -> a table of size against error and KL."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from glmq.checkpoint.folder import OutputFolder, check_apart
from glmq.checkpoint.journal import Journal
from glmq.checkpoint.json_file import write_json, write_whole
from glmq.checkpoint.reader import Checkpoint
from glmq.checkpoint.run_note import RunNote
from glmq.checkpoint.workplace import Workplace, check_output, foreseen, has_progress
from glmq.errors import LaunchError, UsageError
from glmq.jobs.given_statistics import open_statistics
from glmq.jobs.sweep_recipes import KL_LIMIT, SweepJob, SweepOptions, Variant, check_variants
from glmq.jobs.sweep_rows import SweepRows, SweepWork
from glmq.jobs.sweep_samples import describe_samples, find_samples, open_ruler
from glmq.jobs.verify import only_of_pictures, refuse_unused
from glmq.jobs.watcher import Watcher
from glmq.model.config import ModelConfig
from glmq.model.side_files import check_needed_files
from glmq.model.source import SourceOptions, open_source
from glmq.progress import Watch
from glmq.quantization.dry_run import TextLoad, estimated_peak, seconds_of
from glmq.quantization.fallback import check_topk
from glmq.quantization.output import OutputPlan, plan_output
from glmq.quantization.plan import plan_groups
from glmq.quoting import csv_text
from glmq.ranks import read_place
from glmq.reporting.page import write_page
from glmq.reporting.sweep_page import sweep_page
from glmq.reporting.sweeps import SWEEP, Sweep, SweepFailure, SweepRow, sweep_document, sweep_rows
from glmq.values import to_path
from glmq.wording import counted


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """What one recipe would give and take."""

    name: str
    quant_type: str
    output_bytes: int
    seconds: float
    """Estimated, without measuring KL."""


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """What a sweep would do and need."""

    rows: tuple[PlannedRow, ...]
    samples: tuple[str, ...]
    """Those that KL is measured on; none where it is left out."""
    kl_seconds: float
    """Estimated time of one model over them; the float model runs once, and each checkpoint once."""
    disk_bytes: int
    """That are needed at one time: the largest checkpoint, or all of them where they stay."""
    peak_bytes: int
    """Estimated resident memory."""
    obstacles: tuple[str, ...] = ()
    """What lies where the output would, and stops a real run: a sentence each."""

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        runs = len(self.rows) + 1 if self.samples else 0
        return sum(row.seconds for row in self.rows) + runs * self.kl_seconds


def sweep(
    model: str | Path,
    stats: str | Path,
    recipes: Sequence[Variant],
    *,
    out: str | Path,
    options: SweepOptions = SweepOptions(),
    overwrite: bool = False,
    resume: bool = False,
    watch: Watch | None = None,
) -> Sweep:
    """Quantize a float checkpoint by several recipes, and weigh size against error and KL; only the reports stay.

    >>> import glmq
    >>> three = glmq.Variant("3-bits", glmq.Recipe.w8a8s(target_bits=3.0))
    >>> found = glmq.sweep("GLM-4.1V", "stats", [three, glmq.Variant("w8a8", glmq.Recipe.w8a8())], out="sweep")
    >>> [row.name for row in found.rows]
    ['3-bits', 'w8a8']

    Args:
        model: folder of the float weights.
        stats: folder of its statistics, which `calibrate` has written.
        recipes: at least one, each under a name of its own.
        out: folder to write the reports into.
        options: whether the weights stay, and what KL is measured on.
        overwrite: replace what lies in `out`, once the reports are whole.
        resume: go on after what an interrupted sweep has finished.
        watch: is called with the events of the run.

    Returns:
        A row for each recipe, the smallest first.

    Raises:
        UsageError: recipes that contradict each other, or an output folder that may not be written.
        InputError: a model, statistics or samples that cannot be used.
        ResourceError: no disk or memory.
    """
    job = SweepJob(to_path(model), to_path(stats), to_path(out), tuple(recipes), options)
    return run_sweep(job, overwrite=overwrite, resume=resume, watch=watch)


def run_sweep(job: SweepJob, *, overwrite: bool, resume: bool, watch: Watch | None) -> Sweep:
    """As `sweep`. Everything that can be refused is refused before the first weight is read."""
    started, watcher = time.perf_counter(), Watcher(watch)
    _check_places(job, overwrite=overwrite, resume=resume)
    with _prepared(job, watcher) as work:
        work.check_room()
        if watcher.is_watched:
            watcher.plan(work.forecast())
        run = RunNote("sweep", job.command, work.chosen())
        with OutputFolder(
            job.out_path, overwrite=overwrite, resume=resume, work_dir=job.options.work_dir, run=run
        ) as output:
            journal = Journal(output.work, work.settings(), options=work.chosen())
            rows = SweepRows(work, output.work, journal, watch, overwrite=overwrite, resume=resume).make()
            found = Sweep(
                folder=job.out_path,
                model=job.model_path,
                statistics=job.stats_path,
                float_bytes=sum(work.source.nbytes(name) for name in work.source),
                rows=tuple(sorted((one for one in rows if isinstance(one, SweepRow)), key=_by_size)),
                failures=tuple(one for one in rows if isinstance(one, SweepFailure)),
                samples=() if work.ruler is None else tuple(sample.name for sample in work.ruler.samples),
                seconds=time.perf_counter() - started,
            )
            _write_reports(output.path, found)
            output.finish()
            return found


def forecast_sweep(job: SweepJob, *, overwrite: bool, watch: Watch | None) -> SweepPlan:
    """What `run_sweep` would do: reads headers, quantizes one group by each recipe, writes nothing."""
    obstacles: list[str] = []
    with foreseen(obstacles):
        _check_places(job, overwrite=overwrite, resume=True)
    with _prepared(job, Watcher(watch)) as work:
        with foreseen(obstacles):
            work.check_room()
        steps, peak = ((), 0) if work.ruler is None else work.ruler.forecast()
        load = TextLoad.of(work.statistics.samples(), work.statistics.settings())
        peaks = [estimated_peak(work.config, one.recipe, plan, load) for one, plan in work.plans.items()]
        return SweepPlan(
            rows=tuple(
                PlannedRow(one.name, one.recipe.quant_type.value, work.plans[one].shards.nbytes, seconds_of(passes))
                for one, passes in work.forecast_rows().items()
            ),
            samples=() if work.ruler is None else tuple(sample.name for sample in work.ruler.samples),
            kl_seconds=sum(step.seconds for step in steps),
            disk_bytes=work.disk_bytes,
            peak_bytes=max(peak, *peaks),
            obstacles=tuple(obstacles),
        )


def _by_size(row: SweepRow) -> int:
    return row.expected_bytes


def _check_places(job: SweepJob, *, overwrite: bool, resume: bool) -> None:
    """Refuse recipes that contradict each other, and folders that cannot be written or hold what is read."""
    if read_place().world > 1:
        raise LaunchError("glmq sweep: needs no torchrun, one process goes through all recipes; run it alone")
    check_variants(job.variants)
    options = job.options
    idle = {"--calib-images": options.cases.images, "--cases": options.cases.cases}
    for option in (name for name, path in idle.items() if path is not None and not options.kl):
        raise UsageError(f"{option} with --no-kl: no model is run over the samples; drop one of them")
    if not options.kl:
        refuse_unused(
            {
                **only_of_pictures(options.cases),
                "--limit": options.cases.limit not in (None, KL_LIMIT),
                "--max-pixels": options.cases.max_pixels is not None,
            },
            "--kl",
        )
    inputs = {
        "the float weights": job.model_path,
        "the statistics": job.stats_path,
        "the pictures": options.cases.images,
        "the cases": options.cases.cases,
    }
    check_apart(job.out_path, "--out", {**inputs, "the weights that stay": options.keep})
    check_output(job.out_path, overwrite=overwrite, resume=resume, work_dir=options.work_dir)
    goes_on = resume and has_progress(Workplace.of(job.out_path, options.work_dir).work)
    for place in filter(None, map(job.place_of, job.variants)):
        check_apart(place, "--keep", {**inputs, "the reports": job.out_path})
        if not goes_on:  # else what the interrupted sweep has finished lies there
            check_output(place, overwrite=overwrite, resume=resume, work_dir=options.work_dir)


@contextmanager
def _prepared(job: SweepJob, watcher: Watcher) -> Iterator[SweepWork]:
    """Open model and statistics, lay out every output, find the samples."""
    options = job.options
    opened = open_source(job.model_path, SourceOptions(options.dequantize))
    with opened.checkpoint as source:
        for sentence in opened.notes:
            watcher.note(f"note: {sentence}")
        check_needed_files(job.model_path)
        statistics = open_statistics(source, job.calibration, job.stats_path, watcher)
        plans = {variant: _plan(source, opened.config, variant) for variant in job.variants}
        ruler = None
        if options.kl:
            samples = find_samples(options.cases, statistics, watcher)
            max_pixels = options.cases.max_pixels or statistics.settings().max_pixels
            ruler = open_ruler(source, opened.config, samples, max_pixels, options.chat_template)
            known = counted(len(statistics.samples()), "sample")
            watcher.note(f"KL: on {describe_samples(samples)}; the statistics were taken from {known}")
        source.contents = statistics.weights_wanted()
        yield SweepWork(job, source, opened.config, statistics, plans, ruler)


def _plan(source: Checkpoint, config: ModelConfig, variant: Variant) -> OutputPlan:
    """The output of one recipe. Raises UsageError, with the recipe's name, for one that does not fit the model."""
    try:
        groups = plan_groups(variant.recipe, config)
        check_topk(groups, variant.fallback_topk)
        return plan_output(source, config, variant.recipe, groups, None, {})
    except UsageError as error:
        raise type(error)(f"recipe {variant.name!r}: {error}") from error


def _write_reports(folder: Path, found: Sweep) -> None:
    """The sweep as JSON, as a table, and as a page."""
    write_json(folder / f"{SWEEP}.json", sweep_document(found), indent=1)
    rows = sweep_rows(found)
    write_whole(folder / f"{SWEEP}.csv", csv_text(list(rows[0]), rows).encode())
    write_page(folder / f"{SWEEP}.html", sweep_page(found))
