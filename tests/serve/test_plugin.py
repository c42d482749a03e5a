"""The plugin beside vLLM's own classes; needs vLLM, as `.ci/engine` installs it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from random_w8a8s import write_w8a8s
from safetensors.torch import load_file
from torch import nn

import glmq
from glmq.errors import CheckpointError
from glmq.model.config import read_config
from glmq.model.tiny import TINY_CHECKPOINT
from glmq.spec import QuantType
from glmq.verification.engines.vllm_ascend import vllm_modules

pytest.importorskip("vllm", reason="vLLM is not installed")

LAYER = "model.language_model.layers.0"


def describe(**changes: str | None) -> dict[str, Any]:
    """A description of one W8A8S attention; keys that are changed to None are left out."""
    document: dict[str, Any] = {"version": "1.0.0", "model_quant_type": "W8A8S", "lm_head.weight": "FLOAT"}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        for suffix in ("weight", "input_scale", "input_offset", "quant_bias", "deq_scale"):
            document[f"{LAYER}.self_attn.{name}.{suffix}"] = "W8A8S"
    document[f"{LAYER}.mlp.down_proj.weight"] = "FLOAT"
    return {key: value for key, value in (document | changes).items() if value is not None}


def config_of(**changes: str | None) -> Any:
    from glmq.serve.config import GlmqConfig

    return GlmqConfig.from_config(describe(**changes))


def test_packed_and_plain_linears_have_their_described_types() -> None:
    config = config_of()
    assert config.type_of(f"{LAYER}.self_attn.qkv_proj") is QuantType.W8A8S
    assert config.type_of(f"{LAYER}.self_attn.o_proj") is QuantType.W8A8S
    assert config.type_of(f"{LAYER}.mlp.down_proj") is QuantType.FLOAT


@pytest.mark.parametrize(
    ("changes", "linear", "sentence"),
    [
        ({"version": None}, "o_proj", "quant_model_description.json: has no version, so it is of the MindIE form"),
        ({"lm_head.weight": "W8A8"}, "o_proj", "lm_head.weight: is W8A8; the plugin serves embeddings and lm_head as"),
        ({f"{LAYER}.self_attn.o_proj.weight": "W8A8SC"}, "o_proj", "is W8A8SC; the plugin serves FLOAT, W8A8, W8A8S"),
        (
            {f"{LAYER}.self_attn.o_proj.weight": None},
            "o_proj",
            "found {}.self_attn.o_proj: no entry; quantize it again",
        ),
        ({f"{LAYER}.self_attn.v_proj.weight": "FLOAT"}, "qkv_proj", "{}.self_attn.v_proj: FLOAT; quantize it again"),
        (
            {f"{LAYER}.self_attn.o_proj.weight": "W4A8_DYNAMIC"},
            "o_proj",
            "has W4A8_DYNAMIC linears but no group_size; quantize",
        ),
        ({f"{LAYER}.self_attn.k_proj.deq_scale": None}, "qkv_proj", "lacks {}.self_attn.k_proj.deq_scale, which W8A8S"),
    ],
)
def test_a_description_that_is_not_served_is_refused(
    changes: dict[str, str | None], linear: str, sentence: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        config_of(**changes).type_of(f"{LAYER}.self_attn.{linear}")
    assert sentence.format(LAYER) in str(caught.value)


def test_a_portable_folder_is_recognised_and_decoded_while_it_is_loaded(tmp_path: Path) -> None:
    from vllm.config import LoadConfig, ModelConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.weight_utils import get_quant_config

    from glmq.serve.plugin import register

    register()
    source = write_w8a8s(tmp_path / "w8a8s")
    glmq.compress(source, out=tmp_path / "packed", codec="portable")
    wanted = load_file(source / "quant_model_weight_w8a8s.safetensors")
    model = ModelConfig(model=str(tmp_path / "packed"), skip_tokenizer_init=True)
    assert model.quantization == "glmq"
    load = LoadConfig(load_format="glmq")
    assert get_quant_config(model, load).type_of(f"{LAYER}.self_attn.qkv_proj") is QuantType.W8A8S
    found = dict(get_model_loader(load).get_all_weights(model, nn.Module()))
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_what_vllm_looks_up_for_each_linear_is_what_verify_emulates(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, tuple[str, ...]] = {}
    for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    monkeypatch.setitem(os.environ, "VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    from glmq.serve.config import GlmqConfig

    class Recorder(GlmqConfig):
        """Notes the name and the packed members of each linear that the model's own classes build."""

        def __init__(self) -> None:
            super().__init__(describe())

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            if not isinstance(layer, LinearBase | ParallelLMHead):
                return None
            parent, _, leaf = prefix.rpartition(".")
            members = self.packed_modules_mapping.get(leaf, [leaf])
            asked[prefix] = tuple(f"{parent}.{member}" for member in members)
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    register_quantization_config("recorder")(Recorder)
    LLM(
        model=str(TINY_CHECKPOINT),
        quantization="recorder",
        load_format="dummy",
        enforce_eager=True,
        max_model_len=512,
        limit_mm_per_prompt={"image": 1, "video": 0},
    )
    emulated = dict(vllm_modules(read_config(TINY_CHECKPOINT)))
    found = {_in_checkpoint(name): tuple(map(_in_checkpoint, members)) for name, members in asked.items()}
    assert len(found) == 6 * 4 + 3 * 4 + 3 + 1, json.dumps(found, indent=1)
    assert {name: emulated.get(name) for name in found} == found


def _in_checkpoint(name: str) -> str:
    """A name of vLLM as the checkpoint has it."""
    for own, stored in (
        ("language_model.lm_head", "lm_head"),
        ("language_model.model.", "model.language_model."),
        ("visual.", "model.visual."),
    ):
        if name.startswith(own):
            return name.replace(own, stored, 1)
    return name
