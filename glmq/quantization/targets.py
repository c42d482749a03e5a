"""`--target` of `glmq quantize`: the place where the checkpoint will be served, and what it does not load."""

from __future__ import annotations

from enum import Enum
from typing import Final

from glmq.engines import Chip, Engine, Place
from glmq.errors import TargetError
from glmq.spec import FloatDtype, Form, QuantType


class Target(Enum):
    """Where the checkpoint will be served."""

    MINDIE_300I_DUO = "mindie-300i-duo"
    MINDIE_800I_A2 = "mindie-800i-a2"
    VLLM_ASCEND = "vllm-ascend"
    GENERIC = "generic"
    """Not known yet: sparse types in bfloat16 alone are refused, and what the engines of today do not run is warned of."""

    @property
    def place(self) -> Place | None:
        """Engine and chip; None for GENERIC."""
        return _PLACES.get(self)


_PLACES: Final = {
    Target.MINDIE_300I_DUO: Place(Engine.MINDIE, Chip.DUO_300I),
    Target.MINDIE_800I_A2: Place(Engine.MINDIE, Chip.A2_800I),
    Target.VLLM_ASCEND: Place(Engine.VLLM_ASCEND, None),
}


def refuse_unloadable(target: Target, quant_type: QuantType, dtype: FloatDtype, form: Form) -> None:
    """Raise UsageError, with the reason, unless the target loads that type in that dtype and form."""
    place = target.place
    if place is None:
        _refuse_dtype(quant_type, dtype)
        return
    dtypes, spec = place.dtypes(quant_type), place.engine.spec
    if not dtypes:
        known = ", ".join(known.value for known in place.types())
        raise TargetError(
            f"--target {target.value} does not load {quant_type.value}: {place.why_not(quant_type)}; it loads {known}"
        )
    if dtype not in dtypes:
        why = f", {spec.dtype_reasons[quant_type]}" if quant_type in spec.dtype_reasons else ""
        raise TargetError(
            f"--target {target.value} loads {quant_type.value} in {dtypes[0].value} only, not {dtype.value}{why}; "
            f"pass --torch_dtype {'fp16' if dtypes[0] is FloatDtype.FP16 else 'bf16'}"
        )
    if form not in spec.forms:
        if form is Form.MINDIE:
            raise TargetError(
                f"--mindie_format True with --target {target.value}: it reads the ascendV1 layout alone; drop --mindie_format"
            )
        raise TargetError(
            f"--format {form.value} with --target {target.value}: {spec.title} does not read it; drop one of them"
        )
    if form is Form.COMPRESSED_TENSORS and quant_type not in spec.packed_types:
        known = ", ".join(known.value for known in spec.packed_types)
        raise TargetError(
            f"--format {form.value} with --target {target.value}: {spec.title} reads {known} alone in it, "
            f"not {quant_type.value}; drop one of them"
        )


def _refuse_dtype(quant_type: QuantType, dtype: FloatDtype) -> None:
    """Raise TargetError for sparse types in bfloat16, which their chip lacks; later engines may run other types."""
    if quant_type.spec.is_sparse and dtype is not FloatDtype.FP16:
        raise TargetError(
            f"{quant_type.value} with {dtype.value} float weights (--torch_dtype is bf16 unless given): no engine loads it, "
            "the 300I Duo has no bfloat16; pass --torch_dtype fp16"
        )
