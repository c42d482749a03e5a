"""What the engine's int8 kernels compute, to the integer.

    static:   xq = clamp(round(x / scale + offset), -128, 127);  y = (xq . q + quant_bias) * deq_scale
    dynamic:  per token scale = max|x| / 127;                    y = (xq . q) * scale * weight_scale + bias
    W4A8:     the dynamic form with w = q * weight_scale_second * weight_scale

The integer sums are exact (int8_product.py); what follows them is computed in float64 and rounded to float32 once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glmq.numerics.affine import quantize
from glmq.numerics.grouped import expand_groups
from glmq.numerics.int8_product import matmul_int8
from glmq.numerics.rows import row_chunks
from glmq.records import ActivationQParams, QuantizedLinear
from glmq.spec import INT8, Activation, assert_never

INT32_LIMIT = 2**31 - 1


def quantize_input(x: Tensor, params: ActivationQParams) -> Tensor:
    """Static int8 activation: clamp(round(x / scale + offset), -128, 127). float32 -> int8, same shape."""
    scale, offset = (torch.tensor(value, dtype=torch.float32) for value in (params.scale, params.offset))
    return quantize(x, scale, offset, INT8)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic int8 activation: scale = max|x| / 127 of each token. float32 [T, K] -> int8 [T, K], float32 [T, 1]."""
    scale = x.abs().amax(1, keepdim=True).clamp_min(1e-9) / 127
    return quantize(x, scale, torch.zeros(()), INT8), scale


def fold_bias(q: Tensor, bias: Tensor | None, deq_scale: Tensor, offset: int, shift: Tensor | None = None) -> Tensor:
    """quant_bias = round(bias / deq_scale + sum_k q[n, k] (shift[k] - offset)), clamped to int32.

    Args:
        q: int8 [N, K].
        bias: float32 [N] in output units, or None for zero.
        deq_scale: float32 [N], positive.
        offset: of the input activation.
        shift: float64 [K], what the norm in front takes off the input, in steps of it; None for nothing.

    Returns:
        int32 [N]. Computed in float64, where the integer part is exact.
    """
    sums = torch.cat([q[rows].sum(1, dtype=torch.int32) for rows in row_chunks(q)])
    folded = -float(offset) * sums.double()
    if shift is not None:
        folded += shifted_sums(q, shift)
    if bias is not None:
        folded += bias.double() / deq_scale.double()
    return folded.round_().clamp_(-INT32_LIMIT - 1, INT32_LIMIT).to(torch.int32)


def shifted_sums(q: Tensor, shift: Tensor) -> Tensor:
    """What int8 [N, K] makes of a constant input: float64 [N], from the input's [K]."""
    return torch.cat([q[rows].double() @ shift.double() for rows in row_chunks(q)])


def static_linear(x: Tensor, linear: QuantizedLinear) -> Tensor:
    """Run a static linear as the NPU does, or without quant_bias as the kernels for compressed-tensors do.

    float32 [T, K] -> float32 [T, N].
    """
    assert linear.activation is not None
    assert linear.deq_scale is not None
    sums = matmul_int8(quantize_input(x, linear.activation), linear.weight)
    if linear.quant_bias is not None:
        return ((sums + linear.quant_bias.double()) * linear.deq_scale.double()).float()
    # Without one, the offset's share is taken off the integer sums, and the float bias is added to the products.
    sums -= linear.activation.offset * linear.weight.sum(1, dtype=torch.int32).double()
    y = sums * linear.deq_scale.double()
    return (y if linear.bias is None else y + linear.bias.double()).float()


def dynamic_linear(x: Tensor, linear: QuantizedLinear) -> Tensor:
    """Run a dynamic (per token) or W4A8 linear as the NPU does. float32 [T, K] -> float32 [T, N]."""
    xq, token_scale = quantize_tokens(x)
    row_scale = linear.weight_scale.reshape(1, -1).double()
    if linear.weight_scale_second is None:
        y = matmul_int8(xq, linear.weight) * row_scale
    else:
        y = _grouped_product(xq, linear.weight, linear.weight_scale_second) * row_scale
    y *= token_scale.double()
    return (y if linear.bias is None else y + linear.bias.double()).float()


def run_linear(x: Tensor, linear: QuantizedLinear) -> Tensor:
    """Run a quantized linear as the NPU does, whatever its type. float32 [T, K] -> float32 [T, N]."""
    match linear.quant_type.spec.activation:
        case Activation.STATIC:
            y = static_linear(x, linear)
        case Activation.PER_TOKEN:
            y = dynamic_linear(x, linear)
        case Activation.NONE:
            y = weight_only_linear(x, linear)
        case other:
            assert_never(other)
    return y


def weight_only_linear(x: Tensor, linear: QuantizedLinear) -> Tensor:
    """Run a linear whose weights alone are integers: y = x . (q * weight_scale) + bias. float32 [T, K] -> float32 [T, N]."""
    if linear.weight_scale.shape[1] == 1:
        y = (x @ linear.weight.float().T) * linear.weight_scale.reshape(1, -1)
    else:
        y = x.new_empty(x.shape[0], linear.weight.shape[0])
        for rows in row_chunks(linear.weight):
            steps = expand_groups(linear.weight_scale[rows], linear.weight.shape[1])
            y[:, rows] = x @ (linear.weight[rows] * steps).T
    return y if linear.bias is None else y + linear.bias


def _grouped_product(xq: Tensor, q: Tensor, second: Tensor) -> Tensor:
    """sum over groups of (xq_g . q_g) * second[:, g]. int8 [T, K], int8 [N, K], float32 [N, G] -> float64 [T, N]."""
    out = torch.zeros(xq.shape[0], q.shape[0], dtype=torch.float64, device=q.device)
    for index, (x_part, q_part) in enumerate(
        zip(xq.chunk(second.shape[1], 1), q.chunk(second.shape[1], 1), strict=True)
    ):
        out += matmul_int8(x_part, q_part) * second[:, index].double()
    return out
