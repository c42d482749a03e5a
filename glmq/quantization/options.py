"""The options of `glmq quantize`, and what of them is refused before a recipe is made.

Nothing is ignored in silence: an option without effect in the chosen mode is refused when set away from its default.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from glmq.engines import Engine
from glmq.errors import UsageError
from glmq.quantization.targets import Target
from glmq.spec import Activation, Allocation, FloatDtype, Form, Method, QuantType, Smoothing, StepRule, assert_never
from glmq.values import DTYPE_WORDS, check_between, check_word

GROUP_SIZES: Final = tuple(sorted({size for engine in Engine for size in engine.spec.group_sizes}))
"""Those that some engine accepts."""
PACKED_GROUP_SIZES: Final = (32, 64, 128)
"""Those of weight-only types: what vLLM's fast kernels take."""
DTYPES: Final = {"bf16": FloatDtype.BF16, "fp16": FloatDtype.FP16}
"""What --torch_dtype names."""
DEFAULT_GROUP_SIZE: Final = 64
DEFAULT_FRACTION: Final = 0.01
DEFAULT_SIGMA_FACTOR: Final = 3.0


@dataclass(frozen=True, slots=True)
class Options:
    """How to quantize, in the options of `glmq quantize`, not yet checked.

    Names are those of the vendor's `quant_glm41v.py` where that has the option.
    """

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
    format: str | None = None
    """A key of forms.FORMATS; None: what `mindie_format` says."""
    method: str = Method.COMPENSATED.value
    target_bits: float | None = None
    target_ratio: float | None = None
    allocate: str = Allocation.ANSWER.value
    propagation: float = 0.0
    bias_correction: bool = False
    channel_shift: bool = False
    keep_float: tuple[str, ...] = ()
    layer: tuple[str, ...] = ()
    target: str = Target.GENERIC.value


def check_values(options: Options) -> None:
    """Raise UsageError for a word that is none, or a number that no model takes."""
    check_word("--torch_dtype", options.torch_dtype, (*DTYPES, *DTYPE_WORDS))
    check_word("--anti_method", options.anti_method, (Smoothing.M2.value, Smoothing.NONE.value))
    check_word("--method", options.method, [method.value for method in Method])
    check_word("--allocate", options.allocate, [allocation.value for allocation in Allocation])
    check_word("--target", options.target, [target.value for target in Target])
    if options.w_bit not in (4, 8):
        raise UsageError(f"--w_bit {options.w_bit}: 4 or 8 is needed")
    if options.a_bit not in (8, 16):
        raise UsageError(f"--a_bit {options.a_bit}: 8, or 16 for float activations, is needed")
    if options.act_method not in (1, 2, 3):
        raise UsageError(
            f"--act_method {options.act_method}: 1 (min-max), 2 (histogram) or 3 (the better of both) is needed"
        )
    check_between("--fraction", options.fraction, 0.01, 0.1)
    check_between("--sigma_factor", options.sigma_factor, 1.0, 3.0)
    check_between("--propagation", options.propagation, 0, 1)
    check_between("--target-bits", options.target_bits, 0.5, 8)
    check_between("--target-ratio", options.target_ratio, 0.0625, 1)


def refuse_without_effect(options: Options, quant_type: QuantType, rule: StepRule, others: Iterable[QuantType]) -> None:
    """Raise UsageError for an option that changes nothing.

    Args:
        options: as given.
        quant_type: of the linears without a rule.
        rule: of their steps.
        others: the types that rules give.
    """
    spec = quant_type.spec
    kinds = (quant_type, *others)
    sparse = spec.is_sparse
    if sparse and not options.open_outlier:
        _refuse_rule_of_outliers(options)
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
    if not options.open_outlier and not any(kind.spec.is_sparse or kind.spec.two_stage for kind in kinds):
        raise UsageError(f"--open_outlier False has no effect here: {quant_type.value} splits no outliers off; drop it")
    dealt = options.method == Method.COMPENSATED.value or options.target_bits or options.target_ratio
    if options.allocate != Allocation.ANSWER.value and not (sparse and dealt):
        raise UsageError(
            f"--allocate {options.allocate} has no effect here: no bits are dealt out to sparse linears; drop it"
        )
    if options.act_method != 2:
        _refuse_range(options.act_method, kinds)
    if options.bias_correction and not any("quant_bias" in kind.spec.suffixes for kind in kinds):
        raise UsageError(
            f"--bias-correction has no effect in {quant_type.value}: its linears have no quant_bias to correct; drop it"
        )
    if options.bias_correction and options.method == Method.REFERENCE.value:
        raise UsageError("--bias-correction with --method reference: the vendor's tool corrects none; drop one of them")
    if options.channel_shift and all(kind.spec.activation is not Activation.STATIC for kind in kinds):
        raise UsageError(f"--channel-shift: engines ignore norms' biases before {quant_type.value} linears; drop it")
    if options.propagation:
        _refuse_propagation(options, quant_type, kinds)
    if options.method == Method.REFERENCE.value and options.a_bit == 16:
        raise UsageError(
            f"--method reference with --a_bit 16: the vendor's tool makes no {quant_type.value} of this model; drop one of them"
        )


def _refuse_rule_of_outliers(options: Options) -> None:
    """Raise UsageError for what chooses the outliers of a sparse type, which --open_outlier False leaves without any."""
    given = [
        (options.use_sigma, "--use_sigma True"),
        (options.fraction != DEFAULT_FRACTION, f"--fraction {options.fraction}"),
    ]
    for is_given, name in given:
        if is_given:
            raise UsageError(
                f"{name} has no effect with --open_outlier False, which splits no outliers off; drop one of them"
            )


def check_group_size(size: int, model_type: QuantType, others: Iterable[QuantType], form: Form) -> None:
    """Raise UsageError for a --group_size that the types with groups do not take, or that no linear needs.

    Args:
        size: as given.
        model_type: of the linears without a rule.
        others: the types that rules give.
        form: of the checkpoint.
    """
    grouped = [kind for kind in (model_type, *others) if kind.has_groups(form)]
    for kind in grouped or [model_type]:
        if kind.spec.activation is Activation.NONE:
            check_word("--group_size", size, PACKED_GROUP_SIZES)
        elif form is Form.MINDIE:  # which MindIE alone reads
            check_word("--format mindie with --group_size", size, Engine.MINDIE.spec.group_sizes)
        else:
            check_word("--group_size", size, GROUP_SIZES)
    if size != DEFAULT_GROUP_SIZE and not grouped:
        raise UsageError(
            f"--group_size {size} has no effect in {model_type.value}: only W4A8_DYNAMIC "
            "(--w_bit 4 --is_lowbit True --is_dynamic True) has groups, and with --format compressed-tensors W8A16 and W4A16 "
            "(--a_bit 16); drop it"
        )


def _refuse_range(act_method: int, kinds: Iterable[QuantType]) -> None:
    """Raise UsageError unless one of the types, the model's first, stores an activation range, which --act_method chooses."""
    reasons = []
    for kind in kinds:
        match kind.spec.activation:
            case Activation.STATIC:
                return
            case Activation.PER_TOKEN:
                reasons.append("with --is_dynamic True: ranges are found at run time")
            case Activation.NONE:
                reasons.append(f"in {kind.value}: its activations stay float")
            case other:
                assert_never(other)
    raise UsageError(f"--act_method {act_method} has no effect {reasons[0]}; drop it")


def _refuse_propagation(options: Options, quant_type: QuantType, kinds: Iterable[QuantType]) -> None:
    """Raise UsageError unless rounding compensates errors and the weights of some linears have four bits."""
    given = f"--propagation {options.propagation:g}"
    if all(kind.spec.weight_bits != 4 for kind in kinds):
        raise UsageError(f"{given} in {quant_type.value}: it is for W8A8S, W4A8_DYNAMIC and W4A16; drop it")
    if options.method != Method.COMPENSATED.value:
        raise UsageError(
            f"{given} with --method {options.method}: only compensated rounding makes up for errors; drop one of them"
        )
