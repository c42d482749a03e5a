"""Keep the most sensitive linears float: which ones, by the output error that quantizing them would cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from glmq.errors import UsageError
from glmq.quantization.plan import GroupPlan
from glmq.quantization.recipe import Recipe
from glmq.quantization.rules import LayerRule
from glmq.records import LinearReport
from glmq.spec import QuantType
from glmq.wording import counted


def check_topk(groups: Mapping[str, GroupPlan], topk: int) -> None:
    """Raise UsageError if no linear would be left to quantize, before a pass has measured which are the worst."""
    quantized = sum(plan.is_quantized for plan in groups.values())
    if topk >= quantized:
        raise UsageError(
            f"--fallback-topk {topk}: leaves no linear to quantize, of {counted(quantized, 'input')} with linears that become "
            "integers; lower it"
        )


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

    Raises:
        UsageError: all have a larger error than that.
    """
    error = {report.name: report.output_error for report in reports}
    quantized = [plan for plan in groups.values() if plan.is_quantized]
    ranked = sorted(quantized, key=lambda plan: (-_worst(plan, error), plan.group.site))
    kept = [
        plan
        for rank, plan in enumerate(ranked)
        if rank < topk or (max_error is not None and _worst(plan, error) > max_error)
    ]
    if max_error is not None and len(kept) == len(ranked):
        raise UsageError(
            f"--max-error {max_error:g}: leaves no linear to quantize, the smallest output error is "
            f"{_worst(ranked[-1], error):.3g}; raise it"
        )
    return kept


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
