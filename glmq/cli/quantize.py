"""`glmq quantize`: the options of the vendor's `quant_glm41v.py`, flag by flag, and glmq's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from glmq.cli import options as o
from glmq.cli import vendor_options as v
from glmq.cli.command import ARGUMENTS
from glmq.cli.help import Tier
from glmq.cli.presets import PRESETS, PresetName, flags_of, overridden
from glmq.quantization.targets import Target


def _list_presets(context: typer.Context, wanted: bool) -> None:
    if wanted:
        from glmq.cli.console import stdout

        if "--json" in context.meta[ARGUMENTS]:
            raise typer.BadParameter("presets are printed as text; drop --json")
        for name, preset in PRESETS.items():
            stdout.say(f"{name}: {preset.what}", hang=4)
            stdout.say(f"    {flags_of(name)}")
        raise typer.Exit


def quantize(
    model_path: o.ModelPath,
    save_directory: Annotated[
        Path,
        typer.Option("--save-directory", help="Folder to write the quantized weights into.", rich_help_panel=o.OUTPUT),
    ],
    preset: Annotated[
        PresetName | None,
        typer.Option(
            "--preset",
            help="The vendor's flags for a chip, see --list-presets. Other options count more.",
            rich_help_panel=o.QUANTIZATION,
        ),
        Tier.USUAL,
    ] = None,
    list_presets: Annotated[
        bool,
        typer.Option(
            "--list-presets",
            help="Print the flags of every preset, and stop.",
            rich_help_panel=o.QUANTIZATION,
            callback=_list_presets,
            is_eager=True,
        ),
        Tier.USUAL,
    ] = False,
    calib_images: v.CalibImages = None,
    recursive: o.Recursive = False,
    chat_template: o.ChatTemplate = None,
    dequantize: o.Dequantize = False,
    keep_extra: Annotated[
        bool,
        typer.Option(
            "--keep-extra/--no-keep-extra",
            help="Also copy tensors that are no part of the model. MindIE does not read them, vLLM refuses them.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = False,
    calib_samples: o.CalibSamples = None,
    prompt: o.Prompt = "Please describe this picture in detail.",
    texts: o.Texts = True,
    limit: o.LimitImages = None,
    generate: o.Generate = None,
    max_pixels: o.MaxPixels = None,
    skip_bad_images: o.SkipBadImages = False,
    compute_dtype: o.ComputeDtype = "auto",
    stats: Annotated[
        Path | None,
        typer.Option(
            "--stats",
            help="Statistics folder of `glmq calibrate`. It is written first if it does not exist; without it statistics are "
            "temporary.",
            rich_help_panel=o.CALIBRATION,
        ),
        Tier.USUAL,
    ] = None,
    w_bit: v.WBit = 8,
    a_bit: v.ABit = 8,
    is_lowbit: v.IsLowbit = False,
    co_sparse: v.CoSparse = False,
    is_dynamic: v.IsDynamic = False,
    anti_method: v.AntiMethod = "m2",
    act_method: v.ActMethod = 2,
    open_outlier: v.OpenOutlier = True,
    fraction: v.Fraction = 0.01,
    use_sigma: v.UseSigma = False,
    sigma_factor: v.SigmaFactor = 3.0,
    do_smooth: v.DoSmooth = False,
    group_size: v.GroupSize = 64,
    method: Annotated[
        Literal["compensated", "plain", "reference"],
        typer.Option(
            "--method",
            help="Rounding of weights: error-compensated, to nearest, or the vendor tool's integers.",
            rich_help_panel=o.QUANTIZATION,
        ),
    ] = "compensated",
    channel_shift: Annotated[
        bool,
        typer.Option(
            "--channel-shift/--no-channel-shift",
            help="Centre each input channel by the norm's bias: finer ranges for W8A8 and W8A8S. Not yet run on hardware.",
            rich_help_panel=o.QUANTIZATION,
        ),
    ] = False,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(
            "--keep-float",
            help="Pattern of linears that stay float beside the vision tower, down_proj and lm_head; repeatable.",
            rich_help_panel=o.QUANTIZATION,
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            "--layer",
            help="PATTERN=TYPE, e.g. '*.layers.0.*=FLOAT', or, but for W8A8S, '*.layers.*.down_proj=W8A8'. Repeatable, "
            "the last match counts.",
            rich_help_panel=o.QUANTIZATION,
            show_default=False,
        ),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(
            "--target-bits",
            min=0.5,
            max=8.0,
            help="Mean entropy of the sparse weights, bits each, spread over the linears for the least error. "
            "In other types the most that a linear may have.",
            rich_help_panel=o.QUANTIZATION,
        ),
    ] = None,
    target_ratio: Annotated[
        float | None,
        typer.Option(
            "--target-ratio",
            min=0.0625,
            max=1.0,
            help="The same as a share: compressed bytes of the weights over their int8 bytes.",
            rich_help_panel=o.QUANTIZATION,
        ),
    ] = None,
    allocate: Annotated[
        Literal["answer", "error"],
        typer.Option(
            "--allocate",
            help="Where the bits of W8A8S go: to what counts for the answer, or by each linear's own error alone.",
            rich_help_panel=o.QUANTIZATION,
        ),
    ] = "answer",
    propagation: Annotated[
        float,
        typer.Option(
            "--propagation",
            min=0.0,
            max=1.0,
            help="Quantize layer after layer, and make up for this share of what the layers before have done to the inputs: "
            "0.25 for W4A8_DYNAMIC, W4A16, and W8A8S of about 3 bits. It takes about twice the time.",
            rich_help_panel=o.QUANTIZATION,
        ),
    ] = 0.0,
    bias_correction: Annotated[
        bool,
        typer.Option(
            "--bias-correction/--no-bias-correction",
            help="Add the mean output error over the calibration tokens to quant_bias. It helps --method plain; "
            "compensated rounding leaves hardly any.",
            rich_help_panel=o.QUANTIZATION,
        ),
    ] = False,
    fallback_topk: Annotated[
        int,
        typer.Option(
            "--fallback-topk",
            min=0,
            help="Keep this many of the worst linears float, by measured output error; q, k, v count as one.",
            rich_help_panel=o.QUANTIZATION,
        ),
    ] = 0,
    max_error: Annotated[
        float | None,
        typer.Option(
            "--max-error",
            min=0.0,
            help="Keep linears with a larger relative output error float.",
            rich_help_panel=o.QUANTIZATION,
        ),
    ] = None,
    target: Annotated[
        Target,
        typer.Option("--target", help="Refuse what this engine on this chip does not load.", rich_help_panel=o.OUTPUT),
        Tier.USUAL,
    ] = Target.GENERIC,
    torch_dtype: v.TorchDtype = "bf16",
    mindie_format: v.MindieFormat = False,
    form: Annotated[
        Literal["ascendv1", "mindie", "compressed-tensors"] | None,
        typer.Option(
            "--format",
            help="Layout of the checkpoint. The first two are for Ascend engines; compressed-tensors for vLLM and "
            "transformers (W8A8, W8A8_DYNAMIC, W8A16, W4A16).",
            rich_help_panel=o.OUTPUT,
            show_default="ascendv1",
        ),
        Tier.USUAL,
    ] = None,
    part_file_size: v.PartFileSize = None,
    overwrite: o.Overwrite = False,
    work_dir: o.WorkDir = None,
    resume: o.Resume = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print plan, exact bytes, disk, memory and time; touch nothing.",
            rich_help_panel=o.RUN,
        ),
        Tier.USUAL,
    ] = False,
    config: o.ConfigFile = None,
    dump_config: o.DumpConfig = False,
    device_type: v.DeviceType = "cpu",
    trust_remote_code: v.TrustRemoteCode = False,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            help="Also write the page of the run, glmq_report.html of the output, to this file.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report/--no-report",
            help="Measure every linear's error, and write report, page and model card. Without, --method plain takes three "
            "quarters of the time.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = True,
    json_output: o.JsonOutput = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    log_file: o.LogFile = None,
    events: o.Events = None,
    debug: o.Debug = False,
) -> None:
    """Quantize a float GLM-4.1V or GLM-4.6V-Flash for MindIE and vLLM-Ascend; without --stats it calibrates first.

    Sparse W8A8S for the Atlas 300I Duo, and W8A8 for the Atlas 800I A2:

        glmq quantize --model_path FLOAT --save_directory OUT --preset 300i-duo
        glmq quantize --model_path FLOAT --save_directory OUT --preset 800i-a2
    """
    from dataclasses import asdict

    from glmq.checkpoint.json_file import write_named
    from glmq.cli.console import showing, stderr, stdout
    from glmq.cli.malloc import share_one_heap
    from glmq.cli.progress import ProgressView
    from glmq.cli.render import print_json, show_quantization, show_run_plan, times_json
    from glmq.cli.stopped import resuming_command
    from glmq.errors import UsageError
    from glmq.jobs.calibration_options import CalibrationOptions
    from glmq.jobs.quantization_job import QuantizationJob
    from glmq.jobs.quantize import forecast_quantization, run_quantization
    from glmq.jobs.run_report import PAGE
    from glmq.quantization.options import Options
    from glmq.quantization.recipe import make_recipe
    from glmq.ranks import read_place

    share_one_heap()
    if html is not None and not report:
        raise UsageError("--html: it is the page of the report, and --no-report writes none; leave one of the two out")
    options = Options(
        w_bit=w_bit,
        a_bit=a_bit,
        anti_method=anti_method,
        act_method=act_method,
        open_outlier=open_outlier,
        is_dynamic=is_dynamic,
        is_lowbit=is_lowbit,
        co_sparse=co_sparse,
        fraction=fraction,
        do_smooth=do_smooth,
        use_sigma=use_sigma,
        sigma_factor=sigma_factor,
        torch_dtype=torch_dtype,
        group_size=group_size,
        mindie_format=mindie_format,
        format=form,
        method=method,
        target_bits=target_bits,
        target_ratio=target_ratio,
        allocate=allocate,
        propagation=propagation,
        bias_correction=bias_correction,
        channel_shift=channel_shift,
        keep_float=tuple(keep_float or ()),
        layer=tuple(layer or ()),
        target=target.value,
    )
    if preset and read_place().is_first and not (quiet or json_output):
        stderr.say(f"preset {preset}: {flags_of(preset)}{overridden(preset, asdict(options))}")
    job = QuantizationJob(
        model_path,
        save_directory,
        make_recipe(options),
        CalibrationOptions(
            images=calib_images,
            recursive=recursive,
            samples_file=calib_samples,
            prompt=prompt,
            texts=texts,
            limit=limit,
            generate=generate,
            max_pixels=max_pixels,
            skip_bad=skip_bad_images,
            text_inputs=bool(propagation),
            device_type=device_type,
            compute_dtype=compute_dtype,
            trust_remote_code=trust_remote_code,
            dequantize=dequantize,
            chat_template=chat_template,
        ),
        stats_path=stats,
        shard_bytes=None if part_file_size is None else o.parse_size(part_file_size),
        fallback_topk=fallback_topk,
        max_error=max_error,
        work_dir=work_dir,
        keep_extra=keep_extra,
        reports=report,
        command=resuming_command(),
    )
    with ProgressView(quiet=quiet or json_output, verbose=verbose, events=events, verb="quantize") as view:
        if dry_run:
            plan = forecast_quantization(job, overwrite=overwrite, watch=view)
        else:
            result = run_quantization(job, overwrite=overwrite, resume=resume, watch=view)
    if dry_run:
        show_run_plan(plan, save_directory, as_json=json_output, verbose=verbose)
        return
    if not read_place().is_first:
        return
    with showing(result.folder):
        if json_output:
            print_json(
                {
                    **result.document,
                    "folder": str(result.folder),
                    "passes": times_json(result.times),
                    "seconds": result.seconds,
                    "settled": result.settled.is_settled,
                }
            )
        elif quiet:
            stdout.print(str(result.folder), soft_wrap=True)
        else:
            show_quantization(result, model_path, verbose=verbose)
    if html is not None:
        write_named(html, (result.folder / PAGE).read_bytes())
