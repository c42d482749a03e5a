"""Options -> a frozen Recipe, and a Recipe -> the quantization type of every linear. What contradicts is refused here.

Nothing is ignored in silence: an option that has no effect in the chosen mode is refused when it is set away from its default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from glmq.errors import UsageError
from glmq.model.config import ModelConfig
from glmq.model.glm4v import DEFAULT_FLOAT, Group, all_blocks
from glmq.quantize.layer import GroupScheme
from glmq.spec import ActRange, FloatDtype, Method, QuantType, Smoothing, StepRule, WeightScheme

GROUP_SIZES: Final = (64, 128, 256, 512)
DEFAULT_GROUP_SIZE: Final = 64
DEFAULT_FRACTION: Final = 0.01
DEFAULT_SIGMA_FACTOR: Final = 3.0


@dataclass(frozen=True, slots=True)
class Options:
    """The mission's parameters of quantization, as given."""

    w_bit: int = 8
    a_bit: int = 8
    anti_method: str = "m2"
    act_method: int = 2
    open_outlier: bool = True
    is_dynamic: bool = False
    is_lowbit: bool = False
    co_sparse: bool = False
    fraction: float = DEFAULT_FRACTION
    do_smooth: bool = False
    use_sigma: bool = False
    sigma_factor: float = DEFAULT_SIGMA_FACTOR
    torch_dtype: str = "bf16"
    group_size: int = DEFAULT_GROUP_SIZE
    mindie_format: bool = False
    method: str = Method.COMPENSATED.value
    keep_float: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """What quantize does to a checkpoint."""

    quant_type: QuantType
    dtype: FloatDtype
    scheme: GroupScheme
    mindie: bool
    keep_float: tuple[str, ...]
    """Patterns of linears that stay float beside the default ones."""


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One norm group and what becomes of it."""

    group: Group
    quant_type: QuantType
    """FLOAT: the linears stay as they are."""


def make_recipe(options: Options) -> Recipe:
    """Check the options against each other.

    Raises:
        UsageError: a value out of range, options that contradict each other, or an option without effect.
    """
    _check_ranges(options)
    quant_type = _quant_type(options)
    rule = _step_rule(options, quant_type)
    _refuse_without_effect(options, quant_type, rule)
    dtype = FloatDtype.BF16 if options.torch_dtype == "bf16" else FloatDtype.FP16
    if quant_type is QuantType.W8A8S and dtype is FloatDtype.BF16:
        raise UsageError(
            "--torch_dtype bf16 with a sparse type (W8A8S): no engine loads it, the 300I Duo has no bfloat16; "
            "pass --torch_dtype fp16"
        )
    weight = WeightScheme(
        quant_type=quant_type,
        step_rule=rule,
        method=Method(options.method),
        fraction=options.fraction,
        sigma_factor=options.sigma_factor,
        group_size=options.group_size if quant_type is QuantType.W4A8_DYNAMIC else 0,
        keep_outliers=options.open_outlier,
    )
    smoothing = Smoothing.SMOOTHQUANT if options.do_smooth else Smoothing(options.anti_method)
    scheme = GroupScheme(weight, smoothing, ActRange(options.act_method), bias_correction=False)
    return Recipe(quant_type, dtype, scheme, options.mindie_format, options.keep_float)


def plan_groups(recipe: Recipe, config: ModelConfig) -> dict[str, GroupPlan]:
    """The plan of every group, keyed by site, in model order.

    Raises:
        UsageError: a pattern that matches no quantizable linear, splits a group, or leaves nothing to quantize.
    """
    groups = [group for block in all_blocks(config) for group in block.groups]
    candidates = [
        linear.name for group in groups for linear in group.linears if not matches(linear.name, DEFAULT_FLOAT)
    ]
    for pattern in recipe.keep_float:
        if not any(fnmatchcase(name, pattern) for name in candidates):
            raise UsageError(
                f"--keep-float {pattern!r} matches none of the {len(candidates)} linears that would be quantized; "
                f"their names look like {candidates[0]!r}"
            )
    plans = {group.site: GroupPlan(group, _group_type(group, recipe)) for group in groups}
    if all(plan.quant_type is QuantType.FLOAT for plan in plans.values()):
        raise UsageError("--keep-float leaves no linear to quantize; narrow the patterns")
    return plans


def count_matches(pattern: str, config: ModelConfig) -> int:
    """How many linears of the model a pattern names."""
    return sum(
        fnmatchcase(linear.name, pattern)
        for block in all_blocks(config)
        for group in block.groups
        for linear in group.linears
    )


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a linear's name matches one of the patterns (`*` and `?` as in a shell, case-sensitive)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _group_type(group: Group, recipe: Recipe) -> QuantType:
    kept = [linear.name for linear in group.linears if matches(linear.name, (*DEFAULT_FLOAT, *recipe.keep_float))]
    if kept and len(kept) < len(group.linears):
        rest = [linear.name for linear in group.linears if linear.name not in kept]
        raise UsageError(
            f"--keep-float keeps {kept[0]} float but not {rest[0]}: the engines load the linears of one input as one tensor, "
            "so they must be of one type; let the pattern match all of them"
        )
    return QuantType.FLOAT if kept else recipe.quant_type


def _check_ranges(options: Options) -> None:
    if options.w_bit not in (4, 8):
        raise UsageError(f"--w_bit {options.w_bit}: 4 or 8 is needed")
    if options.a_bit != 8:
        raise UsageError(f"--a_bit {options.a_bit}: only 8 is served")
    if options.act_method not in (1, 2, 3):
        raise UsageError(
            f"--act_method {options.act_method}: 1 (min-max), 2 (histogram) or 3 (the better of both) is needed"
        )
    if not 0.01 <= options.fraction <= 0.1:
        raise UsageError(f"--fraction {options.fraction}: a number from 0.01 to 0.1 is needed")
    if not 1.0 <= options.sigma_factor <= 3.0:
        raise UsageError(f"--sigma_factor {options.sigma_factor}: a number from 1.0 to 3.0 is needed")
    if options.group_size not in GROUP_SIZES:
        raise UsageError(f"--group_size {options.group_size}: one of 64, 128, 256, 512 is needed")


def _quant_type(options: Options) -> QuantType:
    if options.co_sparse and options.is_lowbit:
        raise UsageError(
            "--co_sparse True with --is_lowbit True: they are two algorithms for the same type; choose one"
        )
    if options.co_sparse and options.is_dynamic:
        raise UsageError(
            "--co_sparse True with --is_dynamic True: sparse types have static activations; drop one of them"
        )
    if options.co_sparse:
        return QuantType.W8A8S
    if options.w_bit == 4:
        if not options.is_lowbit:
            raise UsageError(
                "--w_bit 4 needs an algorithm: --is_lowbit True (W8A8S), --co_sparse True (W8A8S), "
                "or --is_lowbit True --is_dynamic True (W4A8_DYNAMIC)"
            )
        return QuantType.W4A8_DYNAMIC if options.is_dynamic else QuantType.W8A8S
    if options.is_lowbit:
        raise UsageError(
            "--is_lowbit True with --w_bit 8: the low-bit sparse algorithm makes 4-bit weights; pass --w_bit 4"
        )
    return QuantType.W8A8_DYNAMIC if options.is_dynamic else QuantType.W8A8


def _step_rule(options: Options, quant_type: QuantType) -> StepRule:
    if quant_type is not QuantType.W8A8S:
        return StepRule.ROW_MAX
    if options.co_sparse:
        return StepRule.TENSOR_FRACTION
    return StepRule.SIGMA if options.use_sigma else StepRule.FRACTION


def _refuse_without_effect(options: Options, quant_type: QuantType, rule: StepRule) -> None:
    sparse = quant_type is QuantType.W8A8S
    by_fraction = sparse and rule in (StepRule.FRACTION, StepRule.TENSOR_FRACTION)
    if options.use_sigma and rule is not StepRule.SIGMA:
        why = (
            "--co_sparse True chooses outliers by --fraction"
            if options.co_sparse
            else f"{quant_type.value} splits none off"
        )
        raise UsageError(f"--use_sigma True has no effect here: {why}; drop it")
    if options.sigma_factor != DEFAULT_SIGMA_FACTOR and rule is not StepRule.SIGMA:
        raise UsageError(
            f"--sigma_factor {options.sigma_factor} has no effect without --use_sigma True; drop it or add that"
        )
    if options.fraction != DEFAULT_FRACTION and not by_fraction:
        why = "--use_sigma True chooses outliers by sigma" if sparse else f"{quant_type.value} splits no outliers off"
        raise UsageError(f"--fraction {options.fraction} has no effect here: {why}; drop it")
    if not options.open_outlier and not sparse and quant_type is not QuantType.W4A8_DYNAMIC:
        raise UsageError(f"--open_outlier False has no effect here: {quant_type.value} splits no outliers off; drop it")
    if options.act_method != 2 and not quant_type.is_static:
        raise UsageError(
            f"--act_method {options.act_method} has no effect with --is_dynamic True: activation ranges are found at run time; drop it"
        )
    if options.group_size != DEFAULT_GROUP_SIZE and quant_type is not QuantType.W4A8_DYNAMIC:
        raise UsageError(
            f"--group_size {options.group_size} has no effect in {quant_type.value}: only W4A8_DYNAMIC "
            "(--w_bit 4 --is_lowbit True --is_dynamic True) has groups; drop it"
        )
