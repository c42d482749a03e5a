"""What vLLM calls when it starts (entry point `vllm.general_plugins`): `--quantization glmq`, and when it is meant.

vLLM finds a quantization in config.json alone, where the ascendV1 form says nothing; so a local folder with
quant_model_description.json is recognised here, and one that `glmq compress` wrote of such a folder in its portable form.
On platforms that bring their own reader of that file, vLLM-Ascend's, the plugin stays out of the way.
"""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any, Final

from vllm.config import ModelConfig
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.model_loader import register_model_loader
from vllm.platforms import current_platform

from glmq.checkpoint.description import ASCEND_V1
from glmq.checkpoint.json_file import read_json_object
from glmq.serve.config import NAME, GlmqConfig
from glmq.serve.norm import BiasedRMSNorm
from glmq.serve.portable import LOAD_FORMAT, PortableLoader, portable_description

_DETECTS: Final = "detects_glmq"


def register() -> None:
    """Make `glmq` a quantization of vLLM. May be called more than once in a process."""
    register_quantization_config(NAME)(GlmqConfig)
    register_model_loader(LOAD_FORMAT)(PortableLoader)
    if current_platform.is_out_of_tree():
        return
    op_registry_oot.setdefault("RMSNorm", BiasedRMSNorm)
    if not hasattr(ModelConfig._verify_quantization, _DETECTS):
        _detect_descriptions()


def _detect_descriptions() -> None:
    """Take a local folder's quant_model_description.json as `--quantization glmq`, where nothing else is said."""
    verify = ModelConfig._verify_quantization

    @wraps(verify)
    def detect_and_verify(self: Any) -> None:
        says_nothing = self.quantization is None and self.model_arch_config.quantization_config is None
        folder = Path(self.model)
        packed = portable_description(folder)
        if says_nothing and ((folder / ASCEND_V1).is_file() or packed.is_file()):
            self.quantization = NAME
        if self.quantization == NAME and packed.is_file():
            self.hf_config.quantization_config = read_json_object(packed)
        verify(self)

    setattr(detect_and_verify, _DETECTS, True)
    ModelConfig._verify_quantization = detect_and_verify
