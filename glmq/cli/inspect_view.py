"""What `glmq inspect` shows: tables on stdout, progress on stderr."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from rich.text import Text

from glmq.cli.console import stdout
from glmq.cli.render import SHOWN_ROWS
from glmq.cli.statistics_view import show_statistics
from glmq.cli.tables import Cell, Column, FittedTable
from glmq.inspection.folder import Kind
from glmq.inspection.listing import (
    TensorRow,
    describe_folder,
    describe_place,
    group_rows,
    tensor_rows,
    totals_by_area,
    totals_by_type,
)
from glmq.inspection.parts import describe_part, group_parts
from glmq.model.config import FAMILY
from glmq.verification.engines.check import describe_engines, is_for
from glmq.wording import counted, dimensions, size

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
    if found.statistics is not None and not found.values:
        sites = {row.name.rpartition(".")[0] for row in found.rows}
        show_statistics(found.statistics, folder.nbytes, sites, one_by_one=one_by_one or verbose)
        return
    stdout.say(f"{folder.directory}: {describe_folder(folder)}", style="bold")
    stdout.say(f"{counted(len(folder.tensors), 'tensor')}, {size(folder.nbytes)}")
    if found.member is not None:
        stdout.say(f"model: {found.member}")
    if folder.directory.is_dir():
        stdout.say(f"for: {describe_engines(folder)}")
    for problem in folder.problems:
        _print_mark("error", problem)
    for target, findings in found.engines.items():
        wanted = ("error", "warning") if verbose else ("error",)  # warnings are for those who ask
        own = [found for found in findings if found.message not in folder.problems and found.severity in wanted]
        if not verbose and not is_for(folder, target):
            continue  # the line above says who does
        for finding in own if verbose else own[:SHOWN_PROBLEMS]:
            where = f"{finding.tensor}: " if finding.tensor else ""
            _print_mark(finding.severity, f"{target.value}: {where}{finding.message}")
        if len(own) > SHOWN_PROBLEMS and not verbose:
            stdout.print(f"  {target.value}: {len(own) - SHOWN_PROBLEMS} more; -v shows all")
    if found.values:
        stdout.print(_values_table(found))
    elif one_by_one:
        stdout.print(_tensors_table(found.rows))
    elif folder.kind in (Kind.PARTS, Kind.SHARDED, Kind.PORTABLE):
        stdout.print(_parts_table(found))
    else:
        stdout.print(_layers_table(found.rows))
    every = tensor_rows(folder)
    for title, totals in (("Bytes by part", totals_by_area(every)), ("Bytes by type", totals_by_type(every))):
        columns = [Column(title.split()[-1], left=True), Column("tensors", drop=1), Column("bytes"), Column("share")]
        rows = [
            [total.label, str(total.tensors), size(total.nbytes), f"{total.nbytes / max(1, folder.nbytes):.1%}"]
            for total in totals
        ]
        stdout.print(FittedTable(title, columns, rows))


def show_comparison(found: Comparison, *, limit: int | None, verbose: bool) -> None:
    """The differences, largest first, the layers, and what only one of them has."""
    stdout.say(f"A {found.a.directory}: {describe_folder(found.a)}, {size(found.a.nbytes)}")
    stdout.say(f"B {found.b.directory}: {describe_folder(found.b)}, {size(found.b.nbytes)}")
    differing = [diff for diff in found.diffs if not diff.identical]
    shown = differing[: limit or (len(differing) if verbose else SHOWN_ROWS)]
    left = len(differing) - len(shown)
    rows = [_diff_cells(diff) for diff in shown]
    equal = sum(diff.equal_within is not None for diff in differing)
    caption = f"{len(found.diffs) - len(differing)} of {len(found.diffs)} compared tensors are identical"
    caption += f", {counted(equal, 'is', 'are')} equal within the dtypes" if equal else ""
    caption += f"; -v shows {left} more" if left else ""
    stdout.print(FittedTable("Weights of B against A, largest difference first", _DIFF_COLUMNS, rows, caption=caption))
    layers = [row for row in found.layers if row.relative_l2 > 0 or row.layer == "total"]
    cells = [
        [
            row.layer,
            str(row.tensors),
            percent(row.relative_l2),
            percent(row.worst_relative_l2),
            FAMILY.short_name(row.worst),
        ]
        for row in layers
    ]
    columns = [
        Column("layer", left=True),
        Column("tensors", drop=3),
        Column("difference"),
        Column("largest"),
        Column("largest at", drop=2, left=True),
    ]
    stdout.print(FittedTable("Layers", columns, cells[:-1], total=cells[-1]))
    if found.verdict_place:
        stdout.say(found.verdict_place)
        stdout.print(f"  {found.verifying_command}", soft_wrap=True)
        stdout.print()
    for one in found.incomparable:
        _print_mark("error", f"{one.name}: {one.reason}")
    for title, patterns in (("Only in A", found.only_a), ("Only in B", found.only_b)):
        _show_patterns(title, patterns)
    for title, changes in (("config.json", found.config), ("the description", found.description)):
        _show_changes(title, changes, verbose=verbose)


_DIFF_COLUMNS: Final = (
    Column("tensor", left=True),
    Column("types", drop=1, left=True),
    Column("difference"),
    Column("SQNR dB", drop=2),
    Column("max abs", drop=4),
    Column("cosine", drop=5),
    Column("changed", drop=6),
    Column("step ratio", drop=7),
    Column("bits", drop=3),
)


def _diff_cells(diff: WeightDiff) -> list[Cell]:
    bits = "" if diff.entropy_b is None else f"{diff.entropy_b:.2f}"
    if diff.entropy_a is not None and diff.entropy_b is not None:
        bits = f"{diff.entropy_b - diff.entropy_a:+.2f}"
    coarser = diff.equal_within
    return [
        FAMILY.short_name(diff.name),
        f"{diff.type_a} > {diff.type_b}",
        percent(diff.relative_l2) if coarser is None else f"equal within {coarser}",
        f"{diff.sqnr_db:.1f}",
        f"{diff.max_abs:.3g}",
        f"{diff.cosine:.5f}",
        "" if diff.changed_share is None else f"{diff.changed_share:.1%}",
        "" if diff.step_ratio is None else f"{diff.step_ratio[1]:.3g}",
        bits,
    ]


def _layers_table(rows: Sequence[TensorRow]) -> FittedTable:
    return FittedTable(
        "Layers",
        [
            Column("layers and role", left=True),
            Column("type", left=True),
            Column("tensors", drop=2, left=True, wraps=True),
            Column("shape"),
            Column("bytes each", drop=1),
        ],
        [
            [describe_place(row.layers, row.role), row.quant_type, row.dtypes, dimensions(row.shape), size(row.nbytes)]
            for row in group_rows(rows)
        ],
    )


def _parts_table(found: Inspection) -> FittedTable:
    """Compressed parts: what is alike over ranks and layers in one line."""
    return FittedTable(
        "Parts, all ranks together",
        [
            Column("layers and role", left=True),
            Column("type", drop=3, left=True),
            Column("ranks", drop=4),
            Column("shape in a rank", drop=2),
            Column("bytes"),
            Column("bits"),
            Column("ratio", drop=1),
        ],
        [[describe_place(row.layers, row.role), *describe_part(row)] for row in group_parts(found.rows, found.packed)],
        caption="bits: of a weight as it is stored"
        if found.packed
        else "without its report nothing says how large the packed weights were",
    )


def _tensors_table(rows: Sequence[TensorRow]) -> FittedTable:
    return FittedTable(
        "Tensors",
        [
            Column("tensor", left=True),
            Column("type", drop=1, left=True),
            Column("dtype", left=True),
            Column("shape"),
            Column("bytes", drop=2),
        ],
        [
            [FAMILY.short_name(row.name), row.quant_type, row.dtype, dimensions(row.shape), size(row.nbytes)]
            for row in rows
        ],
    )


def _values_table(found: Inspection) -> FittedTable:
    rows: list[list[Cell]] = []
    for row in found.rows:
        values = found.values[row.name]
        bad = f"!! {values.nonfinite} not finite " if values.nonfinite else ""
        rows.append(
            [
                Text(f"{bad}{FAMILY.short_name(row.name)}", style="bold red" if bad else ""),
                row.dtype,
                sparkline(values.histogram),
                f"{values.minimum:.4g}",
                f"{values.maximum:.4g}",
                f"{values.std:.4g}",
                "" if values.entropy_bits is None else f"{values.entropy_bits:.2f}",
                f"{values.zero_share:.2%}",
                f"{values.outlier_share:.3%}",
            ]
        )
    return FittedTable(
        "Values",
        [
            Column("tensor", left=True),
            Column("dtype", drop=6, left=True),
            Column(
                "histogram",
                drop=7,
                left=True,
                note="histogram: from min to max, its heights are square roots of counts",
            ),
            Column("min"),
            Column("max"),
            Column("std", drop=1),
            Column("bits", drop=2),
            Column("zeros", drop=4),
            Column("outliers", drop=3, note="outliers: beyond 4 std"),
        ],
        rows,
    )


def sparkline(counts: Sequence[int]) -> str:
    """A histogram as text, two bins a character; heights are square roots of counts."""
    pairs = [sum(counts[i : i + 2]) for i in range(0, len(counts), 2)]
    most = math.sqrt(max(pairs, default=0)) or 1.0
    # A count that is there gets at least the lowest block.
    return "".join(BLOCKS[math.ceil(8 * math.sqrt(count) / most)] for count in pairs)


def _show_patterns(title: str, patterns: Sequence[NamePattern]) -> None:
    if patterns:
        rows = [[row.pattern, str(row.count)] for row in patterns]
        stdout.print(FittedTable(title, [Column("tensors (N: any number)", left=True), Column("count")], rows))


def _show_changes(title: str, changes: Sequence[KeyChange], *, verbose: bool) -> None:
    if not changes:
        return
    left = 0 if verbose else max(len(changes) - SHOWN_ROWS, 0)
    columns = [Column("key", left=True), *(Column(side, left=True, wraps=True) for side in "AB")]
    rows = [[FAMILY.short_name(c.key), _or_absent(c.a), _or_absent(c.b)] for c in changes[: len(changes) - left]]
    caption = f"{left} more; -v shows all" if left else ""
    stdout.print(FittedTable(f"Differences of {title}", columns, rows, caption=caption))


def _or_absent(value: str | None) -> str | Text:
    return Text("absent", style="dim") if value is None else value


def percent(error: float) -> str:
    """A relative error: `3.492%`, `<0.001%`, `1.2e+06%`, `inf`."""
    if not math.isfinite(error):
        return "inf"
    if error >= 1e4:
        return f"{100 * error:.2g}%"
    return f"{error:.3%}" if error >= 1e-5 or error == 0 else "<0.001%"


def _print_mark(severity: str, message: str) -> None:
    mark, style = ("!!", "bold red") if severity == "error" else ("!", "yellow")
    stdout.say(Text(f"{mark} {severity}: {message}", style=style))
