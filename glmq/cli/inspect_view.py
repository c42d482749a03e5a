"""What `glmq inspect` shows: tables on stdout, progress on stderr."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from rich.table import Table
from rich.text import Text

from glmq.cli.console import VisibleTable, stdout
from glmq.cli.render import BAD_ERROR, POOR_ERROR, SHOWN_ROWS, size
from glmq.inspection.listing import (
    TensorRow,
    describe_folder,
    describe_layers,
    group_rows,
    tensor_rows,
    totals_by_area,
    totals_by_type,
)
from glmq.model.config import FAMILY
from glmq.verification.engines.check import describe_engines

if TYPE_CHECKING:
    from glmq.inspection.compare import WeightDiff
    from glmq.inspection.compare_keys import KeyChange, NamePattern
    from glmq.inspection.comparison import Comparison
    from glmq.reporting.documents import Inspection

BLOCKS: Final = " ▁▂▃▄▅▆▇█"
SHOWN_PROBLEMS: Final = 5
"""Of each engine, before the rest is left to -v."""


def show_inspection(found: Inspection, *, one_by_one: bool, verbose: bool) -> None:
    """What the folder is, what is wrong with it, its tensors and their bytes.

    Args:
        one_by_one: list tensors instead of lines of layers that are alike.
        verbose: show every row.
    """
    folder = found.folder
    stdout.print(f"{folder.directory}: {describe_folder(folder)}", style="bold", soft_wrap=True)
    stdout.print(f"{len(folder.tensors)} tensors, {size(folder.nbytes)}")
    if found.member is not None:
        stdout.print(f"model: {found.member}", soft_wrap=True)
    stdout.print(f"for: {describe_engines(folder)}", soft_wrap=True)
    for problem in folder.problems:
        _print_mark("error", problem)
    for target, findings in found.engines.items():
        own = [finding for finding in findings if finding.message not in folder.problems]
        for finding in own if verbose else own[:SHOWN_PROBLEMS]:
            where = f"{finding.tensor}: " if finding.tensor else ""
            _print_mark(finding.severity, f"{target.value}: {where}{finding.message}")
        if len(own) > SHOWN_PROBLEMS and not verbose:
            stdout.print(f"  {target.value}: {len(own) - SHOWN_PROBLEMS} more; -v shows all")
    if found.values:
        stdout.print(_values_table(found))
    elif one_by_one:
        stdout.print(_tensors_table(found.rows))
    else:
        stdout.print(_layers_table(found.rows))
    every = tensor_rows(folder)
    for title, totals in (("Bytes by part", totals_by_area(every)), ("Bytes by type", totals_by_type(every))):
        table = plain_table(title, ("", "tensors", "bytes", "share"), left=1)
        for total in totals:
            share = f"{total.nbytes / max(1, folder.nbytes):.1%}"
            table.add_row(total.label, str(total.tensors), size(total.nbytes), share)
        stdout.print(table)


def show_comparison(found: Comparison, *, limit: int | None, verbose: bool) -> None:
    """The differences, worst first, the layers, and what only one of them has."""
    stdout.print(f"A {found.a.directory}: {describe_folder(found.a)}, {size(found.a.nbytes)}", soft_wrap=True)
    stdout.print(f"B {found.b.directory}: {describe_folder(found.b)}, {size(found.b.nbytes)}", soft_wrap=True)
    differing = [diff for diff in found.diffs if not diff.identical]
    shown = differing[: limit or (len(differing) if verbose else SHOWN_ROWS)]
    table = plain_table("Weights of B against A, worst first", _DIFF_HEADER, left=2)
    for diff in shown:
        table.add_row(*_diff_cells(diff))
    left = len(differing) - len(shown)
    identical = f"{len(found.diffs) - len(differing)} of {len(found.diffs)} compared tensors are identical"
    table.caption = f"{identical}; {left} more differ, -v shows all" if left else identical
    table.caption_justify = "left"
    stdout.print(table)
    layers = plain_table("Layers", ("layer", "tensors", "relative", "worst", ""), left=1)
    for row in found.layers:
        if row.relative_l2 > 0 or row.layer == "total":
            style = "bold" if row.layer == "total" else None
            worst = marked(row.worst_relative_l2)
            name = FAMILY.short_name(row.worst)
            layers.add_row(row.layer, str(row.tensors), marked(row.relative_l2), name, worst, style=style)
    stdout.print(layers)
    for one in found.incomparable:
        _print_mark("error", f"{one.name}: {one.reason}")
    for title, patterns in (("Only in A", found.only_a), ("Only in B", found.only_b)):
        _show_patterns(title, patterns)
    for title, changes in (("config.json", found.config), ("description", found.description)):
        _show_changes(title, changes, verbose=verbose)


_DIFF_HEADER: Final = ("tensor", "types", "relative", "SQNR dB", "max abs", "cosine", "changed", "step ratio", "bits")


def _diff_cells(diff: WeightDiff) -> list[str | Text]:
    bits = "" if diff.entropy_b is None else f"{diff.entropy_b:.2f}"
    if diff.entropy_a is not None and diff.entropy_b is not None:
        bits = f"{diff.entropy_b - diff.entropy_a:+.2f}"
    return [
        FAMILY.short_name(diff.name),
        f"{diff.type_a} > {diff.type_b}",
        marked(diff.relative_l2),
        "inf" if math.isinf(diff.sqnr_db) else f"{diff.sqnr_db:.1f}",
        f"{diff.max_abs:.3g}",
        f"{diff.cosine:.5f}",
        "" if diff.changed_share is None else f"{diff.changed_share:.1%}",
        "" if diff.step_ratio is None else f"{diff.step_ratio[1]:.3g}",
        bits,
    ]


def _layers_table(rows: Sequence[TensorRow]) -> Table:
    table = plain_table("Layers", ("layers", "role", "type", "tensors", "shape", "bytes each"), left=4)
    for row in group_rows(rows):
        shape = " x ".join(map(str, row.shape))
        table.add_row(describe_layers(row.layers), row.role, row.quant_type, row.dtypes, shape, size(row.nbytes))
    return table


def _tensors_table(rows: Sequence[TensorRow]) -> Table:
    table = plain_table("Tensors", ("tensor", "type", "dtype", "shape", "bytes"), left=3)
    for row in rows:
        table.add_row(
            FAMILY.short_name(row.name), row.quant_type, row.dtype, " x ".join(map(str, row.shape)), size(row.nbytes)
        )
    return table


def _values_table(found: Inspection) -> Table:
    header = ("tensor", "dtype", "histogram", "min", "max", "std", "bits", "zeros", "outliers")
    table = plain_table("Values", header, left=3)
    for row in found.rows:
        values = found.values[row.name]
        bad = f"!! {values.nonfinite} not finite " if values.nonfinite else ""
        table.add_row(
            Text(f"{bad}{FAMILY.short_name(row.name)}", style="bold red" if bad else ""),
            row.dtype,
            sparkline(values.histogram),
            f"{values.minimum:.4g}",
            f"{values.maximum:.4g}",
            f"{values.std:.4g}",
            "" if values.entropy_bits is None else f"{values.entropy_bits:.2f}",
            f"{values.zero_share:.2%}",
            f"{values.outlier_share:.3%}",
        )
    table.caption = "Histograms run from min to max, their heights are square roots of counts. Outliers: beyond 4 std."
    table.caption_justify = "left"
    return table


def sparkline(counts: Sequence[int]) -> str:
    """A histogram as text, two bins a character; heights are square roots of counts."""
    pairs = [sum(counts[i : i + 2]) for i in range(0, len(counts), 2)]
    most = math.sqrt(max(pairs, default=0)) or 1.0
    # A count that is there gets at least the lowest block.
    return "".join(BLOCKS[math.ceil(8 * math.sqrt(count) / most)] for count in pairs)


def _show_patterns(title: str, patterns: Sequence[NamePattern]) -> None:
    if patterns:
        table = plain_table(title, ("tensors", "count"), left=1)
        for row in patterns:
            table.add_row(row.pattern, str(row.count))
        stdout.print(table)


def _show_changes(title: str, changes: Sequence[KeyChange], *, verbose: bool) -> None:
    if not changes:
        return
    table = plain_table(f"Differences of {title}", ("key", "A", "B"), left=3)
    for change in changes if verbose else changes[:SHOWN_ROWS]:
        table.add_row(change.key, _or_absent(change.a), _or_absent(change.b))
    if len(changes) > SHOWN_ROWS and not verbose:
        table.caption = f"{len(changes) - SHOWN_ROWS} more; -v shows all"
        table.caption_justify = "left"
    stdout.print(table)


def _or_absent(value: str | None) -> str | Text:
    return Text("absent", style="dim") if value is None else value


def plain_table(title: str, header: Sequence[str], *, left: int) -> Table:
    """A plain table whose first `left` columns are flush left."""
    table = VisibleTable(title)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < left else "right", overflow="fold")
    return table


def marked(error: float) -> Text:
    """A relative error with a colour and, for those who see none, a mark."""
    text = "inf" if math.isinf(error) else f"{error:.3%}" if error >= 1e-5 or error == 0 else f"{error:.0e}"
    if not error < BAD_ERROR:
        return Text(f"!! {text}", style="bold red")
    return Text(f"! {text}", style="yellow") if error >= POOR_ERROR else Text(text, style="green")


def _print_mark(severity: str, message: str) -> None:
    mark, style = ("!!", "bold red") if severity == "error" else ("!", "yellow")
    stdout.print(Text(f"{mark} {severity}: {message}", style=style), soft_wrap=True)
