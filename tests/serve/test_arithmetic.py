"""What the plugin for vLLM computes, without vLLM: the operators against the arithmetic of `glmq verify`."""

import pytest
import torch
from torch import Tensor

from glmq.numerics.int8_linear import run_linear
from glmq.records import ActivationQParams, QuantizedLinear
from glmq.serve.arithmetic import dynamic_linear, static_linear, weight_only_linear
from glmq.spec import QuantType

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(quant_type: QuantType) -> QuantizedLinear:
    """48 -> 40 channels, groups of 16."""
    generator = torch.Generator().manual_seed(3)
    low = -8 if quant_type is QuantType.W4A8_DYNAMIC else -128
    q = torch.randint(low, -low, (40, 48), generator=generator, dtype=torch.int8)
    step = draw(40, 1, seed=4).abs() / 100 + 1e-3
    if quant_type is QuantType.W8A8S:
        deq_scale = step[:, 0] * 0.05
        quant_bias = torch.randint(-9000, 9000, (40,), generator=generator, dtype=torch.int32)
        return QuantizedLinear(quant_type, q, step, None, ActivationQParams(0.05, -7), deq_scale, quant_bias)
    second = torch.randint(1, 18, (40, 3), generator=generator).float()
    is_two_stage = quant_type is QuantType.W4A8_DYNAMIC
    return QuantizedLinear(quant_type, q, step, draw(40, seed=5), weight_scale_second=second if is_two_stage else None)


def serve(x: Tensor, linear: QuantizedLinear) -> Tensor:
    if linear.activation is not None:
        scale, offset = linear.activation.scale, linear.activation.offset
        return static_linear(x, linear.weight, linear.deq_scale, linear.quant_bias, scale, offset)
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    if linear.quant_type is QuantType.W8A16:
        return weight_only_linear(x, linear.weight, linear.weight_scale, bias)
    return dynamic_linear(x, linear.weight, linear.weight_scale, linear.weight_scale_second, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "quant_type", [QuantType.W8A8S, QuantType.W8A8_DYNAMIC, QuantType.W4A8_DYNAMIC, QuantType.W8A16]
)
def test_what_is_served_is_what_is_verified_rounded_once(quant_type: QuantType, dtype: torch.dtype) -> None:
    linear = make(quant_type)
    if linear.bias is not None:  # an engine holds it in the run dtype, as the checkpoint does
        linear.bias.copy_(linear.bias.to(dtype))
    x = (3 * draw(2, 9, 48, seed=6)).to(dtype)
    verified = run_linear(x.reshape(-1, 48).float(), linear).reshape(2, 9, 40)
    served = serve(x, linear)
    assert (served.shape, served.dtype) == ((2, 9, 40), dtype)
    assert torch.equal(served, verified.to(dtype))
    bound = 0.0 if dtype is torch.float32 else torch.finfo(dtype).eps / 2
    assert bool(((served.double() - verified.double()).abs() <= bound * verified.double().abs() + 1e-7).all())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiler_sees_the_shape_and_dtype_without_running() -> None:
    linear = make(QuantType.W4A8_DYNAMIC)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.zeros(5, 48, dtype=torch.bfloat16))
        y = serve(x, linear)
    assert (y.shape, y.dtype) == ((5, 40), torch.bfloat16)
