"""What `glmq verify` shows on stdout."""

from __future__ import annotations

from statistics import median
from typing import Final

from rich.text import Text

from glmq.checkpoint.names import natural_key
from glmq.cli.console import stdout
from glmq.cli.inspect_view import percent
from glmq.cli.render import legend, marked
from glmq.cli.tables import Cell, Column, FittedTable
from glmq.model.config import FAMILY
from glmq.reporting.documents import Verification
from glmq.verification.engines.schemes import group_schemes
from glmq.verification.findings import Check, Finding
from glmq.wording import counted

MODELS: Final = 11
"""Columns of the names of the two models before their answers."""
SHOWN_FINDINGS: Final = 3
"""Of each check, before the rest is counted."""


def show_verification(found: Verification, *, quiet: bool, verbose: bool) -> None:
    """The verdict, what was checked and found, the numbers in short or with `verbose` in tables, and the verdict again."""
    if not quiet:
        _show_verdict(found)
        stdout.say(f"{found.candidate}: {found.what}", style="bold")
        for what in found.checked:
            stdout.say(f"checked: {what}")
        for what in found.not_checked:
            stdout.say(f"not checked: {what}")
        _show_findings(found, verbose=verbose)
        for engine, schemes in found.schemes.items():
            columns = [Column("module", left=True), Column("scheme", left=True, wraps=True)]
            stdout.print(FittedTable(f"What {engine.spec.title} will take", columns, group_schemes(schemes)))
        if verbose:
            _show_linears(found)
            _show_blocks(found)
            _show_samples(found)
        else:
            _show_in_short(found)
        _show_predictions(found)
    _show_verdict(found)


def show_checks() -> None:
    """The table of all checks."""
    rows = [
        [str(check.number), check.title, " or ".join(f"{severity}s" for severity in check.severities)]
        for check in Check
    ]
    columns = [Column("no."), Column("check", left=True, wraps=True), Column("findings are", left=True)]
    stdout.print(FittedTable("What verify looks for", columns, rows))


def _show_findings(found: Verification, *, verbose: bool) -> None:
    groups: dict[Check, list[Finding]] = {}
    for finding in sorted(found.findings, key=lambda finding: finding.severity):  # errors before warnings
        groups.setdefault(finding.check, []).append(finding)
    for check, findings in sorted(groups.items(), key=lambda item: item[0].number):
        errors = sum(finding.severity == "error" for finding in findings)
        mark, style = ("!!", "bold red") if errors else ("!", "yellow")
        stdout.say(
            Text(f"{mark} check {check.number}, {check.title}: {_counts(errors, len(findings) - errors)}", style=style)
        )
        shown = findings if verbose else findings[:SHOWN_FINDINGS]
        for finding in shown:
            where = f"{finding.tensor} " if finding.tensor else ""
            stdout.say(f"     {finding.severity}: {where}{finding.message}")
        if len(shown) < len(findings):
            stdout.say(f"     and {len(findings) - len(shown)} more; -v shows all")


def _show_in_short(found: Verification) -> None:
    """The numbers of the tables that -v shows, in a line each."""
    if found.behaviours:
        worst = max(found.behaviours.values(), key=lambda linear: linear.error)
        middle = median(linear.error for linear in found.behaviours.values())
        stdout.say(
            f"output error of {counted(len(found.behaviours), 'linear')}: {percent(worst.error)} at worst "
            f"({FAMILY.short_name(worst.name)}), {percent(middle)} in the median; -v shows each"
        )
    elif found.linears:
        stdout.say(f"{counted(len(found.linears), 'integer linear')}; -v shows each")
    if found.blocks:
        last = found.blocks[-1]
        stdout.say(f"hidden states after {FAMILY.short_name(last.done.name)}: {percent(last.error)} off")


def _show_linears(found: Verification) -> None:
    behaviours = found.behaviours
    arithmetic = {linear.name: linear for linear in found.linears}
    distances = {linear.name: linear.against.relative_l2 for linear in found.linears if linear.against is not None}
    names = sorted(
        arithmetic.keys() | behaviours.keys(),
        key=lambda name: (
            -behaviours[name].error if name in behaviours else 0,
            -distances.get(name, 0),
            natural_key(name),
        ),
    )
    if not names:
        return
    rows: list[list[Cell]] = []
    for name in names:
        one, other = behaviours.get(name), arithmetic.get(name)
        against = None if other is None else other.against
        rows.append(
            [
                FAMILY.short_name(name),
                "" if one is None else marked(one.error, percent(one.error)),
                "" if against is None else f"{against.relative_l2:.2%}",
                "" if other is None else f"{other.entropy_bits:.2f}",
                "" if one is None or one.covered_high == one.covered_low else f"{one.clipped_share:.3%}",
                "" if one is None or not one.excess else f"{one.excess:.0%}",
                "" if one is None else one.excess_sample,
                "" if one is None else f"{one.largest_output:.3g}",
            ]
        )
    columns = [
        Column("linear", left=True),
        Column("output error"),
        Column("weight error", drop=1),
        Column("bits", drop=2),
        Column("clipped", drop=3),
        Column("beyond", drop=4, note="beyond: how far inputs go past what is covered, as a share of it"),
        Column("worst sample", drop=5, left=True),
        Column("max |y|", drop=6),
    ]
    order = ", worst output error first" if behaviours else ", largest weight error first" if distances else ""
    marks = legend(one.error for one in behaviours.values())
    stdout.print(FittedTable(f"Integer linears{order}", columns, rows, caption="".join(marks)))


def _show_blocks(found: Verification) -> None:
    if found.blocks:
        rows: list[list[Cell]] = [
            [FAMILY.short_name(b.done.name), marked(b.error, percent(b.error))] for b in found.blocks
        ]
        columns = [Column("block", left=True), Column("hidden states")]
        caption = "; ".join(["hidden states after the block: relative error", *legend(b.error for b in found.blocks)])
        stdout.print(FittedTable("Error built up, block after block", columns, rows, caption=caption))


def _show_samples(found: Verification) -> None:
    predictions = found.predictions
    if predictions is None:
        return
    samples = sorted(predictions.samples, key=lambda sample: (-sample.kl, natural_key(sample.name)))
    rows = [
        [
            sample.name,
            str(sample.positions),
            f"{sample.kl:.3g}",
            f"{sample.top1:.2%}",
            _nats(sample.nll_float),
            _nats(sample.nll_candidate),
        ]
        for sample in samples
    ]
    columns = [
        Column("sample", left=True),
        Column("positions", drop=2),
        Column("KL nats"),
        Column("same top token", drop=1),
        Column("NLL float", drop=4),
        Column("NLL candidate", drop=3),
    ]
    total = [
        f"all {len(samples)}",
        str(predictions.positions),
        f"{predictions.kl:.3g}",
        f"{predictions.top1:.2%}",
        _nats(predictions.nll_float),
        _nats(predictions.nll_candidate),
    ]
    stdout.print(FittedTable("Predicted tokens, largest KL first", columns, rows, total=total))


def _show_predictions(found: Verification) -> None:
    predictions = found.predictions
    if predictions is None:
        return
    error = "" if predictions.kl_error is None else f" ± {predictions.kl_error:.1g}"
    positions, samples = counted(predictions.positions, "position"), counted(len(predictions.samples), "sample")
    stdout.say(
        f"predicted tokens: KL {predictions.kl:.3g}{error} nats (mean and its standard error over {positions} of {samples}), "
        f"same top token {predictions.top1:.2%}{predictions.tied}"
    )
    for caption in found.captions:
        same = "the same" if caption.reference == caption.candidate else "different"
        stdout.say(f"{caption.name}: {same}", style="bold")
        for model, answer in (("float", caption.reference), ("candidate", caption.candidate)):
            stdout.say(f"  {model:<{MODELS}}{answer}", hang=2 + MODELS)


def _show_verdict(found: Verification) -> None:
    errors = sum(finding.severity == "error" for finding in found.findings)
    warnings = len(found.findings) - errors
    what = ["files", "integers"] if found.linears else ["files"]
    what += ["behaviour"] if found.predictions is not None else []
    checked = " and ".join([", ".join(what[:-1]), what[-1]]) if len(what) > 1 else what[0]
    if found.passed:
        text = f"passed: nothing wrong with {checked}" + (f", {counted(warnings, 'warning')}" if warnings else "")
        stdout.say(Text(text, style="bold green"))
    else:
        stdout.say(Text(f"!! failed: {_counts(errors, warnings)} in {checked}", style="bold red"))


def _counts(errors: int, warnings: int) -> str:
    """`1 error, 2 warnings`, without those that there are none of."""
    parts = [counted(errors, "error")] if errors else []
    return ", ".join([*parts, *([counted(warnings, "warning")] if warnings else [])]) or "nothing checked"


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
