"""Checkpoints that another tool has quantized: recognised by the names and dtypes of their tensors, called by their method.

What config.json says counts only beside such tensors: merging tools leave `quantization_config` behind in float checkpoints.
torch is not imported here.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from glmq.checkpoint.header import TensorInfo
from glmq.checkpoint.json_file import JsonValue

FP8_CODES: Final = ("F8_E4M3", "F8_E5M2")
"""The FP8 dtypes of weights that torch can read."""
SCALE_SUFFIXES: Final = ("weight_scale_inv", "weight_scale")
"""Of the scales that FP8 weights are multiplied by: of transformers and DeepSeek's tools, and of compressed-tensors."""
COMPANIONS: Final = ("input_scale", "activation_scale", "input_scale_inv", "input_zero_point", "k_scale", "v_scale")
"""What may lie beside an FP8 weight for the engine alone."""

_SUFFIXES: Final[Mapping[str, str]] = {
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes",
    "bitsandbytes__nf4": "bitsandbytes",
    "bitsandbytes__fp4": "bitsandbytes",
    "g_idx": "GPTQ",
    "qweight": "AWQ or GPTQ",
    "weight_packed": "compressed-tensors",
    "_scale": "quanto",
    "weight_blocks": "MXFP4",
    "biases": "MLX",
}
"""The last part of names that only checkpoints of one method have; the first that is found counts."""
_TITLES: Final[Mapping[str, str]] = {
    "bitsandbytes": "bitsandbytes",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "fp8": "FP8",
    "compressed-tensors": "compressed-tensors",
    "quanto": "quanto",
    "mxfp4": "MXFP4",
    "auto-round": "AutoRound",
    "torchao": "torchao",
    "modelopt": "ModelOpt",
    "hqq": "HQQ",
}
"""`quant_method` in config.json -> the method as people call it."""
_INTEGERS: Final = ("I8", "U8", "I32", "F4", "F6_E2M3", "F6_E3M2")
"""Dtypes that weights have in no float checkpoint."""


@dataclass(frozen=True, slots=True)
class ForeignMethod:
    """How another tool has quantized a checkpoint."""

    title: str
    """As people call the method."""
    tensor: str
    """One that shows it."""
    is_fp8: bool
    """Its weights are FP8, in which glmq can read them if their scales are there."""


def find_method(tensors: Mapping[str, TensorInfo], config: Mapping[str, JsonValue]) -> ForeignMethod | None:
    """The method that a checkpoint was quantized with; None if its weights are float.

    Args:
        tensors: of the checkpoint, by stored name.
        config: contents of its config.json.
    """
    said = said_method(config)
    for suffix, title in _SUFFIXES.items():
        name = next((name for name in tensors if name.rpartition(".")[2] == suffix), None)
        if name is not None:
            return ForeignMethod(_named_method(config) or title, name, is_fp8=False)
    fp8 = _first_weight(tensors, FP8_CODES)
    if fp8 is not None:
        return ForeignMethod("FP8" if said in (None, "FP8") else f"{said} (FP8)", fp8, is_fp8=True)
    other = _first_weight(tensors, _INTEGERS)
    if other is not None and said is not None:
        return ForeignMethod(said, other, is_fp8=False)
    return None


def said_method(config: Mapping[str, JsonValue]) -> str | None:
    """The method that `quantization_config` names, as people call it; None without one."""
    return _named_method(config) or (
        "a method without a name" if isinstance(config.get("quantization_config"), Mapping) else None
    )


def _named_method(config: Mapping[str, JsonValue]) -> str | None:
    """The same, and None too where it gives no name."""
    section = config.get("quantization_config")
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    return _TITLES.get(method, f"{method:.40}") if isinstance(method, str) else None


def block_size(config: Mapping[str, JsonValue]) -> tuple[int, int]:
    """Rows and columns of a weight that share a scale where scales are stored by block; 128 x 128 unless config.json says."""
    section = config.get("quantization_config")
    found = section.get("weight_block_size") if isinstance(section, Mapping) else None
    match found:
        case [int() as rows, int() as cols] if rows > 0 and cols > 0:
            return rows, cols
        case _:
            return 128, 128


def scale_of(name: str, tensors: Container[str]) -> str | None:
    """The name of the scales of FP8 weight `name`; None if they are not there."""
    base = name.removesuffix("weight")
    return next((base + suffix for suffix in SCALE_SUFFIXES if base + suffix in tensors), None)


def _first_weight(tensors: Mapping[str, TensorInfo], codes: Iterable[str]) -> str | None:
    return next((n for n, info in tensors.items() if n.endswith(".weight") and info.dtype in codes), None)
