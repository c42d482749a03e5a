"""Options -> a frozen Recipe. Options that contradict each other are refused here.

Nothing is ignored in silence: an option without effect in the chosen mode is refused when set away from its default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Final

from glmq.checkpoint.journal import number_text
from glmq.engines import Engine
from glmq.errors import UsageError
from glmq.model.config import FAMILY
from glmq.quantization.forms import FORMATS, choose_form, why_not_in_form
from glmq.quantization.group import GroupScheme
from glmq.quantization.rules import LayerRule, parse_rule
from glmq.quantization.targets import Target, refuse_unloadable
from glmq.spec import (
    Activation,
    ActRange,
    Allocation,
    FloatDtype,
    Form,
    Method,
    QuantType,
    Smoothing,
    StepRule,
    WeightScheme,
    assert_never,
)

GROUP_SIZES: Final = tuple(sorted({size for engine in Engine for size in engine.spec.group_sizes}))
"""Those that some engine accepts."""
PACKED_GROUP_SIZES: Final = (32, 64, 128)
"""Those of weight-only types: what vLLM's fast kernels take."""
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
    bias_correction: bool = False
    channel_shift: bool = False
    keep_float: tuple[str, ...] = ()
    layer: tuple[str, ...] = ()
    target: str = Target.GENERIC.value


@dataclass(frozen=True, slots=True)
class Recipe:
    """The checked settings of a quantization: the type, how weights and activations are treated, and which linears differ."""

    quant_type: QuantType
    """Of the model; linears may have another by rule."""
    dtype: FloatDtype
    scheme: GroupScheme
    """Of linears with the model's type."""
    form: Form
    rules: tuple[LayerRule, ...]
    group_size: int
    """Of linears whose type has groups of input columns: their size."""
    target: Target
    target_bits: float | None
    """Mean entropy of the sparse linears' integers, in other types the most of each linear's, in bits per weight; None: the
    step rule of the flags decides."""
    allocation: Allocation
    """Of the bits of sparse linears."""

    @classmethod
    def w8a8(cls, *, dtype: str = "bf16") -> Recipe:
        """Int8 weights, static int8 activations: MindIE on the Atlas 800I A2. `dtype`: `bf16` or `fp16`."""
        return make_recipe(Options(torch_dtype=dtype))

    @classmethod
    def w8a8_dynamic(cls, *, dtype: str = "bf16") -> Recipe:
        """Int8 weights, int8 activations whose scale is found per token. `dtype`: `bf16` or `fp16`."""
        return make_recipe(Options(is_dynamic=True, torch_dtype=dtype))

    @classmethod
    def w8a8s(
        cls,
        *,
        sigma: float | None = None,
        fraction: float | None = None,
        target_bits: float | None = None,
        dtype: str = "fp16",
    ) -> Recipe:
        """Sparse int8 weights of few bits each, which compress well: the Atlas 300I Duo.

        Args:
            sigma: weights within so many standard deviations of their row get 4 bits; the vendor's `use_sigma`.
            fraction: instead of it, the share of a row's weights that is not held to 4 bits.
            target_bits: entropy to spend per weight over the whole model, instead of what the rule spends.
            dtype: of the float tensors: `fp16` or `bf16`.
        """
        return make_recipe(
            Options(
                w_bit=4,
                is_lowbit=True,
                use_sigma=sigma is not None,
                sigma_factor=DEFAULT_SIGMA_FACTOR if sigma is None else sigma,
                fraction=DEFAULT_FRACTION if fraction is None else fraction,
                target_bits=target_bits,
                torch_dtype=dtype,
            )
        )

    @classmethod
    def w4a8_dynamic(cls, *, group_size: int = DEFAULT_GROUP_SIZE, dtype: str = "bf16") -> Recipe:
        """Int4 weights in groups of `group_size` columns, int8 activations whose scale is found per token."""
        return make_recipe(Options(w_bit=4, is_lowbit=True, is_dynamic=True, group_size=group_size, torch_dtype=dtype))

    @classmethod
    def w4a16(cls, *, group_size: int = DEFAULT_GROUP_SIZE, dtype: str = "bf16") -> Recipe:
        """Int4 weights in groups of `group_size` columns, float activations, in the compressed-tensors form."""
        return make_recipe(
            Options(w_bit=4, a_bit=16, group_size=group_size, torch_dtype=dtype, format="compressed-tensors")
        )

    def rule_of(self, name: str) -> LayerRule | None:
        """The rule that decides about a linear: the last one that matches."""
        matching = [rule for rule in self.rules if fnmatchcase(name, rule.pattern)]
        return matching[-1] if matching else None

    def settings(self) -> dict[str, str]:
        """What the integers depend on, by the option of `glmq quantize` that decides it; empty text for what is not given."""
        weight, kind = self.scheme.weight, self.quant_type
        is_tensor_wide = weight.step_rule is StepRule.TENSOR_FRACTION
        few_bits = kind in (QuantType.W4A8_DYNAMIC, QuantType.W4A16) or (kind.spec.is_sparse and not is_tensor_wide)
        smoothquant = self.scheme.smoothing is Smoothing.SMOOTHQUANT
        return {
            "--w_bit": "4" if few_bits else "8",
            "--a_bit": "16" if kind in (QuantType.W8A16, QuantType.W4A16) else "8",
            "--is_lowbit": str(few_bits and kind is not QuantType.W4A16),
            "--co_sparse": str(is_tensor_wide),
            "--is_dynamic": str(kind.spec.activation is Activation.PER_TOKEN),
            "--use_sigma": str(weight.step_rule is StepRule.SIGMA),
            "--sigma_factor": number_text(weight.sigma_factor),
            "--fraction": number_text(weight.fraction),
            "--open_outlier": str(weight.keep_outliers),
            "--group_size": str(weight.group_size or self.group_size),
            "--method": weight.method.value,
            "--do_smooth": str(smoothquant),
            "--anti_method": "" if smoothquant else self.scheme.smoothing.value,
            "--act_method": str(self.scheme.act_range.value),
            "--bias-correction": str(self.scheme.bias_correction),
            "--channel-shift": str(self.scheme.channel_shift),
            "--torch_dtype": "fp16" if self.dtype is FloatDtype.FP16 else "bf16",
            "--format": next(name for name, form in FORMATS.items() if form is self.form),
            "--layer": " ".join(rule.option for rule in self.rules if rule.option.startswith("--layer")),
            "--keep-float": " ".join(rule.option for rule in self.rules if rule.option.startswith("--keep-float")),
            "--target-bits": "" if self.target_bits is None else number_text(self.target_bits),
            "--allocate": self.allocation.value,
        }

    def scheme_of(self, quant_type: QuantType) -> GroupScheme:
        """The scheme of linears of that type."""
        if quant_type is self.quant_type:
            return self.scheme
        group_size = self.group_size if quant_type.has_groups(self.form) else 0
        weight = replace(self.scheme.weight, quant_type=quant_type, step_rule=StepRule.ROW_MAX, group_size=group_size)
        return replace(self.scheme, weight=weight)


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
    target = Target(options.target)
    form = choose_form(options.format, mindie_format=options.mindie_format)
    _refuse_in_form(options, quant_type, form)
    refuse_unloadable(target, quant_type, dtype, form)
    weight = WeightScheme(
        quant_type=quant_type,
        step_rule=rule,
        method=Method(options.method),
        fraction=options.fraction,
        sigma_factor=options.sigma_factor,
        group_size=options.group_size if quant_type.has_groups(form) else 0,
        keep_outliers=options.open_outlier,
    )
    smoothing = Smoothing.SMOOTHQUANT if options.do_smooth else Smoothing(options.anti_method)
    scheme = GroupScheme(
        weight, smoothing, ActRange(options.act_method), options.bias_correction, options.channel_shift
    )
    rules = (
        *(LayerRule(pattern, QuantType.FLOAT, "") for pattern in FAMILY.float_by_default),
        *(parse_rule(text, quant_type, target, form) for text in options.layer),
        *(LayerRule(pattern, QuantType.FLOAT, f"--keep-float {pattern!r}") for pattern in options.keep_float),
    )
    return Recipe(
        quant_type,
        dtype,
        scheme,
        form,
        rules,
        options.group_size,
        target,
        _target_bits(options, quant_type),
        Allocation(options.allocate),
    )


def _refuse_in_form(options: Options, quant_type: QuantType, form: Form) -> None:
    """Raise UsageError for what the form does not have, or an option that has no effect in it."""
    problem = why_not_in_form(quant_type, form)
    if problem is not None:
        raise UsageError(problem)
    if options.bias_correction and form is Form.COMPRESSED_TENSORS:
        raise UsageError(
            "--bias-correction with --format compressed-tensors: it stores no quant_bias to correct; drop one of them"
        )
    if options.channel_shift and form is Form.COMPRESSED_TENSORS:
        raise UsageError("--channel-shift with --format compressed-tensors: its norms have no bias; drop one of them")
    if options.group_size != DEFAULT_GROUP_SIZE and not quant_type.has_groups(form):
        raise UsageError(
            f"--group_size {options.group_size} has no effect in {quant_type.value}: only W4A8_DYNAMIC "
            "(--w_bit 4 --is_lowbit True --is_dynamic True) has groups, and with --format compressed-tensors W8A16 and W4A16 "
            "(--a_bit 16); drop it"
        )


def _target_bits(options: Options, quant_type: QuantType) -> float | None:
    if options.target_bits is None and options.target_ratio is None:
        return None
    name = "--target-bits" if options.target_ratio is None else "--target-ratio"
    if options.target_bits is not None and options.target_ratio is not None:
        raise UsageError("--target-bits with --target-ratio: they name the same size in two ways; choose one")
    if not quant_type.spec.is_sparse and options.method == Method.PLAIN.value:
        raise UsageError(
            f"{name} with --method plain has no effect in {quant_type.value}: nearest integers keep the finest step there; "
            "drop one of them"
        )
    if options.method == Method.REFERENCE.value:
        raise UsageError(
            f"{name} with --method reference: the vendor's rule alone decides the size there; drop one of them"
        )
    if options.target_bits is not None:
        return options.target_bits
    assert options.target_ratio is not None
    return 8 * options.target_ratio


def _check_ranges(options: Options) -> None:
    if options.w_bit not in (4, 8):
        raise UsageError(f"--w_bit {options.w_bit}: 4 or 8 is needed")
    if options.a_bit not in (8, 16):
        raise UsageError(f"--a_bit {options.a_bit}: 8, or 16 for float activations, is needed")
    if options.act_method not in (1, 2, 3):
        raise UsageError(
            f"--act_method {options.act_method}: 1 (min-max), 2 (histogram) or 3 (the better of both) is needed"
        )
    if not 0.01 <= options.fraction <= 0.1:
        raise UsageError(f"--fraction {options.fraction}: a number from 0.01 to 0.1 is needed")
    if not 1.0 <= options.sigma_factor <= 3.0:
        raise UsageError(f"--sigma_factor {options.sigma_factor}: a number from 1.0 to 3.0 is needed")
    sizes = GROUP_SIZES if options.a_bit == 8 else PACKED_GROUP_SIZES
    if options.group_size not in sizes:
        raise UsageError(f"--group_size {options.group_size}: one of {', '.join(map(str, sizes))} is needed")


def _quant_type(options: Options) -> QuantType:
    if options.a_bit == 16:
        return _weight_only_type(options)
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


def _weight_only_type(options: Options) -> QuantType:
    clashing = [
        (options.is_dynamic, "--is_dynamic True"),
        (options.is_lowbit, "--is_lowbit True"),
        (options.co_sparse, "--co_sparse True"),
    ]
    for is_given, name in clashing:
        if is_given:
            raise UsageError(
                f"{name} with --a_bit 16: activations stay float and weights dense there; drop one of them"
            )
    return QuantType.W4A16 if options.w_bit == 4 else QuantType.W8A16


def _step_rule(options: Options, quant_type: QuantType) -> StepRule:
    if not quant_type.spec.is_sparse:
        return StepRule.ROW_MAX
    if options.co_sparse:
        return StepRule.TENSOR_FRACTION
    return StepRule.SIGMA if options.use_sigma else StepRule.FRACTION


def _refuse_without_effect(options: Options, quant_type: QuantType, rule: StepRule) -> None:
    spec = quant_type.spec
    sparse = spec.is_sparse
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
    if not options.open_outlier and not sparse and not spec.two_stage:
        raise UsageError(f"--open_outlier False has no effect here: {quant_type.value} splits no outliers off; drop it")
    dealt = options.method == Method.COMPENSATED.value or options.target_bits or options.target_ratio
    if options.allocate != Allocation.ANSWER.value and not (sparse and dealt):
        raise UsageError(
            f"--allocate {options.allocate} has no effect here: no bits are dealt out to sparse linears; drop it"
        )
    if options.act_method != 2:
        _refuse_range(options.act_method, quant_type)
    if options.bias_correction and "quant_bias" not in spec.suffixes:
        raise UsageError(
            f"--bias-correction has no effect in {quant_type.value}: its linears have no quant_bias to correct; drop it"
        )
    if options.bias_correction and options.method == Method.REFERENCE.value:
        raise UsageError("--bias-correction with --method reference: the vendor's tool corrects none; drop one of them")
    if options.channel_shift and spec.activation is not Activation.STATIC:
        raise UsageError(f"--channel-shift: engines ignore norms' biases before {quant_type.value} linears; drop it")
    if options.method == Method.REFERENCE.value and options.a_bit == 16:
        raise UsageError(
            f"--method reference with --a_bit 16: the vendor's tool makes no {quant_type.value} of this model; drop one of them"
        )


def _refuse_range(act_method: int, quant_type: QuantType) -> None:
    """Raise UsageError unless the type stores an activation range, which --act_method chooses."""
    match quant_type.spec.activation:
        case Activation.STATIC:
            return
        case Activation.PER_TOKEN:
            why = "with --is_dynamic True: ranges are found at run time"
        case Activation.NONE:
            why = f"in {quant_type.value}: its activations stay float"
        case other:
            assert_never(other)
    raise UsageError(f"--act_method {act_method} has no effect {why}; drop it")
