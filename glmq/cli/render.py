"""Records -> progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from shlex import quote
from statistics import median
from typing import TYPE_CHECKING, Final

from rich.text import Text

from glmq.cli.complaint import ANSWERED
from glmq.cli.console import stdout
from glmq.cli.lines import Flow, width_of
from glmq.cli.tables import Cell, Column, FittedTable
from glmq.engines import NOT_COMPRESSED, Chip, Engine, Place, name_cards
from glmq.inspection.folder import layer_of, role_of
from glmq.inspection.listing import describe_place
from glmq.machine import available_memory
from glmq.model.config import FAMILY
from glmq.quoting import visible, visible_json
from glmq.records import REPORT, PassTime
from glmq.spec import Activation, Form, QuantType, assert_never
from glmq.wording import counted, size

if TYPE_CHECKING:
    from pathlib import Path

    from glmq.calibration.manifest import SampleTokens
    from glmq.jobs.calibrate import CalibrationForecast, CalibrationResult
    from glmq.jobs.quantize import QuantizationResult
    from glmq.jobs.settled import Settled
    from glmq.quantization.dry_run import LinearPlan, RunPlan
    from glmq.quantization.output import AreaBytes
    from glmq.quantization.recipe import Recipe
    from glmq.records import LinearReport

GIB: Final = 2**30
MIB: Final = 2**20
BAD_ERROR: Final = 0.2
POOR_ERROR: Final = 0.1
SHOWN_ROWS: Final = 24


def show_calibration(result: CalibrationResult, model: Path, *, verbose: bool) -> None:
    """Tokens of the samples, and how the run ended: where the statistics lie, whether they have settled, what to do next."""
    stdout.print(samples_table(result.statistics.samples()))
    folder = result.folder
    stdout.say(f"Statistics written to {folder} in {duration(result.seconds)}")
    stdout.say(f"  size: {size(sum(path.stat().st_size for path in folder.iterdir()))}")
    show_settled(result.settled, verbose=verbose)
    stdout.print(
        f"Next: glmq quantize --model_path {quote(str(model))} --stats {quote(str(folder))} --save_directory ...",
        soft_wrap=True,
    )


def times_json(times: Sequence[PassTime]) -> list[dict[str, object]]:
    """Passes and their stages as JSON values."""
    return [asdict(done) for done in times]


def print_json(document: dict[str, object]) -> None:
    """One JSON object on stdout: sorted keys, no NaN, a newline at the end."""
    text = json.dumps(document, sort_keys=True, allow_nan=False, ensure_ascii=False, indent=1)
    sys.stdout.write(visible_json(text) + "\n")
    sys.stdout.flush()  # a full disk shows here, where it can be said, and not when Python ends
    ANSWERED.set(True)


class Streamed:
    """A longer text on stdout, piece by piece as it is made: lines end where its own do, on a terminal between words too."""

    def __init__(self) -> None:
        self._flow = Flow(width_of(sys.stdout))
        self.has_begun = False

    def add(self, piece: str) -> None:
        """Write a piece, at once but for a word that is not whole."""
        self.has_begun = True
        self._write(self._flow.add("\n".join(visible(line) for line in piece.split("\n"))))

    def end(self) -> None:
        """Write what was held back, and end the line."""
        self._write(f"{self._flow.finish()}\n")

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _static(report: LinearReport, text: str) -> str:
    match report.quant_type.spec.activation:
        case Activation.STATIC:
            shown = text
        case Activation.PER_TOKEN:
            shown = "per token"
        case Activation.NONE:
            shown = "float"
        case other:
            assert_never(other)
    return shown


ERROR_COLUMNS: Final[tuple[tuple[Column, Callable[[LinearReport], Cell]], ...]] = (
    (Column("linear", left=True), lambda r: FAMILY.short_name(r.name)),
    (Column("type", drop=4, left=True), lambda r: r.quant_type.value),
    (Column("step", drop=8), lambda r: f"{r.step_min:.2g}..{r.step_max:.2g}"),
    (Column("bits", drop=1), lambda r: f"{r.entropy_bits:.2f}"),
    (Column("|q|>7", drop=6), lambda r: f"{r.outlier_share:.1%}"),
    (Column("weight error", drop=2), lambda r: f"{r.weight_error:.2%}"),
    (Column("output error"), lambda r: marked(r.output_error, f"{r.output_error:.2%}")),
    (Column("SQNR dB", drop=5), lambda r: f"{r.sqnr_db:.1f}"),
    (Column("input range", drop=7), lambda r: _static(r, f"{r.input_low:.3g}..{r.input_high:.3g}")),
    (Column("range by", drop=9), lambda r: _static(r, r.input_range)),
    (Column("clipped", drop=3), lambda r: _static(r, f"{r.clipped_share:.3%}")),
)


def error_table(reports: Sequence[LinearReport], *, verbose: bool) -> FittedTable:
    """One row per linear, worst output error first; the tail is left out unless `verbose`."""
    worst_first = sorted(reports, key=lambda r: (-r.output_error, r.name))
    shown = worst_first if verbose else worst_first[:SHOWN_ROWS]
    left = len(worst_first) - len(shown)
    tail = f"{counted(left, 'better one is', 'better ones are')} left out; -v shows all, {REPORT}.csv has them"
    return FittedTable(
        "Error per linear, worst output error first",
        [column for column, _ in ERROR_COLUMNS],
        [[cell(report) for _, cell in ERROR_COLUMNS] for report in shown],
        caption="; ".join([*([tail] if left else []), *legend(report.output_error for report in shown)]),
    )


def samples_table(samples: Sequence[SampleTokens]) -> FittedTable:
    """Tokens of each calibration sample."""
    return FittedTable(
        "Calibration samples",
        [Column("sample", left=True), Column("tokens"), Column("answer", drop=1, left=True)],
        [[sample.name, f"{sample.tokens:,}", "yes" if sample.has_answer else "no"] for sample in samples],
        total=[counted(len(samples), "sample"), f"{sum(s.tokens for s in samples):,}", ""],
    )


def captions_table(picture: str, captions: Mapping[str, str]) -> FittedTable:
    """What each model says about a picture that calibration did not see."""
    return FittedTable(
        f"Captions of {picture}, not used for calibration",
        [Column("model", left=True), Column("says", left=True, wraps=True)],
        [[label, text] for label, text in captions.items()],
    )


def duration(seconds: float) -> str:
    """A time for people: `0.4 s`, `34 s`, `46 min`, `1 h 12 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 89.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def planned_linears(linears: Sequence[LinearPlan], *, verbose: bool) -> FittedTable:
    """What becomes of the linears, a line for those of one role that are alike; float ones only with `verbose`."""
    grouped: dict[tuple[str, str, str, str], list[str]] = {}
    for linear in linears:
        if verbose or linear.quant_type is not QuantType.FLOAT:
            name = f"{linear.name}.weight"
            shape = f"{linear.rows} x {linear.cols}"
            key = (role_of(name), linear.quant_type.value, shape, linear.rule or "default")
            grouped.setdefault(key, []).append(layer_of(name))
    floats = sum(linear.quant_type is QuantType.FLOAT for linear in linears)
    return FittedTable(
        "Linears",
        [
            Column("layers and role", left=True),
            Column("type", left=True),
            Column("shape", drop=1),
            Column("by", drop=2, left=True),
        ],
        [[describe_place(layers, role), *others] for (role, *others), layers in grouped.items()],
        caption=f"{counted(floats, 'linear stays', 'linears stay')} float; -v lists them"
        if floats and not verbose
        else "",
    )


def show_run_plan(plan: RunPlan, folder: Path, *, as_json: bool, verbose: bool) -> None:
    """What a run would do and need, as tables or JSON."""
    from glmq.checkpoint.disk import free_bytes  # imports torch, which `glmq inspect` starts without

    free, memory = free_bytes(folder), available_memory()
    if as_json:
        print_json(
            {
                "schema": "glmq.plan/1",
                "linears": [asdict(linear) | {"quant_type": linear.quant_type.value} for linear in plan.linears],
                "bytes": [{"part": p.area.value, "before": p.before, "after": p.after} for p in plan.areas],
                "files": [{"name": name, "bytes": count} for name, count in plan.files],
                "output_bytes": plan.output_bytes,
                "statistics_bytes": plan.statistics_bytes,
                "work_bytes": plan.work_bytes,
                "free_bytes": free,
                "peak_bytes": plan.peak_bytes,
                "available_bytes": memory,
                "calibration_seconds": plan.calibration_seconds,
                "quantization_seconds": plan.quantization_seconds,
                "obstacles": list(plan.obstacles),
            }
        )
        return
    stdout.print(planned_linears(plan.linears, verbose=verbose))
    stdout.print(areas_table(plan.areas))
    for name, count in plan.files:
        stdout.print(f"{name}: {count} bytes")
    beside = f", {size(plan.work_bytes)} beside it while it runs" if plan.work_bytes else ""
    stdout.say(
        f"disk: {size(plan.output_bytes)} output{beside}, {size(plan.statistics_bytes)} statistics, {size(free)} free"
    )
    stdout.say(f"memory: about {size(plan.peak_bytes)} resident at most, {size(memory)} available")
    if plan.quantization_seconds is not None:
        stdout.say(f"time: about {duration(plan.quantization_seconds)} on this machine as it is now")
    elif plan.calibration_seconds is not None:
        stdout.say(
            f"time: calibration about {duration(plan.calibration_seconds)} on this machine as it is now; "
            "the rest can be foretold once there are statistics (--stats)"
        )
    show_obstacles(plan.obstacles)


def show_obstacles(obstacles: Sequence[str]) -> None:
    """What would stop a real run."""
    for sentence in obstacles:
        stdout.say(Text(f"!! this would stop a real run: {sentence}", style="bold red"))


def show_calibration_plan(forecast: CalibrationForecast, folder: Path, *, as_json: bool) -> None:
    """What a calibration would write, need and take."""
    from glmq.checkpoint.disk import free_bytes

    plan, seconds = forecast.plan, forecast.seconds
    free, memory = free_bytes(folder), available_memory()
    if as_json:
        print_json(
            {
                "schema": "glmq.calibration-plan/1",
                "samples": [asdict(sample) for sample in plan.samples],
                "files": [{"name": name, "bytes": count} for name, count in plan.files],
                "output_bytes": plan.output_bytes,
                "work_bytes": plan.work_bytes,
                "free_bytes": free,
                "peak_bytes": plan.peak_bytes,
                "available_bytes": memory,
                "seconds": seconds,
                "obstacles": list(forecast.obstacles),
            }
        )
        return
    stdout.print(samples_table(plan.samples))
    most = "" if plan.is_exact else "at most "
    stdout.say(f"statistics: {most}{plan.output_bytes} bytes in {len(plan.files)} files")
    stdout.say(
        f"disk: {size(plan.output_bytes)} statistics, {size(plan.work_bytes)} beside them while it runs, {size(free)} free"
    )
    stdout.say(f"memory: about {size(plan.peak_bytes)} resident at most, {size(memory)} available")
    stdout.say(f"time: about {duration(seconds)} on this machine as it is now; one sample went through one block")
    show_obstacles(forecast.obstacles)


def legend(errors: Iterable[float]) -> list[str]:
    """What the marks of a table of these relative errors mean; nothing where none is marked."""
    is_marked = any(not error < POOR_ERROR for error in errors)
    return [f"!: {POOR_ERROR:.0%} or more, !!: {BAD_ERROR:.0%} or more"] if is_marked else []


def marked(error: float, text: str) -> Text:
    """The relative error of an output, as `text` says it, with a colour and, for those who see none, a mark."""
    if not error < BAD_ERROR:
        return Text(f"!! {text}", style="bold red")
    return Text(f"! {text}", style="yellow") if error >= POOR_ERROR else Text(text, style="green")


def areas_table(areas: Sequence[AreaBytes]) -> FittedTable:
    """Bytes before and after by area of the model."""
    before, after = sum(p.before for p in areas), sum(p.after for p in areas)
    rows = [(p.area.value, p.before, p.after) for p in areas]
    cells = [[name, size(b), size(a), f"{a / b:.3f}" if b else "-"] for name, b, a in (*rows, ("total", before, after))]
    columns = [Column("part", left=True), Column("float", drop=1), Column("quantized"), Column("ratio", drop=2)]
    return FittedTable("Bytes", columns, cells[:-1], total=cells[-1])


def show_quantization(result: QuantizationResult, model: Path, *, verbose: bool) -> None:
    """The error table, the bytes, and how the run ended: where the output lies, what it is worth, and what to do next."""
    if result.reports:
        stdout.print(error_table(result.reports, verbose=verbose))
    stdout.print(areas_table(result.areas))
    recipe, folder = result.recipe, result.folder
    stdout.say(f"{recipe.quant_type.value} ({recipe.dtype.value}) written to {folder} in {duration(result.seconds)}")
    before, after = sum(part.before for part in result.areas), sum(part.after for part in result.areas)
    stdout.say(f"  size: {size(before)} before, {size(after)} after")
    if result.reports:
        errors = sorted(report.output_error for report in result.reports)
        worst = max(result.reports, key=lambda report: report.output_error)
        at = FAMILY.short_name(worst.name)
        stdout.say(f"  output error: median {median(errors):.2%}, worst {errors[-1]:.2%} at {at}")
    show_settled(result.settled, verbose=verbose)
    stdout.print(f"  check it: glmq verify {quote(str(folder))} --reference {quote(str(model))}", soft_wrap=True)
    for line in next_steps(result.folder, recipe, result.engines):
        show_line(line)


def show_settled(settled: Settled, *, verbose: bool) -> None:
    """Whether the statistics have settled: the verdict, with `verbose` what moved."""
    from glmq.jobs.notes import convergence_verdict, describe_convergence, unanswered_verdict

    stdout.say(f"  statistics: {convergence_verdict(settled.assessment, is_dense=settled.is_dense)}")
    for line in describe_convergence(settled.assessment, unanswered=0) if verbose else ():
        stdout.say(f"    {line.strip()}")
    if settled.unanswered:
        stdout.say(f"  answers: {unanswered_verdict(settled.unanswered)}")


def show_line(line: str) -> None:
    """A sentence, or a command, which starts with blanks and stays one line."""
    stdout.print(line, soft_wrap=True) if line.startswith("  ") else stdout.say(line)


def next_steps(folder: Path, recipe: Recipe, loaders: Mapping[Engine, Sequence[Chip]]) -> list[str]:
    """The exact next command for a fresh checkpoint, which these engines load on these chips."""
    is_sparse, of_mindie = recipe.quant_type.spec.is_sparse, loaders.get(Engine.MINDIE)
    if is_sparse and of_mindie and recipe.form is Form.ASCEND_V1:
        return [
            "Next, for the Atlas 300I Duo: compress it for the tensor-parallel size that you will serve with:",
            f"  glmq compress --model_path {quote(str(folder))} --save_directory {quote(f'{folder}-sc')} --tp 1",
        ]
    if recipe.form is Form.COMPRESSED_TENSORS:
        return [f"Next: serve it with vLLM (vllm serve {folder}), or load it with transformers and compressed-tensors."]
    if of_mindie:
        return [
            f"Next: serve it with MindIE on the {name_cards(of_mindie)} (world size 1 or 2): set modelWeightPath to "
            f"{folder.absolute()} in conf/config.json of mindie-service, then start mindieservice_daemon. "
            "The speed-up needs the NPU engine.",
            *([f"Note: {NOT_COMPRESSED}."] if is_sparse else []),
        ]
    target = recipe.target.place
    able = [engine for engine in Engine if Place(engine, None).dtypes(recipe.quant_type)]
    engines = list(loaders) or (able if target is None else [target.engine])
    command = f"  glmq verify {quote(str(folder))} --target {engines[0].value}"
    if loaders:
        first = engines[0]
        return [
            f"Next: serve it with {first.spec.title} on the {name_cards(loaders[first])}; what that makes of it:",
            command,
        ]
    if recipe.form is Form.MINDIE and Engine.MINDIE not in engines:
        titles = " or ".join(engine.spec.title for engine in engines)
        return [f"No engine is known to load it in this form; for {titles} write it with --format ascendv1."]
    return ["No engine is known to load it as it is; this says why:", command]
