"""The frozen words of glmq: quantization types, integer grids, and the scheme of one linear. Pure Python."""

from dataclasses import dataclass
from enum import Enum
from typing import Final


class FloatDtype(Enum):
    """The dtype of stored float tensors, spelled as in `config.json`."""

    FP16 = "float16"
    BF16 = "bfloat16"


class QuantType(Enum):
    """A quantization type, spelled as in the description file (upper case)."""

    FLOAT = "FLOAT"
    W8A8 = "W8A8"
    W8A8S = "W8A8S"
    W8A8_DYNAMIC = "W8A8_DYNAMIC"
    W4A8_DYNAMIC = "W4A8_DYNAMIC"
    W8A8SC = "W8A8SC"

    @property
    def is_static(self) -> bool:
        """Activation scale and offset are stored (one pair per linear), not computed per token."""
        return self in (QuantType.W8A8, QuantType.W8A8S, QuantType.W8A8SC)

    @property
    def tag(self) -> str:
        """Lower case, as used in file names and in config.json."""
        return self.value.lower()


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


class ActRange(Enum):
    """How the range of a static activation is chosen; the numbers are the `act_method` of the seed."""

    MINMAX = 1
    HISTOGRAM = 2
    MIXED = 3
    """Per linear, whichever of the two loses less."""


class StepRule(Enum):
    """How the weight step of a row is chosen."""

    ROW_MAX = "row-max"
    """max|w| / 127 (W8A8, W8A8_DYNAMIC), or the first stage of W4A8_DYNAMIC."""
    SIGMA = "sigma"
    """Largest |w| not above sigma_factor * std(|w|) of the row, divided by 7 (is_lowbit, use_sigma)."""
    FRACTION = "fraction"
    """k-th largest |w| of the row, k = int(fraction * columns), divided by 7 (is_lowbit)."""
    TENSOR_FRACTION = "tensor-fraction"
    """Row maximum of what is not above the k-th largest |w| of the tensor, divided by 7 (co_sparse)."""


class Method(Enum):
    """How weights are rounded onto the grid."""

    PLAIN = "plain"
    """Nearest integer."""
    COMPENSATED = "compensated"
    """Error-compensated rounding from the second moment of the inputs (GPTQ family)."""
    REFERENCE = "reference"
    """Integers exactly as the vendor's tool makes them (REFERENCE formulas), saturation included."""


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
    """Input columns per second-stage scale; only W4A8_DYNAMIC, else 0."""
    keep_outliers: bool = True
    """open_outlier: weights above the rule's range keep their value; False makes the step cover the row's maximum."""
