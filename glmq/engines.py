"""The serving engines and what each reads on which chip, as one table, with the reason for every no.

From the engines' documentation and loaders; nothing here has run on hardware.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from glmq.spec import FloatDtype, Form, QuantType, type_named

FP16, BF16 = FloatDtype.FP16, FloatDtype.BF16


WITHOUT_BIAS: Final = "give those another type: --layer '*.self_attn.[qkv]_proj=W8A8_DYNAMIC'"
"""What helps where an engine leaves out the bias of a type's linears."""
FLOAT_ELSEWHERE: Final = "the vision tower and lm_head in float alone"
"""How an engine that is `text_only` reads them."""
NOT_COMPRESSED: Final = "`glmq compress` takes the ascendV1 form alone; to compress, quantize without --mindie_format"
"""Of sparse models in the MindIE form."""
LARGE_GROUPS: Final = "VLLM_ASCEND_ENABLE_NZ=0"
"""The setting with which vLLM-Ascend takes groups beyond `largest_group`."""


class Chip(Enum):
    """An Atlas card, without the family's name."""

    A2_800I = "800I A2"
    DUO_300I = "300I Duo"


class Engine(Enum):
    """A serving engine, spelled as in options, manifests and reports."""

    MINDIE = "mindie"
    VLLM_ASCEND = "vllm-ascend"
    SGLANG = "sglang"

    @property
    def spec(self) -> EngineSpec:
        """What it reads."""
        return ENGINES[self]


@dataclass(frozen=True, slots=True)
class ChipSupport:
    """What an engine reads on one chip."""

    dtypes: Mapping[QuantType, tuple[FloatDtype, ...]]
    """The quantization types that it loads, and in which float dtypes, the usual one first."""
    refusals: Mapping[QuantType, str]
    """Why it does not load others that `glmq quantize` writes."""
    fails: str | None = None
    """Why the family's model does not run there although its types are loaded."""


@dataclass(frozen=True, slots=True)
class Release:
    """How a range of an engine's releases treats what others treat otherwise."""

    versions: str
    missing_key: str
    """What becomes of a linear whose key is not in the description."""
    missing_packed_key: str
    """The same for one that the engine packs from several."""
    dense_w4a8: str
    """What becomes of W4A8_DYNAMIC linears outside of mixtures of experts."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine reads: a row of ENGINES."""

    title: str
    """Its name for people."""
    forms: tuple[Form, ...]
    mixes_types: bool
    """It reads a quantization type per layer, not one for the model."""
    group_sizes: tuple[int, ...]
    """Input columns per second-stage scale that it accepts."""
    world_sizes: tuple[int, ...]
    """Tensor-parallel sizes whose parts have been compared with what its own loader makes."""
    documented_world_sizes: tuple[int, ...]
    """Those that its support table names for GLM-4.1V."""
    dtype_reasons: Mapping[QuantType, str]
    """Why it does not run a type in the dtypes that `chips` leave out, where its code or its users say so."""
    chips: Mapping[Chip, ChipSupport]
    packed_types: tuple[QuantType, ...] = ()
    """The types that it reads in the compressed-tensors form."""
    mixtures: tuple[tuple[QuantType, QuantType], ...] = ()
    """Linears of the first type that it takes in a model of the second although it does not mix types."""
    text_only: bool = False
    """It has integer kernels for the linears of text layers alone: the vision tower and lm_head must be float."""
    drops_bias: tuple[QuantType, ...] = ()
    """The types whose linears it runs without their bias."""
    largest_group: int | None = None
    """Columns per group up to which it runs as it is installed; None: all of `group_sizes`."""
    releases: tuple[Release, ...] = ()
    """Oldest first; empty where all that were read are alike."""
    legal_path: str | None = None
    """Regular expression for the paths that it opens; None: any."""

    def refuses_path(self, path: str) -> bool:
        """Whether it does not open a folder because of its name."""
        return self.legal_path is not None and re.fullmatch(self.legal_path, path) is None

    def by_release(self, quant_type: QuantType) -> list[str]:
        """What becomes of the type in which release, as one sentence; none where all that were read are alike."""
        if quant_type is not QuantType.W4A8_DYNAMIC or not self.releases:
            return []
        versions: dict[str, list[str]] = {}
        for release in self.releases:
            versions.setdefault(release.dense_w4a8, []).append(release.versions)
        said = "; ".join(f"{', '.join(names)}: {what}" for what, names in versions.items())
        return [f"W4A8_DYNAMIC of a dense linear depends on the release of {self.title}: {said}"]

    def takes(self, quant_type: QuantType, model: QuantType) -> bool:
        """Whether it takes linears of that type in a model of the other."""
        return self.mixes_types or quant_type is model or (quant_type, model) in self.mixtures

    def chips_for(self, quant_type: QuantType, dtype: FloatDtype | None) -> tuple[Chip, ...]:
        """The chips on which it loads that type in that dtype; None: in some dtype."""
        loaded = {chip: support.dtypes.get(quant_type, ()) for chip, support in self.chips.items()}
        return tuple(chip for chip, dtypes in loaded.items() if (bool(dtypes) if dtype is None else dtype in dtypes))


_MINDIE_W4A8: Final = "MindIE's GLM-4.1V has no W4A8_DYNAMIC loader"
_VLLM_310P_W4A8: Final = "its registry for the 300I Duo has no W4A8_DYNAMIC"
_MINDIE_A16: Final = "its support table for GLM-4.1V has no weight-only types"
_VLLM_W4A16: Final = "it has the linears of 8-bit weights alone"
_VLLM_310P_DYNAMIC: Final = (
    "its kernel takes no float bias there, which q_proj, k_proj and v_proj have (its issue 14152)"
)
_FLOAT16_SCALES: Final = "its kernel takes no float16 scales (vLLM-Ascend's issue 7443)"
_BFLOAT16_BIAS: Final = "its kernel takes no bfloat16 bias, which q_proj, k_proj and v_proj have (its issue 7039)"
_VLLM_310P_A16: Final = "its registry for the 300I Duo has no weight-only types"
_NOT_IN_SGLANG: Final = "SGLang's ModelSlim loader has no such linear"
_SGLANG_310P: Final = "not checked on the 300I Duo"
_VLLM_310P_ROTARY: Final = (
    "vLLM-Ascend does not run GLM-4.1V on the Atlas 300I Duo, "
    "where its rotary kernel has no interleaved mode; MindIE does"
)
_SPARSE_ELSEWHERE: Final = "sparse types run on the 300I Duo only"

_WRITTEN: Final = tuple(t for t in QuantType if t is not QuantType.FLOAT and not t.spec.is_compressed)
"""The types that `glmq quantize` writes."""

ENGINES: Final[Mapping[Engine, EngineSpec]] = {
    Engine.MINDIE: EngineSpec(
        title="MindIE",
        forms=(Form.ASCEND_V1, Form.MINDIE),
        mixes_types=False,
        mixtures=((QuantType.W8A8, QuantType.W8A8_DYNAMIC),),  # run as dynamic ones
        text_only=True,
        group_sizes=(64, 128, 256),
        world_sizes=(1, 2, 4),
        documented_world_sizes=(1, 2),
        legal_path=r"[0-9A-Za-z_./-]*",
        dtype_reasons={},
        chips={
            Chip.A2_800I: ChipSupport(
                dtypes={QuantType.W8A8: (BF16, FP16), QuantType.W8A8_DYNAMIC: (BF16, FP16)},
                refusals={
                    QuantType.W8A8S: _SPARSE_ELSEWHERE,
                    QuantType.W4A8_DYNAMIC: _MINDIE_W4A8,
                    QuantType.W8A16: _MINDIE_A16,
                    QuantType.W4A16: _MINDIE_A16,
                },
            ),
            Chip.DUO_300I: ChipSupport(
                dtypes={QuantType.W8A8S: (FP16,), QuantType.W8A8: (FP16,), QuantType.W8A8SC: (FP16,)},
                refusals={
                    QuantType.W8A8_DYNAMIC: "the 300I Duo recipe is W8A8S, then W8A8SC",
                    QuantType.W4A8_DYNAMIC: _MINDIE_W4A8,
                    QuantType.W8A16: _MINDIE_A16,
                    QuantType.W4A16: _MINDIE_A16,
                },
            ),
        },
    ),
    # GLM-4.1V is not in vLLM-Ascend's support table; these are what its quantization code knows on each chip.
    Engine.VLLM_ASCEND: EngineSpec(
        title="vLLM-Ascend",
        forms=(Form.ASCEND_V1, Form.COMPRESSED_TENSORS),
        mixes_types=True,
        group_sizes=(64, 128, 256, 512),
        largest_group=128,
        world_sizes=(1, 2, 4),
        documented_world_sizes=(),
        packed_types=(QuantType.W8A8_DYNAMIC,),
        drops_bias=(QuantType.W4A8_DYNAMIC,),
        dtype_reasons={QuantType.W8A8_DYNAMIC: _FLOAT16_SCALES, QuantType.W8A16: _BFLOAT16_BIAS},
        chips={
            Chip.A2_800I: ChipSupport(
                dtypes={
                    QuantType.W8A8: (BF16, FP16),
                    QuantType.W8A8_DYNAMIC: (BF16,),
                    QuantType.W8A16: (FP16,),
                    QuantType.W4A8_DYNAMIC: (BF16, FP16),
                },
                refusals={
                    QuantType.W8A8S: _SPARSE_ELSEWHERE,
                    QuantType.W4A16: _VLLM_W4A16,
                },
            ),
            Chip.DUO_300I: ChipSupport(
                fails=_VLLM_310P_ROTARY,
                dtypes={
                    QuantType.W8A8: (FP16,),
                    QuantType.W8A8S: (FP16,),
                    QuantType.W8A8SC: (FP16,),
                },
                refusals={
                    QuantType.W8A8_DYNAMIC: _VLLM_310P_DYNAMIC,
                    QuantType.W4A8_DYNAMIC: _VLLM_310P_W4A8,
                    QuantType.W8A16: _VLLM_310P_A16,
                    QuantType.W4A16: _VLLM_310P_A16,
                },
            ),
        },
        releases=(
            Release(
                "0.18 to 0.26",
                missing_key="KeyError",
                missing_packed_key="KeyError",
                dense_w4a8="loaded, its activations are not quantized",
            ),
            Release(
                "0.27",
                missing_key="KeyError",
                missing_packed_key="KeyError",
                dense_w4a8="NotImplementedError",
            ),
            Release(
                "0.28 to 0.30",
                missing_key="it runs as float, without a word",
                missing_packed_key="KeyError",
                dense_w4a8="NotImplementedError",
            ),
        ),
    ),
    # Its ModelSlim loader, 0.5.23, read and emulated. Its compressed-tensors loader maps no names of this family.
    Engine.SGLANG: EngineSpec(
        title="SGLang",
        forms=(Form.ASCEND_V1,),
        mixes_types=True,
        group_sizes=(),
        world_sizes=(),
        documented_world_sizes=(),
        dtype_reasons={QuantType.W8A8_DYNAMIC: _FLOAT16_SCALES},
        chips={
            Chip.A2_800I: ChipSupport(
                dtypes={QuantType.W8A8: (BF16, FP16), QuantType.W8A8_DYNAMIC: (BF16,)},
                refusals={
                    QuantType.W8A8S: _SPARSE_ELSEWHERE,
                    QuantType.W4A8_DYNAMIC: _NOT_IN_SGLANG,
                    QuantType.W8A16: _NOT_IN_SGLANG,
                    QuantType.W4A16: _NOT_IN_SGLANG,
                },
            ),
            Chip.DUO_300I: ChipSupport(dtypes={}, refusals=dict.fromkeys(_WRITTEN, _SGLANG_310P)),
        },
    ),
}

UNCHECKED: Final = ("xLLM",)
"""Engines for Ascend NPUs that know the family, and what they read of ours was not checked."""


@dataclass(frozen=True, slots=True)
class Place:
    """An engine on one chip, or on any that it knows."""

    engine: Engine
    chip: Chip | None

    def dtypes(self, quant_type: QuantType) -> tuple[FloatDtype, ...]:
        """The float dtypes in which a model of that type is loaded here, the usual one first; empty if it is not."""
        found = [support.dtypes.get(quant_type, ()) for support in self._supports()]
        return tuple(dict.fromkeys(dtype for dtypes in found for dtype in dtypes))

    def refuses_dtype(self, quant_type: QuantType, dtype: FloatDtype) -> str | None:
        """That the type runs here in another dtype only; None if it runs in this one, or is not loaded at all."""
        dtypes, spec = self.dtypes(quant_type), self.engine.spec
        if not dtypes or dtype in dtypes:
            return None
        why = f": {spec.dtype_reasons[quant_type]}" if quant_type in spec.dtype_reasons else ""
        return f"{self.title} runs {quant_type.value} in {dtypes[0].value} only, not in {dtype.value}{why}"

    @property
    def title(self) -> str:
        """Engine and chip for people."""
        return self.engine.spec.title + ("" if self.chip is None else f" on the Atlas {self.chip.value}")

    def loads(
        self, model: QuantType, types: Collection[QuantType], dtype: FloatDtype, form: Form, *, text_only: bool
    ) -> bool:
        """Whether a model is loaded here, and runs.

        Args:
            model: its own type.
            types: those of its linears that are integers.
            dtype: of its float tensors.
            form: in which it is written.
            text_only: whether all of these linears are those of text layers.
        """
        spec = self.engine.spec
        is_read = form in spec.forms and (form is not Form.COMPRESSED_TENSORS or set(types) <= set(spec.packed_types))
        fits = all(spec.takes(quant_type, model) for quant_type in types) and (text_only or not spec.text_only)
        runs = any(support.fails is None for support in self._supports())
        return runs and is_read and fits and all(dtype in self.dtypes(quant_type) for quant_type in types)

    def why_not(self, quant_type: QuantType) -> str:
        """Why that type is not loaded here."""
        reasons = (support.refusals[quant_type] for support in self._supports() if quant_type in support.refusals)
        return next(reasons, _SPARSE_ELSEWHERE if quant_type.spec.is_sparse else "it is not in its support table")

    def types(self) -> tuple[QuantType, ...]:
        """The types that `glmq quantize` writes and that are loaded here."""
        loaded = dict.fromkeys(quant_type for support in self._supports() for quant_type in support.dtypes)
        return tuple(quant_type for quant_type in loaded if not quant_type.spec.is_compressed)

    def _supports(self) -> tuple[ChipSupport, ...]:
        chips = self.engine.spec.chips
        return tuple(chips.values()) if self.chip is None else (chips[self.chip],)


def reads_type(engine: Engine, name: str | None) -> bool:
    """Whether the engine loads the quantization type of that name on any chip; True for a name that is no type of ours."""
    quant_type = type_named(name)
    return quant_type is None or bool(Place(engine, None).dtypes(quant_type))


def name_cards(chips: Iterable[Chip]) -> str:
    """Some chips for people, e.g. `Atlas 800I A2 or 300I Duo`."""
    return f"Atlas {' or '.join(chip.value for chip in chips)}"
