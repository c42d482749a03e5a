"""Records -> progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from shlex import quote
from typing import TYPE_CHECKING, Final

from rich.table import Table
from rich.text import Text

from glmq.cli.console import VisibleTable, stdout
from glmq.engines import Engine, Place
from glmq.machine import available_memory
from glmq.model.config import FAMILY
from glmq.quoting import visible_json
from glmq.records import PassTime
from glmq.spec import Activation, Form, QuantType, assert_never

if TYPE_CHECKING:
    from pathlib import Path

    from glmq.calibration.manifest import SampleTokens
    from glmq.jobs.calibrate import CalibrationForecast
    from glmq.jobs.quantize import QuantizationResult
    from glmq.quantization.dry_run import RunPlan
    from glmq.quantization.output import AreaBytes
    from glmq.quantization.recipe import Recipe
    from glmq.records import LinearReport

GIB: Final = 2**30
MIB: Final = 2**20
BAD_ERROR: Final = 0.2
POOR_ERROR: Final = 0.1
SHOWN_ROWS: Final = 24


def times_json(times: Sequence[PassTime]) -> list[dict[str, object]]:
    """Passes and their stages as JSON values."""
    return [asdict(done) for done in times]


def print_json(document: dict[str, object]) -> None:
    """One JSON object on stdout: sorted keys, no NaN, a newline at the end."""
    text = json.dumps(document, sort_keys=True, allow_nan=False, ensure_ascii=False, indent=1)
    sys.stdout.write(visible_json(text) + "\n")


@dataclass(frozen=True, slots=True)
class ErrorColumn:
    """One column of the error table, shown on terminals at least `from_width` characters wide."""

    header: str
    cell: Callable[[LinearReport], str | Text]
    from_width: int = 0


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


ERROR_COLUMNS: Final = (
    ErrorColumn("type", lambda r: r.quant_type.value, 96),
    ErrorColumn("step", lambda r: f"{r.step_min:.2g}..{r.step_max:.2g}", 124),
    ErrorColumn("bits", lambda r: f"{r.entropy_bits:.2f}"),
    ErrorColumn("|q|>7", lambda r: f"{r.outlier_share:.1%}", 84),
    ErrorColumn("weight", lambda r: f"{r.weight_error:.2%}"),
    ErrorColumn("output", lambda r: _marked(r.output_error)),
    ErrorColumn("SQNR dB", lambda r: f"{r.sqnr_db:.1f}"),
    ErrorColumn("input range", lambda r: _static(r, f"{r.input_low:.3g}..{r.input_high:.3g}"), 110),
    ErrorColumn("range by", lambda r: _static(r, r.input_range), 152),
    ErrorColumn("clipped", lambda r: _static(r, f"{r.clipped_share:.3%}"), 74),
)


def error_table(reports: Sequence[LinearReport], *, verbose: bool) -> Table:
    """One row per linear, worst output error first; the tail is left out unless `verbose`."""
    worst_first = sorted(reports, key=lambda r: (-r.output_error, r.name))
    shown = worst_first if verbose else worst_first[:SHOWN_ROWS]
    table = VisibleTable("Error per linear, worst first")
    table.add_column("linear", no_wrap=True, overflow="fold")
    columns = [column for column in ERROR_COLUMNS if stdout.width >= column.from_width]
    for column in columns:
        table.add_column(column.header, justify="right", no_wrap=True)
    for report in shown:
        table.add_row(FAMILY.short_name(report.name), *(column.cell(report) for column in columns))
    if len(shown) < len(worst_first):
        table.caption = (
            f"{len(worst_first) - len(shown)} better ones are left out; -v shows all, glmq_report.csv has them"
        )
        table.caption_justify = "left"
    return table


def samples_table(samples: Sequence[SampleTokens]) -> Table:
    """Tokens of each calibration sample."""
    table = VisibleTable("Calibration samples")
    table.add_column("sample")
    table.add_column("tokens", justify="right")
    table.add_column("answer")
    for sample in samples:
        table.add_row(sample.name, str(sample.tokens), "yes" if sample.has_answer else "no")
    table.add_row(f"{len(samples)} samples", str(sum(s.tokens for s in samples)), "", style="bold")
    return table


def captions_table(picture: str, captions: Mapping[str, str]) -> Table:
    """What each model says about a picture that calibration did not see, side by side."""
    table = VisibleTable(f"Captions of {picture}, not used for calibration")
    for label in captions:
        table.add_column(label, ratio=1)
    table.add_row(*captions.values())
    return table


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
                "free_bytes": free,
                "peak_bytes": plan.peak_bytes,
                "available_bytes": memory,
                "calibration_seconds": plan.calibration_seconds,
                "quantization_seconds": plan.quantization_seconds,
            }
        )
        return
    table = VisibleTable("Linears")
    for header in ("linear", "type", "shape", "by"):
        table.add_column(header, no_wrap=True)
    shown = [linear for linear in plan.linears if verbose or linear.quant_type is not QuantType.FLOAT]
    for linear in shown:
        shape = f"{linear.rows} x {linear.cols}"
        table.add_row(FAMILY.short_name(linear.name), linear.quant_type.value, shape, linear.rule or "default")
    if len(shown) < len(plan.linears):
        table.caption = f"{len(plan.linears) - len(shown)} linears stay float; -v lists them"
        table.caption_justify = "left"
    stdout.print(table)
    stdout.print(areas_table(plan.areas))
    for name, count in plan.files:
        stdout.print(f"{name}: {count} bytes")
    stdout.print(f"disk: {size(plan.output_bytes)} output, {size(plan.statistics_bytes)} statistics, {size(free)} free")
    stdout.print(f"memory: about {size(plan.peak_bytes)} resident at most, {size(memory)} available")
    if plan.quantization_seconds is not None:
        stdout.print(f"time: about {plan.quantization_seconds / 60:.1f} minutes on this machine as it is now")
    elif plan.calibration_seconds is not None:
        stdout.print(
            f"time: calibration about {plan.calibration_seconds / 60:.1f} minutes on this machine as it is now; "
            "the rest can be foretold once there are statistics (--stats)"
        )


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
            }
        )
        return
    stdout.print(samples_table(plan.samples))
    most = "" if plan.is_exact else "at most "
    stdout.print(f"statistics: {most}{plan.output_bytes} bytes in {len(plan.files)} files")
    stdout.print(
        f"disk: {size(plan.output_bytes)} statistics, {size(plan.work_bytes)} beside them while it runs, {size(free)} free"
    )
    stdout.print(f"memory: about {size(plan.peak_bytes)} resident at most, {size(memory)} available")
    stdout.print(
        f"time: about {seconds / 60:.1f} minutes on this machine as it is now; one sample went through one block"
    )


def _marked(error: float) -> Text:
    """An error with a colour and, for those who see none, a mark."""
    if error >= BAD_ERROR:
        return Text(f"!! {error:.2%}", style="bold red")
    if error >= POOR_ERROR:
        return Text(f"! {error:.2%}", style="yellow")
    return Text(f"{error:.2%}", style="green")


def areas_table(areas: Sequence[AreaBytes]) -> Table:
    """Bytes before and after by area of the model."""
    table = VisibleTable("Bytes")
    for header in ("part", "float", "quantized", "ratio"):
        table.add_column(header, justify="left" if header == "part" else "right")
    before, after = sum(p.before for p in areas), sum(p.after for p in areas)
    for name, b, a in [*((p.area.value, p.before, p.after) for p in areas), ("total", before, after)]:
        table.add_row(name, size(b), size(a), f"{a / b:.3f}" if b else "-")
    return table


def size(count: int) -> str:
    """Bytes for people: `13.66 GiB`, `7.2 MiB`, `512 B`."""
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    if count >= MIB:
        return f"{count / MIB:.1f} MiB"
    return f"{count / 1024:.1f} KiB" if count >= 1024 else f"{count} B"


def show_quantization(result: QuantizationResult, *, verbose: bool) -> None:
    """The error table, the bytes, where the output lies, and what to do next."""
    stdout.print(error_table(result.reports, verbose=verbose))
    stdout.print(areas_table(result.areas))
    recipe = result.recipe
    stdout.print(f"{recipe.quant_type.value} ({recipe.dtype.value}) written to {result.folder}", soft_wrap=True)
    for line in next_steps(result.folder, recipe):
        stdout.print(line, soft_wrap=True)


def next_steps(folder: Path, recipe: Recipe) -> list[str]:
    """The exact next command for a fresh checkpoint, and which engine takes it."""
    quant_type = recipe.quant_type
    if quant_type.spec.is_sparse:
        return [
            "Next, for the Atlas 300I Duo: compress it for the tensor-parallel size that you will serve with:",
            f"  glmq compress --model_path {quote(str(folder))} --save_directory {quote(f'{folder}-sc')} --tp 1",
        ]
    if recipe.form is Form.COMPRESSED_TENSORS:
        return [
            f"Next: serve it with vLLM or SGLang (vllm serve {folder}), or load it with transformers and compressed-tensors."
        ]
    places = [Place(engine, None) for engine in Engine]
    if not Place(Engine.MINDIE, None).dtypes(quant_type):
        titles = [place.engine.spec.title for place in places if place.dtypes(quant_type)]
        return [f"Next: serve it with {' or '.join(titles)}; MindIE does not load {quant_type.value}."]
    return [
        f"Next: serve it with MindIE on the Atlas 800I A2 (world size 1 or 2): set modelWeightPath to {folder} "
        "in conf/config.json of mindie-service, then start mindieservice_daemon. "
        "The speed-up needs the NPU engine."
    ]
