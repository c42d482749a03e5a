"""Keep the most sensitive linears float: which ones, by the output error that quantizing them would cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from glmq.quantization.plan import GroupPlan
from glmq.quantization.recipe import Recipe
from glmq.quantization.rules import LayerRule
from glmq.records import LinearReport
from glmq.spec import QuantType


def worst_groups(
    reports: Sequence[LinearReport], groups: Mapping[str, GroupPlan], *, topk: int, max_error: float | None
) -> list[GroupPlan]:
    """The groups to keep float, worst first.

    A group (q, k, v count as one: the engines need them of one type) is as bad as its worst linear.

    Args:
        reports: of every quantized linear.
        groups: the plan of every group.
        topk: keep this many, whatever their error.
        max_error: also keep every group with a relative output error above this; None for no limit.
    """
    error = {report.name: report.output_error for report in reports}
    quantized = [plan for plan in groups.values() if plan.is_quantized]
    ranked = sorted(quantized, key=lambda plan: (-_worst(plan, error), plan.group.site))
    return [
        plan
        for rank, plan in enumerate(ranked)
        if rank < topk or (max_error is not None and _worst(plan, error) > max_error)
    ]


def with_fallback(recipe: Recipe, kept: Iterable[GroupPlan]) -> Recipe:
    """The recipe with rules that keep those groups float."""
    rules = tuple(
        LayerRule(linear.name, QuantType.FLOAT, f"--keep-float {linear.name!r}")
        for plan in kept
        for linear in plan.group.linears
    )
    return replace(recipe, rules=recipe.rules + rules)


def _worst(plan: GroupPlan, error: Mapping[str, float]) -> float:
    return max(error[linear.name] for linear in plan.group.linears)
