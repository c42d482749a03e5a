"""The linears that the plugin serves: operators of PyTorch around the arithmetic that `glmq verify` uses; needs no vLLM.

For the same integers, scales and input each operator returns what `glmq.numerics.int8_linear.run_linear` does in float32,
rounded once to the dtype of the input: |served - verified| <= eps / 2 * |verified|, where eps is 2^-10 in float16, 2^-7 in
bfloat16 and 0 in float32 (within the normal range of the dtype).

They are operators so that a compiler sees one node: whether the platform's int8 product is exact is asked while they run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glmq.numerics.int8_linear import run_linear
from glmq.records import ActivationQParams, QuantizedLinear
from glmq.spec import QuantType


def _run(x: Tensor, linear: QuantizedLinear) -> Tensor:
    y = run_linear(x.reshape(-1, x.shape[-1]).float(), linear)
    return y.reshape(*x.shape[:-1], -1).to(x.dtype)


def _static(
    x: Tensor, weight: Tensor, deq_scale: Tensor, quant_bias: Tensor, input_scale: float, input_offset: int
) -> Tensor:
    activation = ActivationQParams(input_scale, input_offset)
    steps = (deq_scale / input_scale)[:, None]
    return _run(x, QuantizedLinear(QuantType.W8A8, weight, steps, None, activation, deq_scale, quant_bias))


def _dynamic(x: Tensor, weight: Tensor, weight_scale: Tensor, second: Tensor | None, bias: Tensor | None) -> Tensor:
    quant_type = QuantType.W8A8_DYNAMIC if second is None else QuantType.W4A8_DYNAMIC
    return _run(x, QuantizedLinear(quant_type, weight, weight_scale, _wide(bias), weight_scale_second=second))


def _weight_only(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return _run(x, QuantizedLinear(QuantType.W8A16, weight, weight_scale, _wide(bias)))


def _wide(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def _shape(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    """What a compiler needs to know of each operator's result."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _operator(name: str, schema: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    operator = torch.library.custom_op(f"glmq::{name}", function, mutates_args=(), schema=schema)
    operator.register_fake(_shape)
    return operator


static_linear = _operator(
    "static_linear",
    "(Tensor x, Tensor weight, Tensor deq_scale, Tensor quant_bias, float input_scale, int input_offset) -> Tensor",
    _static,
)
"""y = (xq . q + quant_bias) * deq_scale, xq = clamp(round(x / input_scale + input_offset), -128, 127).

x float [..., K]; weight int8 [N, K]; deq_scale float32 [N]; quant_bias int32 [N] -> [..., N] in the dtype of x.
"""

dynamic_linear = _operator(
    "dynamic_linear",
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? second, Tensor? bias) -> Tensor",
    _dynamic,
)
"""y = (xq . q) * token scale * weight_scale + bias, the integers of each group of columns times `second` first if given.

x float [..., K]; weight int8 [N, K]; weight_scale float32 [N, 1]; second float32 [N, K / group_size] or None; bias float
[N] or None -> [..., N] in the dtype of x.
"""

weight_only_linear = _operator(
    "weight_only_linear", "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor", _weight_only
)
"""y = x . (q * weight_scale) + bias. x float [..., K]; weight int8 [N, K]; weight_scale float32 [N, 1]; bias float [N] or
None -> [..., N] in the dtype of x."""
