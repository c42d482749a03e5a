"""The bytes and the JSON of the compressed-tensors form, written out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import edit_tensors
from safetensors.torch import save_file
from torch import Tensor

from glmq.checkpoint.compressed_config import CompressedConfig, CompressedGroup, make_config, read_compressed_config
from glmq.checkpoint.compressed_tensors import pack_words, packed_bits, unpack_words
from glmq.checkpoint.linears import decode_linear, encode_linear, encode_norm, linear_specs
from glmq.checkpoint.reader import Checkpoint, dtype_code
from glmq.errors import CheckpointError, UsageError
from glmq.records import ActivationQParams, QuantizedLinear
from glmq.spec import FloatDtype, Form, QuantType

CT = Form.COMPRESSED_TENSORS
BF16, FP16 = FloatDtype.BF16, FloatDtype.FP16
N, K, GROUP = 4, 64, 32


def linear(quant_type: QuantType) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(0)
    low, high = (-8, 8) if quant_type is QuantType.W4A16 else (-128, 128)
    weight = torch.randint(low, high, (N, K), generator=generator, dtype=torch.int8)
    packed = quant_type in (QuantType.W4A16, QuantType.W8A16)
    scale = torch.rand(N, K // GROUP if packed else 1, generator=generator).bfloat16().float() + 0.5
    scale = scale.bfloat16().float()
    activation = ActivationQParams(0.25, -3) if quant_type is QuantType.W8A8 else None
    return QuantizedLinear(quant_type, weight, scale, torch.arange(N).float(), activation)


def stored(quant_type: QuantType, dtype: FloatDtype = BF16) -> dict[str, Tensor]:
    return encode_linear("p", linear(quant_type), dtype=dtype, form=CT, row_parallel=False)


@pytest.mark.parametrize(
    ("quant_type", "dtype", "wanted"),
    [
        (
            QuantType.W8A8,
            BF16,
            {
                "weight": ("I8", (N, K)), "bias": ("BF16", (N,)), "weight_scale": ("BF16", (N, 1)),
                "input_scale": ("BF16", (1,)), "input_zero_point": ("I8", (1,)),
            },
        ),
        (
            QuantType.W8A8,
            FP16,
            {
                "weight": ("I8", (N, K)), "bias": ("F16", (N,)), "weight_scale": ("F16", (N, 1)),
                "input_scale": ("F32", (1,)), "input_zero_point": ("I8", (1,)),
            },
        ),
        (
            QuantType.W8A8_DYNAMIC,
            BF16,
            {"weight": ("I8", (N, K)), "bias": ("BF16", (N,)), "weight_scale": ("BF16", (N, 1))},
        ),
        (
            QuantType.W8A16,
            BF16,
            {
                "weight_packed": ("I32", (N, K // 4)), "bias": ("BF16", (N,)),
                "weight_scale": ("BF16", (N, K // GROUP)), "weight_shape": ("I64", (2,)),
            },
        ),
        (
            QuantType.W4A16,
            BF16,
            {
                "weight_packed": ("I32", (N, K // 8)), "bias": ("BF16", (N,)),
                "weight_scale": ("BF16", (N, K // GROUP)), "weight_shape": ("I64", (2,)),
            },
        ),
    ],
)  # fmt: skip
def test_a_linear_has_these_tensors_planned_and_written(
    quant_type: QuantType, dtype: FloatDtype, wanted: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    specs = linear_specs(
        "p", quant_type, (N, K), has_bias=True, dtype=dtype, group_size=GROUP if "weight_packed" in wanted else 0,
        form=CT, row_parallel=False,
    )  # fmt: skip
    assert {spec.name.removeprefix("p."): (spec.dtype, spec.shape) for spec in specs} == wanted
    written = {name.removeprefix("p."): t for name, t in stored(quant_type, dtype).items()}
    assert {suffix: (dtype_code(t.dtype), tuple(t.shape)) for suffix, t in written.items()} == wanted


def test_words_hold_neighbouring_columns_the_first_lowest_shifted_to_be_unsigned() -> None:
    q4 = torch.tensor([[-8, -7, 0, 7, 1, 2, 3, -1]], dtype=torch.int8)
    assert pack_words(q4, 4).tolist() == [[0x7BA9F810]]
    q8 = torch.tensor([[-128, 127, 0, -1]], dtype=torch.int8)
    assert pack_words(q8, 8).tolist() == [[0x7F80FF00]]
    for bits, q in ((4, q4), (8, q8)):
        assert torch.equal(unpack_words(pack_words(q, bits), bits), q)


@pytest.mark.slow
def test_words_are_those_of_the_library(packing_library: ModuleType) -> None:
    library = packing_library.compressors
    pack = getattr(library, "pack_to_int32", None)
    if pack is None:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32 as pack
    for bits in (4, 8):
        q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 96), dtype=torch.int8)
        assert torch.equal(pack_words(q, bits), pack(q, bits))


@pytest.mark.parametrize("quant_type", [QuantType.W8A8, QuantType.W8A8_DYNAMIC, QuantType.W8A16, QuantType.W4A16])
def test_what_is_written_is_read_back(quant_type: QuantType, tmp_path: Path) -> None:
    save_file(stored(quant_type), tmp_path / "model.safetensors")
    before = linear(quant_type)
    with Checkpoint.open(tmp_path) as checkpoint:
        after = decode_linear("p", checkpoint)
    assert after.quant_type is quant_type
    assert torch.equal(after.weight, before.weight)
    assert torch.equal(after.weight_scale, before.weight_scale)
    assert after.bias is not None
    assert after.bias.tolist() == [0, 1, 2, 3]
    assert after.activation == before.activation
    assert after.quant_bias is None
    if quant_type is QuantType.W8A8:
        assert after.deq_scale is not None
        assert torch.equal(after.deq_scale, before.weight_scale.reshape(-1) * 0.25)


def test_a_norm_has_its_weight_alone() -> None:
    assert {n: t.dtype for n, t in encode_norm("norm", torch.ones(3), dtype=BF16, form=CT).items()} == {
        "norm.weight": torch.bfloat16
    }


def test_columns_that_do_not_divide_into_groups_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        linear_specs(
            "p", QuantType.W4A16, (4, 96), has_bias=False, dtype=BF16, group_size=64, form=CT, row_parallel=False
        )
    assert str(caught.value) == "p: 96 input columns do not divide into groups of 64; choose another group size"


@pytest.mark.parametrize(
    ("shape", "shown"), [(torch.tensor([N, K - 8]), "[4, 56]"), (torch.tensor([N, torch.nan]), "[4.0, nan]")]
)
def test_packed_tensors_that_contradict_each_other_are_refused(tmp_path: Path, shape: Tensor, shown: str) -> None:
    save_file(stored(QuantType.W4A16), tmp_path / "model.safetensors")
    edit_tensors(tmp_path, lambda t: t.update({"p.weight_shape": shape}))
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(CheckpointError) as caught:
        packed_bits("p", checkpoint)
    assert str(caught.value) == (
        f"p.weight_packed: is I32 [4, 8] for weights of {shown}, wanted int32 words of 4 or 8 bits a weight; quantize again"
    )


WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None, "dynamic": False}
INPUTS = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}


def test_the_document_of_one_type() -> None:
    made = make_config({"a.q": QuantType.W8A8}, ["lm_head"], QuantType.W8A8, 64)
    assert made.document() == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["a.q"],
                "weights": WEIGHTS,
                "input_activations": INPUTS,
                "output_activations": None,
            }
        },
    }


def test_types_of_two_formats_say_their_own() -> None:
    types = {"a": QuantType.W4A16, "b": QuantType.W8A8_DYNAMIC, "c": QuantType.W4A16}
    made = make_config(types, [], QuantType.W8A8_DYNAMIC, 32)
    document = json.loads(json.dumps(made.document()))
    first, second = document["config_groups"].values()
    assert document["format"] == "mixed-precision"
    assert (first["targets"], first["format"], first["input_activations"]["dynamic"]) == (["b"], "int-quantized", True)
    assert (second["targets"], second["format"], second["input_activations"]) == (["a", "c"], "pack-quantized", None)
    assert (second["weights"]["num_bits"], second["weights"]["strategy"], second["weights"]["group_size"]) == (
        4,
        "group",
        32,
    )
    assert read_compressed_config({"quantization_config": document}, "config.json") == made
    assert made == CompressedConfig(
        (
            CompressedGroup(QuantType.W8A8_DYNAMIC, 0, ("b",)),
            CompressedGroup(QuantType.W4A16, 32, ("a", "c")),
        ),
        (),
    )
    assert made.tensor_types(["a.weight_packed", "a.bias", "b.weight", "d.weight"]) == {
        "a.weight_packed": "W4A16",
        "a.bias": "FLOAT",
        "b.weight": "W8A8_DYNAMIC",
        "d.weight": "FLOAT",
    }


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda d: d.update(config_groups={}), "config_groups is {}, wanted one group at least"),
        (
            lambda d: d.update(kv_cache_scheme={"num_bits": 8}),
            "kv_cache_scheme is set, glmq knows weights and their inputs only",
        ),
        (lambda d: d.update(transform_config={"a": 1}), "transform_config is set, which glmq does not know"),
        (lambda d: d.update(ignore=["re:.*visual.*"]), "ignore has 're:.*visual.*', glmq reads the exact names of linears"),
        (
            lambda d: d["config_groups"]["group_0"].update(targets=["Linear"]),
            "config_groups.group_0.targets has 'Linear', glmq reads the exact names of linears",
        ),
        (lambda d: d.update(ignore="lm_head"), "ignore is 'lm_head', wanted a list of names"),
        (
            lambda d: d["config_groups"].update(group_0=[]),
            "config_groups.group_0 is [], wanted an object with targets and weights",
        ),
        (
            lambda d: d["config_groups"]["group_0"].update(weights={"num_bits": 2}),
            "config_groups.group_0 has weights {'num_bits': 2} and inputs "
            f"{INPUTS!r} in the format 'int-quantized', which is none of W8A8, W8A8_DYNAMIC, W8A16, W4A16",
        ),
    ],
)  # fmt: skip
def test_what_glmq_does_not_know_is_refused_in_one_sentence(edit, sentence: str) -> None:
    document = make_config({"a.q": QuantType.W8A8}, ["lm_head"], QuantType.W8A8, 64).document()
    edit(document)
    with pytest.raises(CheckpointError) as caught:
        read_compressed_config({"quantization_config": document}, "config.json")
    assert str(caught.value) == (
        f"config.json: in quantization_config {sentence}; quantize again, or look at it with another tool"
    )
