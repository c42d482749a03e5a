"""The flags of `glmq quantize` that make a recipe: the fewest, so that it can be made again by hand."""

from __future__ import annotations

from glmq.quantization.options import Options
from glmq.quantization.recipe import Recipe, make_recipe
from glmq.quantization.targets import Target
from glmq.spec import QuantType

_RULES = ("--layer", "--keep-float")


def recipe_flags(recipe: Recipe) -> list[str]:
    """The words that `glmq quantize` needs for a recipe beside model, statistics and output; none for what is the default."""
    usual = make_recipe(Options()).settings()
    words: list[str] = []
    for option, value in recipe.settings().items():
        if option in _RULES or value in ("", usual[option]):
            continue
        words += [option, value] if "_" in option or value not in ("True", "False") else [_flag(option, value)]
    for rule in recipe.rules:
        if rule.option.startswith("--layer"):
            words += ["--layer", f"{rule.pattern}={rule.quant_type.value}"]
        elif rule.option:
            assert rule.quant_type is QuantType.FLOAT
            words += ["--keep-float", rule.pattern]
    return words if recipe.target is Target.GENERIC else [*words, "--target", recipe.target.value]


def _flag(option: str, value: str) -> str:
    """A flag of glmq's own, which takes no value."""
    return option if value == "True" else f"--no-{option.removeprefix('--')}"
