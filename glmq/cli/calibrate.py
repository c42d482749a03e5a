"""`glmq calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glmq.cli import options as o
from glmq.cli.help import Tier


def calibrate(
    model_path: o.ModelPath,
    stats: Annotated[
        Path, typer.Option("--stats", help="Folder to write the statistics into.", rich_help_panel=o.OUTPUT)
    ],
    chat_template: o.ChatTemplate = None,
    dequantize: o.Dequantize = False,
    calib_images: o.CalibImages = None,
    recursive: o.Recursive = False,
    calib_samples: o.CalibSamples = None,
    prompt: o.Prompt = "Please describe this picture in detail.",
    texts: o.Texts = True,
    limit: o.LimitImages = None,
    generate: o.Generate = None,
    max_pixels: o.MaxPixels = None,
    skip_bad_images: o.SkipBadImages = False,
    wide_moments: o.WideMoments = False,
    text_inputs: o.TextInputs = False,
    device_type: o.DeviceType = "cpu",
    compute_dtype: o.ComputeDtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    overwrite: o.Overwrite = False,
    work_dir: o.WorkDir = None,
    resume: o.Resume = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print exact output bytes, disk, memory and time needed (one block is run); touch nothing.",
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
    """Run calibration samples through the float model, one block in memory at a time, and keep the statistics.

    The statistics serve every recipe of `glmq quantize`:

        glmq calibrate --model-path FLOAT --calib-images PHOTOS --stats STATS
    """
    from glmq.cli.console import showing, stdout
    from glmq.cli.progress import ProgressView
    from glmq.cli.render import print_json, show_calibration, show_calibration_plan, times_json
    from glmq.cli.stopped import resuming_command
    from glmq.jobs.calibrate import forecast_calibration, run_calibration
    from glmq.jobs.calibration_options import CalibrationOptions
    from glmq.ranks import read_place

    chosen = CalibrationOptions(
        images=calib_images,
        recursive=recursive,
        samples_file=calib_samples,
        prompt=prompt,
        texts=texts,
        limit=limit,
        generate=generate,
        max_pixels=max_pixels,
        skip_bad=skip_bad_images,
        wide_moments=wide_moments,
        text_inputs=text_inputs,
        device_type=device_type,
        compute_dtype=compute_dtype,
        trust_remote_code=trust_remote_code,
        work_dir=work_dir,
        dequantize=dequantize,
        chat_template=chat_template,
    )
    if dry_run:
        with ProgressView(quiet=quiet or json_output, verbose=verbose, events=events, verb="calibrate") as view:
            forecast = forecast_calibration(model_path, stats, chosen, overwrite=overwrite, watch=view)
        show_calibration_plan(forecast, stats, as_json=json_output)
        return
    with ProgressView(quiet=quiet or json_output, verbose=verbose, events=events, verb="calibrate") as view:
        result = run_calibration(
            model_path, stats, chosen, overwrite=overwrite, resume=resume, watch=view, command=resuming_command()
        )
    if not read_place().is_first:
        return
    with showing(stats):
        if json_output:
            print_json(
                {
                    **result.statistics.manifest,
                    "schema": "glmq.calibrate/1",  # it has more than the file
                    "folder": str(stats),
                    "passes": times_json(result.times),
                    "seconds": result.seconds,
                    "settled": result.settled.is_settled,
                }
            )
        elif quiet:
            stdout.print(str(stats), soft_wrap=True)
        else:
            show_calibration(result, model_path, verbose=verbose)
