"""`glmq quantize`: the options of the vendor's `quant_glm41v.py`, flag by flag, and glmq's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from glmq.cli import options as o
from glmq.quantization.targets import Target


def quantize(
    model_path: o.ModelPath,
    save_directory: Annotated[
        Path,
        typer.Option("--save-directory", help="Folder to write the quantized weights into.", rich_help_panel=o.OUTPUT),
    ],
    calib_images: o.CalibImages = None,
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
            help="Statistics folder of `glmq calibrate`; written first if it does not exist. Without it they are temporary.",
            rich_help_panel=o.CALIBRATION,
        ),
    ] = None,
    w_bit: Annotated[int, typer.Option("--w-bit", help="Weight bits: 4 or 8.", rich_help_panel=o.QUANTIZATION)] = 8,
    a_bit: Annotated[
        int,
        typer.Option(
            "--a-bit",
            help="Activation bits: 8, or 16 for float activations (W8A16; W4A16 with --format compressed-tensors).",
            rich_help_panel=o.QUANTIZATION,
        ),
    ] = 8,
    is_lowbit: Annotated[
        bool,
        typer.Option(
            "--is-lowbit/--no-is-lowbit",
            help="The low-bit sparse algorithm: W8A8S, or W4A8_DYNAMIC with --is_dynamic.",
            rich_help_panel=o.QUANTIZATION,
        ),
    ] = False,
    co_sparse: Annotated[
        bool,
        typer.Option(
            "--co-sparse/--no-co-sparse",
            help="W8A8S with outliers chosen over the whole tensor.",
            rich_help_panel=o.QUANTIZATION,
        ),
    ] = False,
    is_dynamic: Annotated[
        bool,
        typer.Option(
            "--is-dynamic/--no-is-dynamic",
            help="Activation scales per token at run time.",
            rich_help_panel=o.QUANTIZATION,
        ),
    ] = False,
    anti_method: Annotated[
        Literal["m2", "none"],
        typer.Option(
            "--anti-method", help="Outlier suppression before the norms' linears.", rich_help_panel=o.QUANTIZATION
        ),
    ] = "m2",
    act_method: Annotated[
        int,
        typer.Option(
            "--act-method",
            help="Activation range: 1 min-max, 2 histogram, 3 the better of both per input.",
            rich_help_panel=o.QUANTIZATION,
        ),
    ] = 2,
    open_outlier: Annotated[
        bool,
        typer.Option(
            "--open-outlier/--no-open-outlier",
            help="Split weight outliers off in sparse types; off: the step covers the largest weight.",
            rich_help_panel=o.QUANTIZATION,
        ),
    ] = True,
    fraction: Annotated[
        float,
        typer.Option(
            "--fraction",
            help="Share of weight outliers that sparse types protect, 0.01 to 0.1.",
            rich_help_panel=o.QUANTIZATION,
        ),
    ] = 0.01,
    use_sigma: Annotated[
        bool,
        typer.Option(
            "--use-sigma/--no-use-sigma",
            help="Choose outliers by standard deviations instead of --fraction.",
            rich_help_panel=o.QUANTIZATION,
        ),
    ] = False,
    sigma_factor: Annotated[
        float,
        typer.Option("--sigma-factor", help="How many, 1.0 to 3.0, with --use_sigma.", rich_help_panel=o.QUANTIZATION),
    ] = 3.0,
    do_smooth: Annotated[
        bool,
        typer.Option(
            "--do-smooth/--no-do-smooth",
            help="SmoothQuant scales instead of m2's.",
            rich_help_panel=o.QUANTIZATION,
        ),
    ] = False,
    group_size: Annotated[
        int,
        typer.Option(
            "--group-size",
            help="Input columns per step of W4A8_DYNAMIC: 64, 128, 256 or 512; of W8A16 and W4A16 in compressed-tensors: "
            "32, 64 or 128.",
            rich_help_panel=o.QUANTIZATION,
        ),
    ] = 64,
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
            help="PATTERN=TYPE, e.g. '*.mlp.down_proj=W8A8' or '*.layers.0.*=FLOAT'; repeatable, the last match counts.",
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
    ] = Target.GENERIC,
    torch_dtype: Annotated[
        Literal["bf16", "fp16"],
        typer.Option("--torch-dtype", help="Dtype of the stored float weights.", rich_help_panel=o.OUTPUT),
    ] = "bf16",
    mindie_format: Annotated[
        bool,
        typer.Option(
            "--mindie-format/--no-mindie-format",
            help="Write the older MindIE layout instead of ascendV1, as --format mindie does.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = False,
    form: Annotated[
        Literal["ascendv1", "mindie", "compressed-tensors"] | None,
        typer.Option(
            "--format",
            help="Layout of the checkpoint: ascendv1 or mindie for Ascend engines; compressed-tensors for vLLM, SGLang and "
            "transformers (W8A8, W8A8_DYNAMIC, W8A16, W4A16).  \\[default: ascendv1]",
            rich_help_panel=o.OUTPUT,
            show_default=False,
        ),
    ] = None,
    part_file_size: Annotated[
        str | None,
        typer.Option(
            "--part-file-size",
            help="Upper size of one weight file: GB as a whole number, or 4GB, 500MB.  \\[default: one file]",
            rich_help_panel=o.OUTPUT,
            show_default=False,
        ),
    ] = None,
    overwrite: o.Overwrite = False,
    work_dir: o.WorkDir = None,
    resume: o.Resume = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the plan per linear, exact output bytes, disk, memory and time; touch nothing.",
            rich_help_panel=o.RUN,
        ),
    ] = False,
    config: o.ConfigFile = None,
    dump_config: o.DumpConfig = False,
    device_type: o.DeviceType = "cpu",
    trust_remote_code: o.TrustRemoteCode = False,
    json_output: o.JsonOutput = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    log_file: o.LogFile = None,
    debug: o.Debug = False,
) -> None:
    """Quantize a float GLM-4.1V or GLM-4.6V-Flash for MindIE and vLLM-Ascend; calibrates first unless --stats has it.

    Sparse W8A8S for the Atlas 300I Duo:
    [bold]glmq quantize --model_path FLOAT --save_directory OUT --calib_images photos
    --w_bit 4 --is_lowbit True --use_sigma True --torch_dtype fp16[/]

    W8A8 for the Atlas 800I A2:
    [bold]glmq quantize --model_path FLOAT --save_directory OUT --calib_images photos[/]
    """
    from glmq.cli.console import showing, stdout
    from glmq.cli.progress import ProgressView
    from glmq.cli.render import print_json, show_quantization, show_run_plan, times_json
    from glmq.jobs.calibrate import CalibrationOptions
    from glmq.jobs.quantize import QuantizationJob, forecast_quantization, run_quantization
    from glmq.quantization.recipe import Options, make_recipe
    from glmq.ranks import read_place

    job = QuantizationJob(
        model_path,
        save_directory,
        make_recipe(
            Options(
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
                bias_correction=bias_correction,
                channel_shift=channel_shift,
                keep_float=tuple(keep_float or ()),
                layer=tuple(layer or ()),
                target=target.value,
            )
        ),
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
    )
    with ProgressView(quiet=quiet or json_output) as view:
        if dry_run:
            plan = forecast_quantization(job, overwrite=overwrite, watch=view)
            show_run_plan(plan, save_directory, as_json=json_output, verbose=verbose)
            return
        result = run_quantization(job, overwrite=overwrite, resume=resume, watch=view)
    if not read_place().is_first:
        return
    with showing(result.folder):
        if json_output:
            print_json({**result.document, "folder": str(result.folder), "passes": times_json(result.times)})
        elif quiet:
            stdout.print(str(result.folder), soft_wrap=True)
        else:
            show_quantization(result, verbose=verbose)
