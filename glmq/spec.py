"""The frozen words of glmq: quantization types with their properties, forms, integer grids, the scheme of one linear."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, NoReturn


class FloatDtype(Enum):
    """The dtype of stored float tensors, spelled as in `config.json`."""

    FP16 = "float16"
    BF16 = "bfloat16"

    @property
    def code(self) -> str:
        """What safetensors calls it."""
        return "F16" if self is FloatDtype.FP16 else "BF16"


class Form(Enum):
    """One of the ways in which a quantized checkpoint is written and described, spelled as for people."""

    ASCEND_V1 = "ascendV1"
    """`quant_model_description.json` with a version; int4 weights two rows in one; no extra norm tensors."""
    MINDIE = "MindIE form"
    """The older one: `quant_model_description_{type}.json`, `quantize` in config.json, every norm a second time as
    `.module`."""
    COMPRESSED_TENSORS = "compressed-tensors"
    """That of the library of this name, which vLLM and transformers read: `quantization_config` in config.json, no
    description file, norms as in the float model, weights of weight-only types packed into int32."""


class Activation(Enum):
    """What becomes of a linear's input before the product."""

    STATIC = "static"
    """int8 with one stored scale and offset per linear."""
    PER_TOKEN = "per token"
    """int8 with a scale that the engine computes for every token, no offset."""
    NONE = "none"
    """It stays float."""


class QuantType(Enum):
    """A quantization type, spelled as in the description file (upper case)."""

    FLOAT = "FLOAT"
    W8A8 = "W8A8"
    W8A8S = "W8A8S"
    W8A8_DYNAMIC = "W8A8_DYNAMIC"
    W4A8_DYNAMIC = "W4A8_DYNAMIC"
    W8A8SC = "W8A8SC"
    W8A16 = "W8A16"
    W4A16 = "W4A16"

    @property
    def spec(self) -> "TypeSpec":
        """The type's properties."""
        return TYPES[self]

    @property
    def tag(self) -> str:
        """Lower case, as used in file names and in config.json."""
        return self.value.lower()

    def has_groups(self, form: Form) -> bool:
        """Whether its weights have a step for each group of input columns in that form, of whatever stage."""
        weight_only = self.spec.activation is Activation.NONE and self is not QuantType.FLOAT
        return self.spec.two_stage or (weight_only and form is Form.COMPRESSED_TENSORS)


ASCEND_FORMS: Final = (Form.ASCEND_V1, Form.MINDIE)
"""Those of the Ascend engines, with a description file."""


@dataclass(frozen=True, slots=True)
class TypeSpec:
    """The properties of a quantization type. What depends on a type asks these, not for the type by name."""

    weight_bits: int
    """Of nearly every weight; the rare outliers of a sparse type take up to 8. 16: the weights stay float."""
    activation: Activation
    suffixes: tuple[str, ...] = ()
    """What `glmq quantize` stores for a linear beside `.weight` and `.bias`, in order, without the dot; two-stage types
    have `scale_bias` too in ascendV1. Of the Ascend forms; empty for types that it does not write in them."""
    is_sparse: bool = False
    """Most weights are few-bit integers, so an entropy coder makes them small."""
    is_compressed: bool = False
    """The weights are stored as that coder's bytes."""
    two_stage: bool = False
    """int4 weights with a float32 step per row and one per group of input columns; else one step per row."""
    step_in_model_dtype: bool = False
    """Row steps are stored as float16 or bfloat16 numbers, as the model is; else they are float32."""
    forms: tuple[Form, ...] = ASCEND_FORMS
    """The forms that have the type."""


_STATIC_SUFFIXES: Final = ("input_scale", "input_offset", "quant_bias", "deq_scale")
_STEP_SUFFIXES: Final = ("weight_scale", "weight_offset")
PACKED_SUFFIXES: Final = ("weight", "index", "info")
"""Of what the engine's codec makes of a weight (W8A8SC)."""
_SECOND_SUFFIXES: Final = ("weight_scale_second", "weight_offset_second")

TYPES: Final[Mapping[QuantType, TypeSpec]] = {
    QuantType.FLOAT: TypeSpec(16, Activation.NONE),
    QuantType.W8A8: TypeSpec(
        8,
        Activation.STATIC,
        suffixes=(*_STATIC_SUFFIXES, *_STEP_SUFFIXES),
        step_in_model_dtype=True,
        forms=tuple(Form),
    ),
    QuantType.W8A8S: TypeSpec(4, Activation.STATIC, suffixes=_STATIC_SUFFIXES, is_sparse=True),
    QuantType.W8A8_DYNAMIC: TypeSpec(
        8, Activation.PER_TOKEN, suffixes=_STEP_SUFFIXES, step_in_model_dtype=True, forms=tuple(Form)
    ),
    QuantType.W4A8_DYNAMIC: TypeSpec(
        4, Activation.PER_TOKEN, suffixes=(*_STEP_SUFFIXES, *_SECOND_SUFFIXES), two_stage=True
    ),
    QuantType.W8A8SC: TypeSpec(4, Activation.STATIC, is_sparse=True, is_compressed=True),
    QuantType.W8A16: TypeSpec(
        8,
        Activation.NONE,
        suffixes=_STEP_SUFFIXES,
        step_in_model_dtype=True,
        forms=(Form.ASCEND_V1, Form.COMPRESSED_TENSORS),
    ),
    QuantType.W4A16: TypeSpec(4, Activation.NONE, step_in_model_dtype=True, forms=(Form.COMPRESSED_TENSORS,)),
}
"""Every quantization type. A new one is a row here, one in engines.py for each engine that reads it, and what mypy then asks
for."""


@dataclass(frozen=True, slots=True)
class IntGrid:
    """The integers qmin..qmax, both included."""

    qmin: int
    qmax: int


INT8: Final = IntGrid(-128, 127)
INT8_SYMMETRIC: Final = IntGrid(-127, 127)
INT4: Final = IntGrid(-8, 7)


class Smoothing(Enum):
    """How outlier input channels are moved from the activations into the weights of a norm group."""

    NONE = "none"
    M2 = "m2"
    """Outlier Suppression+ (Wei et al. 2023, arXiv 2304.09145), scale part only: no shift."""
    SMOOTHQUANT = "smoothquant"
    """SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): s = max|x|^a / max|w|^(1-a)."""


class Allocation(Enum):
    """By what the bits of sparse linears are dealt out."""

    ANSWER = "answer"
    """By each linear's output error and, at half weight, by what that error does to the residual stream."""
    ERROR = "error"
    """By each linear's relative output error alone."""


class ActRange(Enum):
    """How the range of a static activation is chosen; the numbers are `act_method` of the vendor's tool."""

    MINMAX = 1
    HISTOGRAM = 2
    MIXED = 3
    """Per linear, whichever of the two loses less."""


def type_named(name: str | None) -> QuantType | None:
    """The quantization type that a description file calls so; None for a name that is none of ours."""
    return next((quant_type for quant_type in QuantType if quant_type.value == name), None)


class StepRule(Enum):
    """A rule of the vendor's tool that gives each weight row its step.

    Plain and reference rounding use the step itself. Compensated rounding of a sparse type takes from it only a budget: the
    entropy, in bits per weight, that the rule's integers would have; its own steps spend as much (numerics/budget.py).
    """

    ROW_MAX = "row-max"
    """max|w| / 127; the only rule of types that are not sparse. Two-stage types have steps of their own (w4a8.py)."""
    SIGMA = "sigma"
    """Largest |w| not above sigma_factor * std(|w|) of the row, divided by 7 (is_lowbit, use_sigma)."""
    FRACTION = "fraction"
    """k-th largest |w| of the row, k = int(fraction * columns), divided by 7 (is_lowbit)."""
    TENSOR_FRACTION = "tensor-fraction"
    """Row maximum of what is not above the k-th largest |w| of the tensor, divided by 7 (co_sparse)."""


class Method(Enum):
    """How weights become integers."""

    PLAIN = "plain"
    """Nearest integer."""
    COMPENSATED = "compensated"
    """Error-compensated rounding with the second moment of the inputs (GPTQ, arXiv 2210.17323)."""
    REFERENCE = "reference"
    """Integers exactly as the vendor's tool makes them, saturation included."""


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How the weight of one linear becomes integers."""

    quant_type: QuantType
    step_rule: StepRule
    method: Method
    fraction: float = 0.01
    """Share of a row's (or tensor's) weights kept above the step's range; only FRACTION and TENSOR_FRACTION."""
    sigma_factor: float = 3.0
    """Only SIGMA."""
    group_size: int = 0
    """Input columns per step, second-stage in two-stage types; 0: one step per row."""
    keep_outliers: bool = True
    """open_outlier: weights above the rule's range keep their value; False makes the step cover the row's maximum."""


def assert_never(value: NoReturn) -> NoReturn:
    """For the last `case` of a `match` over an enum: mypy refuses the call as long as a member has no case of its own.

    typing.assert_never, which Python 3.10 does not have yet.
    """
    raise AssertionError(f"{value!r} has no case")
