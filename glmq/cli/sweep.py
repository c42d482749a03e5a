"""`glmq sweep`: several recipes over the same statistics, weighed against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from glmq.cli import options as o
from glmq.cli.help import Tier
from glmq.cli.presets import PresetName

RECIPES = "Recipes"
KL = "KL"
DEFAULT_PRESET: Final = "300i-duo"


def sweep(
    model_path: o.ModelPath,
    stats: Annotated[
        Path,
        typer.Option("--stats", help="Statistics folder of `glmq calibrate`.", rich_help_panel=o.CALIBRATION),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Folder to write table, page and JSON into.", rich_help_panel=o.OUTPUT)
    ],
    recipes: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RECIPES]",
            help="TOML file of [[recipe]] tables, each with options of `glmq quantize`, a preset, a name.",
            show_default=False,
        ),
    ] = None,
    target_bits: Annotated[
        str | None,
        typer.Option(
            "--target-bits",
            help="Also a recipe for each of these bits per weight: 2.5,3,3.5.",
            rich_help_panel=RECIPES,
            show_default=False,
        ),
        Tier.USUAL,
    ] = None,
    preset: Annotated[
        PresetName,
        typer.Option("--preset", help="The other flags of these recipes.", rich_help_panel=RECIPES),
        Tier.USUAL,
    ] = DEFAULT_PRESET,
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep",
            help="Folder in which each recipe's weights stay, under its name. Without it only the reports do; one "
            "checkpoint at a time lies on the disk until it is measured.",
            rich_help_panel=o.OUTPUT,
            show_default=False,
        ),
        Tier.USUAL,
    ] = None,
    kl: Annotated[
        bool,
        typer.Option(
            "--kl/--no-kl",
            help="Measure KL, how far predicted tokens are from the float model's. It and each checkpoint run once over "
            "samples, which takes as long as calibrating on them each time.",
            rich_help_panel=KL,
        ),
        Tier.USUAL,
    ] = True,
    calib_images: Annotated[
        Path | None,
        typer.Option(
            "--calib-images",
            help="Folder of images for KL.",
            rich_help_panel=KL,
            show_default="samples of the statistics that came with glmq",
        ),
        Tier.USUAL,
    ] = None,
    recursive: o.Recursive = False,
    cases: Annotated[
        Path | None,
        typer.Option(
            "--cases", help="JSON-lines file of samples for KL: image, prompt and text (answer).", rich_help_panel=KL
        ),
        Tier.USUAL,
    ] = None,
    prompt: o.Prompt = "Please describe this picture in detail.",
    limit: Annotated[
        int,
        typer.Option(
            "--limit",
            min=1,
            help=f"{o.FIRST}; the texts that the statistics have from glmq come on top, unless samples are named.",
            rich_help_panel=KL,
        ),
        Tier.USUAL,
    ] = 8,
    max_pixels: o.MaxPixels = None,
    chat_template: o.ChatTemplate = None,
    dequantize: o.Dequantize = False,
    overwrite: o.Overwrite = False,
    work_dir: o.WorkDir = None,
    resume: o.Resume = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print each recipe's bytes and time, disk and memory; write nothing.",
            rich_help_panel=o.RUN,
        ),
        Tier.USUAL,
    ] = False,
    config: o.ConfigFile = None,
    dump_config: o.DumpConfig = False,
    json_output: o.JsonOutput = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    log_file: o.LogFile = None,
    events: o.Events = None,
    debug: o.Debug = False,
) -> None:
    """Quantize by several recipes over the same statistics, and weigh size against error and KL.

    The best are marked: no other is both as small and as close. Each row has the command that makes its checkpoint:

        glmq sweep --model-path FLOAT --stats STATS --out SWEEP --target-bits 2.5,3
        glmq sweep RECIPES.toml --model-path FLOAT --stats STATS --out SWEEP-2
    """
    from glmq.cli.console import showing, stdout
    from glmq.cli.progress import ProgressView
    from glmq.cli.render import print_json
    from glmq.cli.stopped import resuming_command
    from glmq.cli.sweep_recipes import RecipeReader
    from glmq.cli.sweep_view import plan_document, show_sweep, show_sweep_plan
    from glmq.errors import UsageError
    from glmq.jobs.sweep import forecast_sweep, run_sweep
    from glmq.jobs.sweep_recipes import SweepJob, SweepOptions
    from glmq.jobs.verify import CaseOptions
    from glmq.reporting.sweeps import sweep_document

    if target_bits is None and preset != DEFAULT_PRESET:
        raise UsageError(f"--preset {preset} has no effect without --target-bits; a recipe of the file names its own")
    reader = RecipeReader()
    variants = [] if recipes is None else reader.read_file(recipes)
    variants += [] if target_bits is None else reader.read_bits(target_bits, preset)
    options = SweepOptions(
        keep=keep,
        kl=kl,
        cases=CaseOptions(calib_images, recursive, cases, prompt, limit, max_pixels),
        dequantize=dequantize,
        chat_template=chat_template,
        work_dir=work_dir,
    )
    job = SweepJob(model_path, stats, out, tuple(variants), options, resuming_command())
    with ProgressView(quiet=quiet or json_output, verbose=verbose, events=events, verb="sweep") as view:
        if dry_run:
            plan = forecast_sweep(job, overwrite=overwrite, watch=view)
        else:
            found = run_sweep(job, overwrite=overwrite, resume=resume, watch=view)
    if dry_run:
        print_json(plan_document(plan, out)) if json_output else show_sweep_plan(plan, out)
        return
    with showing(out):
        if json_output:
            print_json(dict(sweep_document(found)))
        elif quiet:
            stdout.print(str(out), soft_wrap=True)
        else:
            show_sweep(found)
