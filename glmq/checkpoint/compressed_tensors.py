"""The tensors of one quantized linear in the compressed-tensors form: names, shapes, dtypes, encoding and decoding.

As the library of this name lays them out, for a linear of [N, K]:

    int-quantized    weight int8 [N, K], weight_scale [N, 1]; static inputs: input_scale [1], input_zero_point int8 [1]
    pack-quantized   weight_packed int32 [N, K * bits / 32], weight_scale [N, K / group], weight_shape int64 [2] = (N, K)

Scales are in the model's dtype, but an input scale of a float16 model is float32: vLLM computes with that, and small ones
would lose bits. Packed integers are shifted by 8 or 128 to be unsigned; of the K neighbours that share a word, the first has
the lowest bits. Biases stay float, the engines add them after the product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glmq.checkpoint.ascend import check_activation, check_positive, encode_row_scale, to_float
from glmq.checkpoint.compressed_config import is_packed
from glmq.checkpoint.layout import TensorSpec
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import CheckpointError, UsageError
from glmq.records import ActivationQParams, QuantizedLinear
from glmq.spec import Activation, FloatDtype, QuantType, assert_never

WORD_BITS = 32


def compressed_suffixes(quant_type: QuantType, *, has_bias: bool) -> tuple[str, ...]:
    """The suffixes that a linear of that type has on disk, in order, without the dot."""
    match quant_type.spec.activation:
        case Activation.STATIC:
            own: tuple[str, ...] = ("weight", "weight_scale", "input_scale", "input_zero_point")
        case Activation.PER_TOKEN:
            own = ("weight", "weight_scale")
        case Activation.NONE:
            own = ("weight_packed", "weight_scale", "weight_shape")
        case other:
            assert_never(other)
    return (own[0], *(("bias",) if has_bias else ()), *own[1:])


def compressed_specs(
    name: str, quant_type: QuantType, shape: tuple[int, int], *, has_bias: bool, dtype: FloatDtype, group_size: int
) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors that `encode_compressed` returns for such a linear.

    Args:
        name: of the linear, without a suffix.
        quant_type: one that the form has.
        shape: [N, K]: output and input features.
        has_bias: the float layer has a bias.
        dtype: of the written model.
        group_size: input columns per step; weight-only types.

    Raises:
        UsageError: the columns do not divide into groups, or into words.
    """
    rows, cols = shape
    if group_size and cols % group_size:
        raise UsageError(
            f"{name}: {cols} input columns do not divide into groups of {group_size}; choose another group size"
        )
    table: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight": ("I8", (rows, cols)),
        "weight_packed": ("I32", (rows, cols * quant_type.spec.weight_bits // WORD_BITS)),
        "bias": (dtype.code, (rows,)),
        "weight_scale": (dtype.code, (rows, cols // group_size if group_size else 1)),
        "weight_shape": ("I64", (2,)),
        "input_scale": ("F32" if dtype is FloatDtype.FP16 else "BF16", (1,)),
        "input_zero_point": ("I8", (1,)),
    }
    return [
        TensorSpec(f"{name}.{suffix}", *table[suffix]) for suffix in compressed_suffixes(quant_type, has_bias=has_bias)
    ]


def encode_compressed(name: str, linear: QuantizedLinear, *, dtype: FloatDtype) -> dict[str, Tensor]:
    """The tensors of `linear` as they are stored.

    Args:
        name: of the linear, without a suffix.
        linear: its integers and scales.
        dtype: of the written model.

    Returns:
        Tensor name -> contiguous CPU tensor, with the names, dtypes and shapes of `compressed_specs`.

    Raises:
        CheckpointError: a field that the type needs is missing, is not finite or positive, or does not fit its dtype.
    """
    bits = linear.quant_type.spec.weight_bits
    check_positive(f"{name}.weight_scale", linear.weight_scale)
    found = {"weight_scale": encode_row_scale(linear.weight_scale, dtype)}
    if linear.bias is not None:
        found["bias"] = to_float(f"{name}.bias", linear.bias, dtype)
    if is_packed(linear.quant_type):
        found["weight_packed"] = pack_words(linear.weight, bits)
        found["weight_shape"] = torch.tensor(linear.weight.shape, dtype=torch.int64)
    else:
        found["weight"] = linear.weight
    if linear.activation is not None:
        found |= _encode_input(name, linear.activation, dtype)
    suffixes = compressed_suffixes(linear.quant_type, has_bias=linear.bias is not None)
    return {f"{name}.{suffix}": found[suffix].contiguous() for suffix in suffixes}


def _encode_input(name: str, activation: ActivationQParams, dtype: FloatDtype) -> dict[str, Tensor]:
    check_activation(name, activation, dtype)
    scale_dtype = torch.float32 if dtype is FloatDtype.FP16 else torch.bfloat16
    return {
        "input_scale": torch.tensor([activation.scale], dtype=scale_dtype),
        "input_zero_point": torch.tensor([activation.offset], dtype=torch.int8),
    }


def pack_words(q: Tensor, bits: int) -> Tensor:
    """Neighbouring columns share a word. int8 [N, K] of 4 or 8 bits -> int32 [N, K * bits / 32]."""
    shifted = (q.short() + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 4:
        shifted = shifted[:, 0::2] | shifted[:, 1::2] << 4
    words: Tensor = shifted.contiguous().view(torch.int32)  # little-endian, as safetensors files are
    return words


def unpack_words(packed: Tensor, bits: int) -> Tensor:
    """The inverse of pack_words: int32 [N, W] -> int8 [N, 32 / bits * W]."""
    stored: Tensor = packed.contiguous().view(torch.uint8)
    if bits == 4:
        stored = torch.stack((stored & 15, stored >> 4), dim=-1).reshape(len(stored), -1)
    q: Tensor = (stored.short() - 2 ** (bits - 1)).to(torch.int8)
    return q


def compressed_type(name: str, checkpoint: Checkpoint) -> QuantType | None:
    """The type of a linear, told by its tensors; None if they are not those of this form.

    Raises:
        CheckpointError: packed weights of a number of bits that glmq does not know.
    """
    if f"{name}.weight_packed" in checkpoint:
        return QuantType.W4A16 if packed_bits(name, checkpoint) == 4 else QuantType.W8A16
    if f"{name}.weight_scale" not in checkpoint or f"{name}.weight_offset" in checkpoint:
        return None
    if f"{name}.input_zero_point" in checkpoint:
        return QuantType.W8A8
    is_dynamic = f"{name}.input_scale" not in checkpoint and f"{name}.deq_scale" not in checkpoint
    return QuantType.W8A8_DYNAMIC if is_dynamic else None


def packed_bits(name: str, checkpoint: Checkpoint) -> int:
    """Bits per weight of packed integers: what the shape that is stored beside them leaves for each.

    Raises:
        CheckpointError: tensors that contradict each other, or neither 4 nor 8 bits.
    """
    packed = checkpoint.info(f"{name}.weight_packed")
    shape: list[int | float | bool] = checkpoint.read(f"{name}.weight_shape").flatten().tolist()
    fits = packed.dtype == "I32" and len(packed.shape) == 2 and len(shape) == 2 and packed.shape[0] == shape[0]
    found = [bits for bits in (4, 8) if fits and packed.shape[1] * WORD_BITS == shape[1] * bits]
    if not found:
        raise CheckpointError(
            f"{name}.weight_packed: is {packed.dtype} {list(packed.shape)} for weights of {shape!s:.80}, wanted int32 words of "
            "4 or 8 bits a weight; quantize again"
        )
    return found[0]


def decode_compressed(name: str, checkpoint: Checkpoint, quant_type: QuantType) -> QuantizedLinear:
    """The quantized linear `name` of a checkpoint in this form.

    A static one has no quant_bias: its engines add the float bias and take the offset's share off exactly.

    Raises:
        CheckpointError: tensors that contradict each other.
    """
    bias = checkpoint.read(f"{name}.bias").float() if f"{name}.bias" in checkpoint else None
    scale = checkpoint.read(f"{name}.weight_scale").float()
    if is_packed(quant_type):
        weight = unpack_words(checkpoint.read(f"{name}.weight_packed"), packed_bits(name, checkpoint))
    else:
        weight = checkpoint.read(f"{name}.weight")
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise CheckpointError(f"{name}.weight: wanted int8 [N, K], found {weight.dtype} {tuple(weight.shape)}")
    if scale.dim() != 2 or scale.shape[0] != weight.shape[0] or weight.shape[1] % scale.shape[1]:
        raise CheckpointError(
            f"{name}.weight_scale: has shape {list(scale.shape)}, wanted one step for each of {weight.shape[0]} rows or for "
            f"equal groups of their {weight.shape[1]} columns"
        )
    if quant_type.spec.activation is not Activation.STATIC:
        return QuantizedLinear(quant_type, weight, scale, bias)
    step = float(checkpoint.read(f"{name}.input_scale"))
    if not 0 < step < math.inf:
        raise CheckpointError(f"{name}.input_scale: is {step}, wanted a positive number")
    activation = ActivationQParams(step, int(checkpoint.read(f"{name}.input_zero_point")))
    return QuantizedLinear(quant_type, weight, scale, bias, activation, deq_scale=(scale * step).reshape(-1))
