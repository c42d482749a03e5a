"""What the engines need of one linear of an un-sharded checkpoint, by its quantization type."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Final, TypeAlias

from glmq.checkpoint.header import FLOAT_CODES
from glmq.checkpoint.json_file import JsonValue
from glmq.inspection.folder import Folder, StoredTensor
from glmq.model.config import ModelConfig
from glmq.spec import FloatDtype

STATIC: Final = ("W8A8", "W8A8S")
TYPES: Final = ("FLOAT", *STATIC, "W8A8SC", "W8A8_DYNAMIC", "W4A8_DYNAMIC")
"""The types that MindIE's loader knows."""
VLLM_TYPES: Final = (*TYPES, "W8A16")
"""Those of vLLM-Ascend."""
SUFFIXES: Final[Mapping[str, tuple[str, ...]]] = {
    "W8A8": ("input_scale", "input_offset", "quant_bias", "deq_scale"),
    "W8A8S": ("input_scale", "input_offset", "quant_bias", "deq_scale"),
    "W8A8SC": ("input_scale", "input_offset", "quant_bias", "deq_scale", "index"),
    "W8A8_DYNAMIC": ("weight_scale", "weight_offset"),
    "W8A16": ("weight_scale", "weight_offset"),
}
"""What the engines that know the type read beside `.weight`."""
DTYPE_NAMES: Final = {"float16": "F16", "bfloat16": "BF16"}

Complaint: TypeAlias = tuple[bool, str, str]
"""(is an error, tensor, message)."""


def run_dtype(config: ModelConfig) -> FloatDtype | None:
    """The dtype that the engine will run in; None where config.json does not say it."""
    text = config.nested["text_config"]
    value = text.get("dtype") if isinstance(text, Mapping) else None
    return next((dtype for dtype in FloatDtype if dtype.value == value), None)


def check_linear_tensors(
    stored: Mapping[str, StoredTensor], name: str, folder: Folder, dtype: str | None, types: Container[str]
) -> Iterator[Complaint]:
    """What an engine that knows `types` needs of one linear of an un-sharded checkpoint."""
    weight = stored.get(f"{name}.weight")
    if weight is None:
        return
    described = str(folder.description.get(weight.name, "FLOAT"))
    if weight.info.dtype in FLOAT_CODES:
        if described != "FLOAT":
            yield False, weight.name, f"is described as {described} but stored as {weight.info.dtype}; it runs as float"
        return
    if described == "FLOAT" or described not in types:
        yield (
            True,
            weight.name,
            f"is stored as {weight.info.dtype} but described as {described}: its integers run as float",
        )
        return
    for suffix in SUFFIXES.get(described, ()):
        tensor = stored.get(f"{name}.{suffix}")
        if tensor is None:
            yield True, f"{name}.{suffix}", f"does not exist; a {described} linear needs it"
        elif suffix in ("input_scale", "input_offset") and tensor.info.shape != (1,):
            yield True, tensor.name, f"has shape {list(tensor.info.shape)}, wanted [1]: IndexError"
        elif suffix.startswith("weight_") and len(tensor.info.shape) != 2:
            yield True, tensor.name, f"has shape {list(tensor.info.shape)}, wanted [rows, 1]: IndexError"
        elif suffix == "deq_scale" and dtype is not None and tensor.info.dtype != ("I64" if dtype == "F16" else "F32"):
            wanted = "the bits of float32 as I64" if dtype == "F16" else "F32"
            yield (
                True,
                tensor.name,
                f"is {tensor.info.dtype}, a model that runs in {dtype} wants {wanted}: silent garbage",
            )


def section(raw: Mapping[str, JsonValue], key: str) -> Mapping[str, JsonValue]:
    """An object within config.json; empty where there is none."""
    value = raw.get(key)
    return value if isinstance(value, Mapping) else {}
