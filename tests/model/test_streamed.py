import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import edit_json, edit_tensors, full_model_kwargs, load_full, streamed_logits
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from glmq.checkpoint.reader import Checkpoint
from glmq.errors import CheckpointError, ModelError
from glmq.model.config import FAMILY, read_config
from glmq.model.cpu_modules import keep_on_cpu
from glmq.model.inputs import ModelInputs, Preprocessor
from glmq.model.streamed import StreamedModel, _build_alone
from glmq.model.tiny import TINY_CASES
from glmq.model.vision_tower import attend_to_all, queries_at_once, quicken_vision

LAYER = "model.language_model.layers.0"
CPU = torch.device("cpu")


def test_what_other_threads_make_meanwhile_is_no_part_of_a_model(tiny: Path) -> None:
    made: set[tuple[torch.device, torch.dtype, torch.dtype]] = set()

    def elsewhere() -> None:
        made.add((nn.Linear(2, 2).weight.device, torch.ones(1).dtype, torch.get_default_dtype()))

    def observe(_: nn.Module, __: str, ___: nn.Parameter) -> None:
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=elsewhere)
            other.start()
            other.join()

    with closing_hook(register_module_parameter_registration_hook(observe)):
        model = _build_alone(read_config(tiny), torch.bfloat16)
    assert made == {(CPU, torch.float32, torch.float32)}
    assert {(one.device.type, one.dtype) for one in model.parameters()} == {("meta", torch.bfloat16)}


@contextmanager
def closing_hook(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


class Quick(TorchFunctionMode):
    """Fails at every convolution inside, and at attention through a mask."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "conv" not in func.__name__
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            assert kwargs.get("attn_mask") is None
        return func(*args, **kwargs)


def samples(tiny: Path) -> dict[str, ModelInputs]:
    """A picture with prompt and answer, one without answer, a prompt alone, a text alone."""
    preprocessor = Preprocessor(tiny, read_config(tiny), max_pixels=None, trust_remote_code=False)
    case = json.loads((TINY_CASES / "images.jsonl").read_text().splitlines()[0])
    text = json.loads((TINY_CASES / "texts.jsonl").read_text().splitlines()[0])["text"]
    image = Image.open(TINY_CASES / case["image"])
    wide = image.resize((224, 84))
    return {
        "image, prompt and answer": preprocessor.encode(image, case["prompt"], case["text"]),
        "wide image and prompt": preprocessor.encode(wide, case["prompt"], None),
        "prompt alone": preprocessor.encode(None, case["prompt"], None),
        "text alone": preprocessor.encode(None, None, text),
    }


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = getattr(torch, request.param)
    return found


@pytest.fixture(scope="module")
def whole(tiny: Path, full_model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return full_model if dtype is torch.float32 else load_full(tiny, dtype)


@pytest.mark.parametrize("kind", ["image, prompt and answer", "wide image and prompt", "prompt alone", "text alone"])
def test_streamed_logits_equal_the_whole_models_bit_for_bit(
    kind: str, tiny: Path, whole: nn.Module, dtype: torch.dtype
) -> None:
    inputs = samples(tiny)[kind]
    with torch.no_grad():
        wanted = whole(**full_model_kwargs(inputs, whole)).logits[0]
    assert wanted.dtype is dtype
    assert torch.equal(streamed_logits(tiny, read_config(tiny), inputs, dtype), wanted.float())


@pytest.mark.parametrize("kernel", [(2, 2), (2, 3, 3)])
def test_a_convolution_over_its_whole_input_is_a_product(kernel: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    convolution = (nn.Conv2d if len(kernel) == 2 else nn.Conv3d)(5, 7, kernel, stride=kernel)
    for parameter in convolution.parameters():
        parameter.data = torch.randint(-9, 9, parameter.shape).float()  # so that every sum is exact
    x = torch.randint(-9, 9, (3, *kernel, 5)).float().movedim(-1, 1)  # not contiguous, as the merger's input
    wanted = convolution(x)
    quicken_vision(convolution)
    with Quick():
        assert torch.equal(convolution(x), wanted)


@pytest.mark.parametrize("lengths", [(60,), (24, 36)])
def test_attention_over_each_picture_by_itself_is_attention_through_a_mask(
    lengths: tuple[int, ...], tiny: Path
) -> None:
    from transformers import Glm4vForConditionalGeneration

    model = Glm4vForConditionalGeneration.from_pretrained(tiny, torch_dtype=torch.float32).eval()
    attention = model.model.visual.blocks[0].attn
    width = attention.qkv.in_features
    torch.manual_seed(0)
    x, angles = torch.randn(60, width), torch.randn(60, width // attention.num_heads)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    with torch.no_grad():
        wanted = attention(x, cu_seqlens=ends, position_embeddings=(angles.cos(), angles.sin()))
        quicken_vision(model)
        found = attention(x, cu_seqlens=ends, position_embeddings=(angles.cos(), angles.sin()))
    assert torch.equal(found, wanted) if len(lengths) == 1 else torch.allclose(found, wanted, atol=1e-6)


def test_the_vision_tower_has_no_convolution_no_mask_and_the_logits_of_transformers(tiny: Path) -> None:
    from transformers import Glm4vForConditionalGeneration

    inputs = samples(tiny)["wide image and prompt"]
    plain = Glm4vForConditionalGeneration.from_pretrained(tiny, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = plain(**full_model_kwargs(inputs, plain)).logits[0]
    with Quick():
        found = streamed_logits(tiny, read_config(tiny), inputs, torch.float32)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture
def streamed(small: Path) -> Iterator[StreamedModel]:
    with Checkpoint.open(small) as source:
        yield StreamedModel(source, read_config(small), device=CPU, dtype=torch.float32)


def in_memory(model: StreamedModel) -> set[str]:
    """Names of the parameters that are not on meta."""
    return {name for name, parameter in model.model.named_parameters() if parameter.device.type != "meta"}


def test_a_fresh_model_has_every_parameter_on_meta_and_every_buffer_in_memory(streamed: StreamedModel) -> None:
    assert in_memory(streamed) == set()
    assert {buffer.device.type for buffer in streamed.model.buffers()} == {"cpu"}
    assert {parameter.dtype for parameter in streamed.model.parameters()} == {torch.float32}


def test_building_the_model_changes_nothing_in_the_config(small: Path) -> None:
    config = read_config(small)
    with Checkpoint.open(small) as source:
        StreamedModel(source, config, device=CPU, dtype=torch.float32)
    assert config == read_config(small)


def test_only_the_placed_blocks_parameters_are_in_memory(streamed: StreamedModel) -> None:
    for block in streamed.config.family.blocks(streamed.config):
        with streamed.placed(block.name):
            wanted = {name for name in streamed.source if name.startswith(f"{block.name}.")}
            assert in_memory(streamed) == wanted
        assert in_memory(streamed) == set()


def test_stem_and_tail_hold_the_vision_tower_but_its_blocks(streamed: StreamedModel) -> None:
    with streamed.placed(*FAMILY.vision_stem, *FAMILY.vision_tail):
        visual = {name for name in streamed.source if name.startswith("model.visual.")}
        assert in_memory(streamed) == {name for name in visual if not name.startswith("model.visual.blocks.")}


def test_placed_parameters_are_the_files_values(streamed: StreamedModel) -> None:
    with streamed.placed(LAYER):
        for name, parameter in streamed.module(LAYER).named_parameters():
            assert torch.equal(parameter, streamed.source.read(f"{LAYER}.{name}").float())
            assert not parameter.requires_grad


def test_a_block_is_dropped_when_its_context_ends_in_an_error(streamed: StreamedModel) -> None:
    with pytest.raises(RuntimeError, match="inside"), streamed.placed(LAYER):
        raise RuntimeError("inside")
    assert in_memory(streamed) == set()


def test_embedding_rows_hold_the_samples_tokens_alone(streamed: StreamedModel) -> None:
    name = "model.language_model.embed_tokens.weight"
    ids = torch.tensor([[9, 3, 3, 1535]])
    with streamed.embedding_rows(ids):
        rows = streamed.module("model.language_model").embed_tokens(ids)
        assert torch.equal(rows, streamed.source.read(name)[ids].float())
        assert in_memory(streamed) == set()
    assert type(streamed.module("model.language_model").embed_tokens) is nn.Embedding


def test_a_token_beyond_the_embedding_is_refused(streamed: StreamedModel) -> None:
    with pytest.raises(ModelError) as caught, streamed.embedding_rows(torch.tensor([[3, 1536]])):
        pass
    assert str(caught.value) == (
        "the tokenizer gives token 1536, but model.language_model.embed_tokens.weight has 1536 rows; "
        "take tokenizer and weights from the same release"
    )


def place_layer(folder: Path) -> str:
    """What placing the first text layer of a damaged checkpoint says, and that it leaves nothing behind."""
    with Checkpoint.open(folder) as source:
        model = StreamedModel(source, read_config(folder), device=CPU, dtype=torch.float32)
        with pytest.raises(CheckpointError) as caught, model.placed(LAYER):
            pass
        assert in_memory(model) == set()
    return str(caught.value)


def test_a_tensor_of_another_shape_is_named(small_copy: Path) -> None:
    name = f"{LAYER}.self_attn.o_proj.weight"
    edit_tensors(small_copy, lambda tensors: tensors.update({name: tensors[name][:, :32].contiguous()}))
    assert place_layer(small_copy) == (
        f"model-00001-of-00001.safetensors: tensor '{name}' has shape (64, 32), "
        "config.json asks for (64, 64); take both from the same release"
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_tensor_that_is_not_finite_is_named(bad: float, small_copy: Path) -> None:
    name = f"{LAYER}.mlp.down_proj.weight"
    edit_tensors(small_copy, lambda tensors: tensors[name][3, 5:7].fill_(bad))
    assert place_layer(small_copy) == (
        f"model-00001-of-00001.safetensors: tensor '{name}' holds 2 NaN or infinite values of 6144; "
        "download the file again or repair the checkpoint"
    )


def test_a_missing_tensor_is_named_with_its_neighbour(small_copy: Path) -> None:
    name = f"{LAYER}.input_layernorm.weight"
    edit_tensors(small_copy, lambda tensors: tensors.pop(name))
    edit_json(small_copy / "model.safetensors.index.json", lambda index: index["weight_map"].pop(name))
    assert place_layer(small_copy) == (
        f"{small_copy}: has no tensor '{name}'; did you mean 'model.language_model.layers.1.input_layernorm.weight'?"
    )


def test_a_nan_in_an_embedding_row_is_named_only_when_the_row_is_used(small_copy: Path) -> None:
    name = "model.language_model.embed_tokens.weight"
    edit_tensors(small_copy, lambda tensors: tensors[name][7].fill_(torch.nan))
    with Checkpoint.open(small_copy) as source:
        model = StreamedModel(source, read_config(small_copy), device=CPU, dtype=torch.float32)
        with model.embedding_rows(torch.tensor([[6, 8]])):
            pass
        with pytest.raises(CheckpointError) as caught, model.embedding_rows(torch.tensor([[7, 8]])):
            pass
    assert str(caught.value) == (
        f"model-00001-of-00001.safetensors: tensor '{name}' holds 64 NaN or infinite values of 128; "
        "download the file again or repair the checkpoint"
    )


@pytest.mark.parametrize("kind", ["image, prompt and answer", "wide image and prompt", "text alone"])
def test_a_call_is_made_again_from_its_hidden_states_and_positions(kind: str, tiny: Path, dtype: torch.dtype) -> None:
    inputs = samples(tiny)[kind]
    with Checkpoint.open(tiny) as source:
        config = read_config(tiny)
        model = StreamedModel(source, config, device=CPU, dtype=dtype)
        family = config.family
        vision = None
        if inputs.pixel_values is not None:
            with model.placed(*family.vision_stem, *(block.name for block in family.vision_blocks(config)[:-1])):
                vision = model.vision_call(inputs)
                for block in family.vision_blocks(config)[:-1]:
                    vision.hidden = model.replay(block.name, vision)
        with model.placed(*family.vision_tail), model.embedding_rows(inputs.ids):
            call, positions = model.positioned_call(inputs, vision)
        assert (positions.dtype, positions.shape) == (torch.int64, (3, inputs.tokens))
        again = model.text_call_at(call.hidden, positions)
        first = family.text_block(config, 0)
        with model.placed(first.name):
            assert torch.equal(model.replay(first.name, again), model.replay(first.name, call))


class _Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(2)), list[torch.device]()

    def forward(self, x: torch.Tensor, *, sizes: list[int], ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.seen += [x.device, ids.device]
        return x + self.weight + sizes[0], ids


def test_what_npus_lack_is_computed_on_the_cpu_beside_them(small: Path) -> None:
    elsewhere = torch.device("meta")
    module = _Sums()
    keep_on_cpu(module, elsewhere)
    results = module(torch.ones(2), sizes=[3], ids=torch.arange(2))
    assert module.seen == [CPU, CPU]
    assert {result.device for result in results} == {elsewhere}
    kept = ("model.visual.embeddings", "model.language_model.rotary_emb")
    others = ("model.visual.patch_embed", "model.language_model.norm", "model.visual.rotary_pos_emb")
    with Checkpoint.open(small) as source:
        for device in (elsewhere, CPU):
            model = StreamedModel(source, read_config(small), device=device, dtype=torch.float32)
            with model.placed(*kept, *others):
                for names, wanted in ((kept, CPU), (others, device)):
                    modules = [model.module(name) for name in names]
                    assert {t.device for m in modules for t in (*m.parameters(), *m.buffers())} == {wanted}
                    hooked = wanted != device
                    assert [bool(m._forward_hooks) for m in modules] == [hooked] * len(names)


def test_queries_take_turns_beside_a_cpu_where_their_scores_are_too_many() -> None:
    npu = torch.device("meta")
    assert queries_at_once(CPU, heads=12, patches=24_128) == 24_128
    assert queries_at_once(npu, heads=12, patches=24_128) == 927  # 268,388,  of 2^28 = 268,435, thousand scores
    assert queries_at_once(npu, heads=12, patches=1_564) > 1_564
    assert queries_at_once(npu, heads=12, patches=2**28) == 1


@pytest.mark.parametrize("at_once", [1, 3, 7, 8])
def test_attention_in_turns_is_that_of_all_queries(at_once: int) -> None:
    q, k, v = torch.randn(3, 1, 2, 7, 4).unbind()
    whole = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
    torch.testing.assert_close(attend_to_all(q, k, v, scale=0.5, at_once=at_once), whole)


def test_a_block_runs_with_other_weights_than_its_own(streamed: StreamedModel) -> None:
    block = "model.language_model.layers.0"
    call = streamed.text_call_at(torch.randn(1, 5, 64), torch.arange(5).expand(3, -1))
    site = f"{block}.mlp.gate_up_proj"
    with streamed.placed(block):
        own = streamed.module(f"{block}.self_attn.v_proj").weight
        plain, seen = streamed.replay(block, call), streamed.input_of(site, block, call, {})
        doubled = {"self_attn.v_proj.weight": 2 * own}
        other, moved = streamed.replay(block, call, doubled), streamed.input_of(site, block, call, doubled)
        assert seen.shape == moved.shape == (5, 64)
        assert not torch.equal(other, plain)
        assert not torch.equal(moved, seen)
        assert torch.equal(streamed.replay(block, call), plain)  # its own are back
        streamed.module(f"{block}.self_attn.v_proj").weight = nn.Parameter(2 * own)
        assert torch.equal(streamed.replay(block, call), other)
        assert torch.equal(streamed.input_of(site, block, call, {}), moved)
    assert in_memory(streamed) == set()
