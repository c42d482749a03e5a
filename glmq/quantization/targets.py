"""Which engine on which chip loads what: the support matrix, as data, with the reason for every no.

From the engines' documentation and loaders; nothing here has run on hardware.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from glmq.errors import UsageError
from glmq.spec import FloatDtype, Form, QuantType

FP16, BF16 = FloatDtype.FP16, FloatDtype.BF16


class Target(Enum):
    """Where the checkpoint will be served."""

    MINDIE_300I_DUO = "mindie-300i-duo"
    MINDIE_800I_A2 = "mindie-800i-a2"
    VLLM_ASCEND = "vllm-ascend"
    GENERIC = "generic"
    """Unknown: any combination that some engine loads, or that none refuses by format."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What one engine on one chip takes."""

    dtypes: Mapping[QuantType, tuple[FloatDtype, ...]]
    """Quantization types that it loads, and in which dtypes."""
    refusals: Mapping[QuantType, str]
    """Why it does not load the others."""
    world_sizes: tuple[int, ...]
    """Tensor-parallel sizes that are documented for GLM-4.1V."""
    has_mindie_format: bool
    """Reads the older MindIE layout too."""
    mixes_types: bool
    """Reads a quantization type per layer."""
    note: str


_NO_W4A8: Final = "MindIE's GLM-4.1V has no W4A8_DYNAMIC loader"

ENGINES: Final[Mapping[Target, Engine]] = {
    Target.MINDIE_300I_DUO: Engine(
        dtypes={QuantType.W8A8S: (FP16,), QuantType.W8A8: (FP16,)},
        refusals={
            QuantType.W8A8_DYNAMIC: "the 300I Duo recipe is W8A8S, then W8A8SC",
            QuantType.W4A8_DYNAMIC: _NO_W4A8,
        },
        world_sizes=(1, 2),
        has_mindie_format=True,
        mixes_types=False,
        note="compress W8A8S to W8A8SC before serving",
    ),
    Target.MINDIE_800I_A2: Engine(
        dtypes={QuantType.W8A8: (BF16, FP16), QuantType.W8A8_DYNAMIC: (BF16, FP16)},
        refusals={
            QuantType.W8A8S: "sparse types run on the 300I Duo only",
            QuantType.W4A8_DYNAMIC: _NO_W4A8,
        },
        world_sizes=(1, 2),
        has_mindie_format=True,
        mixes_types=False,
        note="W8A8_DYNAMIC loads but is not in MindIE's support table",
    ),
    Target.VLLM_ASCEND: Engine(
        dtypes={
            QuantType.W8A8: (BF16, FP16),
            QuantType.W8A8_DYNAMIC: (BF16, FP16),
            QuantType.W8A8S: (FP16,),
        },
        refusals={QuantType.W4A8_DYNAMIC: "vLLM-Ascend has it for mixtures of experts only"},
        world_sizes=(1, 2, 4),
        has_mindie_format=False,
        mixes_types=True,
        note="glm4v is not in vLLM-Ascend's support table; W8A8S on the 300I Duo only",
    ),
    Target.GENERIC: Engine(
        dtypes={
            QuantType.W8A8: (BF16, FP16),
            QuantType.W8A8_DYNAMIC: (BF16, FP16),
            QuantType.W8A8S: (FP16,),
            QuantType.W4A8_DYNAMIC: (BF16, FP16),
        },
        refusals={},
        world_sizes=(1, 2, 4),
        has_mindie_format=True,
        mixes_types=True,
        note="no engine is checked",
    ),
}

GROUP_SIZE_READERS: Final[Mapping[int, str]] = {
    64: "MindIE's config check and older vLLM-Ascend",
    128: "MindIE's config check and older vLLM-Ascend",
    256: "MindIE's config check and older vLLM-Ascend; the only one that the vendor names for W4A8_DYNAMIC",
    512: "older vLLM-Ascend alone; MindIE's config check refuses it",
}


def check_target(target: Target, quant_type: QuantType, dtype: FloatDtype, form: Form) -> None:
    """Raise UsageError, with the reason, unless the target loads that type in that dtype and form."""
    engine = ENGINES[target]
    if quant_type not in engine.dtypes:
        known = ", ".join(t.value for t in engine.dtypes)
        raise UsageError(
            f"--target {target.value} does not load {quant_type.value}: {engine.refusals[quant_type]}; it loads {known}"
        )
    dtypes = engine.dtypes[quant_type]
    if dtype not in dtypes:
        if target is Target.GENERIC:
            raise UsageError(
                f"--torch_dtype bf16 with a sparse type ({quant_type.value}): no engine loads it, "
                "the 300I Duo has no bfloat16; pass --torch_dtype fp16"
            )
        raise UsageError(
            f"--target {target.value} loads {quant_type.value} in {dtypes[0].value} only, not {dtype.value}; "
            f"pass --torch_dtype {'fp16' if dtypes[0] is FP16 else 'bf16'}"
        )
    if form is Form.MINDIE and not engine.has_mindie_format:
        raise UsageError(
            f"--mindie_format True with --target {target.value}: it reads the ascendV1 layout alone; drop --mindie_format"
        )
