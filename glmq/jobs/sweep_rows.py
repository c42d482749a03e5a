"""The rows of a sweep, one recipe after the other: its checkpoint is made, looked at, run over the samples, and removed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from glmq.calibration.samples import digest
from glmq.calibration.stats import Statistics
from glmq.checkpoint.disk import check_room
from glmq.checkpoint.journal import Journal
from glmq.checkpoint.json_file import JsonObject, read_json_object
from glmq.checkpoint.reader import Checkpoint
from glmq.checkpoint.workplace import stored_bytes
from glmq.errors import GlmqError, InputError, OutputError, ResumeError, UsageError
from glmq.jobs.forecast import forecast_weight_passes
from glmq.jobs.quantization_job import QuantizationJob
from glmq.jobs.quantize import run_quantization
from glmq.jobs.settings import machine_settings
from glmq.jobs.sweep_recipes import SweepJob, Variant
from glmq.jobs.sweep_samples import FLOAT, Ruler
from glmq.jobs.watcher import Watcher
from glmq.model.config import ModelConfig
from glmq.numerics import gptq
from glmq.numerics.rate import RateCurve
from glmq.progress import Event, Note, PassDone, PassPlan, PassStarted, RunPlanned, Watch
from glmq.quantization.dry_run import TextLoad
from glmq.quantization.output import OutputPlan
from glmq.records import REPORT, LinearReport, parse_row
from glmq.reporting.sweeps import Divergence, SweepFailure, SweepRow
from glmq.verification.last_states import LastStates


@dataclass(frozen=True, slots=True)
class SweepWork:
    """Everything that a sweep needs, checked, before its first block."""

    job: SweepJob
    source: Checkpoint
    config: ModelConfig
    statistics: Statistics
    plans: Mapping[Variant, OutputPlan]
    ruler: Ruler | None
    """None: KL is left out."""

    @property
    def disk_bytes(self) -> int:
        """That are needed at one time: the largest checkpoint, or all of them where they stay and are not there yet."""
        places = {variant: self.job.place_of(variant) for variant in self.plans}
        sizes = {one: plan.shards.nbytes for one, plan in self.plans.items()}
        if self.job.options.keep is None:
            return max(sizes.values())
        return sum(size for one, size in sizes.items() if (place := places[one]) is not None and not place.is_dir())

    def check_room(self) -> None:
        """Raise SpaceError if the disk has no room for what the sweep needs."""
        job = self.job
        check_room(job.options.keep or job.out_path, self.disk_bytes - stored_bytes(job.out_path, job.options.work_dir))

    def chosen(self) -> dict[str, str]:
        """What the user chose, by option."""
        places = {"--model_path": str(self.job.model_path), "--stats": str(self.job.stats_path)}
        return {**places, **self.job.options.chosen()}

    def settings(self) -> dict[str, str]:
        """What every row depends on beside its recipe."""
        ruler = self.ruler
        return {
            "model": self.source.fingerprint(),
            "statistics": self.statistics.digest,
            "samples": "" if ruler is None else digest(ruler.samples, None),
            "--max-pixels": "" if ruler is None or ruler.max_pixels is None else str(ruler.max_pixels),
            **self.job.options.settings(),
            "rounding": gptq.rounding_kernel(),
            **machine_settings(),
        }

    def forecast(self) -> list[PassPlan]:
        """The passes of the whole run, each with the time that its blocks are expected to take."""
        passes = []
        steps = () if self.ruler is None else self.ruler.forecast()[0]
        if steps:
            passes.append(PassPlan(FLOAT, steps))
        for variant, own in self.forecast_rows().items():
            passes += [PassPlan(title_of(variant, one.title), one.steps) for one in own]
            passes += [PassPlan(title_of(variant, "KL"), steps)] if steps else []
        return passes

    def forecast_rows(self) -> dict[Variant, list[PassPlan]]:
        """The passes of each recipe over the weights; what an earlier one measures is not measured again."""
        found: dict[Variant, list[PassPlan]] = {}
        load = TextLoad.of(self.statistics.samples(), self.statistics.settings())
        measured: set[str | None] = set()
        for variant, plan in self.plans.items():
            passes = forecast_weight_passes(
                self.source,
                self.config,
                variant.recipe,
                plan,
                self.statistics,
                load,
                measures=variant.measures,
                reports=True,
            )
            found[variant] = [one for one in passes if one.title != "rate" or variant.curves_key not in measured]
            measured.add(variant.curves_key)
        return found


def title_of(variant: Variant, of_pass: str) -> str:
    """What a pass is called, of which every recipe has one."""
    return f"{variant.name}: {of_pass}"


class SweepRows:
    """Makes the rows, one recipe after the other.

    Args:
        work: what they are made from.
        folder: the work folder, in which the weights lie that do not stay.
        journal: of the rows that are finished.
        watch: is called with the events.
        overwrite: what lies where weights are to stay may be replaced.
        resume: an interrupted quantization is gone on with.
    """

    def __init__(
        self, work: SweepWork, folder: Path, journal: Journal, watch: Watch | None, *, overwrite: bool, resume: bool
    ) -> None:
        self._work, self._folder, self._journal, self._watch = work, folder, journal, watch
        self._overwrite, self._resume, self._watcher = overwrite, resume, Watcher(watch)
        self._told: set[str] = set()

    def make(self) -> list[SweepRow | SweepFailure]:
        """Every row, in the order of the recipes. Raises what ended the last recipe if none of them gave a checkpoint."""
        variants = self._work.job.variants
        reference = self._run_float([one for one in variants if not self._journal.has(_block(one))])
        rows: list[SweepRow | SweepFailure] = []
        failed: GlmqError | None = None
        for variant in variants:
            try:
                if not self._journal.has(_block(variant)):
                    row = self._make_row(variant, reference)
                    self._journal.record(_block(variant), {"row": json.dumps(asdict(row))})
                rows.append(self._read_row(variant))
            except (OutputError, ResumeError):
                raise
            except (UsageError, InputError) as error:
                failed = error
                rows.append(SweepFailure(variant.name, str(error), self._work.job.command_of(variant)))
                self._watcher.note(f"{variant.name}: not made: {error}")
            if self._work.job.place_of(variant) is None and self._candidate(variant).is_dir():
                shutil.rmtree(self._candidate(variant))
        if failed is not None and not any(isinstance(row, SweepRow) for row in rows):
            raise failed
        return rows

    def _run_float(self, left: Sequence[Variant]) -> LastStates | None:
        """The last states of the float model, if they are to be compared with."""
        ruler = self._work.ruler
        return None if ruler is None or not left else ruler.run_float(self._folder, self._journal, self._watcher)

    def _candidate(self, variant: Variant) -> Path:
        """Where the weights of a recipe lie."""
        return self._work.job.place_of(variant) or self._folder / f"candidate-{variant.name}"

    def _make_row(self, variant: Variant, reference: LastStates | None) -> SweepRow:
        """Quantize, unless that was done before the sweep was interrupted, and measure."""
        started, candidate, job = time.perf_counter(), self._candidate(variant), self._work.job
        self._quantize(variant, candidate)
        divergence = None
        if self._work.ruler is not None and reference is not None:
            divergence = self._work.ruler.measure(candidate, reference, title_of(variant, "KL"), self._watcher)
        return _row_of(
            variant,
            read_json_object(candidate / f"{REPORT}.json"),
            job.command_of(variant),
            divergence,
            time.perf_counter() - started,
        )

    def _quantize(self, variant: Variant, candidate: Path) -> None:
        job, made = self._work.job, f"{_block(variant)} made"
        stays = job.place_of(variant) is not None
        if candidate.is_dir() and (self._journal.has(made) or not stays):
            return
        watch = None if self._watch is None else lambda event: self._tell(variant, event)
        done = run_quantization(
            QuantizationJob(
                job.model_path,
                candidate,
                variant.recipe,
                job.calibration,
                job.stats_path,
                fallback_topk=variant.fallback_topk,
                max_error=variant.max_error,
                work_dir=job.options.work_dir if stays else None,
                curves=self._known_curves(variant),
            ),
            overwrite=self._overwrite,
            resume=self._resume,
            watch=watch,
        )
        curves = f"curves {variant.curves_key}"
        if done.curves and not self._journal.has(curves):
            self._journal.record(curves, {"curves": json.dumps([asdict(curve) for curve in done.curves])})
        if stays:  # where others may put something; what lies in the work folder is ours
            self._journal.record(made, {})

    def _known_curves(self, variant: Variant) -> tuple[RateCurve, ...]:
        """What another recipe of this sweep has measured that asks for other bits alone."""
        line = self._journal.finished.get(f"curves {variant.curves_key}")
        rows = [] if line is None else json.loads(str(line["curves"]))
        return tuple(RateCurve(**{**row, "bits": tuple(row["bits"]), "loss": tuple(row["loss"])}) for row in rows)

    def _read_row(self, variant: Variant) -> SweepRow:
        """What the journal says of a recipe; the command is that of this run."""
        values = json.loads(str(self._journal.finished[_block(variant)]["row"]))
        found = values.pop("divergence")
        row = SweepRow(**values, divergence=None if found is None else Divergence(**found))
        return replace(row, command=self._work.job.command_of(variant))

    def _tell(self, variant: Variant, event: Event) -> None:
        """Pass on an event of a quantization, as a part of the sweep; notes that several recipes have in common once."""
        assert self._watch is not None
        match event:
            case RunPlanned():
                return
            case PassStarted():
                event = replace(event, title=title_of(variant, event.title))
            case PassDone():
                event = replace(event, time=replace(event.time, title=title_of(variant, event.time.title)))
            case Note():
                if event.text in self._told:
                    return
                self._told.add(event.text)
                event = Note(f"{variant.name}: {event.text}")
            case _:
                pass
        self._watch(event)


def _block(variant: Variant) -> str:
    """The journal's name for a row."""
    return f"{variant.name} {variant.key}"


def _row_of(
    variant: Variant, report: JsonObject, command: str, divergence: Divergence | None, seconds: float
) -> SweepRow:
    """The row of a checkpoint, from its glmq_report.json."""
    linears = _linears(report)
    kept, areas = report["kept_float"], report["bytes"]
    assert isinstance(kept, list)
    assert isinstance(areas, list)
    output_bytes = sum(int(str(area["after"])) for area in areas if isinstance(area, Mapping))
    weights = sum(one.rows * one.cols for one in linears)
    entropy = sum(one.entropy_bits * one.rows * one.cols for one in linears)
    sparse = [one for one in linears if one.quant_type.spec.is_sparse]
    saved = sum(one.rows * one.cols * (8 - one.entropy_bits) / 8 for one in sparse)
    worst = max(linears, key=lambda one: one.output_error)
    return SweepRow(
        name=variant.name,
        quant_type=str(report["quant_type"]),
        dtype=str(report["dtype"]),
        bits=entropy / weights,
        output_bytes=output_bytes,
        expected_bytes=output_bytes - int(saved),
        median_error=median(one.output_error for one in linears),
        worst_error=worst.output_error,
        worst_linear=worst.name,
        kept_float=len(kept),
        divergence=divergence,
        seconds=seconds,
        command=command,
    )


def _linears(report: JsonObject) -> list[LinearReport]:
    rows = report["linears"]
    assert isinstance(rows, list)
    return [parse_row({**row, "seconds": 0.0}) for row in rows if isinstance(row, Mapping)]
