"""`--quantization glmq`: which linear of the model has which quantization type, from quant_model_description.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.utils import WeightsMapper

from glmq.checkpoint.description import ASCEND_V1, parse_description
from glmq.errors import CheckpointError, WrongFolderError
from glmq.serve.linear import GlmqLinearMethod
from glmq.spec import Activation, FloatDtype, Form, QuantType

NAME: Final = "glmq"
"""As `--quantization` has it."""

SERVED: Final = (
    QuantType.W8A8,
    QuantType.W8A8S,
    QuantType.W8A8_DYNAMIC,
    QuantType.W4A8_DYNAMIC,
    QuantType.W8A16,
)

_PACKED: Final = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Linears that vLLM makes one of: its name -> those in the checkpoint."""


_ALWAYS_FLOAT: Final = ("embed_tokens.weight", "lm_head.weight")


class GlmqConfig(QuantizationConfig):
    """The description of a checkpoint, and what it means for each layer that vLLM builds.

    Args:
        document: contents of quant_model_description.json.

    Raises:
        CheckpointError: malformed, of another form, or of a type that the plugin does not compute with.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        super().__init__()
        description = parse_description(Path(ASCEND_V1), document)
        if description.form is not Form.ASCEND_V1:
            raise WrongFolderError(
                f"{ASCEND_V1}: has no version, so it is of the MindIE form; quantize with `--format ascendv1`"
            )
        for name, kind in description.tensors.items():
            if name.endswith(_ALWAYS_FLOAT) and kind != QuantType.FLOAT.value:
                raise CheckpointError(f"{name}: is {kind}; the plugin serves embeddings and lm_head as float only")
        if description.group_size is None and QuantType.W4A8_DYNAMIC.value in description.tensors.values():
            raise CheckpointError(f"{ASCEND_V1}: has W4A8_DYNAMIC linears but no group_size; quantize it again")
        self.group_size = description.group_size
        self.deq_dtype = torch.float32
        self._types = description.tensors

    @classmethod
    def get_name(cls) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of NVIDIA's cards: the first with an int8 product."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return [ASCEND_V1]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GlmqConfig:
        return cls(config)

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Drop what nothing here reads: scale_bias is for kernels that shift int4 values by 8."""
        return QuantizationConfig.get_checkpoint_weight_mapper() | WeightsMapper(
            orig_to_new_suffix={".scale_bias": None}
        )

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Learn the checkpoint's dtype: it decides how deq_scale is stored."""
        text = hf_config.get_text_config()
        dtype = getattr(text, "dtype", None) or getattr(hf_config, "dtype", None)
        is_half = dtype in (torch.float16, FloatDtype.FP16.value)
        self.deq_dtype = torch.int64 if is_half else torch.float32

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Bring the names of tensors into vLLM's."""
        self._types = hf_to_vllm_mapper.apply_dict(self._types)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How vLLM computes `layer`; None where it decides itself.

        Raises:
            CheckpointError: the description lacks the layer or one of its tensors, or has a type that is not served.
        """
        if isinstance(layer, LinearBase):
            quant_type = self.type_of(prefix)
            self._check_bias(layer, prefix, quant_type)
            if quant_type is QuantType.FLOAT:
                return UnquantizedLinearMethod()
            return GlmqLinearMethod(prefix, quant_type, group_size=self.group_size, deq_dtype=self.deq_dtype)
        return None

    def type_of(self, prefix: str) -> QuantType:
        """The quantization type of a linear or embedding by its name in vLLM. Raises as get_quant_method."""
        names = self._members(prefix)
        found = {name: self._types.get(f"{name}.weight") for name in names}
        kinds = set(found.values())
        if len(kinds) != 1 or None in kinds:
            listed = ", ".join(f"{name}: {kind or 'no entry'}" for name, kind in found.items())
            raise CheckpointError(f"{prefix}: wanted one type for it in {ASCEND_V1}, found {listed}; quantize it again")
        quant_type = self._parse(prefix, str(kinds.pop()))
        missing = [
            f"{name}.{suffix}"
            for name in names
            for suffix in quant_type.spec.suffixes
            if f"{name}.{suffix}" not in self._types
        ]
        if missing:
            raise CheckpointError(f"{prefix}: {ASCEND_V1} lacks {missing[0]}, which {quant_type.value} needs")
        return quant_type

    def _members(self, prefix: str) -> tuple[str, ...]:
        """The linears of the checkpoint that vLLM makes this one of."""
        parent, _, leaf = prefix.rpartition(".")
        if leaf in _PACKED and not self._is_whole(prefix):
            return tuple(f"{parent}.{part}" for part in _PACKED[leaf])
        return (prefix,)

    def _check_bias(self, layer: nn.Module, prefix: str, quant_type: QuantType) -> None:
        """vLLM drops a bias that it did not expect, without a word."""
        is_folded = quant_type.spec.activation is Activation.STATIC
        stored = [name for name in self._members(prefix) if f"{name}.bias" in self._types]
        if stored and not layer.has_bias and not is_folded:
            raise CheckpointError(
                f"{stored[0]}.bias: would be left out, as config.json has no `attention_bias`: true in text_config; set it"
            )

    def _is_whole(self, name: str) -> bool:
        """Whether the checkpoint has one tensor for a linear that vLLM packs; an entry without scales may be an alias."""
        is_float = self._types.get(f"{name}.weight") == QuantType.FLOAT.value
        return is_float or any(f"{name}.{suffix}" in self._types for suffix in ("weight_scale", "deq_scale"))

    @staticmethod
    def _parse(prefix: str, kind: str) -> QuantType:
        known = {served.value: served for served in (QuantType.FLOAT, *SERVED)}
        if kind not in known:
            raise CheckpointError(f"{prefix}: is {kind}; the plugin serves {', '.join(known)}")
        return known[kind]
