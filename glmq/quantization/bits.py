"""How many bits each linear may spend: a policy over the whole model, from the recipe and measured curves alone."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from glmq.calibration.stats import Statistics
from glmq.numerics.rate import RateCurve, mean_rule_bits, solve_bits
from glmq.quantization.plan import GroupPlan
from glmq.quantization.recipe import Recipe
from glmq.spec import Allocation, Method

log = logging.getLogger(__name__)


def needs_curves(recipe: Recipe) -> bool:
    """Whether bits are dealt out by what each linear loses at how many: sparse types, unless their rule alone decides."""
    is_compensated = recipe.scheme.weight.method is Method.COMPENSATED
    return recipe.quant_type.spec.is_sparse and (recipe.target_bits is not None or is_compensated)


def settle_allocation(
    recipe: Recipe, groups: Mapping[str, GroupPlan], statistics: Statistics
) -> tuple[Recipe, str | None]:
    """The recipe, by errors alone where the statistics do not say what every sparse linear counts for the answer.

    Returns:
        The recipe to go on with, and a note for the user if that is another one.
    """
    sparse = [site for site, plan in groups.items() if plan.quant_type.spec.is_sparse]
    unknown = [site for site in sparse if not statistics.has_sensitivity(site)]
    if recipe.allocation is not Allocation.ANSWER or not needs_curves(recipe) or not unknown:
        return recipe, None
    why = (
        f"what {unknown[0]} counts for the answer is not known, only the text layers' linears are rated"
        if any(statistics.has_sensitivity(site) for site in groups)
        else f"an older glmq wrote the statistics in {statistics.directory}; calibrate again for more accurate answers"
    )
    by_error = replace(recipe, allocation=Allocation.ERROR)
    return by_error, f"note: bits are dealt out as with --allocate error: {why}"


def spread_bits(recipe: Recipe, linears: Iterable[str], curves: Sequence[RateCurve]) -> dict[str, float]:
    """The entropy that the integers of each linear may have, in bits per weight.

    Sparse linears share their bits over the whole model so that the sum of their losses is least. The mean is the recipe's
    target, or what the flags' step rule would spend. In other types each linear may have the target.

    Args:
        recipe: with its target, if it has one.
        linears: names of the linears that become integers.
        curves: of the sparse ones, from `rate_checkpoint`, where `needs_curves`.

    Returns:
        Bits by linear; empty where nothing limits them.

    Raises:
        UsageError: a target that the linears cannot reach.
    """
    if needs_curves(recipe):
        target = mean_rule_bits(curves) if recipe.target_bits is None else recipe.target_bits
        log.info("%d linears share %.3f bits per weight", len(curves), target)
        return {curve.name: bits for curve, bits in zip(curves, solve_bits(curves, target), strict=True)}
    if recipe.target_bits is None or recipe.quant_type.spec.is_sparse:
        return {}
    return dict.fromkeys(linears, recipe.target_bits)
