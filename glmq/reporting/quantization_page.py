"""The HTML page of a quantization: errors, bits, what clipped and what stayed float, bytes, time, and the run itself."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from glmq.model.config import FAMILY
from glmq.quantization.report import Report, report_document
from glmq.records import LinearReport
from glmq.reporting.charts import RangeBar, columns_chart, heat_map, integer_histogram, range_chart, stacked_bars
from glmq.reporting.page import (
    Cell,
    anchor_of,
    card,
    cards,
    cell,
    figure,
    folded,
    grid,
    page,
    section,
    split_table,
    table,
)
from glmq.reporting.words import moment, percent, place_of, tone_of
from glmq.wording import counted, size

HISTOGRAM = "integers"
"""Kind of the anchors of histograms."""


def quantization_page(report: Report) -> str:
    """`glmq_report.html`, which `glmq quantize` writes beside the weights."""
    recipe, run = report.recipe, report.run
    ranked = sorted(report.linears, key=lambda linear: (-linear.output_error, linear.name))
    sections = [
        cards(*_cards(report, ranked)),
        *_charts(report),
        section("Linears, worst first", _linears_table(ranked), note="A name leads to the histogram of its integers."),
        section("What clipped", _clipped_table(ranked), note=_CLIPPED_NOTE),
        section("What stayed float, and why", _float_table(report)),
        section("Bytes by part", _bytes_chart(report)),
        section("Where the time went", _time_table(report)),
        section(
            "Integers", folded(f"Histograms of {counted(len(ranked), 'linear')}, worst first", _histograms(ranked))
        ),
        *_background(report),
    ]
    subtitle = [
        f"{run.output}: {recipe.quant_type.value} ({recipe.form.value}, {recipe.dtype.value}), made from {run.model}",
        f"{moment(run.finished)}, {run.processor}, {counted(run.cores, 'core')}",
    ]
    return page(f"glmq quantize: {run.output.rpartition('/')[2]}", subtitle, *sections)


_CLIPPED_NOTE = (
    "Inputs outside the range that the int8 activation covers, as a share of all that calibration saw; and weights that the "
    "grid of integers cuts off by more than half a step."
)


def _cards(report: Report, ranked: Sequence[LinearReport]) -> list[str]:
    before, after = sum(area.before for area in report.areas), sum(area.after for area in report.areas)
    worst, middle = ranked[0], median(linear.output_error for linear in ranked)
    bits = sum(linear.entropy_bits * linear.rows * linear.cols for linear in ranked)
    weights = sum(linear.rows * linear.cols for linear in ranked)
    clipped = max(ranked, key=lambda linear: linear.clipped_share)
    most = FAMILY.short_name(clipped.name) if clipped.clipped_share else "no input"
    return [
        card("Bytes", f"{size(before)} → {size(after)}", note=f"{percent(after / max(1, before))} of the float model"),
        card("Median output error", percent(middle), tone_of(middle), "||y_q - y|| / ||y|| of a linear"),
        card("Worst", percent(worst.output_error), tone_of(worst.output_error), FAMILY.short_name(worst.name)),
        card("Bits per weight", f"{bits / weights:.2f}", note="entropy of the integers"),
        card("Most clipped", percent(clipped.clipped_share), note=most),
        card("Stayed float", str(len(report.kept_float)), note=f"of {len(ranked) + len(report.kept_float)} linears"),
    ]


def _charts(report: Report) -> list[str]:
    errors = {place_of(linear.name): linear.output_error for linear in report.linears}
    links = {place_of(linear.name): anchor_of(HISTOGRAM, linear.name) for linear in report.linears}
    layers, roles = (list(dict.fromkeys(key[side] for key in errors)) for side in (0, 1))
    worst = [max(error for (layer, _), error in errors.items() if layer == one) for one in layers]
    bars = _ranges(report.linears)
    found = [
        section(
            "Error of each linear",
            heat_map(layers, roles, errors, "output error", links),
            note="||y_q - y|| / ||y|| on a sample of calibration tokens, in the NPU's arithmetic. A cell leads to the "
            "histogram of that linear's integers.",
        ),
        section("Largest error of each layer", columns_chart(layers, worst, "output error", "layer")),
    ]
    if bars:
        note = "What the static int8 activation of each input covers, after smoothing."
        found.append(
            section("Input ranges", folded(counted(len(bars), "input"), range_chart(bars, "input value")), note=note)
        )
    return found


def _ranges(linears: Sequence[LinearReport]) -> list[RangeBar]:
    """One bar for linears that share an input."""
    bars: dict[tuple[str, float, float], RangeBar] = {}
    for one in linears:
        if one.input_high > one.input_low:
            bar = RangeBar(FAMILY.short_name(one.name), one.input_low, one.input_high, None, None)
            bars.setdefault((place_of(one.name)[0], one.input_low, one.input_high), bar)
    return list(bars.values())


def _linears_table(ranked: Sequence[LinearReport]) -> str:
    rows: list[list[str | Cell]] = [
        [
            cell(FAMILY.short_name(one.name), code=True, link=anchor_of(HISTOGRAM, one.name)),
            one.quant_type.value,
            cell(percent(one.output_error), tone_of(one.output_error)),
            f"{one.sqnr_db:.1f}",
            percent(one.weight_error),
            f"{one.entropy_bits:.2f}",
            percent(one.outlier_share),
            percent(one.zero_share),
            f"{one.step_min:.3g} … {one.step_max:.3g}",
            percent(one.clipped_share) if one.input_high > one.input_low else "",
            f"{one.seconds:.1f}",
        ]
        for one in ranked
    ]
    header = (
        "linear",
        "type",
        "output error",
        "SQNR dB",
        "weight error",
        "bits",
        "|q| > 7",
        "zeros",
        "step",
        "clipped",
        "seconds",
    )
    return split_table(header, rows, 2)


def _clipped_table(ranked: Sequence[LinearReport]) -> str:
    rows = [
        (
            cell(FAMILY.short_name(one.name), code=True, link=anchor_of(HISTOGRAM, one.name)),
            one.input_range,
            percent(one.clipped_share),
            f"{one.input_low:.3g} … {one.input_high:.3g}" if one.input_high > one.input_low else "",
            f"{one.saturated:,}",
        )
        for one in sorted(ranked, key=lambda one: (-one.clipped_share, -one.saturated))
        if one.clipped_share or one.saturated
    ]
    return split_table(("linear", "range by", "inputs clipped", "covered", "weights cut off"), rows, 2)


def _float_table(report: Report) -> str:
    """Roles rather than names where a rule keeps many."""
    layers: dict[tuple[str, str, str], list[str]] = {}
    for kept in report.kept_float:
        layer, role = place_of(kept.name)
        layers.setdefault((role, kept.why, layer.rstrip("0123456789")), []).append(layer)
    rows = [
        (cell(role, code=True), why, found[0] if len(found) == 1 else f"{found[0]} … {found[-1]}", str(len(found)))
        for (role, why, _), found in layers.items()
    ]
    return split_table(("linear", "why", "layers", "count"), rows, 3)


def _bytes_chart(report: Report) -> str:
    parts = {
        title: {area.area.value: getattr(area, side) for area in report.areas if area.before or area.after}
        for title, side in (("float model", "before"), ("quantized", "after"))
    }
    rows = [(a.area.value, size(a.before), size(a.after)) for a in report.areas if a.before or a.after]
    return stacked_bars(parts, "bytes by part") + table(("part", "float model", "quantized"), rows)


def _time_table(report: Report) -> str:
    rows: list[tuple[str, str, str, str, str]] = []
    total = sum(done.seconds for done in report.run.passes) or 1.0
    for done in report.run.passes:
        rows.append(
            (done.title, "whole pass", f"{done.seconds:.1f}", percent(done.seconds / total), size(done.peak_bytes))
        )
        rows += [(done.title, one.stage, f"{one.seconds:.1f}", percent(one.seconds / total), "") for one in done.stages]
    return table(("pass", "stage", "seconds", "share", "peak memory"), rows, text_columns=2)


def _histograms(ranked: Sequence[LinearReport]) -> str:
    return grid(
        *(
            figure(
                FAMILY.short_name(one.name),
                integer_histogram(one.integers, one.first_integer, f"integers of {one.name}"),
                note=f"{one.rows:,} x {one.cols:,}, {one.entropy_bits:.2f} bits, output error {percent(one.output_error)}",
                anchor=anchor_of(HISTOGRAM, one.name),
            )
            for one in ranked
        )
    )


def _background(report: Report) -> list[str]:
    """The command, options, calibration samples, versions and the machine."""
    run, document = report.run, report_document(report)
    recipe, settings = document["recipe"], report.calibration.settings
    assert isinstance(recipe, dict)
    chosen = [item for item in recipe.items() if item[0] not in ("scheme", "rules")]
    options = [(key, _option(value)) for key, value in (*chosen, *_flat(recipe["scheme"]), *settings.items())]
    samples = report.calibration.samples
    facts = [
        ("command", run.command),
        ("float model", run.model),
        ("statistics", run.statistics or "taken by this run and not kept"),
        ("finished", moment(run.finished)),
        ("machine", f"{run.processor}, {counted(run.cores, 'core')}, {size(run.memory_bytes)}, {run.platform}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())),
        ("digest of the tensors' checksums", report.checksums),
    ]
    rows = [(sample.name, "yes" if sample.has_answer else "no", f"{sample.tokens:,}") for sample in samples]
    return [
        section(
            "The run", table(("", ""), [(cell(name), cell(value, code=True)) for name, value in facts], text_columns=2)
        ),
        section("Options", table(("option", "value"), options, text_columns=2)),
        section(
            "Calibration samples",
            split_table(("sample", "with an answer", "tokens"), rows, 2),
            note=f"{counted(len(samples), 'sample')}, {sum(sample.tokens for sample in samples):,} tokens.",
        ),
    ]


def _flat(scheme: object) -> list[tuple[str, object]]:
    """The entries of a scheme, those of the weights' among them."""
    assert isinstance(scheme, dict)
    inner = scheme["weight"]
    assert isinstance(inner, dict)
    outer = [(key, value) for key, value in scheme.items() if key != "weight"]
    return [*outer, *((f"weight.{key}", value) for key, value in inner.items())]


def _option(value: object) -> str:
    return "not set" if value is None else ("yes" if value else "no") if isinstance(value, bool) else str(value)
