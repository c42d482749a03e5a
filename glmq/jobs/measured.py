"""The passes that come before the one that writes: how many bits sparse linears may spend, and which groups stay float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from glmq.jobs.watcher import Watcher
from glmq.numerics.rate import RateCurve
from glmq.quantization.bits import needs_curves, spread_bits
from glmq.quantization.fallback import with_fallback, worst_groups
from glmq.quantization.measure import measure_checkpoint, measured_blocks, rate_checkpoint, rated_blocks
from glmq.quantization.output import OutputPlan
from glmq.quantization.passes import QuantizationRun
from glmq.quantization.recipe import Recipe
from glmq.records import LinearReport
from glmq.wording import counted


def deal_bits(
    work: QuantizationRun, recipe: Recipe, plan: OutputPlan, watcher: Watcher, known: Sequence[RateCurve]
) -> tuple[dict[str, float], tuple[RateCurve, ...]]:
    """Bits per weight of each linear, after a pass that measures what the sparse ones lose where that is needed.

    Args:
        known: what an earlier run has measured, which leaves the pass out; empty if there was none.

    Returns:
        The bits, and what was measured.
    """
    sparse = {
        one.name for group in plan.groups.values() if group.quant_type.spec.is_sparse for one in group.group.linears
    }
    curves = [curve for curve in known if curve.name in sparse]
    if needs_curves(recipe) and not known:
        blocks = [f"rate {block.name}" for block in rated_blocks(work.config, plan.groups)]
        with watcher.blocks("rate", len(blocks), finished=sum(map(work.journal.has, blocks))) as advance:
            for block in rate_checkpoint(work, recipe, plan.groups):
                curves += block.curves
                advance(block.done)
    return spread_bits(recipe, plan.linears, curves), tuple(curves)


def fall_back(
    work: QuantizationRun,
    recipe: Recipe,
    plan: OutputPlan,
    bits: Mapping[str, float],
    watcher: Watcher,
    *,
    topk: int,
    max_error: float | None,
) -> Recipe:
    """Measure every group first, then keep the worst float."""
    reports: list[LinearReport] = []
    blocks = [f"measure {block.name}" for block in measured_blocks(work.config, plan.groups)]
    with watcher.blocks("measure", len(blocks), finished=sum(map(work.journal.has, blocks))) as advance:
        for block in measure_checkpoint(work, recipe, plan.groups, bits=bits):
            reports += block.reports
            advance(block.done)
    kept = worst_groups(reports, plan.groups, topk=topk, max_error=max_error)
    names = [linear.name for group in kept for linear in group.group.linears]
    stays = f"{counted(len(names), 'linear stays', 'linears stay')} float"
    watcher.note(f"{stays}; the same by hand:" if names else f"{stays}: none is that far off")
    for name in names:
        watcher.note(f"  --keep-float {name}")
    return with_fallback(recipe, kept)
