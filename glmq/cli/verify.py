"""`glmq verify`: is a checkpoint right, before it reaches an NPU?"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from glmq.cli import options as o
from glmq.cli.help import Tier
from glmq.cli.inspect import Html
from glmq.engines import Chip, Engine, Place
from glmq.errors import UsageError

LIMITS = "Limits"
PLACES: Final = {
    "mindie": Place(Engine.MINDIE, None),
    "mindie-300i-duo": Place(Engine.MINDIE, Chip.DUO_300I),
    "mindie-800i-a2": Place(Engine.MINDIE, Chip.A2_800I),
    "vllm-ascend": Place(Engine.VLLM_ASCEND, None),
    "sglang": Place(Engine.SGLANG, None),
}


class ServingEngine(str, Enum):
    """An engine that can be asked here, without an NPU."""

    VLLM = "vllm"


FAILED = 3
"""Exit code: problems were found."""


def verify(
    candidate: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of a quantized or compressed checkpoint, whoever wrote it.",
            metavar="CANDIDATE",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            help="Folder of the float weights it was made from; of a compressed checkpoint, of its W8A8S weights.",
            rich_help_panel=o.MODEL,
        ),
        Tier.USUAL,
    ] = None,
    target: Annotated[
        Literal["mindie", "mindie-300i-duo", "mindie-800i-a2", "vllm-ascend", "sglang"] | None,
        typer.Option(
            "--target",
            help="Also emulate this engine's look-ups in headers and JSON files, and print which scheme it will take for each "
            "module.",
            rich_help_panel=o.MODEL,
            show_default=False,
        ),
        Tier.USUAL,
    ] = None,
    engine: Annotated[
        ServingEngine | None,
        typer.Option(
            "--engine",
            help="Also let both models answer the pictures or cases in this engine, which must be installed.",
            rich_help_panel=o.MODEL,
            show_default=False,
        ),
        Tier.USUAL,
    ] = None,
    calib_images: Annotated[
        Path | None,
        typer.Option(
            "--calib-images",
            help="Folder of images to run both models on; needs --reference.",
            rich_help_panel=o.SAMPLES,
        ),
        Tier.USUAL,
    ] = None,
    recursive: o.Recursive = False,
    cases: Annotated[
        Path | None,
        typer.Option(
            "--cases",
            help="JSON-lines file of cases with image, prompt and text (answer) to run both models on; needs --reference.",
            rich_help_panel=o.SAMPLES,
        ),
        Tier.USUAL,
    ] = None,
    prompt: o.Prompt = "Please describe this picture in detail.",
    limit: o.LimitCases = None,
    max_pixels: o.MaxPixels = None,
    max_kl: Annotated[
        float,
        typer.Option("--max-kl", min=0, help="Mean KL(float || candidate) in nats.", rich_help_panel=LIMITS),
    ] = 0.1,
    min_top1: Annotated[
        float,
        typer.Option(
            "--min-top1",
            min=0,
            max=1,
            help="Share of positions with the same top token or a tie.",
            rich_help_panel=LIMITS,
        ),
    ] = 0.9,
    max_error: Annotated[
        float,
        typer.Option("--max-error", min=0, help="Relative output error of the worst linear.", rich_help_panel=LIMITS),
    ] = 0.3,
    list_checks: Annotated[
        bool,
        typer.Option(
            "--list-checks",
            help="Print the number and title of every check, and whether it finds errors or warnings; CANDIDATE is not needed.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = False,
    html: Html = None,
    json_output: o.JsonOutput = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the verdict and errors only.", rich_help_panel=o.RUN)
    ] = False,
    verbose: o.Verbose = False,
    log_file: o.LogFile = None,
    events: o.Events = None,
    debug: o.Debug = False,
) -> None:
    """Check files, arithmetic and behaviour of a checkpoint; exit code 3 if something is wrong.

    Against the float weights, and by the look-ups of an engine:

        glmq verify W8A8S --reference FLOAT --calib-images PHOTOS
        glmq verify W8A8S --target mindie-300i-duo
    """
    from glmq.cli.console import stderr
    from glmq.cli.progress import ProgressView
    from glmq.cli.render import print_json
    from glmq.cli.verify_view import show_checks, show_verification
    from glmq.jobs.verify import CaseOptions
    from glmq.jobs.verify import verify as verify_folder
    from glmq.reporting.documents import checks_document, verification_document
    from glmq.reporting.page import write_page
    from glmq.reporting.verification_page import verification_page
    from glmq.verification.limits import Limits

    if list_checks:
        looking = {"--reference": reference, "--target": target, "--engine": engine, "--calib-images": calib_images}
        for option, value in {**looking, "--cases": cases, "--html": html, "--events": events}.items():
            if value is not None:
                raise UsageError(f"{option} with --list-checks: no checkpoint is looked at; drop one of them")
        if json_output:
            print_json(dict(checks_document()))
        else:
            show_checks()
        return
    if candidate is None:
        raise UsageError("CANDIDATE: missing; give the folder of a quantized or compressed checkpoint")
    with ProgressView(quiet=quiet or json_output, verbose=verbose, events=events, verb="verify") as view:
        found = verify_folder(
            candidate,
            reference=reference,
            engines=[] if target is None else [PLACES[target].engine],
            chip=None if target is None else PLACES[target].chip,
            limits=Limits(max_kl=max_kl, min_top1=min_top1, max_error=max_error),
            cases=CaseOptions(calib_images, recursive, cases, prompt, limit, max_pixels),
            in_vllm=engine is ServingEngine.VLLM,
            watch=view,
        )
    if json_output:
        print_json(dict(verification_document(found)))
    else:
        show_verification(found, quiet=quiet, verbose=verbose)
    if html is not None:  # after what was found, which no full disk may take away
        write_page(html, verification_page(found))
        if not (quiet or json_output):
            stderr.print(f"written: {html}", soft_wrap=True)
    if not found.passed:
        raise typer.Exit(FAILED)
