"""What `glmq sweep` shows on stdout: the table of recipes, the command of each, and what a sweep would take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Final

from glmq.cli.console import stdout
from glmq.cli.render import duration, legend, marked, show_obstacles
from glmq.cli.tables import Cell, Column, FittedTable
from glmq.machine import available_memory
from glmq.model.config import FAMILY
from glmq.reporting.sweep_page import BEST
from glmq.reporting.sweeps import SWEEP
from glmq.wording import counted, size

if TYPE_CHECKING:
    from pathlib import Path

    from glmq.jobs.sweep import SweepPlan
    from glmq.reporting.sweeps import Sweep, SweepRow

COLUMNS: Final[tuple[tuple[Column, Callable[[SweepRow, bool, bool], Cell]], ...]] = (
    (Column("recipe", left=True), lambda row, error, kl: row.name),
    (Column("type", drop=5, left=True), lambda row, error, kl: row.quant_type),
    (Column("bits", drop=1), lambda row, error, kl: f"{row.bits:.2f}"),
    (
        Column("size", note="size: as it is served, sparse types compressed"),
        lambda row, error, kl: size(row.expected_bytes),
    ),
    (Column("written", drop=6), lambda row, error, kl: size(row.output_bytes)),
    (
        Column("median error"),
        lambda row, error, kl: marked(row.median_error, f"{row.median_error:.2%}{_sign(error)}"),
    ),
    (Column("worst error", drop=2), lambda row, error, kl: marked(row.worst_error, f"{row.worst_error:.2%}")),
    (Column("worst at", drop=8, left=True), lambda row, error, kl: FAMILY.short_name(row.worst_linear)),
    (
        Column("KL"),
        lambda row, error, kl: "" if row.divergence is None else f"{row.divergence.kl:.2g}{_sign(kl)}",
    ),
    (Column("± KL", drop=3), lambda row, error, kl: _kl_error(row)),
    (
        Column("same top", drop=4),
        lambda row, error, kl: "" if row.divergence is None else f"{row.divergence.top1:.1%}",
    ),
    (Column("time", drop=7), lambda row, error, kl: duration(row.seconds)),
)


def _sign(is_best: bool) -> str:
    return f" {BEST}" if is_best else ""


def _kl_error(row: SweepRow) -> str:
    error = None if row.divergence is None else row.divergence.kl_error
    return "" if error is None else f"{error:.1g}"


def show_sweep(found: Sweep) -> None:
    """The table, what could not be made, the commands, and where the reports lie."""
    stdout.print(sweep_table(found))
    for failure in found.failures:
        stdout.say(f"{failure.name}: not made: {failure.reason}")
    stdout.print("To make one of them:")
    for name in (row.name for row in found.rows):
        stdout.print(f"  {found.commands[name]}", soft_wrap=True)
    page = found.folder / f"{SWEEP}.html"
    stdout.say(f"{counted(len(found.rows), 'recipe')} in {duration(found.seconds)}: {page}")


def sweep_table(found: Sweep) -> FittedTable:
    """One row a recipe, the smallest first."""
    caption = f"{BEST} no other recipe is both as small and as close"
    if found.samples:
        positions = max(row.divergence.positions for row in found.rows if row.divergence is not None)
        caption += f"; KL in nats over {positions:,} positions of {counted(len(found.samples), 'sample')}"
    marks = {
        "median error": legend(row.median_error for row in found.rows),
        "worst error": legend(row.worst_error for row in found.rows),
    }
    return FittedTable(
        f"Recipes, smallest first; the float model has {size(found.float_bytes)}",
        [replace(column, note="".join(marks.get(column.header, [column.note]))) for column, _ in COLUMNS],
        [
            [cell(row, by_error, by_kl) for _, cell in COLUMNS]
            for row, by_error, by_kl in zip(found.rows, found.best_by_error, found.best_by_kl, strict=True)
        ],
        caption=caption,
    )


def show_sweep_plan(plan: SweepPlan, folder: Path) -> None:
    """What a sweep would write, need and take."""
    from glmq.checkpoint.disk import free_bytes  # imports torch, which `glmq inspect` starts without

    stdout.print(
        FittedTable(
            "Recipes",
            [Column("recipe", left=True), Column("type", drop=1, left=True), Column("written"), Column("time", drop=2)],
            [[row.name, row.quant_type, size(row.output_bytes), duration(row.seconds)] for row in plan.rows],
        )
    )
    stdout.say(f"disk: {size(plan.disk_bytes)} at one time, {size(free_bytes(folder))} free")
    stdout.say(f"memory: about {size(plan.peak_bytes)} resident at most, {size(available_memory())} available")
    if plan.samples:
        stdout.say(
            f"KL: {counted(len(plan.rows) + 1, 'run')} over {counted(len(plan.samples), 'sample')}, about "
            f"{duration(plan.kl_seconds)} each; --no-kl leaves it out, --limit takes fewer pictures or lines"
        )
    stdout.say(f"time: about {duration(plan.seconds)} on this machine as it is now")
    show_obstacles(plan.obstacles)


def plan_document(plan: SweepPlan, folder: Path) -> dict[str, object]:
    """The same for --json."""
    from glmq.checkpoint.disk import free_bytes

    return {
        "schema": "glmq.sweep-plan/1",
        **asdict(plan),
        "seconds": plan.seconds,
        "free_bytes": free_bytes(folder),
        "available_bytes": available_memory(),
    }
