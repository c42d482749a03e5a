import math
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from make_checkpoint import SIZES, config_of

from glmq.checkpoint.reader import Checkpoint
from glmq.model.config import ModelConfig, parse_config, read_config
from glmq.model.family import Area
from glmq.model.glm4v import GLM4V


@pytest.fixture(scope="module")
def real() -> ModelConfig:
    """The 9B model's sizes."""
    return parse_config(config_of(SIZES["9b"]), "config.json")


def test_the_9b_model_has_704_tensors_and_10_292_777_472_parameters(real: ModelConfig) -> None:
    shapes = real.family.shapes(real)
    assert len(shapes) == 704
    assert sum(math.prod(shape) for shape in shapes.values()) == 10_292_777_472


def test_the_9b_models_tensors_are_counted_by_tower(real: ModelConfig) -> None:
    towers = Counter(name.split(".")[1] for name in real.family.shapes(real))
    assert towers == {"visual": 181, "language_model": 522, "weight": 1}  # lm_head.weight is the last
    assert sum(".layers.7." in name for name in real.family.shapes(real)) == 13


def test_the_9b_models_shapes_are_those_of_the_release(real: ModelConfig) -> None:
    shapes = real.family.shapes(real)
    layer, block = "model.language_model.layers.39", "model.visual.blocks.23"
    assert shapes[f"{layer}.self_attn.q_proj.weight"] == (4096, 4096)
    assert shapes[f"{layer}.self_attn.k_proj.weight"] == (256, 4096)
    assert shapes[f"{layer}.self_attn.k_proj.bias"] == (256,)
    assert shapes[f"{layer}.mlp.gate_up_proj.weight"] == (27392, 4096)
    assert shapes[f"{layer}.mlp.down_proj.weight"] == (4096, 13696)
    assert shapes[f"{block}.attn.qkv.weight"] == (4608, 1536)
    assert shapes[f"{block}.mlp.up_proj.weight"] == (4096, 1536)
    assert shapes["model.visual.patch_embed.proj.weight"] == (1536, 3, 2, 14, 14)
    assert shapes["model.visual.embeddings.position_embedding.weight"] == (576, 1536)
    assert shapes["model.visual.downsample.weight"] == (4096, 1536, 2, 2)
    assert shapes["model.visual.merger.gate_proj.weight"] == (13696, 4096)


def test_the_tiny_models_file_has_exactly_the_expected_names_and_shapes(tiny: Path) -> None:
    with Checkpoint.open(tiny) as checkpoint:
        assert read_config(tiny).family.shapes(read_config(tiny)) == {
            name: info.shape for name, info in checkpoint.items()
        }


def test_240_linears_of_the_9b_model_lie_in_its_text_layers(real: ModelConfig) -> None:
    names = [linear.name for block in real.family.blocks(real) for group in block.groups for linear in group.linears]
    assert len(names) == len(set(names)) == 240 + 24 * 5 + 4 + 1
    quantized = [
        name for name in names if not any(fnmatchcase(name, pattern) for pattern in real.family.float_by_default)
    ]
    assert len(quantized) == 200  # q, k, v, o and gate_up of 40 layers


def test_a_text_layers_groups_are_fed_by_the_norm_before_them(real: ModelConfig) -> None:
    block = real.family.text_block(real, 3)
    assert block.name == "model.language_model.layers.3"
    found = [([linear.name.removeprefix(block.name) for linear in g.linears], g.norm, g.width) for g in block.groups]
    assert found == [
        ([".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj"], f"{block.name}.input_layernorm", 4096),
        ([".self_attn.o_proj"], None, 4096),
        ([".mlp.gate_up_proj"], f"{block.name}.post_attention_layernorm", 4096),
        ([".mlp.down_proj"], None, 13696),
    ]
    assert [linear.has_bias for group in block.groups for linear in group.linears] == [True] * 3 + [False] * 3
    assert [group.site for group in block.groups] == [
        f"{block.name}{end}"
        for end in (".self_attn.q_proj", ".self_attn.o_proj", ".mlp.gate_up_proj", ".mlp.down_proj")
    ]


def test_a_vision_blocks_gate_and_up_read_one_input(real: ModelConfig) -> None:
    block = real.family.vision_block(real, 0)
    assert [(len(group.linears), group.norm) for group in block.groups] == [
        (1, "model.visual.blocks.0.norm1"),
        (1, None),
        (2, "model.visual.blocks.0.norm2"),
        (1, None),
    ]


def test_nothing_folds_into_the_mergers_norm_or_before_the_head(real: ModelConfig) -> None:
    groups = [*real.family.merger_block(real).groups, *real.family.head_block(real).groups]
    assert [group.norm for group in groups] == [None] * 4


def test_blocks_come_in_the_order_of_the_forward_pass(tiny: Path) -> None:
    assert [block.name for block in read_config(tiny).family.blocks(read_config(tiny))] == [
        *(f"model.visual.blocks.{i}" for i in range(3)),
        "model.visual.merger",
        *(f"model.language_model.layers.{i}" for i in range(6)),
        "lm_head",
    ]


def test_the_rms_norms_are_the_models_own(tiny: Path, full_model: object) -> None:
    names = [name for name, module in full_model.named_modules() if type(module).__name__.endswith("RMSNorm")]
    assert sorted(read_config(tiny).family.rms_norms(read_config(tiny))) == sorted(names)


@pytest.mark.parametrize(
    ("name", "area"),
    [
        ("model.visual.blocks.0.mlp.down_proj.weight", Area.VISION),
        ("model.visual.post_layernorm.bias", Area.VISION),
        ("lm_head.weight", Area.EMBEDDINGS),
        ("model.language_model.embed_tokens.weight", Area.EMBEDDINGS),
        ("model.language_model.layers.0.mlp.down_proj.weight", Area.DOWN_PROJ),
        ("model.language_model.layers.0.mlp.gate_up_proj.deq_scale", Area.TEXT_LINEARS),
        ("model.language_model.layers.0.self_attn.q_proj.bias", Area.TEXT_LINEARS),
        ("model.language_model.layers.0.input_layernorm.weight", Area.NORMS),
        ("model.language_model.layers.0.post_self_attn_layernorm.bias", Area.NORMS),
        ("model.language_model.norm.weight", Area.NORMS),
    ],
)
def test_every_tensor_belongs_to_an_area(name: str, area: Area) -> None:
    assert GLM4V.area(name) is area


def test_the_areas_of_the_9b_model_have_their_known_sizes(real: ModelConfig) -> None:
    areas = dict.fromkeys(Area, 0)
    for name, shape in real.family.shapes(real).items():
        areas[GLM4V.area(name)] += math.prod(shape)
    assert areas[Area.DOWN_PROJ] == 40 * 4096 * 13696
    assert areas[Area.EMBEDDINGS] == 2 * 151552 * 4096
    assert areas[Area.NORMS] == 161 * 4096
    attention = 2 * 4096 * 4096 + 2 * 256 * 4096 + 4096 + 2 * 256
    assert areas[Area.TEXT_LINEARS] == 40 * (attention + 27392 * 4096)
    assert sum(areas.values()) == 10_292_777_472


@pytest.mark.parametrize(
    ("name", "of_the_checkpoint", "short"),
    [
        ("model.language_model.layers.3.mlp.gate_up_proj", None, "layers.3.mlp.gate_up_proj"),
        ("model.visual.merger.proj", None, "visual.merger.proj"),
        ("lm_head", None, "lm_head"),
        # MindIE's parts, then vLLM-Ascend's
        (
            "language_model.layers.3.mlp.down_proj",
            "model.language_model.layers.3.mlp.down_proj",
            "layers.3.mlp.down_proj",
        ),
        ("language_model.lm_head.weight", "lm_head.weight", "lm_head.weight"),
        ("visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"),
        ("language_model.model.norm.weight", "model.language_model.norm.weight", "norm.weight"),
    ],
)
def test_engines_names_are_brought_back_and_all_are_shortened(
    name: str, of_the_checkpoint: str | None, short: str
) -> None:
    assert GLM4V.checkpoint_name(name) == (of_the_checkpoint or name)
    assert GLM4V.short_name(name) == short


def test_aliases_stand_for_what_vllm_fuses_and_splits() -> None:
    tensors = {
        "model.visual.blocks.0.attn.qkv.weight": "FLOAT",
        "model.visual.blocks.0.mlp.gate_proj.weight": "FLOAT",
        "model.visual.blocks.0.mlp.up_proj.weight": "FLOAT",
        "model.visual.blocks.0.mlp.down_proj.weight": "FLOAT",
        "model.visual.merger.gate_proj.weight": "FLOAT",
        "model.language_model.layers.11.mlp.gate_up_proj.weight": "W8A8S",
        "model.language_model.layers.11.mlp.gate_up_proj.deq_scale": "W8A8S",
        "model.language_model.layers.11.self_attn.q_proj.weight": "W8A8S",
        "lm_head.weight": "FLOAT",
    }
    assert GLM4V.vllm_aliases(tensors) == {
        "model.visual.blocks.0.attn.q_proj.weight": "FLOAT",
        "model.visual.blocks.0.attn.k_proj.weight": "FLOAT",
        "model.visual.blocks.0.attn.v_proj.weight": "FLOAT",
        "model.visual.blocks.0.mlp.gate_up_proj.weight": "FLOAT",
        "model.visual.merger.gate_up_proj.weight": "FLOAT",
        "model.language_model.layers.11.mlp.gate_proj.weight": "W8A8S",
        "model.language_model.layers.11.mlp.up_proj.weight": "W8A8S",
    }


def test_an_alias_never_replaces_a_tensor() -> None:
    tensors = {
        "model.visual.merger.gate_proj.weight": "FLOAT",
        "model.visual.merger.gate_up_proj.weight": "W8A8",
    }
    assert GLM4V.vllm_aliases(tensors) == {}


def test_sglang_asks_for_text_linears_without_the_language_model() -> None:
    tensors = {
        "model.visual.blocks.0.attn.proj.weight": "FLOAT",
        "model.language_model.layers.11.mlp.gate_up_proj.weight": "W8A8",
        "model.language_model.layers.11.self_attn.q_proj.weight": "W8A8",
        "model.language_model.layers.11.self_attn.q_proj.deq_scale": "W8A8",
        "model.language_model.layers.11.input_layernorm.weight": "FLOAT",
    }
    found = GLM4V.engine_aliases(tensors)
    assert {name: kind for name, kind in found.items() if name.startswith("model.layers.")} == {
        "model.layers.11.mlp.gate_up_proj.weight": "W8A8",
        "model.layers.11.mlp.gate_proj.weight": "W8A8",
        "model.layers.11.mlp.up_proj.weight": "W8A8",
        "model.layers.11.self_attn.q_proj.weight": "W8A8",
    }
