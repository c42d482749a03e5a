"""Which linears get another type than the model's: the patterns of `--layer` and `--keep-float`."""

from __future__ import annotations

from dataclasses import dataclass

from glmq.errors import PatternError
from glmq.quantization.forms import why_not_in_form
from glmq.quantization.targets import Target
from glmq.spec import Form, QuantType


@dataclass(frozen=True, slots=True)
class LayerRule:
    """A pattern of linear names and the type that they get; of several that match, the last one counts."""

    pattern: str
    quant_type: QuantType
    option: str
    """How the user wrote it, for messages; empty for the default rules."""


def parse_rule(text: str, model_type: QuantType, target: Target, form: Form) -> LayerRule:
    """Read one `--layer PATTERN=TYPE`.

    Raises:
        UsageError: no such type, or one that cannot stand beside the model's.
    """
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise PatternError(f"--layer {text!r}: PATTERN=TYPE is needed, like '*.layers.*.down_proj=W8A8'")
    known = {t.value: t for t in QuantType if not t.spec.is_compressed}
    quant_type = known.get(name.upper())
    if quant_type is None:
        raise PatternError(f"--layer {text!r}: unknown type {name!r}; known are {', '.join(known)}")
    if quant_type in (QuantType.FLOAT, model_type):
        return LayerRule(pattern, quant_type, f"--layer {text!r}")
    problem = why_not_in_form(quant_type, form)
    if problem is not None:
        raise PatternError(f"--layer {text!r}: {problem}")
    if quant_type.spec.is_sparse or model_type.spec.is_sparse:
        raise PatternError(
            f"--layer {text!r} in a {model_type.value} model: sparse linears cannot be mixed with other types, "
            "their engine reads one type; use FLOAT or the model's own type"
        )
    place = target.place
    if place is not None and not place.engine.spec.takes(quant_type, model_type):
        raise PatternError(
            f"--layer {text!r} with --target {target.value}: {place.engine.spec.title} reads one quantization type per model, "
            f"this one is {model_type.value}; use FLOAT, or another target"
        )
    return LayerRule(pattern, quant_type, f"--layer {text!r}")
