"""The HTML page of `glmq verify`: verdict, findings, behaviour, linears."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from glmq.model.config import FAMILY
from glmq.reporting.charts import (
    RangeBar,
    columns_chart,
    heat_map,
    range_chart,
)
from glmq.reporting.documents import Verification
from glmq.reporting.page import Cell, anchor_of, card, cards, cell, page, picture, section, split_table, table
from glmq.reporting.words import (
    or_empty,
    percent,
    place_of,
    tone_of,
)

if TYPE_CHECKING:
    from glmq.verification.behaviour import LinearBehaviour
    from glmq.verification.predictions import Predictions


def verification_page(found: Verification) -> str:
    """`glmq verify --html`."""
    note = f"Checked: {'; '.join(found.checked) or 'nothing'}."
    note += f" Not checked: {'; '.join(found.not_checked)}." if found.not_checked else ""
    sections = [
        cards(*_cards(found)),
        section("Findings", _findings_table(found), note=note),
        *_behaviour_charts(found),
        _linears_section(found),
    ]
    if found.predictions is not None:
        sections.append(section("Samples, worst first", _samples_table(found.predictions)))
    if found.captions:
        captions = [
            ("" if c.picture is None else picture(c.picture, c.name), c.name, c.reference, c.candidate)
            for c in found.captions
        ]
        header = ("picture", "name", "float", "candidate")
        sections.append(section("Captions side by side", table(header, captions, text_columns=4)))
    subtitle = [f"{found.candidate} ({found.what})"]
    if found.reference is not None:
        subtitle.append(f"against {found.reference}")
    return page(f"glmq verify: {found.candidate.name}", subtitle, *sections)


def _cards(found: Verification) -> list[str]:
    errors = sum(f.severity == "error" for f in found.findings)
    warnings = len(found.findings) - errors
    made = [
        card("Verdict", "passed" if found.passed else "failed", "good" if found.passed else "bad"),
        card("Errors", str(errors), "bad" if errors else "good"),
        card("Warnings", str(warnings), "warn" if warnings else "good"),
    ]
    predictions, limits = found.predictions, found.limits
    if predictions is None:
        return made
    is_close = predictions.kl <= limits.max_kl
    below = limits.below(predictions.good_tokens, predictions.positions)
    made += [
        card("KL from float", f"{predictions.kl:.2g}", "good" if is_close else "bad", "nats"),
        card(
            "Same top token",
            percent(predictions.top1),
            "good" if below is None else "bad" if below == "error" else "warn",
            f"{predictions.positions:,} positions{predictions.tied}",
        ),
    ]
    if predictions.nll_float is not None and predictions.nll_candidate is not None:
        note = f"float {predictions.nll_float:.4f} nats"
        made.append(card("NLL of answers", f"{predictions.nll_candidate:.4f}", note=note))
    return made


def _behaviour_charts(found: Verification) -> list[str]:
    sections: list[str] = []
    if found.blocks:
        names = [FAMILY.short_name(block.done.name) for block in found.blocks]
        sections.append(
            section(
                "Error built up, block after block",
                columns_chart(names, [block.error for block in found.blocks], "built-up error"),
                note="||h_q - h|| / ||h|| of the hidden states, each model on its own.",
            )
        )
    behaviours = list(found.behaviours.values())
    if not behaviours:
        return sections
    cells = {place_of(linear.name): linear.error for linear in behaviours}
    links = {place_of(linear.name): anchor_of("linear", linear.name) for linear in behaviours}
    roles = list(dict.fromkeys(role for _, role in cells))
    sections.append(
        section(
            "Error of each linear",
            heat_map(list(dict.fromkeys(layer for layer, _ in cells)), roles, cells, "output error", links),
            note="||y_q - y|| / ||y|| in the NPU's arithmetic, both fed the float model's hidden states. "
            "A cell leads to the row of that linear.",
        )
    )
    bars = _seen_ranges(behaviours)
    if bars:
        sections.append(
            section(
                "Input ranges",
                range_chart(bars, "input value"),
                note="Wide: what the int8 activation covers. Line: what was seen, red where it lies outside.",
            )
        )
    return sections


def _samples_table(predictions: Predictions) -> str:
    rows = [
        (s.name, str(s.positions), f"{s.kl:.3g}", percent(s.top1), or_empty(s.nll_float), or_empty(s.nll_candidate))
        for s in sorted(predictions.samples, key=lambda s: -s.kl)
    ]
    header = ("sample", "positions", "KL nats", "same top", "NLL float", "NLL candidate")
    return split_table(header, rows, 1)


def _seen_ranges(behaviours: Sequence[LinearBehaviour]) -> list[RangeBar]:
    """Covered and seen input ranges of the static linears; one bar for those that share an input."""
    bars: dict[tuple[str, float, float, float, float], RangeBar] = {}
    for x in behaviours:
        if x.covered_high > x.covered_low:
            key = (place_of(x.name)[0], x.covered_low, x.covered_high, x.seen_low, x.seen_high)
            bar = RangeBar(FAMILY.short_name(x.name), x.covered_low, x.covered_high, x.seen_low, x.seen_high)
            bars.setdefault(key, bar)
    return list(bars.values())


def _findings_table(found: Verification) -> str:
    rows = [
        (
            cell(finding.severity, "bad" if finding.severity == "error" else "warn"),
            finding.check.title,
            cell(finding.tensor, code=True),
            finding.message,
        )
        for finding in found.findings
    ]
    return split_table(("severity", "check", "tensor", "what"), rows, 4)


def _linears_section(found: Verification) -> str:
    title = "Linears, worst output error first" if found.behaviours else "Linears"
    note = "Bits: entropy of the integers. Of int32: the largest possible sum of products, as a share of what an int32 holds."
    if found.behaviours:
        note += " Clipped: inputs outside what the int8 activation covers; farthest: how far outside, as a share of its width."
    return section(title, _linears_table(found), note=note if found.linears else "")


def _linears_table(found: Verification) -> str:
    behaviours = found.behaviours
    arithmetic = {linear.name: linear for linear in found.linears}
    names = sorted(
        arithmetic.keys() | behaviours.keys(), key=lambda n: (-behaviours[n].error if n in behaviours else 0.0, n)
    )
    rows: list[list[str | Cell]] = []
    for name in names:
        one, other = behaviours.get(name), arithmetic.get(name)
        against = None if other is None else other.against
        rows.append(
            [
                cell(FAMILY.short_name(name), code=True, anchor=anchor_of("linear", name)),
                "" if one is None else cell(percent(one.error), tone_of(one.error)),
                "" if against is None else percent(against.relative_l2),
                "" if other is None else f"{other.entropy_bits:.2f}",
                "" if one is None else percent(one.clipped_share),
                "" if one is None or one.excess == 0 else f"{percent(one.excess)} on {one.excess_sample}",
                "" if other is None else percent(other.accumulator_share),
                "" if one is None else f"{one.largest_output:.3g}",
            ]
        )
    header = ("linear", "output error", "weight error", "bits", "clipped", "farthest", "of int32", "max |y|")
    return split_table(header, rows, 1)
