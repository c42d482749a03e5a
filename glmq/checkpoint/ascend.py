"""The tensors in which one quantized linear or one norm is stored: names, shapes, dtypes, encoding and decoding.

The engines' kernels compute y = (xq . q + quant_bias) * deq_scale for the static types; a float16 model stores
deq_scale as the bits of the float32 number in an int64, a bfloat16 model as float32.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from glmq.checkpoint.description import read_description
from glmq.checkpoint.layout import TensorSpec
from glmq.checkpoint.reader import Checkpoint, torch_dtype
from glmq.errors import CheckpointError, DtypeRangeError, UsageError, WrongFolderError
from glmq.records import ActivationQParams, QuantizedLinear
from glmq.spec import INT4, INT8, TYPES, Activation, FloatDtype, Form, QuantType, assert_never

SCALE_BIAS_CHUNKS: Final = 16
"""Columns of a row-parallel scale_bias: one per rank at the largest tensor-parallel size. At smaller sizes a rank adds the
columns that belong to its share of the input."""

_TELLING: Final = frozenset({"deq_scale", "weight_scale", "weight_scale_second"})
"""The tensors by which a linear's type is told."""

_ROWS_AT_ONCE: Final = 1024
"""Rows that are widened to float64 together; 13696 columns make 112 MB."""


def linear_suffixes(quant_type: QuantType, *, form: Form, has_bias: bool) -> tuple[str, ...]:
    """The suffixes that a quantized linear has on disk, in a fixed order, without the dot.

    Raises:
        CheckpointError: a type that is not stored this way (FLOAT, W8A8SC).
    """
    spec = quant_type.spec
    if not spec.suffixes:
        raise CheckpointError(f"{quant_type.value} linears are not written by the quantizer")
    packed = ("scale_bias",) if spec.two_stage and form is Form.ASCEND_V1 else ()
    return ("weight", *(("bias",) if has_bias else ()), *spec.suffixes, *packed)


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
    """Names, dtypes and shapes of the tensors that `encode_linear` returns for such a linear.

    Args:
        name: of the linear, without `.weight`.
        quant_type: of the linear.
        shape: [N, K]: output and input features.
        has_bias: the float layer has a bias.
        dtype: of the written model.
        group_size: input columns per second-stage scale; W4A8_DYNAMIC only.
        form: of the checkpoint.
        row_parallel: engines split the linear along K (o_proj, down_proj).

    Raises:
        UsageError: W4A8_DYNAMIC, and the sizes cannot be packed.
    """
    rows, cols = shape
    if quant_type.spec.two_stage:
        _check_w4a8(name, rows, cols, group_size, form=form, row_parallel=row_parallel)
    float_code = dtype.code
    is_w4a8 = quant_type.spec.two_stage
    activation_code = "F32" if dtype is FloatDtype.FP16 else "BF16"
    scale_code = float_code if quant_type.spec.step_in_model_dtype else "F32"
    groups = cols // group_size if is_w4a8 else 0
    table: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight": ("I8", (rows // 2 if is_w4a8 and form is Form.ASCEND_V1 else rows, cols)),
        "bias": (float_code, (rows,)),
        "input_scale": (activation_code, (1,)),
        "input_offset": (activation_code, (1,)),
        "quant_bias": ("I32", (rows,)),
        "deq_scale": ("I64" if dtype is FloatDtype.FP16 else "F32", (rows,)),
        "weight_scale": (scale_code, (rows, 1)),
        "weight_offset": (scale_code, (rows, 1)),
        "weight_scale_second": ("F32", (rows, groups)),
        "weight_offset_second": ("I64", (rows, groups)),
        "scale_bias": ("F32", (rows, SCALE_BIAS_CHUNKS if row_parallel else 1)),
    }
    suffixes = linear_suffixes(quant_type, form=form, has_bias=has_bias)
    return [TensorSpec(f"{name}.{suffix}", *table[suffix]) for suffix in suffixes]


def _check_w4a8(name: str, rows: int, cols: int, group_size: int, *, form: Form, row_parallel: bool) -> None:
    if group_size < 1 or cols % group_size:
        raise UsageError(
            f"{name}: {cols} input columns do not divide into groups of {group_size}; choose another group size"
        )
    if form is Form.ASCEND_V1 and rows % 2:
        raise UsageError(f"{name}: {rows} output rows cannot be packed in pairs as W4A8_DYNAMIC wants; keep it float")
    if form is Form.ASCEND_V1 and row_parallel and cols % SCALE_BIAS_CHUNKS:
        raise UsageError(
            f"{name}: {cols} input columns do not divide by {SCALE_BIAS_CHUNKS} as W4A8_DYNAMIC wants; keep it float"
        )


def storable_input_scale(scale: float, dtype: FloatDtype) -> float:
    """The number that a model of `dtype` stores for `scale`: rounded to float32 (float16 models) or to bfloat16."""
    return float(torch.tensor(scale, dtype=torch.float32 if dtype is FloatDtype.FP16 else torch.bfloat16))


def storable_weight_scale(scale: Tensor, dtype: FloatDtype) -> Tensor:
    """The row steps that a W8A8 or W8A8_DYNAMIC model of `dtype` stores: rounded to `dtype`, never to zero.

    Args:
        scale: float32 [N, 1], positive.
        dtype: of the written model.

    Returns:
        float32 [N, 1]: exactly representable in `dtype`; at least its smallest positive number.
    """
    target = torch_dtype(dtype.code)
    smallest = torch.finfo(target).smallest_normal * torch.finfo(target).eps  # the smallest subnormal number
    return scale.float().clamp_min(smallest).to(target).float()


def encode_linear(
    name: str, linear: QuantizedLinear, *, dtype: FloatDtype, form: Form, row_parallel: bool
) -> dict[str, Tensor]:
    """The tensors of `linear` as they are stored.

    Args:
        name: of the linear, without `.weight`.
        linear: its integers and scales.
        dtype: of the written model.
        form: of the checkpoint.
        row_parallel: engines split the linear along K (o_proj, down_proj); shapes scale_bias.

    Returns:
        Tensor name -> contiguous CPU tensor, with the names, dtypes and shapes of `linear_specs`.

    Raises:
        CheckpointError: a field that the type needs is missing, is not finite or positive, or does not fit its dtype.
    """
    suffixes = linear_suffixes(linear.quant_type, form=form, has_bias=linear.bias is not None)
    spec = linear.quant_type.spec
    found = {"weight": linear.weight}
    if linear.bias is not None:
        found["bias"] = to_float(f"{name}.bias", linear.bias, dtype)
    match spec.activation:
        case Activation.STATIC:
            found |= _encode_static(name, linear, dtype)
        case Activation.PER_TOKEN | Activation.NONE:
            pass
        case other:
            assert_never(other)
    if "weight_scale" in suffixes:
        check_positive(f"{name}.weight_scale", linear.weight_scale)
        found["weight_scale"] = (
            encode_row_scale(linear.weight_scale, dtype) if spec.step_in_model_dtype else linear.weight_scale
        )
        found["weight_offset"] = torch.zeros_like(found["weight_scale"])
    if spec.two_stage:
        found |= _encode_w4a8(name, linear, form=form, row_parallel=row_parallel)
    return {f"{name}.{suffix}": found[suffix].contiguous() for suffix in suffixes}


def _encode_static(name: str, linear: QuantizedLinear, dtype: FloatDtype) -> dict[str, Tensor]:
    if linear.activation is None or linear.deq_scale is None or linear.quant_bias is None:
        raise CheckpointError(f"{name}: a {linear.quant_type.value} linear needs activation, deq_scale and quant_bias")
    scale, offset = linear.activation.scale, linear.activation.offset
    check_activation(name, linear.activation, dtype)
    check_positive(f"{name}.deq_scale", linear.deq_scale)
    activation_dtype = torch.float32 if dtype is FloatDtype.FP16 else torch.bfloat16
    deq_scale = linear.deq_scale.float().contiguous()
    return {
        "input_scale": torch.tensor([scale], dtype=activation_dtype),
        "input_offset": torch.tensor([offset], dtype=activation_dtype),
        "quant_bias": linear.quant_bias,
        "deq_scale": deq_scale.view(torch.int32).long() if dtype is FloatDtype.FP16 else deq_scale,
    }


def encode_row_scale(scale: Tensor, dtype: FloatDtype) -> Tensor:
    """Steps in the model's dtype, as storable_weight_scale rounds them; any shape."""
    return storable_weight_scale(scale, dtype).to(torch_dtype(dtype.code))


def _encode_w4a8(name: str, linear: QuantizedLinear, *, form: Form, row_parallel: bool) -> dict[str, Tensor]:
    second = linear.weight_scale_second
    if second is None:
        raise CheckpointError(f"{name}: a W4A8_DYNAMIC linear needs weight_scale_second")
    check_positive(f"{name}.weight_scale_second", second)
    low, high = (int(extreme) for extreme in torch.aminmax(linear.weight))
    if low < INT4.qmin or high > INT4.qmax:
        raise CheckpointError(f"{name}: int4 values lie in {low}..{high}, wanted {INT4.qmin}..{INT4.qmax}")
    found = {"weight_scale_second": second, "weight_offset_second": torch.zeros(second.shape, dtype=torch.int64)}
    if form is Form.ASCEND_V1:
        found["weight"] = pack_int4(linear.weight)
        found["scale_bias"] = _scale_bias(linear.weight, linear.weight_scale, second, row_parallel=row_parallel)
    return found


def pack_int4(q: Tensor) -> Tensor:
    """Two rows in one: row 2i in the low nibble, row 2i + 1 in the high. int8 [N, K] in -8..7 -> int8 [N / 2, K]."""
    return q[1::2] * 16 | (q[0::2] & 15)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of pack_int4: int8 [N / 2, K] -> int8 [N, K] in -8..7."""
    pairs = torch.stack([((packed & 15) ^ 8) - 8, packed >> 4], dim=1)  # [N / 2, 2, K]
    return pairs.reshape(-1, packed.shape[1])


def _scale_bias(q: Tensor, scale: Tensor, second: Tensor, *, row_parallel: bool) -> Tensor:
    """8 * sum over input columns of q * bf16(second) * bf16(scale): kernels shift int4 values by 8 to make them unsigned.

    The sum runs over all columns, or over each of 16 equal pieces of them for a row-parallel linear. It is computed in
    float64, where it is exact, and rounded once.

    Args:
        q: int8 [N, K].
        scale: float32 [N, 1].
        second: float32 [N, K / group].
        row_parallel: 16 sums instead of one.

    Returns:
        float32 [N, 1] or [N, 16].
    """
    rows, cols = q.shape
    pieces = SCALE_BIAS_CHUNKS if row_parallel else 1
    sums = torch.empty(rows, pieces, dtype=torch.float64)
    for row in range(0, rows, _ROWS_AT_ONCE):
        cut = slice(row, row + _ROWS_AT_ONCE)
        steps = second[cut].bfloat16().double().repeat_interleave(cols // second.shape[1], dim=1)  # [r, K]
        sums[cut] = steps.mul_(q[cut]).reshape(steps.shape[0], pieces, -1).sum(2)
    return (8 * sums * scale.bfloat16().double()).float()


def decode_linear(name: str, checkpoint: Checkpoint) -> QuantizedLinear:
    """The quantized linear `name` of a checkpoint in either form; its type follows from the tensors that it has.

    The row steps of a W8A8S linear are not stored; they are deq_scale / input_scale.

    Raises:
        CheckpointError: not a quantized linear, a compressed one, or tensors that contradict each other.
    """
    quant_type = _type_of(name, checkpoint)
    weight = checkpoint.read(f"{name}.weight")
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise CheckpointError(f"{name}.weight: wanted int8 [N, K], found {weight.dtype} {tuple(weight.shape)}")
    bias = checkpoint.read(f"{name}.bias").float() if f"{name}.bias" in checkpoint else None
    match quant_type.spec.activation:
        case Activation.STATIC:
            linear = _decode_static(name, checkpoint, quant_type, weight, bias)
        case Activation.PER_TOKEN | Activation.NONE:
            linear = _decode_steps(name, checkpoint, quant_type, weight, bias)
        case other:
            assert_never(other)
    return linear


def _decode_static(
    name: str, checkpoint: Checkpoint, quant_type: QuantType, weight: Tensor, bias: Tensor | None
) -> QuantizedLinear:
    """A linear with a stored activation scale and offset."""
    deq_scale = decode_deq_scale(f"{name}.deq_scale", checkpoint.read(f"{name}.deq_scale"))
    activation = _decode_activation(name, checkpoint)
    if f"{name}.weight_scale" in checkpoint:
        scale = checkpoint.read(f"{name}.weight_scale").float()
    else:
        scale = (deq_scale / activation.scale)[:, None]
    quant_bias = checkpoint.read(f"{name}.quant_bias")
    return QuantizedLinear(quant_type, weight, scale, bias, activation, deq_scale, quant_bias)


def _decode_steps(
    name: str, checkpoint: Checkpoint, quant_type: QuantType, weight: Tensor, bias: Tensor | None
) -> QuantizedLinear:
    """A linear of which weight steps alone are stored, in one stage or two."""
    scale = checkpoint.read(f"{name}.weight_scale").float()
    second = None
    if quant_type.spec.two_stage:
        second = checkpoint.read(f"{name}.weight_scale_second").float()
        weight = unpack_int4(weight) if 2 * weight.shape[0] == scale.shape[0] else weight
    return QuantizedLinear(quant_type, weight, scale, bias, weight_scale_second=second)


def _type_of(name: str, checkpoint: Checkpoint) -> QuantType:
    """The type whose linears have these scales; where several have, the described one, else the first that stores just these.

    W8A8_DYNAMIC and W8A16 store the same, and other tools leave W8A8 without the row steps that deq_scale tells.
    """
    if f"{name}.index" in checkpoint:
        raise WrongFolderError(f"{name}: is compressed (W8A8SC); decompress the checkpoint first")
    found = {suffix for suffix in _TELLING if f"{name}.{suffix}" in checkpoint}
    stored = {t: _TELLING & set(spec.suffixes) for t, spec in TYPES.items() if spec.suffixes}
    fitting = [t for t, own in stored.items() if found == own or (found == own - {"weight_scale"} == {"deq_scale"})]
    if not fitting:
        listed = ", ".join(sorted(found)) or "neither deq_scale nor weight_scale"
        raise CheckpointError(f"{name}: is not a quantized linear of a known type, it has {listed}")
    if len(fitting) > 1:
        description = read_description(checkpoint.directory)
        described = None if description is None else description.tensors.get(f"{name}.weight")
        fitting = [t for t in fitting if t.value == described] or [t for t in fitting if stored[t] == found]
    return fitting[0]


def decode_deq_scale(name: str, stored: Tensor) -> Tensor:
    """float32 [N] from the int64 bits of a float16 model or the float32 numbers of a bfloat16 one.

    Raises:
        CheckpointError: another dtype, or integers that are not the bits of a positive float32 number.
    """
    if stored.dtype == torch.float32:
        return stored
    if stored.dtype != torch.int64:
        raise CheckpointError(f"{name}: wanted int64 (float16 model) or float32 (bfloat16 model), found {stored.dtype}")
    if not bool(((stored > 0) & (stored < 2**31)).all()):
        raise CheckpointError(
            f"{name}: has integers outside 1..2^31-1, which are not the bits of positive float32 numbers"
        )
    return stored.to(torch.int32).view(torch.float32)


def _decode_activation(name: str, checkpoint: Checkpoint) -> ActivationQParams:
    scale, offset = checkpoint.read(f"{name}.input_scale"), checkpoint.read(f"{name}.input_offset")
    if scale.numel() != 1 or offset.numel() != 1:
        raise CheckpointError(
            f"{name}: input_scale and input_offset have {scale.numel()} and {offset.numel()} values, wanted one each"
        )
    step, zero = float(scale), float(offset)
    if not 0 < step < math.inf or not zero.is_integer() or not INT8.qmin <= zero <= INT8.qmax:
        raise CheckpointError(
            f"{name}: input_scale {step} and input_offset {zero} are not a positive number and an integer in -128..127"
        )
    return ActivationQParams(step, int(zero))


def norm_specs(name: str, width: int, *, dtype: FloatDtype, form: Form) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors that `encode_norm` returns for the RMSNorm `name` of `width` channels."""
    owners = (name, f"{name}.module") if form is Form.MINDIE else (name,)
    return [
        TensorSpec(f"{owner}.{suffix}", code, (width,))
        for owner in owners
        for suffix, code in (("weight", dtype.code), ("bias", "F32"))
    ]


def encode_norm(
    name: str, weight: Tensor, *, dtype: FloatDtype, form: Form, bias: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of the RMSNorm `name`: weight, float32 bias, and both again as `.module.*` in the MindIE form.

    Args:
        name: of the norm, without `.weight`.
        weight: float [width], smoothing folded in.
        dtype: of the written model.
        form: of the checkpoint.
        bias: float32 [width]; None for zeros.

    Raises:
        CheckpointError: the weight does not fit `dtype`.
    """
    stored = {
        "weight": to_float(f"{name}.weight", weight, dtype),
        "bias": torch.zeros(weight.shape) if bias is None else bias,
    }
    owners = (name, f"{name}.module") if form is Form.MINDIE else (name,)
    return {f"{owner}.{suffix}": tensor for owner in owners for suffix, tensor in stored.items()}


def to_float(name: str, tensor: Tensor, dtype: FloatDtype) -> Tensor:
    """`tensor` in `dtype`, rounded half to even. Raises CheckpointError if the result holds infinity or NaN."""
    stored = tensor.to(torch_dtype(dtype.code))
    if not bool(stored.isfinite().all()):
        worst = float(tensor.abs().max())
        raise DtypeRangeError(
            f"{name}: its largest magnitude is {worst:g}, which {dtype.value} cannot hold; "
            "pass --torch_dtype bf16 (not for W8A8S) or repair the checkpoint"
        )
    return stored.contiguous()


def check_activation(name: str, activation: ActivationQParams, dtype: FloatDtype) -> None:
    """Raise CheckpointError unless a model of `dtype` can store the scale and offset of the input of linear `name`."""
    scale, offset = activation.scale, activation.offset
    if not 0 < scale < math.inf or storable_input_scale(scale, dtype) != scale:
        raise CheckpointError(
            f"{name}: input scale {scale!r} is not a positive number that a {dtype.value} model can store; "
            "quantize with storable_input_scale of it"
        )
    if not INT8.qmin <= offset <= INT8.qmax:
        raise CheckpointError(f"{name}: input offset {offset} is outside {INT8.qmin}..{INT8.qmax}")


def check_positive(name: str, scale: Tensor) -> None:
    """Raise CheckpointError unless all scales are finite and positive."""
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise CheckpointError(
            f"{name}: has scales that are not finite and positive, the smallest is {float(scale.min()):g}"
        )
