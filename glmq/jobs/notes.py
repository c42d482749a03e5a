"""The longer notes of the jobs: whether statistics have settled, what generating answers takes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from glmq.calibration.convergence import Assessment, Convergence
from glmq.calibration.generate import GenerationPlan
from glmq.calibration.samples import WANTED_IMAGES, SampleSet
from glmq.engines import FLOAT_ELSEWHERE, LARGE_GROUPS, NOT_COMPRESSED, WITHOUT_BIAS, Engine, EngineSpec, Place
from glmq.model.config import FAMILY, ModelConfig
from glmq.model.family import LinearShape
from glmq.numerics import gptq
from glmq.quantization.plan import GroupPlan, beyond_text, count_matches, loading_engines
from glmq.quantization.recipe import Recipe
from glmq.spec import Form, QuantType
from glmq.wording import counted

ANSWERS_COUNT: Final = (
    "most of what a thinking model computes is its answer, and --generate 256 lets the model write one"
)
GIB: Final = 2**30
LISTED: Final = 20
"""Files left out that are named."""
LARGE_PICTURE: Final = 9216
"""Patches beyond which attention over them takes longer than the products of weights, in the vision tower of the real size."""


def convergence_verdict(assessment: Assessment | None, *, is_dense: bool | None) -> str:
    """Whether the statistics have settled, in a few words.

    Args:
        is_dense: all quantized weights are dense 8-bit ones; None where that is not known yet.
    """
    if assessment is None:
        return "not known to have settled, one sample does not show it; more images would help"
    verdict = assessment.in_words
    if assessment.suffices(is_dense=bool(is_dense)):
        return verdict
    if assessment.has_settled_ranges and is_dense is None:
        return f"{verdict}; for sparse and 4-bit ones more images would help, -v says what moved"
    return "not settled; more images would help, -v says what moved"


def describe_convergence(assessment: Assessment | None, *, unanswered: int) -> Iterator[str]:
    """Whether the statistics have settled, their worst inputs, and what would help."""
    if assessment is None:
        yield "warning: one sample alone does not show whether the statistics have settled; give more images"
    else:
        verdict = assessment.in_words
        if not assessment.has_settled_ranges:
            verdict = "warning: the statistics have not settled"
        yield (
            f"{verdict}: against half of the samples, {_changes(assessment.typical)} "
            f"(medians over {assessment.inputs} text inputs)"
        )
        worst = "; ".join(f"{FAMILY.short_name(site)}: {_changes(change)}" for site, change in assessment.worst)
        yield f"  changed most: {worst}"
        if not assessment.is_settled:
            aim = "for sparse and 4-bit weights " if assessment.has_settled_ranges else ""
            yield f"  {aim}more images would help, of the kind that the model will be asked about, and samples with answers"
    if unanswered:
        yield f"note: {_samples(unanswered)} no answer; {ANSWERS_COUNT}"


def unanswered_verdict(unanswered: int) -> str:
    """How many samples have no answer, and what would give them one."""
    return f"{_samples(unanswered)} none; {ANSWERS_COUNT}"


def _samples(unanswered: int) -> str:
    return counted(unanswered, "sample has", "samples have")


def _changes(change: Convergence) -> str:
    correlation = "" if change.correlation is None else f", correlations {change.correlation:.0%}"
    return f"ranges changed by {change.range_gap:.0%}, mean squares {change.diagonal:.0%}{correlation}"


def describe_few(images: int) -> list[str]:
    """That more calibration images are wanted; nothing if there are enough."""
    if images >= WANTED_IMAGES:
        return []
    return [f"note: {counted(images, 'calibration image')}; {WANTED_IMAGES} are wanted for accuracy"]


def describe_large_pictures(patches: Iterable[int], patch_size: int) -> list[str]:
    """That pictures are so large that they take most of the time, and what shrinks them; nothing if none is.

    Args:
        patches: of each picture.
        patch_size: pixels along each side of a patch.
    """
    large = [count for count in patches if count > LARGE_PICTURE]
    if not large:
        return []
    them, pixels = "it" if len(large) == 1 else "them", LARGE_PICTURE * patch_size**2
    return [
        f"note: {counted(len(large), 'large picture')} of up to {max(large):,} patches, whose attention takes time with "
        f"their square; if the model will be asked about smaller ones, --max-pixels {pixels} shrinks {them}"
    ]


def describe_generation(plan: GenerationPlan) -> str:
    """What writing the answers will take, before it starts."""
    asked = sum(len(members) for members in plan.rounds)
    if not asked:
        return "generate: every sample has an answer"
    read = plan.token_bytes - plan.kept_bytes
    rounds = f", in {len(plan.rounds)} rounds" if len(plan.rounds) > 1 else ""
    weights = (
        f"{read / GIB:.1f} of {plan.token_bytes / GIB:.1f} GiB of weights for each token"
        if read
        else "the weights once"
    )
    seconds = plan.read_seconds
    minutes = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(seconds, 1):.0f} s"
    time_needed = f"{seconds / 3600:.1f} h" if seconds >= 5400 else minutes
    return (
        f"generate: {counted(asked, 'sample is', 'samples are')} answered in up to {plan.max_tokens} tokens{rounds}; "
        f"reading {weights} takes up to about {time_needed}"
    )


def describe_large_weights(linears: Iterable[str], beyond_float16: Collection[str]) -> list[str]:
    """That weights of a float16 model are larger than float16 can be, and why that does no harm; nothing if none is.

    Args:
        linears: names of the quantized linears.
        beyond_float16: names of tensors of the float model that float16 cannot hold.
    """
    large = [name for name in linears if f"{name}.weight" in beyond_float16]
    if not large:
        return []
    others = f" and {len(large) - 1} more" if len(large) > 1 else ""
    return [
        f"note: {large[0]}.weight{others} goes beyond 65504, where float16 ends: integers and their float32 scales hold it"
    ]


def describe_recipe(recipe: Recipe, groups: Iterable[GroupPlan], config: ModelConfig, out: Path) -> list[str]:
    """What is to be said of a quantization before it starts."""
    path, patterns = describe_path(out, recipe.form), describe_patterns(recipe, config)
    return [*describe_limits(recipe, groups), *patterns, *path, *describe_kernel()]


def describe_kernel() -> list[str]:
    """That rounding was not compiled, and what that costs; nothing if it was."""
    if gptq.KERNELS:
        return []
    return ["note: this glmq has no compiled rounding: torch does it, in 1.5 times the time; see glmq doctor"]


def describe_path(out: Path, form: Form) -> list[str]:
    """That an engine which reads the form will not open the output where it is written; nothing if all will."""
    path = str(out.resolve())
    return [
        f"note: {engine.spec.title} opens no path like {path}: letters, digits, _ . / - only; move the output for it"
        for engine in Engine
        if form in engine.spec.forms and engine.spec.refuses_path(path)
    ]


def describe_limits(recipe: Recipe, groups: Iterable[GroupPlan]) -> list[str]:
    """What engines that read the form do with the recipe that one would not think, or refuse though they load its type.

    Args:
        groups: of the model, as the recipe has them.
    """
    plans = list(groups)
    types: dict[QuantType, list[LinearShape]] = {}
    for plan in plans:
        types.setdefault(plan.quant_type, []).extend(plan.group.linears)
    target = recipe.target.place
    asked = Engine if target is None else (target.engine,)
    readers = [engine for engine in asked if recipe.form in engine.spec.forms]
    general = [NOT_COMPRESSED] if recipe.quant_type.spec.is_sparse and recipe.form is Form.MINDIE else []
    others = beyond_text(plans)
    general += [
        f"{engine.spec.title} reads {FLOAT_ELSEWHERE}, and {len(others)} of their linears become integers, {others[0]} first"
        for engine in readers
        if others and engine.spec.text_only
    ]
    general += [
        f"{engine.spec.title} reads one type per model, here {recipe.quant_type.value}, and {counted(len(linears), 'linear')} "
        f"will be {kind.value}, {linears[0].name} first"
        for engine in readers
        for kind, linears in types.items()
        if kind is not QuantType.FLOAT and Place(engine, None).dtypes(recipe.quant_type)
        if not engine.spec.takes(kind, recipe.quant_type)
    ]
    if target is not None and not loading_engines(recipe, plans):
        supports = target.engine.spec.chips.values()
        general += [one.fails for one in supports if one.fails is not None and recipe.quant_type in one.dtypes]
    return [f"warning: {said}" for said in general] + [
        f"warning: {said}"
        for engine in readers
        for kind, linears in types.items()
        if recipe.form is not Form.COMPRESSED_TENSORS or kind in engine.spec.packed_types
        for said in (
            *engine.spec.by_release(kind),
            *filter(None, (Place(engine, None).refuses_dtype(kind, recipe.dtype),)),
            *_without_bias(engine.spec, kind, linears),
            *_large_groups(engine.spec, kind, recipe.group_size),
        )
    ]


def _without_bias(spec: EngineSpec, kind: QuantType, linears: Sequence[LinearShape]) -> list[str]:
    biased = [linear.name for linear in linears if linear.has_bias]
    if kind not in spec.drops_bias or not biased:
        return []
    return [
        f"{spec.title} runs {kind.value} linears without their bias, which {len(biased)} of them have, {biased[0]} first: "
        f"its answers will be wrong; {WITHOUT_BIAS}"
    ]


def _large_groups(spec: EngineSpec, kind: QuantType, size: int) -> list[str]:
    if not kind.spec.two_stage or spec.largest_group is None or size <= spec.largest_group:
        return []
    return [f"{spec.title} takes groups of more than {spec.largest_group} columns with {LARGE_GROUPS} alone"]


def describe_patterns(recipe: Recipe, config: ModelConfig) -> list[str]:
    """How many linears each pattern of the command line matches."""
    counts = {rule.option: count_matches(rule.pattern, config) for rule in recipe.rules if rule.option}
    return [f"{option} matches {counted(count, 'linear')}" for option, count in counts.items()]


def describe_findings(found: SampleSet, what: str) -> list[str]:
    """The files of a sample set that were left out, the first of them by name, and what else was found."""
    lines = [f"left out {rejected.name}: {rejected.reason}" for rejected in found.rejected[:LISTED]]
    if found.rejected:
        lines.append(f"{counted(len(found.rejected), 'file')} left out, {len(found.samples)} {what} used")
    return [*lines, *(f"note: {note}" for note in found.notes)]
