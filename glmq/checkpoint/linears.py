"""The tensors of one quantized linear or one norm, in whatever form the checkpoint has."""

from __future__ import annotations

from torch import Tensor

from glmq.checkpoint import ascend
from glmq.checkpoint.compressed_tensors import compressed_specs, compressed_type, decode_compressed, encode_compressed
from glmq.checkpoint.layout import TensorSpec
from glmq.checkpoint.reader import Checkpoint
from glmq.records import QuantizedLinear
from glmq.spec import FloatDtype, Form, QuantType, assert_never


def linear_specs(
    name: str,
    quant_type: QuantType,
    shape: tuple[int, int],
    *,
    has_bias: bool,
    dtype: FloatDtype,
    group_size: int,
    form: Form,
    row_parallel: bool,
) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors that `encode_linear` returns for such a linear; arguments as in ascend.py.

    Raises:
        UsageError: sizes that the type cannot take.
    """
    match form:
        case Form.ASCEND_V1 | Form.MINDIE:
            specs = ascend.linear_specs(
                name,
                quant_type,
                shape,
                has_bias=has_bias,
                dtype=dtype,
                group_size=group_size,
                form=form,
                row_parallel=row_parallel,
            )
        case Form.COMPRESSED_TENSORS:
            specs = compressed_specs(name, quant_type, shape, has_bias=has_bias, dtype=dtype, group_size=group_size)
        case other:
            assert_never(other)
    return specs


def encode_linear(
    name: str, linear: QuantizedLinear, *, dtype: FloatDtype, form: Form, row_parallel: bool
) -> dict[str, Tensor]:
    """The tensors of a quantized linear as they are stored, by name; arguments and errors as in ascend.py."""
    match form:
        case Form.ASCEND_V1 | Form.MINDIE:
            tensors = ascend.encode_linear(name, linear, dtype=dtype, form=form, row_parallel=row_parallel)
        case Form.COMPRESSED_TENSORS:
            tensors = encode_compressed(name, linear, dtype=dtype)
        case other:
            assert_never(other)
    return tensors


def norm_specs(name: str, width: int, *, dtype: FloatDtype, form: Form) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors that `encode_norm` returns for the RMSNorm `name` of `width` channels."""
    match form:
        case Form.ASCEND_V1 | Form.MINDIE:
            specs = ascend.norm_specs(name, width, dtype=dtype, form=form)
        case Form.COMPRESSED_TENSORS:
            specs = [TensorSpec(f"{name}.weight", dtype.code, (width,))]
        case other:
            assert_never(other)
    return specs


def encode_norm(
    name: str, weight: Tensor, *, dtype: FloatDtype, form: Form, bias: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of the RMSNorm `name`, by name; arguments and errors as in ascend.py.

    The Ascend forms add a bias, which other engines would not know.
    """
    match form:
        case Form.ASCEND_V1 | Form.MINDIE:
            tensors = ascend.encode_norm(name, weight, dtype=dtype, form=form, bias=bias)
        case Form.COMPRESSED_TENSORS:
            assert bias is None, "the recipe refuses it"
            tensors = {f"{name}.weight": ascend.to_float(f"{name}.weight", weight, dtype)}
        case other:
            assert_never(other)
    return tensors


def decode_linear(name: str, checkpoint: Checkpoint) -> QuantizedLinear:
    """The quantized linear `name` of a checkpoint in any form; form and type follow from the tensors that it has.

    Raises:
        CheckpointError: not a quantized linear, a compressed one, or tensors that contradict each other.
    """
    quant_type = compressed_type(name, checkpoint)
    if quant_type is None:
        return ascend.decode_linear(name, checkpoint)
    return decode_compressed(name, checkpoint, quant_type)


def stored_weight(name: str, checkpoint: Checkpoint) -> str:
    """The name of the tensor that holds the weight of the linear `name`: packed into words, or as it is."""
    packed = f"{name}.weight_packed"
    return packed if packed in checkpoint else f"{name}.weight"


def integer_linears(checkpoint: Checkpoint) -> list[str]:
    """Names of the linears that are stored as integers, in the checkpoint's order."""
    return [
        base
        for name in checkpoint
        for base, _, suffix in [name.rpartition(".")]
        if suffix == "weight_packed" or (suffix == "weight" and checkpoint[name].dtype == "I8")
    ]
