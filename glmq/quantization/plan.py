"""Recipe and model -> the quantization type of every input group, before any weight is read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from glmq.engines import FLOAT_ELSEWHERE, WITHOUT_BIAS, Chip, Engine, Place
from glmq.errors import PatternError, TargetError, UsageError
from glmq.model.config import FAMILY, ModelConfig
from glmq.model.family import InputGroup
from glmq.quantization.recipe import Recipe
from glmq.spec import Method, QuantType, StepRule


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One input group and the type that its linears get."""

    group: InputGroup
    quant_type: QuantType
    """FLOAT: the linears stay as they are."""

    @property
    def is_quantized(self) -> bool:
        """Its linears become integers."""
        return self.quant_type is not QuantType.FLOAT


def plan_groups(recipe: Recipe, config: ModelConfig) -> dict[str, GroupPlan]:
    """The plan of every group, keyed by site, in model order.

    Raises:
        UsageError: a pattern that matches no linear, splits a group, or leaves nothing to quantize, or linears that the
            target cannot run.
    """
    groups = config.family.groups(config)
    for rule in recipe.rules:
        if rule.option and not count_matches(rule.pattern, config):
            names = [linear.name for group in groups for linear in group.linears]
            near = difflib.get_close_matches(rule.pattern, names, n=1, cutoff=0.0)
            raise PatternError(
                f"{rule.option} matches none of the model's {len(names)} linears; their names look like {near[0]!r}"
            )
    plans = {group.site: GroupPlan(group, _group_type(group, recipe)) for group in groups}
    for plan in plans.values():
        _check_width(plan, recipe)
        _check_target(plan, recipe)
    if not any(plan.is_quantized for plan in plans.values()):
        given = {rule.option.partition(" ")[0] for rule in recipe.rules if rule.option}
        verb = "leaves" if len(given) == 1 else "leave"
        raise PatternError(f"{' and '.join(sorted(given))} {verb} no linear to quantize; narrow the patterns")
    return plans


def _check_width(plan: GroupPlan, recipe: Recipe) -> None:
    """The vendor's fraction rule needs at least one outlier per row; glmq's own methods do without."""
    weight = recipe.scheme_of(plan.quant_type).weight
    by_fraction = plan.quant_type.spec.is_sparse and weight.step_rule is StepRule.FRACTION
    if (
        by_fraction
        and weight.keep_outliers
        and weight.method is Method.REFERENCE
        and int(weight.fraction * plan.group.width) < 1
    ):
        raise UsageError(
            f"--fraction {weight.fraction} with --method reference: of {plan.group.site}'s {plan.group.width} columns that is "
            "less than one; pass a larger --fraction or another --method"
        )


def loading_engines(recipe: Recipe, plans: Iterable[GroupPlan]) -> dict[Engine, tuple[Chip, ...]]:
    """The engines that load what the recipe makes, each with the chips on which it does; with a target that one alone."""
    quantized = [plan for plan in plans if plan.is_quantized]
    types, text_only = {plan.quant_type for plan in quantized}, not beyond_text(quantized)
    target = recipe.target.place
    found: dict[Engine, tuple[Chip, ...]] = {}
    for engine in Engine if target is None else [target.engine]:
        chips = engine.spec.chips if target is None or target.chip is None else [target.chip]
        asked = recipe.quant_type, types, recipe.dtype, recipe.form
        fits = tuple(chip for chip in chips if Place(engine, chip).loads(*asked, text_only=text_only))
        if fits:
            found[engine] = fits
    return found


def beyond_text(plans: Iterable[GroupPlan]) -> list[str]:
    """The linears that become integers and are not those of text layers."""
    return [
        linear.name
        for plan in plans
        if plan.is_quantized
        for linear in plan.group.linears
        if not FAMILY.in_text_layers(linear.name)
    ]


def _check_target(plan: GroupPlan, recipe: Recipe) -> None:
    """Linears that the engine of --target lacks kernels for, or whose bias it leaves out, so that it answers wrongly."""
    place = recipe.target.place
    others = [] if place is None or not place.engine.spec.text_only else beyond_text([plan])
    if place is not None and others:
        raise TargetError(
            f"--target {recipe.target.value}: {place.engine.spec.title} reads {FLOAT_ELSEWHERE}, and {others[0]} would be "
            f"{plan.quant_type.value}; narrow the pattern to the text layers, like '*.layers.*.down_proj'"
        )
    biased = [linear.name for linear in plan.group.linears if linear.has_bias]
    if place is not None and plan.quant_type in place.engine.spec.drops_bias and biased:
        raise TargetError(
            f"--target {recipe.target.value}: {place.engine.spec.title} runs {plan.quant_type.value} linears without their "
            f"bias, which {biased[0]} has; {WITHOUT_BIAS}"
        )


def count_matches(pattern: str, config: ModelConfig) -> int:
    """How many linears of the model a pattern names (`*`, `?`, `[...]` as in a shell, case-sensitive)."""
    return sum(fnmatchcase(linear.name, pattern) for group in config.family.groups(config) for linear in group.linears)


def _group_type(group: InputGroup, recipe: Recipe) -> QuantType:
    found: dict[QuantType, tuple[str, str]] = {}
    for linear in group.linears:
        rule = recipe.rule_of(linear.name)
        quant_type = recipe.quant_type if rule is None else rule.quant_type
        found.setdefault(quant_type, (linear.name, rule.option if rule else ""))
    if len(found) > 1:
        # The type that an option asked for comes before the one that was left as it was.
        (first, (name, option)), (second, (other, _)) = sorted(found.items(), key=lambda item: not item[1][1])[:2]
        raise PatternError(
            f"{option} makes {name} {first.value} but leaves {other} {second.value}: the engines load the "
            "linears of one input as one tensor, so they must be of one type; let the pattern match all of them"
        )
    return next(iter(found))
