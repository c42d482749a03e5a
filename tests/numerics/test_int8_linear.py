import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glmq.numerics.int8_linear import (
    fold_bias,
    quantize_input,
    quantize_tokens,
    run_linear,
    weight_only_linear,
)
from glmq.records import ActivationQParams, QuantizedLinear
from glmq.spec import QuantType


def integers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def test_inputs_are_rounded_after_the_offset_and_clamped() -> None:
    params = ActivationQParams(scale=0.5, offset=-3)
    x = torch.tensor([0.0, 0.25, 0.75, -100.0, 100.0])
    assert quantize_input(x, params).tolist() == [-3, -2, -2, -128, 127]  # -2.5 and -1.5 go to even


def test_tokens_have_their_own_scales() -> None:
    xq, scale = quantize_tokens(torch.tensor([[1.27, -0.635], [0.0, 0.0]]))
    assert xq.tolist() == [[127, -64], [0, 0]]  # -63.5 goes to even
    assert scale[0].item() == torch.tensor(1.27).div(127).item()
    assert scale[1].item() > 0


@given(
    st.lists(st.integers(-128, 127), min_size=3, max_size=3),
    st.floats(-100, 100, width=32),
    st.floats(2.0**-20, 1, width=32),
    st.integers(-128, 127),
)
@settings(deadline=None)
def test_folded_bias_equals_the_formula(q: list[int], bias: float, deq: float, offset: int) -> None:
    weight = torch.tensor([q], dtype=torch.int8)
    folded = fold_bias(weight, torch.tensor([bias]), torch.tensor([deq]), offset)
    assert folded.dtype == torch.int32
    assert folded.item() == round(-offset * sum(q) + bias / deq)
    assert fold_bias(weight, None, torch.tensor([deq]), offset).item() == -offset * sum(q)


def test_a_bias_beyond_int32_is_clamped() -> None:
    q = torch.zeros(2, 1, dtype=torch.int8)
    folded = fold_bias(q, torch.tensor([1e6, -1e6]), torch.tensor([1e-6, 1e-6]), 0)
    assert folded.tolist() == [2**31 - 1, -(2**31)]


def test_static_linear_computes_as_the_kernel_does() -> None:
    q, x = integers(4, 20), torch.randn(6, 20, generator=torch.Generator().manual_seed(2))
    params = ActivationQParams(scale=0.03125, offset=5)
    step, bias = torch.rand(4, 1, generator=torch.Generator().manual_seed(3)), torch.tensor([1.0, -2.0, 0.5, 0.0])
    deq = (step * params.scale).reshape(-1)
    quant_bias = fold_bias(q, bias, deq, params.offset)
    linear = QuantizedLinear(QuantType.W8A8S, q, step, bias, params, deq, quant_bias)
    y = run_linear(x, linear)
    for token in range(6):
        xq = [max(-128, min(127, round(float(v) / 0.03125 + 5))) for v in x[token]]
        for row in range(4):
            total = sum(a * b for a, b in zip(xq, q[row].tolist(), strict=True)) + quant_bias[row].item()
            assert y[token, row].item() == torch.tensor(total * deq[row].item(), dtype=torch.float64).float().item()


def test_dynamic_linear_scales_by_token_and_row_and_adds_the_float_bias() -> None:
    q, x = integers(3, 20), torch.randn(4, 20, generator=torch.Generator().manual_seed(2))
    step, bias = torch.tensor([[0.5], [0.25], [0.125]]), torch.tensor([1.0, 2.0, 3.0])
    xq, token_scale = quantize_tokens(x)
    expected = (xq.long() @ q.long().T).double() * step.T.double() * token_scale.double() + bias.double()
    assert torch.equal(run_linear(x, QuantizedLinear(QuantType.W8A8_DYNAMIC, q, step, bias)), expected.float())
    without = QuantizedLinear(QuantType.W8A8_DYNAMIC, q, step, None)
    assert torch.equal(run_linear(x, without), (expected - bias.double()).float())


def test_two_stage_linear_equals_the_product_with_its_dequantized_weight() -> None:
    q = integers(3, 64).clamp(-8, 7)
    second = torch.tensor([[1.0, 17.0], [2.0, 3.0], [5.0, 4.0]])
    step, x = torch.tensor([[0.5], [0.25], [1.0]]), torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    linear = QuantizedLinear(QuantType.W4A8_DYNAMIC, q, step, None, weight_scale_second=second)
    weight = q.double() * second.double().repeat_interleave(32, 1) * step.double()
    xq, token_scale = quantize_tokens(x)
    # Steps are powers of two and sums stay below 2^53: every product and sum above is exact in float64 but the last.
    assert torch.equal(run_linear(x, linear), ((xq.double() @ weight.T) * token_scale.double()).float())


def test_a_linear_with_float_activations_multiplies_the_dequantized_weight() -> None:
    bias = torch.tensor([1.0, -2.0])
    linear = QuantizedLinear(
        QuantType.FLOAT, torch.tensor([[1, -2], [3, 4]], dtype=torch.int8), torch.tensor([[0.5], [2]]), bias
    )
    x = torch.tensor([[1.0, 0.25]])
    assert weight_only_linear(x, linear).tolist() == [[1.25, 6.0]]
    assert torch.equal(run_linear(x, linear), weight_only_linear(x, linear))


def test_a_shift_of_the_input_is_given_back_by_quant_bias() -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randint(-128, 128, (7, 40), generator=g, dtype=torch.int8)
    shift, deq = torch.randn(40, generator=g), torch.rand(7, generator=g) + 0.1
    bias = torch.randn(7, generator=g)
    folded = fold_bias(q, bias, deq, 5, shift)
    exact = bias.double() / deq.double() + (q.double() * (shift.double() - 5)).sum(1)
    assert folded.tolist() == exact.round().int().tolist()
