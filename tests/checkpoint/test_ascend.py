import math
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from glmq.checkpoint.ascend import (
    decode_linear,
    encode_linear,
    encode_norm,
    linear_specs,
    norm_specs,
    pack_int4,
    storable_input_scale,
    storable_weight_scale,
    unpack_int4,
)
from glmq.checkpoint.layout import TensorSpec
from glmq.checkpoint.reader import Checkpoint, dtype_code
from glmq.errors import CheckpointError, UsageError
from glmq.records import ActivationQParams, QuantizedLinear
from glmq.spec import Activation, FloatDtype, Form, QuantType

FP16, BF16 = FloatDtype.FP16, FloatDtype.BF16
ROWS, COLS, GROUP = 6, 32, 8
NAME = "model.language_model.layers.0.self_attn.q_proj"
TYPES = [QuantType.W8A8, QuantType.W8A8S, QuantType.W8A8_DYNAMIC, QuantType.W4A8_DYNAMIC]


def make_linear(quant_type: QuantType, *, has_bias: bool = True, scale: float = 0.03125) -> QuantizedLinear:
    """A linear with every field that its type has. The default input scale is a power of two, exact in every dtype."""
    generator = torch.Generator().manual_seed(TYPES.index(quant_type))
    is_w4a8 = quant_type is QuantType.W4A8_DYNAMIC
    low, high = (-8, 8) if is_w4a8 else (-128, 128)
    q = torch.randint(low, high, (ROWS, COLS), generator=generator).to(torch.int8)
    # Steps that float16 and bfloat16 both hold exactly (8 significant bits), so that round trips are bit-exact.
    step = torch.randint(128, 256, (ROWS, 1), generator=generator).float() / 2**17
    bias = torch.randint(-128, 128, (ROWS,), generator=generator).float() / 64 if has_bias else None
    if quant_type.spec.activation is Activation.STATIC:
        deq = (step * scale).reshape(ROWS)
        quant_bias = torch.randint(-1000, 1000, (ROWS,), generator=generator).to(torch.int32)
        return QuantizedLinear(quant_type, q, step, bias, ActivationQParams(scale, -7), deq, quant_bias)
    second = torch.randint(1, 18, (ROWS, COLS // GROUP), generator=generator).float() if is_w4a8 else None
    return QuantizedLinear(quant_type, q, step, bias, weight_scale_second=second)


def encode(
    linear: QuantizedLinear, dtype: FloatDtype = FP16, *, form: Form = Form.ASCEND_V1, row_parallel: bool = False
) -> dict[str, Tensor]:
    encoded = encode_linear(NAME, linear, dtype=dtype, form=form, row_parallel=row_parallel)
    assert all(name.startswith(f"{NAME}.") for name in encoded)
    return {name.removeprefix(f"{NAME}."): tensor for name, tensor in encoded.items()}


def shapes(
    quant_type: QuantType, dtype: FloatDtype, *, has_bias: bool, form: Form, row_parallel: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    specs = linear_specs(
        NAME, quant_type, (ROWS, COLS),
        has_bias=has_bias, dtype=dtype, group_size=GROUP, form=form, row_parallel=row_parallel,
    )  # fmt: skip
    return {spec.name.removeprefix(f"{NAME}."): (spec.dtype, spec.shape) for spec in specs}


N, K = ROWS, COLS
W8A8_FP16 = {
    "weight": ("I8", (N, K)), "bias": ("F16", (N,)), "input_scale": ("F32", (1,)), "input_offset": ("F32", (1,)),
    "quant_bias": ("I32", (N,)), "deq_scale": ("I64", (N,)), "weight_scale": ("F16", (N, 1)),
    "weight_offset": ("F16", (N, 1)),
}  # fmt: skip
W8A8_BF16 = {
    "weight": ("I8", (N, K)), "bias": ("BF16", (N,)), "input_scale": ("BF16", (1,)), "input_offset": ("BF16", (1,)),
    "quant_bias": ("I32", (N,)), "deq_scale": ("F32", (N,)), "weight_scale": ("BF16", (N, 1)),
    "weight_offset": ("BF16", (N, 1)),
}  # fmt: skip
W8A8S_FP16 = {key: value for key, value in W8A8_FP16.items() if not key.startswith("weight_")}
DYNAMIC_BF16 = {key: W8A8_BF16[key] for key in ("weight", "bias", "weight_scale", "weight_offset")}
W4A8_MINDIE = {
    "weight": ("I8", (N, K)), "bias": ("F16", (N,)), "weight_scale": ("F32", (N, 1)), "weight_offset": ("F32", (N, 1)),
    "weight_scale_second": ("F32", (N, K // GROUP)), "weight_offset_second": ("I64", (N, K // GROUP)),
}  # fmt: skip
W4A8 = W4A8_MINDIE | {"weight": ("I8", (N // 2, K)), "scale_bias": ("F32", (N, 1))}


@pytest.mark.parametrize(
    ("quant_type", "dtype", "form", "row_parallel", "expected"),
    [
        (QuantType.W8A8, FP16, Form.ASCEND_V1, False, W8A8_FP16),
        (QuantType.W8A8, FP16, Form.MINDIE, True, W8A8_FP16),
        (QuantType.W8A8, BF16, Form.ASCEND_V1, False, W8A8_BF16),
        (QuantType.W8A8S, FP16, Form.ASCEND_V1, False, W8A8S_FP16),
        (QuantType.W8A8_DYNAMIC, BF16, Form.ASCEND_V1, True, DYNAMIC_BF16),
        (QuantType.W4A8_DYNAMIC, FP16, Form.ASCEND_V1, False, W4A8),
        (QuantType.W4A8_DYNAMIC, FP16, Form.ASCEND_V1, True, W4A8 | {"scale_bias": ("F32", (N, 16))}),
        (QuantType.W4A8_DYNAMIC, FP16, Form.MINDIE, True, W4A8_MINDIE),
    ],
)
def test_names_dtypes_and_shapes_of_each_type(
    quant_type: QuantType, dtype: FloatDtype, form: Form, row_parallel: bool, expected: dict[str, object]
) -> None:
    assert shapes(quant_type, dtype, has_bias=True, form=form, row_parallel=row_parallel) == expected


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("row_parallel", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_is_encoded_as_planned_and_decoded_to_itself(
    tmp_path: Path, quant_type: QuantType, dtype: FloatDtype, form: Form, row_parallel: bool, has_bias: bool
) -> None:
    linear = make_linear(quant_type, has_bias=has_bias)
    encoded = encode_linear(NAME, linear, dtype=dtype, form=form, row_parallel=row_parallel)
    specs = linear_specs(
        NAME, quant_type, (ROWS, COLS),
        has_bias=has_bias, dtype=dtype, group_size=GROUP, form=form, row_parallel=row_parallel,
    )  # fmt: skip
    assert [TensorSpec(name, dtype_code(t.dtype), tuple(t.shape)) for name, t in encoded.items()] == specs
    assert all(tensor.is_contiguous() for tensor in encoded.values())
    save_file(encoded, tmp_path / "m.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        decoded = decode_linear(NAME, checkpoint)
    assert decoded.quant_type == linear.quant_type
    assert decoded.activation == linear.activation
    for field in ("weight", "bias", "deq_scale", "quant_bias", "weight_scale_second", "weight_scale"):
        wanted, found = getattr(linear, field), getattr(decoded, field)
        assert (wanted is None) == (found is None)
        # weight_scale of W8A8S is deq_scale / input_scale: exact here, because the input scale is a power of two.
        assert wanted is None or (wanted.dtype == found.dtype and torch.equal(wanted, found))


def test_static_tensors_follow_the_formulas() -> None:
    linear = make_linear(QuantType.W8A8, scale=0.015380859375)
    assert linear.deq_scale is not None
    assert linear.quant_bias is not None
    for dtype in (FP16, BF16):
        encoded = encode(linear, dtype)
        assert encoded["weight"].tolist() == linear.weight.tolist()
        assert encoded["input_scale"].tolist() == [0.015380859375]
        assert encoded["input_offset"].tolist() == [-7.0]
        assert encoded["quant_bias"].tolist() == linear.quant_bias.tolist()
        assert encoded["weight_scale"].flatten().tolist() == linear.weight_scale.flatten().tolist()
        assert encoded["weight_offset"].flatten().tolist() == [0.0] * ROWS
    bits = [struct.unpack("<I", struct.pack("<f", value))[0] for value in linear.deq_scale.tolist()]
    assert encode(linear, FP16)["deq_scale"].tolist() == bits
    assert encode(linear, BF16)["deq_scale"].tolist() == linear.deq_scale.tolist()


def test_packing_follows_the_formula() -> None:
    linear = make_linear(QuantType.W4A8_DYNAMIC)
    packed = encode(linear)["weight"]
    for row in range(ROWS // 2):
        for column in range(COLS):
            low, high = int(linear.weight[2 * row, column]), int(linear.weight[2 * row + 1, column])
            byte = ((high & 0xF) << 4) | (low & 0xF)
            assert int(packed[row, column]) == (byte - 256 if byte > 127 else byte)


def test_packing_keeps_every_pair_of_int4_values() -> None:
    values = torch.arange(-8, 8, dtype=torch.int8)
    q = torch.stack([values.repeat_interleave(16), values.repeat(16)])
    packed = pack_int4(q)
    assert packed.dtype == torch.int8
    assert packed.unique().numel() == 256
    assert torch.equal(unpack_int4(packed), q)


@pytest.mark.parametrize("row_parallel", [False, True])
def test_scale_bias_follows_the_formula(row_parallel: bool) -> None:
    # Steps that bfloat16 rounds, so that the rounding is seen; rounding sums once to float32 keeps them exact.
    linear = make_linear(QuantType.W4A8_DYNAMIC)
    linear = replace(linear, weight_scale=linear.weight_scale * 1.003)
    assert linear.weight_scale_second is not None
    found = encode(linear, row_parallel=row_parallel)["scale_bias"]
    pieces = 16 if row_parallel else 1
    width = COLS // pieces
    for row in range(ROWS):
        step = float(linear.weight_scale[row].bfloat16())
        for piece in range(pieces):
            total = 0.0
            for column in range(piece * width, (piece + 1) * width):
                second = float(linear.weight_scale_second[row, column // GROUP].bfloat16())
                total += int(linear.weight[row, column]) * second * step
            assert float(found[row, piece]) == struct.unpack("<f", struct.pack("<f", 8 * total))[0]


def test_scale_bias_of_many_rows_is_the_same_as_of_few() -> None:
    generator = torch.Generator().manual_seed(5)
    q = torch.randint(-8, 8, (2050, COLS), generator=generator).to(torch.int8)
    step = torch.rand(2050, 1, generator=generator) + 0.1
    second = torch.rand(2050, COLS // GROUP, generator=generator) + 1
    whole = encode(QuantizedLinear(QuantType.W4A8_DYNAMIC, q, step, None, weight_scale_second=second))["scale_bias"]
    part = QuantizedLinear(
        QuantType.W4A8_DYNAMIC, q[1000:1100], step[1000:1100], None, weight_scale_second=second[1000:1100]
    )
    assert torch.equal(whole[1000:1100], encode(part)["scale_bias"])


@settings(max_examples=100, deadline=None)
@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_a_storable_input_scale_survives_storage(scale: float) -> None:
    assert storable_input_scale(scale, FP16) == scale
    rounded = storable_input_scale(scale, BF16)
    assert float(torch.tensor([rounded], dtype=torch.bfloat16)) == rounded
    # bfloat16 has 8 significant bits: rounding to nearest moves a number in [2^e, 2^(e+1)) by at most 2^(e-8).
    assert abs(rounded - scale) <= 2.0 ** (math.floor(math.log2(scale)) - 8)
    linear = make_linear(QuantType.W8A8S)
    linear = replace(linear, activation=ActivationQParams(rounded, 3))
    assert float(encode(linear, BF16)["input_scale"]) == rounded


def test_a_row_step_is_never_stored_as_zero() -> None:
    steps = torch.tensor([[1e-12], [2.0**-24], [1.0005], [2.0]])
    assert storable_weight_scale(steps, FP16).flatten().tolist() == [2.0**-24, 2.0**-24, 1.0009765625, 2.0]
    assert storable_weight_scale(steps, BF16).flatten().tolist() == [
        float(torch.tensor(1e-12).bfloat16()),
        2.0**-24,
        1.0,
        2.0,
    ]
    assert storable_weight_scale(torch.tensor([[1e-45]]), BF16).item() == 2.0**-133


def refusal(linear: QuantizedLinear, dtype: FloatDtype = FP16, *, form: Form = Form.ASCEND_V1) -> str:
    with pytest.raises(CheckpointError) as caught:
        encode_linear(NAME, linear, dtype=dtype, form=form, row_parallel=False)
    return str(caught.value).removeprefix(NAME)


def test_an_input_scale_that_the_model_cannot_store_is_refused() -> None:
    linear = make_linear(QuantType.W8A8, scale=0.1)
    advice = "model can store; quantize with storable_input_scale of it"
    assert refusal(linear, BF16) == f": input scale 0.1 is not a positive number that a bfloat16 {advice}"
    assert refusal(linear, FP16) == f": input scale 0.1 is not a positive number that a float16 {advice}"
    linear = make_linear(QuantType.W8A8)
    for scale in (0.0, -1.0, math.nan, math.inf):
        broken = replace(linear, activation=ActivationQParams(scale, 0))
        assert refusal(broken) == f": input scale {scale!r} is not a positive number that a float16 {advice}"


def test_broken_fields_are_refused() -> None:
    static, dynamic = make_linear(QuantType.W8A8), make_linear(QuantType.W8A8_DYNAMIC)
    w4a8 = make_linear(QuantType.W4A8_DYNAMIC)
    for field in ("activation", "deq_scale", "quant_bias"):
        broken = replace(static, **{field: None})
        assert refusal(broken) == ": a W8A8 linear needs activation, deq_scale and quant_bias"
    assert refusal(replace(w4a8, weight_scale_second=None)) == ": a W4A8_DYNAMIC linear needs weight_scale_second"
    assert refusal(replace(static, activation=ActivationQParams(0.5, 128))) == ": input offset 128 is outside -128..127"
    wrong = "has scales that are not finite and positive, the smallest is"
    assert refusal(replace(static, deq_scale=torch.zeros(ROWS))) == f".deq_scale: {wrong} 0"
    assert refusal(replace(dynamic, weight_scale=torch.full((ROWS, 1), -1.0))) == f".weight_scale: {wrong} -1"
    second = torch.full((ROWS, 4), math.inf)
    assert refusal(replace(w4a8, weight_scale_second=second)) == f".weight_scale_second: {wrong} inf"
    q = w4a8.weight.clone()
    q[0, 0] = 8
    assert refusal(replace(w4a8, weight=q), form=Form.MINDIE) == ": int4 values lie in -8..8, wanted -8..7"
    assert refusal(replace(dynamic, bias=torch.full((ROWS,), 1e5))) == (
        ".bias: its largest magnitude is 100000, which float16 cannot hold; "
        "pass --torch_dtype bf16 (not for W8A8S) or repair the checkpoint"
    )
    for quant_type in (QuantType.W8A8SC, QuantType.FLOAT):
        assert refusal(replace(static, quant_type=quant_type)) == (
            f"{quant_type.value} linears are not written by the quantizer"
        )


@pytest.mark.parametrize(
    ("rows", "cols", "group", "message"),
    [
        (6, 32, 12, "32 input columns do not divide into groups of 12; choose another group size"),
        (6, 32, 0, "32 input columns do not divide into groups of 0; choose another group size"),
        (7, 32, 8, "7 output rows cannot be packed in pairs as W4A8_DYNAMIC wants; keep it float"),
        (6, 24, 8, "24 input columns do not divide by 16 as W4A8_DYNAMIC wants; keep it float"),
    ],
)
def test_sizes_that_w4a8_cannot_pack_are_refused_at_the_plan(rows: int, cols: int, group: int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        linear_specs(
            NAME, QuantType.W4A8_DYNAMIC, (rows, cols),
            has_bias=False, dtype=FP16, group_size=group, form=Form.ASCEND_V1, row_parallel=True,
        )  # fmt: skip
    assert str(caught.value) == f"{NAME}: {message}"


def decode_refusal(directory: Path, tensors: dict[str, Tensor]) -> str:
    save_file(
        {f"{NAME}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}, directory / "m.safetensors"
    )
    with Checkpoint.open(directory) as checkpoint, pytest.raises(CheckpointError) as caught:
        decode_linear(NAME, checkpoint)
    return str(caught.value).removeprefix(NAME)


def test_tensors_that_contradict_each_other_are_not_decoded(tmp_path: Path) -> None:
    good = encode(make_linear(QuantType.W8A8S))
    weight = good["weight"]
    assert decode_refusal(tmp_path, {"weight": weight.float()}) == (
        ": is not a quantized linear of a known type, it has neither deq_scale nor weight_scale"
    )
    assert decode_refusal(tmp_path, good | {"weight_scale_second": torch.ones(1, 1)}) == (
        ": is not a quantized linear of a known type, it has deq_scale, weight_scale_second"
    )
    assert decode_refusal(tmp_path, good | {"index": weight.clone()}) == (
        ": is compressed (W8A8SC); decompress the checkpoint first"
    )
    assert decode_refusal(tmp_path, good | {"weight": weight.float()}) == (
        ".weight: wanted int8 [N, K], found torch.float32 (6, 32)"
    )
    assert decode_refusal(tmp_path, good | {"deq_scale": torch.ones(ROWS).half()}) == (
        ".deq_scale: wanted int64 (float16 model) or float32 (bfloat16 model), found torch.float16"
    )
    for bits in (0, 2**31, -1):
        assert decode_refusal(tmp_path, good | {"deq_scale": torch.full((ROWS,), bits)}) == (
            ".deq_scale: has integers outside 1..2^31-1, which are not the bits of positive float32 numbers"
        )
    assert decode_refusal(tmp_path, good | {"input_offset": torch.zeros(2)}) == (
        ": input_scale and input_offset have 1 and 2 values, wanted one each"
    )
    for scale, offset in ((1.0, 0.5), (1.0, 128.0), (0.0, 0.0), (math.inf, 0.0), (math.nan, 0.0), (1.0, math.nan)):
        broken = good | {"input_scale": torch.tensor([scale]), "input_offset": torch.tensor([offset])}
        assert decode_refusal(tmp_path, broken) == (
            f": input_scale {scale} and input_offset {offset} are not a positive number and an integer in -128..127"
        )


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("form", Form)
def test_norms_get_a_zero_float32_bias_and_the_mindie_form_a_second_copy(dtype: FloatDtype, form: Form) -> None:
    weight = torch.tensor([0.5, -1.25, 3.0])
    encoded = encode_norm("n", weight, dtype=dtype, form=form)
    assert [TensorSpec(name, dtype_code(t.dtype), tuple(t.shape)) for name, t in encoded.items()] == norm_specs(
        "n", 3, dtype=dtype, form=form
    )
    float_code = "F16" if dtype is FP16 else "BF16"
    owners = ["n", "n.module"] if form is Form.MINDIE else ["n"]
    assert {name: (dtype_code(t.dtype), t.tolist()) for name, t in encoded.items()} == {
        f"{owner}.{suffix}": value
        for owner in owners
        for suffix, value in (("weight", (float_code, [0.5, -1.25, 3.0])), ("bias", ("F32", [0.0, 0.0, 0.0])))
    }


def test_a_norm_weight_that_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        encode_norm("n", torch.tensor([7e4]), dtype=FP16, form=Form.ASCEND_V1)
    assert (
        str(caught.value) == "n.weight: its largest magnitude is 70000, which float16 cannot hold; "
        "pass --torch_dtype bf16 (not for W8A8S) or repair the checkpoint"
    )
