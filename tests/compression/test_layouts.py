"""The split against a slow, obvious one that works on whole tensors."""

import json
from pathlib import Path

import pytest
import torch
from random_w8a8s import QUANTIZED, write_w8a8s
from safetensors.torch import load_file
from torch import Tensor

from glmq.compression.layouts import Layout, Unsharded, rank_file_types, rank_tensors, vllm_types
from glmq.compression.shard import read_matrix, read_pieces
from glmq.compression.source import open_source
from glmq.engines import Engine
from glmq.errors import CheckpointError

TEXT, VISION = "model.language_model", "model.visual"


def my_share(tensor: Tensor, rank: int, world: int, dim: int = 0) -> Tensor:
    return tensor.chunk(world, dim)[rank]


def my_heads(tensor: Tensor, head_dim: int, rank: int, world: int) -> Tensor:
    heads = list(tensor.split(head_dim))
    if len(heads) % world == 0:
        count = len(heads) // world
        return torch.cat(heads[rank * count : (rank + 1) * count])
    assert world % len(heads) == 0
    return heads[rank // (world // len(heads))]


def head_dim(config: dict) -> int:
    return config["text_config"]["hidden_size"] // config["text_config"]["num_attention_heads"]


def expected_linears(
    t: dict[str, Tensor], config: dict, text: str, qkv: str, rank: int, world: int, *, zero_bias: bool
) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}

    def activation(target: str, name: str) -> None:
        out[f"{target}.input_scale"] = t[f"{name}.input_scale"].half()
        out[f"{target}.input_offset"] = t[f"{name}.input_offset"].to(torch.int8)

    for i in range(config["text_config"]["num_hidden_layers"]):
        name, target = f"{TEXT}.layers.{i}", f"{text}.layers.{i}"
        is_quantized = f"{name}.self_attn.q_proj.deq_scale" in t
        for suffix in ("weight", "bias", *(("deq_scale", "quant_bias") if is_quantized else ())):
            out[f"{target}.self_attn.{qkv}.{suffix}"] = torch.cat(
                [my_heads(t[f"{name}.self_attn.{x}_proj.{suffix}"], head_dim(config), rank, world) for x in "qkv"]
            )
        if is_quantized:
            activation(f"{target}.self_attn.{qkv}", f"{name}.self_attn.q_proj")
        for linear in ("self_attn.o_proj", "mlp.down_proj"):
            out[f"{target}.{linear}.weight"] = my_share(t[f"{name}.{linear}.weight"], rank, world, dim=1)
            if f"{name}.{linear}.deq_scale" in t:
                out[f"{target}.{linear}.deq_scale"] = t[f"{name}.{linear}.deq_scale"]
                bias = t[f"{name}.{linear}.quant_bias"]
                out[f"{target}.{linear}.quant_bias"] = torch.zeros_like(bias) if zero_bias and rank > 0 else bias
                activation(f"{target}.{linear}", f"{name}.{linear}")
        for suffix in ("weight", *(("deq_scale", "quant_bias") if is_quantized else ())):
            gate, up = t[f"{name}.mlp.gate_up_proj.{suffix}"].chunk(2)
            out[f"{target}.mlp.gate_up_proj.{suffix}"] = torch.cat(
                [my_share(gate, rank, world), my_share(up, rank, world)]
            )
        if is_quantized:
            activation(f"{target}.mlp.gate_up_proj", f"{name}.mlp.gate_up_proj")
    return out


def expected_vision(t: dict[str, Tensor], config: dict, rank: int, world: int) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    mlps = {"visual.merger": f"{VISION}.merger"}
    for i in range(config["vision_config"]["depth"]):
        name, target = f"{VISION}.blocks.{i}", f"visual.blocks.{i}"
        out[f"{target}.norm1.weight"], out[f"{target}.norm2.weight"] = (
            t[f"{name}.norm1.weight"],
            t[f"{name}.norm2.weight"],
        )
        out[f"{target}.attn.qkv.weight"] = torch.cat(
            [my_share(x, rank, world) for x in t[f"{name}.attn.qkv.weight"].chunk(3)]
        )
        out[f"{target}.attn.proj.weight"] = my_share(t[f"{name}.attn.proj.weight"], rank, world, dim=1)
        mlps[f"{target}.mlp"] = f"{name}.mlp"
    for target, name in mlps.items():
        gate, up = (my_share(t[f"{name}.{x}_proj.weight"], rank, world) for x in ("gate", "up"))
        out[f"{target}.gate_up_proj.weight"] = torch.cat([gate, up])
        out[f"{target}.down_proj.weight"] = my_share(t[f"{name}.down_proj.weight"], rank, world, dim=1)
    for name in (
        "merger.proj.weight", "merger.post_projection_norm.weight", "merger.post_projection_norm.bias",
        "embeddings.position_embedding.weight", "post_conv_layernorm.weight", "post_layernorm.weight",
        "patch_embed.proj.bias", "downsample.bias",
    ):  # fmt: skip
        out[f"visual.{name}"] = t[f"{VISION}.{name}"]
    return out


def expected_mindie(t: dict[str, Tensor], config: dict, rank: int, world: int) -> dict[str, Tensor]:
    out = expected_linears(t, config, "language_model", "query_key_value", rank, world, zero_bias=True)
    out |= expected_vision(t, config, rank, world)
    embedding = t[f"{TEXT}.embed_tokens.weight"]
    out["language_model.embed_tokens.weight"] = torch.cat([embedding, torch.zeros(1, embedding.shape[1]).half()])
    out["language_model.lm_head.weight"] = my_share(t["lm_head.weight"], rank, world)
    out["language_model.norm.weight"] = t[f"{TEXT}.norm.weight"]
    for i in range(config["text_config"]["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"):
            out[f"language_model.layers.{i}.{norm}.weight"] = t[f"{TEXT}.layers.{i}.{norm}.weight"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"language_model.layers.{i}.{norm}.bias"] = t[f"{TEXT}.layers.{i}.{norm}.bias"].half()
    for convolution in ("patch_embed.proj", "downsample"):
        kernel = t[f"{VISION}.{convolution}.weight"]
        out[f"visual.{convolution}.weight"] = kernel.reshape(kernel.shape[0], -1)
    return out


def expected_vllm(t: dict[str, Tensor], config: dict, rank: int, world: int) -> dict[str, Tensor]:
    text = "language_model.model"
    out = expected_linears(t, config, text, "qkv_proj", rank, world, zero_bias=False)
    out |= expected_vision(t, config, rank, world)
    out["visual.merger.proj.weight"] = my_share(t[f"{VISION}.merger.proj.weight"], rank, world)
    for target, name in ((f"{text}.embed_tokens", f"{TEXT}.embed_tokens"), ("language_model.lm_head", "lm_head")):
        table = t[f"{name}.weight"]
        padded = torch.zeros((table.shape[0] + 63) // 64 * 64, table.shape[1]).half()
        padded[: table.shape[0]] = table
        out[f"{target}.weight"] = my_share(padded, rank, world)
    for name, tensor in t.items():
        base, _, suffix = name.rpartition(".")
        if base.endswith(("norm", "norm1", "norm2")) and "post_projection_norm" not in base:
            target = base.replace(TEXT, text).replace(VISION, "visual")
            out[f"{target}.{suffix}"] = tensor.half()
    for convolution in ("patch_embed.proj", "downsample"):
        out[f"visual.{convolution}.weight"] = t[f"{VISION}.{convolution}.weight"]
    return out


EXPECTED = {Engine.MINDIE: expected_mindie, Engine.VLLM_ASCEND: expected_vllm}


def compare(folder: Path, layout: Layout, world: int) -> None:
    whole = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    config = json.loads((folder / "config.json").read_text())
    source = open_source(folder)
    with source.checkpoint as checkpoint:
        for rank in range(world):
            expected = EXPECTED[layout](whole, config, rank, world)
            planned = rank_tensors(checkpoint, source.config, layout, rank, world)
            assert sorted(tensor.spec.name for tensor in planned) == sorted(expected)
            for tensor in planned:
                name, wanted = tensor.spec.name, expected[tensor.spec.name]
                found = torch.cat(list(read_pieces(checkpoint, tensor)))
                assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
                assert torch.equal(found, wanted), name
                assert tensor.spec.nbytes == found.nbytes
                if tensor.is_matrix:
                    assert torch.equal(torch.from_numpy(read_matrix(checkpoint, tensor)), wanted)


@pytest.mark.parametrize("layout", [Engine.MINDIE, Engine.VLLM_ASCEND])
@pytest.mark.parametrize("world", [1, 2])
def test_the_split_of_the_tiny_model_is_the_obvious_one(tiny_seed: Path, layout: Layout, world: int) -> None:
    compare(tiny_seed, layout, world)


@pytest.mark.parametrize("layout", [Engine.MINDIE, Engine.VLLM_ASCEND])
@pytest.mark.parametrize(("world", "kv_heads"), [(2, 1), (4, 1), (4, 2), (4, 4), (4, 8)])
def test_key_and_value_heads_are_dealt_out_or_repeated(
    tmp_path: Path, layout: Layout, world: int, kv_heads: int
) -> None:
    compare(write_w8a8s(tmp_path, kv_heads=kv_heads), layout, world)


def test_a_quantized_down_proj_is_split_like_o_proj(tmp_path: Path) -> None:
    compare(write_w8a8s(tmp_path, quantized=(*QUANTIZED, "down_proj")), Engine.MINDIE, 2)


def test_a_float_attention_beside_a_quantized_mlp_stays_float(tmp_path: Path) -> None:
    folder = write_w8a8s(tmp_path, quantized=("gate_up_proj",))
    source = open_source(folder)
    with source.checkpoint as checkpoint:
        planned = {tensor.spec.name: tensor for tensor in rank_tensors(checkpoint, source.config, Engine.MINDIE, 0, 2)}
    attention = "language_model.layers.0.self_attn"
    assert planned[f"{attention}.query_key_value.weight"].spec.dtype == "F16"
    assert {name.rpartition(".")[2] for name in planned if name.startswith(attention)} == {"weight", "bias"}
    assert planned["language_model.layers.0.mlp.gate_up_proj.weight"].is_matrix


def test_one_rank_of_the_source_layout_is_the_source_itself(tiny_seed: Path) -> None:
    whole = load_file(tiny_seed / "quant_model_weight_w8a8s.safetensors")
    source = open_source(tiny_seed)
    with source.checkpoint as checkpoint:
        for tensor in rank_tensors(checkpoint, source.config, Unsharded.SOURCE, 0, 1):
            assert torch.equal(torch.cat(list(read_pieces(checkpoint, tensor))), whole.pop(tensor.spec.name))
    assert not whole


def test_types_of_a_part_name_the_codec_for_weights_only() -> None:
    names = ["a.weight", "a.index", "a.info", "a.deq_scale", "a.input_scale", "a.bias", "b.weight"]
    assert rank_file_types(names, ["a"], compressed=True) == {
        "a.weight": "W8A8SC", "a.index": "W8A8SC", "a.info": "W8A8SC", "a.deq_scale": "W8A8S", "a.input_scale": "W8A8S",
        "a.bias": "FLOAT", "b.weight": "FLOAT",
    }  # fmt: skip
    assert rank_file_types(["a.weight", "b.weight"], ["a"], compressed=False) == {
        "a.weight": "W8A8S",
        "b.weight": "FLOAT",
    }


def test_vllm_types_change_quantized_weights_and_their_aliases_only() -> None:
    types = {
        "q.weight": "W8A8S",
        "q.deq_scale": "W8A8S",
        "q.bias": "FLOAT",
        "gate.weight": "W8A8S",
        "n.weight": "FLOAT",
    }
    assert vllm_types(types) == types | {"q.weight": "W8A8SC", "gate.weight": "W8A8SC"}


def edit_source(folder: Path, **changes: Tensor | None) -> None:
    """Change tensors of a one-file checkpoint in place (None: leave out); a name's dots are written as `__`."""
    from safetensors.torch import save_file

    path = folder / "quant_model_weight_w8a8s.safetensors"
    tensors = load_file(path)
    description = json.loads((folder / "quant_model_description.json").read_text())
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
            description.setdefault(name, "FLOAT")
    save_file(tensors, path)
    (folder / "quant_model_description.json").write_text(json.dumps(description))


def read_all(folder: Path) -> None:
    source = open_source(folder)
    with source.checkpoint as checkpoint:
        for tensor in rank_tensors(checkpoint, source.config, Engine.MINDIE, 0, 1):
            list(read_pieces(checkpoint, tensor))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_all(folder)
    return str(caught.value)


def test_a_norm_bias_that_the_engine_would_ignore_must_be_zero(tmp_path: Path) -> None:
    folder = write_w8a8s(tmp_path)
    edit_source(folder, model__language_model__layers__1__post_mlp_layernorm__bias=torch.full((128,), 0.5))
    assert refusal(folder) == (
        "quant_model_weight_w8a8s.safetensors: 'model.language_model.layers.1.post_mlp_layernorm.bias' is not zero, but the "
        "engine ignores this bias; quantize again with `glmq quantize`"
    )


def test_a_missing_norm_bias_becomes_zeros(tmp_path: Path) -> None:
    folder = write_w8a8s(tmp_path)
    edit_source(folder, model__language_model__layers__1__input_layernorm__bias=None)
    source = open_source(folder)
    with source.checkpoint as checkpoint:
        planned = {tensor.spec.name: tensor for tensor in rank_tensors(checkpoint, source.config, Engine.MINDIE, 0, 1)}
        (piece,) = read_pieces(checkpoint, planned["language_model.layers.1.input_layernorm.bias"])
    assert torch.equal(piece, torch.zeros(128).half())


def test_q_k_v_with_different_input_scales_are_refused(tmp_path: Path) -> None:
    folder = write_w8a8s(tmp_path)
    edit_source(folder, model__language_model__layers__0__self_attn__v_proj__input_scale=torch.tensor([0.5]))
    assert refusal(folder) == (
        "quant_model_weight_w8a8s.safetensors: 'model.language_model.layers.0.self_attn.v_proj.input_scale' differs from "
        "'model.language_model.layers.0.self_attn.q_proj.input_scale', but q, k and v read one input, so the engine needs one "
        "value; quantize again with `glmq quantize`"
    )


def test_q_k_v_of_different_types_are_refused(tmp_path: Path) -> None:
    folder = write_w8a8s(tmp_path, quantized=("q_proj", "v_proj", "gate_up_proj"))
    assert refusal(folder) == (
        f"{folder}: 'model.language_model.layers.0.self_attn.q_proj.weight' is I8, but F16 is needed (W8A8S models are float16 "
        "and q, k, v of a layer are quantized together); quantize again with --torch_dtype fp16"
    )


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    folder = write_w8a8s(tmp_path)
    edit_source(folder, model__language_model__extra__weight=torch.zeros(2).half())
    assert refusal(folder) == (
        f"{folder}: 1 tensors have no place in the engine's layout, the first is 'model.language_model.extra.weight'; is this "
        "a GLM-4.1V or GLM-4.6V-Flash in the ascendV1 form?"
    )


@pytest.mark.parametrize(
    ("suffix", "value", "sentence"),
    [
        ("input_scale", 1e-9, "holds 1e-09, which torch.float16 cannot hold"),
        ("input_scale", 1e9, "holds 1e+09, which torch.float16 cannot hold"),
        ("input_offset", 0.5, "holds 0.5, which torch.int8 cannot hold"),
        ("input_offset", 128.0, "holds 128, which torch.int8 cannot hold"),
    ],
)
def test_an_activation_that_the_engine_cannot_hold_is_refused(
    tmp_path: Path, suffix: str, value: float, sentence: str
) -> None:
    folder = write_w8a8s(tmp_path)
    edit_source(folder, **{f"model__language_model__layers__0__mlp__gate_up_proj__{suffix}": torch.tensor([value])})
    assert refusal(folder) == (
        f"{folder}: 'language_model.layers.0.mlp.gate_up_proj.{suffix}' {sentence} as the engine needs it; "
        "calibrate again with other images"
    )
