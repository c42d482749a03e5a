"""What `glmq verify` shows on stdout."""

from __future__ import annotations

from typing import Final

from rich.text import Text

from glmq.cli.console import stdout
from glmq.cli.inspect_view import marked, plain_table
from glmq.cli.render import SHOWN_ROWS
from glmq.model.config import FAMILY
from glmq.reporting.documents import Verification
from glmq.verification.engines.schemes import group_schemes
from glmq.verification.findings import Check, Finding

SHOWN_FINDINGS: Final = 3
"""Of each check, before the rest is counted."""


def show_verification(found: Verification, *, quiet: bool, verbose: bool) -> None:
    """Findings by check, the worst linears and blocks, the predictions, and the verdict last."""
    if not quiet:
        stdout.print(f"{found.candidate}: {found.what}", style="bold", soft_wrap=True)
        _show_findings(found, verbose=verbose)
        for engine, schemes in found.schemes.items():
            table = plain_table(f"What {engine.spec.title} will take", ("module", "scheme"), left=2)
            for modules, scheme in group_schemes(schemes):
                table.add_row(modules, scheme)
            stdout.print(table)
        _show_linears(found, verbose=verbose)
        _show_blocks(found)
        _show_predictions(found, verbose=verbose)
    _show_verdict(found, quiet=quiet)


def show_checks() -> None:
    """The table of all checks."""
    table = plain_table("What verify looks for", ("", "check", "findings are"), left=3)
    for check in Check:
        table.add_row(str(check.number), check.title, " or ".join(f"{severity}s" for severity in check.severities))
    stdout.print(table)


def _show_findings(found: Verification, *, verbose: bool) -> None:
    groups: dict[Check, list[Finding]] = {}
    for finding in sorted(found.findings, key=lambda finding: finding.severity):  # errors before warnings
        groups.setdefault(finding.check, []).append(finding)
    for check, findings in sorted(groups.items(), key=lambda item: item[0].number):
        errors = sum(finding.severity == "error" for finding in findings)
        mark, style = ("!!", "bold red") if errors else ("!", "yellow")
        count = f"{errors} errors" if errors == len(findings) else f"{errors} errors, {len(findings) - errors} warnings"
        stdout.print(Text(f"{mark} {check.number} {check.title}: {count}", style=style))
        shown = findings if verbose else findings[:SHOWN_FINDINGS]
        for finding in shown:
            where = f"{finding.tensor} " if finding.tensor else ""
            stdout.print(f"     {finding.severity}: {where}{finding.message}", soft_wrap=True)
        if len(shown) < len(findings):
            stdout.print(f"     and {len(findings) - len(shown)} more; -v shows all")


def _show_linears(found: Verification, *, verbose: bool) -> None:
    behaviours = found.behaviours
    arithmetic = {linear.name: linear for linear in found.linears}
    distances = {linear.name: linear.against.relative_l2 for linear in found.linears if linear.against is not None}
    names = sorted(
        arithmetic.keys() | behaviours.keys(),
        key=lambda name: (-behaviours[name].error if name in behaviours else 0, -distances.get(name, 0), name),
    )
    if not names:
        return
    rows: list[list[str | Text]] = []
    for name in names if verbose else names[:SHOWN_ROWS]:
        one, other = behaviours.get(name), arithmetic.get(name)
        against = None if other is None else other.against
        rows.append(
            [
                FAMILY.short_name(name),
                "" if one is None else marked(one.error),
                "" if against is None else f"{against.relative_l2:.2%}",
                "" if other is None else f"{other.entropy_bits:.2f}",
                "" if one is None or one.covered_high == one.covered_low else f"{one.clipped_share:.3%}",
                "" if one is None or not one.excess else f"{one.excess:.0%}",
                "" if one is None else one.excess_sample,
                "" if one is None else f"{one.largest_output:.3g}",
            ]
        )
    header = ("linear", "output error", "weight error", "bits", "clipped", "beyond", "worst sample", "max |y|")
    used = [column for column in range(len(header)) if any(row[column] for row in rows)]
    table = plain_table("Integer linears, worst first", [header[column] for column in used], left=1)
    for row in rows:
        table.add_row(*(row[column] for column in used))
    if len(names) > SHOWN_ROWS and not verbose:
        table.caption = f"{len(names) - SHOWN_ROWS} more; -v shows all"
        table.caption_justify = "left"
    stdout.print(table)


def _show_blocks(found: Verification) -> None:
    if not found.blocks:
        return
    table = plain_table("Error built up, block after block", ("block", "hidden states"), left=1)
    for block in found.blocks:
        table.add_row(FAMILY.short_name(block.done.name), marked(block.error))
    stdout.print(table)


def _show_predictions(found: Verification, *, verbose: bool) -> None:
    predictions = found.predictions
    if predictions is None:
        return
    header = ("sample", "positions", "KL nats", "same top token", "NLL float", "NLL candidate")
    table = plain_table("Predicted tokens, worst first", header, left=1)
    samples = sorted(predictions.samples, key=lambda sample: (-sample.kl, sample.name))
    for sample in samples if verbose else samples[:5]:
        table.add_row(
            sample.name,
            str(sample.positions),
            f"{sample.kl:.3g}",
            f"{sample.top1:.2%}",
            _nats(sample.nll_float),
            _nats(sample.nll_candidate),
        )
    nll = (_nats(predictions.nll_float), _nats(predictions.nll_candidate))
    row = (f"all {len(samples)}", str(predictions.positions), f"{predictions.kl:.3g}", f"{predictions.top1:.2%}", *nll)
    table.add_row(*row, style="bold")
    stdout.print(table)
    for caption in found.captions:
        same = "the same" if caption.reference == caption.candidate else "different"
        stdout.print(f"{caption.name}: {same}", style="bold")
        stdout.print(f"  float      {caption.reference}", soft_wrap=True)
        stdout.print(f"  candidate  {caption.candidate}", soft_wrap=True)


def _show_verdict(found: Verification, *, quiet: bool) -> None:
    errors = sum(finding.severity == "error" for finding in found.findings)
    warnings = len(found.findings) - errors
    what = ["files", "integers"] if found.linears else ["files"]
    what += ["behaviour"] if found.predictions is not None else []
    checked = " and ".join([", ".join(what[:-1]), what[-1]]) if len(what) > 1 else what[0]
    if found.passed:
        text = f"passed: nothing wrong with {checked}" + (f", {warnings} warnings" if warnings else "")
        stdout.print(Text(text, style="bold green"))
    else:
        stdout.print(Text(f"!! failed: {errors} errors, {warnings} warnings in {checked}", style="bold red"))
    if quiet:
        return
    stdout.print(f"checked: {'; '.join(found.checked) or 'nothing'}", soft_wrap=True)
    if found.not_checked:
        stdout.print(f"not checked: {'; '.join(found.not_checked)}", soft_wrap=True)


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
