"""Float checkpoints as people have them: what is read as the model's tensors, what is said, what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import edit_json, edit_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from glmq.checkpoint.reader import Checkpoint
from glmq.errors import GlmqError
from glmq.model.config import read_config
from glmq.model.source import SourceOptions, open_source

TEXT, VISION = "model.language_model.", "model.visual."
LAYER = f"{TEXT}layers.0"


@pytest.fixture
def model(small_copy: Path) -> Path:
    """The small model in one file without an index."""
    (small_copy / "model.safetensors.index.json").unlink()
    return small_copy


def stored(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("model*.safetensors")
    return {name: tensor.clone() for name, tensor in load_file(path).items()}  # loaded, they lie in the file


def rename(folder: Path, renamed: Callable[[str], str]) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[renamed(name)] = tensors.pop(name)

    edit_tensors(folder, edit)


def refusal(folder: Path, *, dequantize: bool = False) -> str:
    with pytest.raises(GlmqError) as caught:
        open_source(folder, SourceOptions(dequantize))
    assert caught.value.exit_code == 4
    return str(caught.value).replace(str(folder), "FOLDER")


TRAINERS = {
    "older vision-language classes": lambda n: n.replace(VISION, "visual.").replace(TEXT, "model."),
    "a language model inside": lambda n: (
        n.replace(VISION, "visual.").replace(TEXT, "language_model.model.").replace("lm_head", "language_model.lm_head")
    ),
    "peft, merged": lambda n: f"base_model.model.{n}",
    "without model.": lambda n: n.removeprefix("model."),
    "one wrapped process": lambda n: f"module.{n}",
    "compiled, then wrapped": lambda n: f"module._orig_mod.{n}",
    "a trainer's wrapper of an older class": lambda n: f"module.{n.replace(VISION, 'visual.').replace(TEXT, 'model.')}",
    "model. twice": lambda n: f"model.{n}",
    "sharded layers": lambda n: n.replace("layers.", "layers._fsdp_wrapped_module."),
    "recomputed and compiled layers": lambda n: n.replace(
        ".self_attn.", "._checkpoint_wrapped_module._orig_mod.self_attn."
    ),
    "a prefix that nobody knows": lambda n: f"actor.student.{n}",
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_names_of_trainers_are_read_as_the_models_own(trainer: str, model: Path) -> None:
    wanted = stored(model)
    rename(model, TRAINERS[trainer])
    opened = open_source(model)
    with opened.checkpoint as source:
        assert set(source) == set(wanted)
        assert all(torch.equal(source.read(name), tensor) for name, tensor in wanted.items())
        assert torch.equal(source.read_rows("lm_head.weight", 3, 5), wanted["lm_head.weight"][3:5])
    (note,) = opened.notes
    theirs, own = re.fullmatch(
        r"tensors are named as trainers leave them: (\S+) is read and written as (\S+), and so on", note
    ).groups()
    assert TRAINERS[trainer](own) == theirs


def test_names_as_released_are_not_spoken_of(model: Path) -> None:
    assert open_source(model).notes == ()


def test_two_tensors_of_one_name_are_refused(model: Path) -> None:
    rename(model, TRAINERS["one wrapped process"])
    edit_tensors(model, lambda t: t.update({"lm_head.weight": torch.zeros(1)}))
    assert refusal(model) == (
        "FOLDER: tensors 'lm_head.weight' and 'module.lm_head.weight' both stand for 'lm_head.weight'; "
        "remove the one that does not belong there"
    )


def test_an_adapter_that_is_not_merged_is_refused(model: Path) -> None:
    rename(model, lambda n: n.replace("layers.0.self_attn.q_proj.", "layers.0.self_attn.q_proj.base_layer."))
    assert refusal(model) == (
        f"FOLDER: tensor '{LAYER}.self_attn.q_proj.base_layer.bias' belongs to an adapter (LoRA or its like) that is not "
        "merged into the weights; merge it first, e.g. with peft's merge_and_unload(), and give the merged checkpoint"
    )


def test_an_adapters_folder_is_no_model(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "zai-org/GLM-4.1V-9B-Thinking"}'
    )
    assert refusal(model) == (
        "FOLDER: holds an adapter (LORA) of zai-org/GLM-4.1V-9B-Thinking, not a model; merge it into its base model first, "
        "e.g. with peft's merge_and_unload(), and give the folder of the merged weights"
    )


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "value_head.safetensors"])
def test_what_a_trainer_leaves_beside_the_weights_is_said_and_not_read(name: str, model: Path) -> None:
    wanted = set(stored(model))
    save_file({"q.lora_A.weight": torch.zeros(8, 64)}, model / name)
    opened = open_source(model)
    assert set(opened.checkpoint) == wanted
    assert opened.notes[0].startswith(f"{name} lies beside the weights and is not read: ")
    next(model.glob("model*.safetensors")).unlink()
    assert f"found {name} alone" in refusal(model)


def test_a_tied_head_is_the_embeddings_and_one_that_is_stored_counts(model: Path) -> None:
    wanted = stored(model)
    edit_json(model / "config.json", lambda c: c["text_config"].update(tie_word_embeddings=True))
    own = open_source(model)
    assert own.notes == (
        "config.json says tie_word_embeddings, but lm_head.weight is stored: it is used, and the output says false",
    )
    with own.checkpoint as source:
        assert torch.equal(source.read("lm_head.weight"), wanted["lm_head.weight"])
    edit_tensors(model, lambda t: t.pop("lm_head.weight"))
    tied = open_source(model)
    assert tied.config.nested["text_config"]["tie_word_embeddings"] is False
    with tied.checkpoint as source:
        assert torch.equal(source.read("lm_head.weight"), wanted[f"{TEXT}embed_tokens.weight"])
    edit_json(model / "config.json", lambda c: c["text_config"].update(tie_word_embeddings=False))
    assert refusal(model) == (
        "FOLDER: has no 'lm_head.weight', and config.json does not tie it to the embeddings; set tie_word_embeddings to true "
        "there, beside hidden_size, if the model does, or save the model with its head"
    )


def test_a_resized_vocabulary_says_which_of_both_is_right(model: Path) -> None:
    def grow(*names: str) -> None:
        edit_tensors(model, lambda t: t.update({n: torch.cat([t[n], t[n][:64]]) for n in names}))

    grow("lm_head.weight")
    assert refusal(model) == (
        f"FOLDER: of embeddings and lm_head only one was resized ({TEXT}embed_tokens 1536, lm_head 1600 rows, vocab_size 1536 "
        "in config.json); save the model again with resize_token_embeddings"
    )
    grow(f"{TEXT}embed_tokens.weight")
    assert refusal(model) == (
        "FOLDER: embeddings and lm_head have 1600 rows, config.json says vocab_size 1536: the weights were resized, and both "
        "agree; set vocab_size to their number"
    )


@pytest.mark.parametrize(
    ("section", "key", "said"),
    [
        ("text_config", "num_hidden_layers", "model.language_model.layers"),
        ("vision_config", "vision_config.depth", "model.visual.blocks"),
    ],
)
def test_whole_layers_that_the_config_does_not_count_are_refused(
    section: str, key: str, said: str, model: Path
) -> None:
    def grow(tensors: dict[str, Tensor]) -> None:
        last = "layers.1." if section == "text_config" else "blocks.0."
        further = f"{last[:-2]}{int(last[-2]) + 1}."
        tensors.update({n.replace(last, further): t.clone() for n, t in tensors.items() if last in n})

    edit_tensors(model, grow)
    count = 2 if section == "text_config" else 1
    assert refusal(model) == (
        f"FOLDER: the weights have {count + 1} whole {said}, config.json says {key} {count}; take both from the "
        "same release"
    )
    if section == "text_config":  # a layer that predicts further tokens has more than the others
        edit_tensors(model, lambda t: t.update({f"{TEXT}layers.2.eh_proj.weight": torch.zeros(2, 2)}))
        assert "14 tensors are no part of the model" in open_source(model).notes[0]


def make_fp8(folder: Path, *, scales: str) -> dict[str, Tensor]:
    """Text linears in FP8; returns what they stand for."""
    stands_for: dict[str, Tensor] = {}

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if LAYER in n and n.endswith("proj.weight")]:
            weight = tensors[name].float()
            rows, cols = weight.shape
            shape = {"block": (-(-rows // 32), -(-cols // 16)), "row": (rows, 1), "tensor": (), "none": ()}[scales]
            scale = torch.rand(shape, generator=torch.Generator().manual_seed(rows)) + 0.5
            tensors[name] = weight.to(torch.float8_e4m3fn)
            if scales != "none":
                tensors[f"{name}_scale_inv" if scales == "block" else f"{name}_scale"] = scale
                tensors[f"{name.removesuffix('weight')}input_scale"] = torch.tensor(1.0)
            full = scale.repeat_interleave(32, 0).repeat_interleave(16, 1)[:rows, :cols] if scales == "block" else scale
            stands_for[name] = tensors[name].float() * full

    edit_tensors(folder, edit)
    quantization = {"quant_method": "fp8", "weight_block_size": [32, 16]}
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=quantization))
    return stands_for


def test_scales_that_are_exponents_are_powers_of_two(tmp_path: Path) -> None:
    header = {"s": {"dtype": "F8_E8M0", "shape": [2, 2], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes([127, 126, 0, 255]))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.read("s").flatten().tolist()[:3] == [1.0, 0.5, 2.0**-127]
        assert checkpoint.read_rows("s", 1, 2).isnan().tolist() == [[False, True]]


@pytest.mark.parametrize("scales", ["block", "row", "tensor"])
def test_fp8_is_dequantized_if_asked_for(scales: str, model: Path) -> None:
    names = set(stored(model))
    wanted = make_fp8(model, scales=scales)
    said = refusal(model)
    assert said == (
        f"FOLDER: is quantized with FP8 (tensor '{LAYER}.mlp.down_proj.weight'); pass --dequantize to take its weights as the "
        "float numbers that they stand for, or give the float release"
    )
    opened = open_source(model, SourceOptions(dequantize=True))
    with opened.checkpoint as source:
        assert set(source) == names
        for name, tensor in wanted.items():
            assert source.dtype_read(name) == "F32"
            assert torch.equal(source.read_finite(name), tensor)
            assert torch.equal(source.read_rows(name, 5, 31), tensor[5:31])
            assert torch.equal(torch.cat([piece for _, piece in source.pieces(name)]), tensor)
    assert opened.notes == (f"{len(wanted)} weights are FP8: they are multiplied by their scales, in float32",)


def test_fp8_without_its_scales_is_refused(model: Path) -> None:
    make_fp8(model, scales="none")
    (path,) = model.glob("*.safetensors")
    assert refusal(model, dequantize=True) == (
        f"FOLDER/{path.name}: tensor '{LAYER}.mlp.down_proj.weight' is F8_E4M3, but its scales "
        "(weight_scale_inv or weight_scale) are not there, without which its values mean nothing; "
        "download the checkpoint again, or give the float release"
    )


@pytest.mark.parametrize(
    ("suffix", "method", "title"),
    [
        ("weight.absmax", "bitsandbytes", "bitsandbytes"),
        ("qweight", "awq", "AWQ"),
        ("qweight", "gptq", "GPTQ"),
        ("weight_packed", "compressed-tensors", "compressed-tensors"),
        ("biases", None, "MLX"),
        ("biases", "", "MLX"),
        ("qweight", None, "AWQ or GPTQ"),
    ],
)
def test_other_quantized_checkpoints_are_refused_by_their_method(
    suffix: str, method: str | None, title: str, model: Path
) -> None:
    name = f"{LAYER}.mlp.down_proj.{suffix}"
    edit_tensors(model, lambda t: t.update({name: torch.zeros(4, dtype=torch.uint8)}))
    if method is not None:
        section = {"quant_method": method} if method else {"group_size": 64, "bits": 4}
        edit_json(model / "config.json", lambda c: c.update(quantization_config=section))
    assert refusal(model) == (
        f"FOLDER: is quantized with {title} (tensor '{name}'), float weights are needed; give the float release"
    )


def test_a_quantization_config_beside_float_weights_is_left_out(model: Path) -> None:
    edit_json(model / "config.json", lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"}))
    assert open_source(model).notes == (
        "config.json has a quantization_config (bitsandbytes), but the weights are float: it is left out",
    )


def test_paths_that_are_no_model_folder_say_what_to_give(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "models--zai-org--GLM-4.6V-Flash"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({}))
    monkeypatch.chdir(tmp_path)
    for path, wanted in {
        cache: f"{cache}: is a model's folder in a hub cache; give its snapshot {snapshot}",
        model / "config.json": f"{model}/config.json: is a file; give the folder that holds it, {model}",
        Path(f'"{model}"'): "the quotation marks are part of what was given; leave them out",
        Path("~/GLM-4.1V"): "the shell leaves ~ as it is after =; put a space there, or write the whole path",
        Path("zai-org/GLM-4.6V-Flash"): "(glmq downloads nothing: `hf download zai-org/GLM-4.6V-Flash",
    }.items():
        with pytest.raises(GlmqError) as caught:
            read_config(path)
        assert wanted in str(caught.value)
    shutil.rmtree(cache)


def test_of_missing_tensors_those_that_are_there_instead_are_named(model: Path) -> None:
    def split(tensors: dict[str, Tensor]) -> None:
        both = tensors.pop(f"{LAYER}.mlp.gate_up_proj.weight")
        tensors[f"{LAYER}.mlp.gate_proj.weight"], tensors[f"{LAYER}.mlp.up_proj.weight"] = (
            both[:96].clone(),
            both[96:].clone(),
        )

    edit_tensors(model, split)
    assert refusal(model) == (
        f"FOLDER: 1 of the model's 49 tensors are missing, the first is '{LAYER}.mlp.gate_up_proj.weight' (it has 2 that are "
        f"no part of a GLM-4.1V or GLM-4.6V-Flash, {LAYER}.mlp.gate_proj.weight, {LAYER}.mlp.up_proj.weight); "
        "give the checkpoint with the names of the release"
    )


def test_what_cannot_be_kept_is_refused_before_the_work(model: Path) -> None:
    pytest.importorskip("safetensors", "0.7", reason="writes complex numbers")
    edit_tensors(model, lambda t: t.update({"freqs_cis": torch.ones(3, dtype=torch.complex64)}))
    (path,) = model.glob("*.safetensors")
    with pytest.raises(GlmqError) as caught:
        open_source(model, SourceOptions(keep_extra=True))
    assert str(caught.value) == (
        f"{path.name}: tensor 'freqs_cis' is C64, which glmq does not write; leave out what is no part of the model, "
        "without --keep-extra"
    )
