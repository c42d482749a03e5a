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
    """Not known yet: a type is refused only in a dtype in which no engine loads it, though some load the type."""

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
    dtypes = place.dtypes(quant_type)
    if not dtypes:
        known = ", ".join(known.value for known in place.types())
        raise TargetError(
            f"--target {target.value} does not load {quant_type.value}: {place.why_not(quant_type)}; it loads {known}"
        )
    if dtype not in dtypes:
        raise TargetError(
            f"--target {target.value} loads {quant_type.value} in {dtypes[0].value} only, not {dtype.value}; "
            f"pass --torch_dtype {'fp16' if dtypes[0] is FloatDtype.FP16 else 'bf16'}"
        )
    if form not in place.engine.spec.forms:
        if form is Form.MINDIE:
            raise TargetError(
                f"--mindie_format True with --target {target.value}: it reads the ascendV1 layout alone; drop --mindie_format"
            )
        raise TargetError(
            f"--format {form.value} with --target {target.value}: {place.engine.spec.title} does not read it; drop one of them"
        )


def _refuse_dtype(quant_type: QuantType, dtype: FloatDtype) -> None:
    """Raise UsageError if engines load the type, but none in that dtype; a type that none loads yet may have either."""
    dtypes = {known for engine in Engine for known in Place(engine, None).dtypes(quant_type)}
    if dtypes and dtype not in dtypes:
        raise TargetError(
            f"{quant_type.value} with {dtype.value} float weights (--torch_dtype is bf16 unless given): no engine loads it, "
            "the 300I Duo has no bfloat16; pass --torch_dtype fp16"
        )
