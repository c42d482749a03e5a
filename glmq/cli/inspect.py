"""`glmq inspect`: what is in a checkpoint, and what differs between two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from glmq.cli import options as o
from glmq.errors import UsageError

CHOICE = "Choice of tensors"

Html = Annotated[
    Path | None,
    typer.Option("--html", help="Also write one self-contained page to this file.", rich_help_panel=o.OUTPUT),
]


def inspect(
    a: Annotated[Path, typer.Argument(help="Folder of a checkpoint of any kind, or of statistics.", metavar="A")],
    b: Annotated[Path | None, typer.Argument(help="Another checkpoint, to compare with A.", metavar="[B]")] = None,
    layer: Annotated[
        str | None,
        typer.Option("--layer", help="Only this text layer (3), or layers like visual.*", rich_help_panel=CHOICE),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            help="Only tensors whose name ends in this pattern (*, ?) or contains this text.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    sort: Annotated[
        Literal["name", "bytes", "type", "role"],
        typer.Option("--sort", help="Order of tensors.", rich_help_panel=CHOICE),
    ] = "name",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Show at most this many rows.", rich_help_panel=CHOICE)
    ] = None,
    values: Annotated[
        bool,
        typer.Option(
            "--values/--no-values",
            help="Read the weights: range, spread, entropy, zeros, outliers, histogram.",
            rich_help_panel=CHOICE,
        ),
    ] = False,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Also write the rows to this file.", rich_help_panel=o.OUTPUT)
    ] = None,
    html: Html = None,
    json_output: o.JsonOutput = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Look into a checkpoint without loading it, or compare two weight by weight, worst first.

    [bold]glmq inspect W8A8S --layer 3 --values[/]

    [bold]glmq inspect FLOAT W8A8S --html report.html[/]
    """
    if b is None:
        _inspect_one(
            a, layer, name, sort, limit, csv, html, values=values, json_output=json_output, quiet=quiet, verbose=verbose
        )
    elif values or sort != "name":
        raise UsageError("--values and --sort are for one checkpoint; two are compared by value, worst first")
    else:
        _inspect_two(a, b, layer, name, limit, csv, html, json_output=json_output, quiet=quiet, verbose=verbose)


def _inspect_one(
    a: Path,
    layer: str | None,
    name: str | None,
    sort: str,
    limit: int | None,
    csv: Path | None,
    html: Path | None,
    *,
    values: bool,
    json_output: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    from glmq.cli.inspect_view import read_values, show_inspection
    from glmq.cli.render import print_json
    from glmq.inspection.folder import Kind, scan_folder
    from glmq.inspection.listing import choose_rows, tensor_rows
    from glmq.reporting.documents import Inspection, inspection_csv, inspection_document, write_csv
    from glmq.reporting.inspection_page import inspection_page
    from glmq.reporting.page import write_page
    from glmq.verification.engines.check import Target, check_target

    folder = scan_folder(a)
    rows = choose_rows(tensor_rows(folder), layer=layer, name=name, sort=sort)[:limit]
    is_model = folder.kind in (Kind.QUANTIZED, Kind.PARTS, Kind.SHARDED)
    found = Inspection(
        folder=folder,
        rows=rows,
        values=read_values(rows, quiet=quiet or json_output) if values else {},
        engines={target: list(check_target(folder, target)) for target in Target} if is_model else {},
    )
    if csv is not None:
        write_csv(csv, inspection_csv(found))
    if html is not None:
        write_page(html, inspection_page(found))
    if json_output:
        print_json(dict(inspection_document(found)))
    elif not quiet:
        show_inspection(found, one_by_one=layer is not None or name is not None or limit is not None, verbose=verbose)
        _say_written(csv, html)


def _inspect_two(
    a: Path,
    b: Path,
    layer: str | None,
    name: str | None,
    limit: int | None,
    csv: Path | None,
    html: Path | None,
    *,
    json_output: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    from glmq.cli.inspect_view import compare_folders, show_comparison
    from glmq.cli.render import print_json
    from glmq.reporting.comparison_page import comparison_page
    from glmq.reporting.documents import comparison_csv, comparison_document, write_csv
    from glmq.reporting.page import write_page

    found = compare_folders(a, b, layer=layer, name=name, with_histograms=html is not None, quiet=quiet or json_output)
    if csv is not None:
        write_csv(csv, comparison_csv(found))
    if html is not None:
        write_page(html, comparison_page(found))
    if json_output:
        print_json(dict(comparison_document(found)))
    elif not quiet:
        show_comparison(found, limit=limit, verbose=verbose)
        _say_written(csv, html)


def _say_written(*paths: Path | None) -> None:
    from glmq.cli.render import stderr

    for path in paths:
        if path is not None:
            stderr.print(f"written: {path}", soft_wrap=True)
