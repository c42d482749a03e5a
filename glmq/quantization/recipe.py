"""Options -> a frozen Recipe. Options that contradict each other are refused here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from glmq.checkpoint.journal import number_text
from glmq.errors import UsageError
from glmq.model.config import FAMILY
from glmq.quantization.forms import FORMATS, choose_form, why_not_in_form
from glmq.quantization.group import GroupScheme
from glmq.quantization.options import (
    DEFAULT_FRACTION,
    DEFAULT_GROUP_SIZE,
    DEFAULT_SIGMA_FACTOR,
    DTYPES,
    Options,
    check_group_size,
    check_values,
    refuse_without_effect,
)
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
)
from glmq.values import DTYPE_WORDS


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
    propagation: float
    """Share of what earlier linears' errors do to a linear's input that its rounding makes up for; 0 to 1."""

    def __post_init__(self) -> None:
        """Raise UsageError for what no form or target holds, however the recipe was made: by `dataclasses.replace`, too."""
        problem = why_not_in_form(self.quant_type, self.form)
        if problem is not None:
            raise UsageError(problem)
        for quant_type in dict.fromkeys((self.quant_type, *(rule.quant_type for rule in self.rules))):
            if quant_type is not QuantType.FLOAT:
                refuse_unloadable(self.target, quant_type, self.dtype, self.form)

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
    def w4a8_dynamic(
        cls, *, group_size: int = DEFAULT_GROUP_SIZE, propagation: float = 0.0, dtype: str = "bf16"
    ) -> Recipe:
        """Int4 weights in groups of `group_size` columns, int8 activations whose scale is found per token.

        With `propagation`, about 0.25, layers are rounded for the inputs that those before them make; the statistics must hold
        what enters the text layers (`CalibrationOptions(text_inputs=True)`).
        """
        return make_recipe(
            Options(
                w_bit=4,
                is_lowbit=True,
                is_dynamic=True,
                group_size=group_size,
                propagation=propagation,
                torch_dtype=dtype,
            )
        )

    @classmethod
    def w4a16(cls, *, group_size: int = DEFAULT_GROUP_SIZE, propagation: float = 0.0, dtype: str = "bf16") -> Recipe:
        """Int4 weights in groups of `group_size` columns, float activations, in the compressed-tensors form.

        `propagation` as in `w4a8_dynamic`.
        """
        return make_recipe(
            Options(
                w_bit=4,
                a_bit=16,
                group_size=group_size,
                propagation=propagation,
                torch_dtype=dtype,
                format="compressed-tensors",
            )
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
            "--propagation": number_text(self.propagation) if self.propagation else "",
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
    check_values(options)
    quant_type = _quant_type(options)
    rule = _step_rule(options, quant_type)
    dtype = DTYPES[DTYPE_WORDS.get(options.torch_dtype, options.torch_dtype)]
    target = Target(options.target)
    form = choose_form(options.format, mindie_format=options.mindie_format)
    _refuse_in_form(options, quant_type, form)
    of_layers = tuple(parse_rule(text, quant_type, target, form) for text in options.layer)
    refuse_without_effect(options, quant_type, rule, (given.quant_type for given in of_layers))
    rules = (
        *(LayerRule(pattern, QuantType.FLOAT, "") for pattern in FAMILY.float_by_default),
        *of_layers,
        *(LayerRule(pattern, QuantType.FLOAT, f"--keep-float {pattern!r}") for pattern in options.keep_float),
    )
    check_group_size(options.group_size, quant_type, (rule.quant_type for rule in rules), form)
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
        options.propagation,
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
