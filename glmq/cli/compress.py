"""`glmq compress`: weights compressed for the engine, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from glmq.cli import options as o
from glmq.cli.help import Tier
from glmq.engines import Engine
from glmq.errors import UsageError

COMPRESSION: Final = "Compression"


def compress(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IN OUT", help="The two folders, instead of the two options.", show_default=False),
    ] = None,
    model_path: Annotated[
        Path | None,
        typer.Option(
            "--model-path",
            help="Folder of the W8A8S weights; with --decompress, of what glmq compress wrote.",
            rich_help_panel=o.MODEL,
            show_default=False,
        ),
        Tier.USUAL,
    ] = None,
    save_directory: Annotated[
        Path | None,
        typer.Option("--save-directory", help="Folder to write into.", rich_help_panel=o.OUTPUT, show_default=False),
        Tier.USUAL,
    ] = None,
    tp: Annotated[
        int | None,
        typer.Option(
            "--tp",
            min=1,
            help="Tensor-parallel size to serve with: one part per rank, 1, 2 or 4.",
            rich_help_panel=COMPRESSION,
            show_default="1, or torchrun's processes",
        ),
        Tier.USUAL,
    ] = None,
    codec: Annotated[
        Literal["auto", "portable", "ascend"],
        typer.Option(
            "--codec",
            help="ascend: W8A8SC for the engine, by the vendor's compress program. portable: glmq's own lossless form, for "
            "storage and transport, which no engine reads. auto: ascend; without the program it says what to install.",
            rich_help_panel=COMPRESSION,
        ),
        Tier.USUAL,
    ] = "auto",
    executor: Annotated[
        Path | None,
        typer.Option(
            "--executor",
            envvar="GLMQ_EXECUTOR",
            help="Path of the vendor's program compress_excutor.",
            rich_help_panel=COMPRESSION,
            show_default="where msmodelslim builds it",
        ),
    ] = None,
    layout: Annotated[
        Literal["mindie", "vllm-ascend"],
        typer.Option(
            "--layout",
            help="Engine whose names and cuts are written. vllm-ascend is a best effort that was never run.",
            rich_help_panel=COMPRESSION,
        ),
    ] = "mindie",
    decompress: Annotated[
        bool,
        typer.Option(
            "--decompress/--no-decompress",
            help="Restore the W8A8S checkpoint that a portable folder was made from, bit for bit, from any number of parts.",
            rich_help_panel=COMPRESSION,
        ),
        Tier.USUAL,
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "--multiprocess-num",
            min=1,
            help="Weights worked on at a time; each needs a few times its own size in memory.",
            rich_help_panel=o.RUN,
            show_default="the cores",
        ),
    ] = None,
    save_split_w8a8s_dir: Annotated[
        Path | None,
        typer.Option(
            "--save-split-w8a8s-dir",
            help="Also keep the uncompressed part of each rank, in MindIE's layout, in this folder.",
            rich_help_panel=o.OUTPUT,
            show_default=False,
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code/--no-trust-remote-code",
            help="Accepted, since the engine's own command has it: compressing runs no code of the model folder.",
            rich_help_panel=o.MODEL,
        ),
    ] = False,
    overwrite: o.Overwrite = False,
    work_dir: o.WorkDir = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the bytes to write, exact or estimated, the disk, memory and time needed; touch nothing.",
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
    """Compress W8A8S weights to W8A8SC for the Atlas 300I Duo, one part per tensor-parallel rank.

    In one process, or one process per rank; the bytes are the same:

        glmq compress --model_path W8A8S --save_directory OUT --tp 2
        torchrun --nproc_per_node 2 -m glmq compress W8A8S OUT

    The engine's own command, examples.convert.model_slim.sparse_compressor, has the options --multiprocess_num,
    --trust_remote_code and --save_split_w8a8s_dir; they mean the same here.

    To the portable form, which needs no program of the vendor's, and back:

        glmq compress W8A8S PACKED --codec portable
        glmq compress --decompress PACKED UNPACKED
    """
    from glmq.cli.compress_view import (
        show_compression,
        show_compression_plan,
        show_restoration_plan,
        show_restored,
    )
    from glmq.cli.console import showing, stdout
    from glmq.cli.malloc import return_large_buffers
    from glmq.cli.progress import ProgressView
    from glmq.cli.render import print_json
    from glmq.jobs.compress import CompressionJob, CompressionOptions, forecast_compression, run_compression
    from glmq.jobs.restore import restore
    from glmq.ranks import read_place

    return_large_buffers()
    source, target = settle_folders(folders or [], model_path, save_directory)
    if decompress and (tp is not None or codec == "ascend" or layout != "mindie" or save_split_w8a8s_dir):
        raise UsageError(
            "--decompress: takes no --tp, --codec, --layout or --save_split_w8a8s_dir, the folder says what it is; "
            "leave them out"
        )
    options = CompressionOptions(executor, Engine(layout), jobs, work_dir, save_split_w8a8s_dir)
    job = CompressionJob(source, target, tp, codec, options)
    if decompress and dry_run:
        planned = restore(source, out=target, jobs=jobs, overwrite=overwrite, work_dir=work_dir, dry_run=True)
        show_restoration_plan(planned, target, as_json=json_output)
        return
    with ProgressView(quiet=quiet or json_output, verbose=verbose, events=events, verb="compress") as view:
        if decompress:
            restored = restore(source, out=target, jobs=jobs, overwrite=overwrite, work_dir=work_dir, watch=view)
        elif dry_run:
            plan = forecast_compression(job, overwrite=overwrite, watch=view)
        else:
            result = run_compression(job, overwrite=overwrite, watch=view)
    if decompress:
        show_restored(restored, as_json=json_output, quiet=quiet)
        return
    if dry_run:
        show_compression_plan(plan, target, as_json=json_output, verbose=verbose)
        return
    if not read_place().is_first:
        return
    with showing(result.folder):
        if json_output:
            print_json({**result.document, "folder": str(result.folder)})
        elif quiet:
            stdout.print(str(result.folder), soft_wrap=True)
        else:
            show_compression(result, verbose=verbose)


def settle_folders(folders: Sequence[Path], model_path: Path | None, save_directory: Path | None) -> tuple[Path, Path]:
    """The folder to read and the one to write, however they were given.

    Raises:
        UsageError: one is missing, or there are others.
    """
    match folders, model_path, save_directory:
        case [source, target], None, None:
            return source, target
        case [], Path() as source, Path() as target:
            return source, target
        case [], _, _:
            missing = "--save-directory" if model_path else "--model-path"
            raise UsageError(
                f"{missing}: missing; give --model_path IN --save_directory OUT, or just the two folders IN OUT"
            )
    raise UsageError(
        f"IN OUT: wanted two folders, or --model_path and --save_directory in their place; found {len(folders)}"
        f"{' and the options' if model_path or save_directory else ''}"
    )
