"""`glmq inspect`: what is in a checkpoint, and what differs between two."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from glmq.cli import options as o
from glmq.cli.help import Tier
from glmq.errors import UsageError

CHOICE = "Choice of tensors"

Html = Annotated[
    Path | None,
    typer.Option("--html", help="Also write one self-contained page to this file.", rich_help_panel=o.OUTPUT),
    Tier.USUAL,
]


def inspect(
    a: Annotated[
        Path,
        typer.Argument(
            help="Folder of a checkpoint of any kind or of statistics, or a .safetensors file.", metavar="A"
        ),
    ],
    b: Annotated[Path | None, typer.Argument(help="Another of its kind, to compare with A.", metavar="[B]")] = None,
    layer: Annotated[
        str | None,
        typer.Option("--layer", help="Only this text layer (3), or layers like visual.*", rich_help_panel=CHOICE),
        Tier.USUAL,
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            help="Only tensors whose name ends in this pattern (*, ?) or contains this text.",
            rich_help_panel=CHOICE,
        ),
        Tier.USUAL,
    ] = None,
    sort: Annotated[
        Literal["name", "bytes", "type", "role"],
        typer.Option("--sort", help="Order of tensors.", rich_help_panel=CHOICE),
        Tier.USUAL,
    ] = "name",
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Show at most this many rows.", rich_help_panel=CHOICE),
        Tier.USUAL,
    ] = None,
    values: Annotated[
        bool,
        typer.Option(
            "--values/--no-values",
            help="Read the weights: range, spread, entropy, zeros, outliers, histogram.",
            rich_help_panel=CHOICE,
        ),
        Tier.USUAL,
    ] = False,
    csv: Annotated[
        Path | None,
        typer.Option("--csv", help="Also write the rows to this file.", rich_help_panel=o.OUTPUT),
        Tier.USUAL,
    ] = None,
    html: Html = None,
    json_output: o.JsonOutput = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=o.RUN)] = False,
    verbose: o.Verbose = False,
    log_file: o.LogFile = None,
    debug: o.Debug = False,
) -> None:
    """Look into a checkpoint without loading it, or compare two weight by weight, worst first.

    One layer with the values of its weights, and two checkpoints against each other:

        glmq inspect W8A8S --layer 1 --values
        glmq inspect FLOAT W8A8S --html report.html
    """
    from glmq.cli.inspect_view import show_comparison, show_inspection
    from glmq.cli.malloc import keep_freed_memory
    from glmq.cli.progress import ProgressView
    from glmq.cli.render import print_json
    from glmq.cli.statistics_view import show_statistics_comparison
    from glmq.inspection.folder import is_statistics
    from glmq.reporting.comparison_page import comparison_page
    from glmq.reporting.documents import (
        comparison_csv,
        comparison_document,
        inspection_csv,
        inspection_document,
        statistics_comparison_csv,
        statistics_comparison_document,
        write_csv,
    )
    from glmq.reporting.inspection_page import inspection_page
    from glmq.reporting.page import write_page
    from glmq.reporting.statistics_page import statistics_comparison_page

    with ProgressView(quiet=quiet or json_output or not sys.stderr.isatty()) as view:
        if b is None:
            from glmq.jobs.inspect import Choice
            from glmq.jobs.inspect import inspect as inspect_folder

            found = inspect_folder(a, choice=Choice(layer, name, sort, limit), values=values, watch=view)
            rows, document, page = inspection_csv(found), inspection_document(found), partial(inspection_page, found)
            one_by_one = layer is not None or name is not None or limit is not None
            show = partial(show_inspection, found, one_by_one=one_by_one, verbose=verbose)
        elif is_statistics(a) and is_statistics(b):
            from glmq.jobs.compare import compare_statistics

            if values or sort != "name" or layer is not None or name is not None:
                raise UsageError(
                    "--layer, --name, --values and --sort: two statistics folders are compared as a whole; drop them"
                )
            found_both = compare_statistics(a, b, watch=view)
            first = replace(found_both, changes=found_both.changes[:limit])
            rows, document = statistics_comparison_csv(first), statistics_comparison_document(first)
            page = partial(statistics_comparison_page, first)
            show = partial(show_statistics_comparison, found_both, limit=limit, verbose=verbose)
        elif values or sort != "name":
            raise UsageError("--values and --sort are for one checkpoint; two are compared by value, worst first")
        else:
            from glmq.jobs.compare import compare

            keep_freed_memory()
            diff = compare(a, b, layer=layer, name=name, histograms=html is not None, watch=view)
            worst = replace(diff, diffs=diff.diffs[:limit])
            rows, document, page = (
                comparison_csv(worst),
                comparison_document(worst),
                partial(comparison_page, diff, limit),
            )
            show = partial(show_comparison, diff, limit=limit, verbose=verbose)
    if json_output:
        print_json(dict(document))
    elif not quiet:
        show()
    if csv is not None:  # after what was found, which no full disk may take away
        write_csv(csv, rows)
    if html is not None:
        write_page(html, page())
    if not (quiet or json_output):
        _say_written(csv, html)


def _say_written(*paths: Path | None) -> None:
    from glmq.cli.console import stderr

    for path in paths:
        if path is not None:
            stderr.print(f"written: {path}", soft_wrap=True)
