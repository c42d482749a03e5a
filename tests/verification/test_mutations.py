"""Good checkpoints of every kind, damaged in many ways: each damage is found by the check that is meant for it, and named."""

from __future__ import annotations

import math
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers import W8A8S, calibrate, edit_json, edit_tensors, quantize
from make_checkpoint import Size, make_checkpoint
from random_w8a8s import write_stand_in
from safetensors.torch import load_file, save_file
from torch import Tensor

import glmq
from glmq.checkpoint.checksums import CHECKSUMS, write_checksums
from glmq.checkpoint.header import read_header
from glmq.checkpoint.json_file import read_json_object
from glmq.checkpoint.reader import Checkpoint
from glmq.engines import Engine
from glmq.quantization.options import Options
from glmq.quantization.recipe import make_recipe
from glmq.verification.arithmetic import LinearArithmetic
from glmq.verification.checks import verify_files
from glmq.verification.checksums import check_checksums, checksum_of
from glmq.verification.files import row_of
from glmq.verification.findings import Check, Finding

Tensors = dict[str, Tensor]
Damage = Callable[[Path], object]

LAYER = "model.language_model.layers.0"
OTHER = "model.language_model.layers.1"
Q, K, V, O = (f"{LAYER}.self_attn.{part}_proj" for part in "qkvo")
GATE_UP = f"{LAYER}.mlp.gate_up_proj"
NORM = f"{LAYER}.input_layernorm"
VISION = "model.visual.blocks.0"
DESCRIPTION = "quant_model_description.json"
PART = "part{}-of-2/quant_model_weight_w8a8sc.safetensors"
SIZE = Size(hidden=128, intermediate=160, layers=1, heads=4, kv_heads=2)

OPTIONS = {
    "w8a8s": W8A8S,
    "w8a8": {},
    "dynamic": {"is_dynamic": True, "torch_dtype": "fp16"},
    "w4a8": {"w_bit": 4, "is_lowbit": True, "is_dynamic": True},
    "mindie": {"mindie_format": True, "torch_dtype": "fp16"},
    "sharded": {"shard_bytes": 2**20},
}


@dataclass(frozen=True)
class Good:
    """Undamaged checkpoints and where they come from."""

    source: Path
    folders: dict[str, Path]

    def reference(self, label: str) -> Path:
        if label == "deep":
            return self.source.with_name("deep-float")
        return self.folders["w8a8s"] if label in ("portable", "parts", "ranks") else self.source


@pytest.fixture(scope="module")
def good(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Good:
    root = tmp_path_factory.mktemp("good")
    source = root / "float"
    make_checkpoint(source, SIZE)
    stats = calibrate(source, root / "stats", pictures, limit=4, texts=False)
    for label, options in OPTIONS.items():
        quantize(source, stats, root / label, **options)
    deeper = root / "deep-float"
    make_checkpoint(deeper, replace(SIZE, layers=2))
    calibration = glmq.CalibrationOptions(images=pictures, limit=1, texts=False)
    quantize(deeper, None, root / "deep", calibration=calibration, **OPTIONS["dynamic"])
    glmq.compress(root / "w8a8s", out=root / "portable", codec="portable")
    program = write_stand_in(root)
    for label, engine in {"parts": Engine.MINDIE, "ranks": Engine.VLLM_ASCEND}.items():
        chosen = glmq.CompressionOptions(executor=program, layout=engine)
        glmq.compress(root / "w8a8s", out=root / label, tp=2, codec="ascend", options=chosen)
    return Good(source, {path.name: path for path in root.iterdir() if path.name in KINDS})


KINDS = (*OPTIONS, "deep", "portable", "parts", "ranks")


def findings(folder: Path, good: Good, label: str) -> list[Finding]:
    found = [
        record for record in verify_files(folder, good.reference(label), []) if not isinstance(record, LinearArithmetic)
    ]
    return [finding for finding in found if isinstance(finding, Finding)]


# Ways to damage


def tensors(edit: Callable[[Tensors], object]) -> Damage:
    """Edit the tensors of the one weight file."""

    def damage(folder: Path) -> None:
        edit_tensors(folder, lambda found: edit(found) and None)

    return damage


def part_tensors(rank: int, edit: Callable[[Tensors], object]) -> Damage:
    """Edit the tensors of one rank's part, and drop the manifest, which would tell at once."""

    def damage(folder: Path) -> None:
        path = folder / PART.format(rank)
        if not path.exists():
            path = folder / f"model-rank-{rank}-part-0.safetensors"
        found = load_file(path)
        edit(found)
        save_file(found, path)
        (folder / "glmq_manifest.json").unlink()

    return damage


def put(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    """Replace a tensor by what `change` makes of it."""
    return tensors(lambda found: found.__setitem__(name, change(found[name]).contiguous()))


def at(name: str, index: int | tuple[int, ...], change: Callable[[Tensor], object]) -> Damage:
    """Replace one value."""

    def changed(tensor: Tensor) -> Tensor:
        tensor[index] = change(tensor[index].clone())  # type: ignore[assignment]
        return tensor

    return put(name, changed)


def flip(name: str, index: int | tuple[int, ...], bit: int) -> Damage:
    """Flip one bit of one value, whatever its dtype; bit 0 is the lowest."""
    codes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def changed(tensor: Tensor) -> Tensor:
        code = codes[tensor.element_size()]
        mask = torch.tensor(1 << bit, dtype=torch.int64) if bit < 8 * tensor.element_size() - 1 else None
        view = tensor.reshape(-1).view(code)
        flat = index if isinstance(index, int) else index[0] * tensor.shape[1] + index[1]
        lowest = torch.iinfo(code).min
        view[flat] = view[flat] ^ (lowest if mask is None else int(mask))
        return tensor

    return put(name, changed)


def drop(*names: str) -> Damage:
    """Lose tensors, and their keys in the description."""

    def damage(folder: Path) -> None:
        edit_tensors(folder, lambda found: [found.pop(name) for name in names] and None)
        edit_json(folder / DESCRIPTION, lambda found: [found.pop(name) for name in names])

    return damage


def add(name: str, tensor: Tensor, kind: str) -> Damage:
    """A tensor more, described as `kind`."""

    def damage(folder: Path) -> None:
        edit_tensors(folder, lambda found: found.__setitem__(name, tensor))
        edit_json(folder / DESCRIPTION, lambda found: found.__setitem__(name, kind))

    return damage


def swap(one: str, other: str, *suffixes: str) -> Damage:
    """Exchange tensors of two linears."""

    def edit(found: Tensors) -> None:
        for suffix in suffixes:
            a, b = f"{one}.{suffix}", f"{other}.{suffix}"
            found[a], found[b] = found[b], found[a]

    return tensors(edit)


def swap_rows(linear: str, *suffixes: str) -> Damage:
    """Exchange rows 0 and 1 of some tensors of a linear."""

    def edit(found: Tensors) -> None:
        for suffix in suffixes:
            tensor = found[f"{linear}.{suffix}"]
            order = torch.arange(tensor.shape[0])
            order[0], order[1] = 1, 0
            found[f"{linear}.{suffix}"] = tensor[order].contiguous()

    return tensors(edit)


def key(name: str, value: object) -> Damage:
    """Set one key of the description; `...` removes it."""

    def edit(found: dict[str, object]) -> None:
        if value is ...:
            del found[name]
        else:
            found[name] = value

    return lambda folder: edit_json(folder / DESCRIPTION, edit)


def config(section: str, name: str, value: object) -> Damage:
    """Set one key of config.json; `...` removes it."""

    def edit(found: dict) -> None:
        part = found[section] if section else found
        if value is ...:
            del part[name]
        else:
            part[name] = value

    return lambda folder: edit_json(folder / "config.json", edit)


def write(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def cut(pattern: str, nbytes: int) -> Damage:
    """Cut the end off a file."""

    def damage(folder: Path) -> None:
        path = next(iter(folder.glob(pattern)))
        path.chmod(0o640)
        os.truncate(path, path.stat().st_size - nbytes)

    return damage


def bytes_at(pattern: str, offset: int) -> Damage:
    """Flip a bit of a file; a negative offset counts from its end."""

    def damage(folder: Path) -> None:
        path = next(iter(folder.glob(pattern)))
        content = bytearray(path.read_bytes())
        content[offset] ^= 1
        path.write_bytes(content)

    return damage


def index_total(folder: Path) -> None:
    edit_json(next(iter(folder.glob("*.index.json"))), lambda found: found["metadata"].update(total_size=1))


def index_place(folder: Path) -> None:
    def edit(found: dict) -> None:
        places = found["weight_map"]
        name = next(iter(places))
        places[name] = next(place for place in places.values() if place != places[name])

    edit_json(next(iter(folder.glob("*.index.json"))), edit)


def double_tensor(folder: Path) -> None:
    path = next(iter(folder.glob("*.safetensors")))
    found = load_file(path)
    save_file({f"{O}.quant_bias": found[f"{O}.quant_bias"]}, folder / "extra.safetensors")


def lose_last_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[-1].unlink()


def float_q(found: Tensors) -> None:
    """A float q_proj beside int8 k and v."""
    scale = found[f"{Q}.deq_scale"].to(torch.int32).view(torch.float32) / found[f"{Q}.input_scale"]
    found[f"{Q}.weight"] = (found[f"{Q}.weight"].float() * scale[:, None]).half()
    for suffix in ("deq_scale", "quant_bias", "input_scale", "input_offset"):
        del found[f"{Q}.{suffix}"]


def describe_float_q(folder: Path) -> None:
    edit_tensors(folder, float_q)

    def edit(found: dict) -> None:
        for suffix in ("deq_scale", "quant_bias", "input_scale", "input_offset"):
            del found[f"{Q}.{suffix}"]
        found[f"{Q}.weight"] = "FLOAT"

    edit_json(folder / DESCRIPTION, edit)


def rename_model(found: Tensors) -> None:
    name = "language_model.norm.weight"
    found[f"model.{name}"] = found.pop(name)


def top_description(folder: Path) -> None:
    shutil.copy(folder / "part0-of-2" / DESCRIPTION, folder / DESCRIPTION)


def lose_part(folder: Path) -> None:
    shutil.rmtree(folder / "part1-of-2")
    (folder / "glmq_manifest.json").unlink()


PACKED = "language_model.layers.0.self_attn"

# name -> (kind, damage, the number of a check that must find it, what a finding of it must name)
MUTATIONS: dict[str, tuple[str, Damage, int, str]] = {
    # description
    "no description": ("w8a8s", remove(DESCRIPTION), 1, "found none"),
    "two descriptions": ("w8a8s", write("quant_model_description_w8a8.json", "{}"), 1, "quant_model_description_w8a8"),
    "a torn description": ("w8a8", cut(DESCRIPTION, 40), 1, DESCRIPTION),
    "a description of another type": ("w8a8s", key("model_quant_type", "W8A8"), 4, "w8a8s"),
    "an unknown type": ("w8a8", key("model_quant_type", "W2A2"), 2, "W2A2"),
    "another version": ("w8a8", key("version", "2.0.0"), 2, "version"),
    "no version": ("w8a8", key("version", ...), 2, "version"),
    "a null key": ("dynamic", key("version", None), 2, "version"),
    "a key of another feature": ("w8a8", key("fa_quant_type", None), 2, "fa_quant_type"),
    "a group size where none belongs": ("w8a8s", key("group_size", 64), 3, "group_size"),
    "no group size": ("w4a8", key("group_size", ...), 3, "group_size"),
    "another group size": ("w4a8", key("group_size", 128), 8, "weight_scale_second"),
    "a tensor not described": ("w8a8s", key(f"{O}.deq_scale", ...), 5, f"{O}.deq_scale"),
    "a key without a tensor": ("w8a8s", key("model.visual.nothing.weight", "FLOAT"), 5, "model.visual.nothing"),
    "an alias of another type": ("w8a8", key(f"{LAYER}.mlp.gate_proj.weight", "FLOAT"), 5, "gate_proj"),
    "an int8 weight described as float": ("w8a8", key(f"{O}.weight", "FLOAT"), 9, f"{O}.weight"),
    "a float weight described as int8": ("w8a8", key(f"{LAYER}.mlp.down_proj.weight", "W8A8"), 7, "down_proj"),
    "a linear of another type": ("w8a8", key(f"{O}.weight", "W8A8S"), 12, f"{O}.weight"),
    "a bias described as int8": ("w8a8s", key(f"{Q}.bias", "W8A8S"), 7, f"{Q}.bias"),
    "a scale described as float": ("w8a8s", key(f"{Q}.deq_scale", "FLOAT"), 7, f"{Q}.deq_scale"),
    "vision not described": ("w8a8", key(f"{VISION}.mlp.gate_proj.weight", ...), 14, "gate_proj"),
    # weight files
    "a foreign weight file": ("w8a8", write("model.safetensors", "x"), 4, "model.safetensors"),
    "a stale index": ("w8a8", write("model.safetensors.index.json", "{}"), 4, "model.safetensors.index.json"),
    "a torn weight file": ("w8a8s", cut("*.safetensors", 8), 4, "truncated"),
    "a tensor in two files": ("w8a8", double_tensor, 5, f"{O}.quant_bias"),
    "a part lost": ("sharded", lose_last_shard, 4, "is missing"),
    "a wrong total size": ("sharded", index_total, 4, "total_size"),
    "an index that names another file": ("sharded", index_place, 4, "weight_map"),
    # which tensors
    "a lost norm": ("w8a8", drop(f"{NORM}.weight"), 6, f"{NORM}.weight"),
    "a lost bias": ("w8a8s", drop(f"{Q}.bias"), 7, f"{Q}.bias"),
    "a lost vision weight": ("w8a8s", drop(f"{VISION}.attn.qkv.weight"), 6, "attn.qkv"),
    "a lost deq_scale": ("w8a8s", drop(f"{O}.deq_scale"), 7, f"{O}.deq_scale"),
    "a lost input_offset": ("w8a8", drop(f"{K}.input_offset"), 7, f"{K}.input_offset"),
    "a lost weight_offset": ("dynamic", drop(f"{K}.weight_offset"), 7, f"{K}.weight_offset"),
    "a lost scale_bias": ("w4a8", drop(f"{O}.scale_bias"), 7, f"{O}.scale_bias"),
    "a foreign tensor": ("w8a8", add("model.language_model.extra.weight", torch.zeros(4).bfloat16(), "FLOAT"), 6, "extra"),
    "a weight_scale in W8A8S": ("w8a8s", add(f"{O}.weight_scale", torch.ones(128, 1).half(), "W8A8S"), 7, "weight_scale"),
    "a doubled norm in ascendV1": ("w8a8", add(f"{NORM}.module.weight", torch.ones(128).bfloat16(), "W8A8"), 15, "module"),
    # shapes and dtypes
    "a scale without dimensions": ("w8a8s", put(f"{O}.input_scale", lambda t: t[0]), 8, f"{O}.input_scale"),
    "a flat weight_scale": ("dynamic", put(f"{O}.weight_scale", torch.flatten), 8, f"{O}.weight_scale"),
    "a quant_bias with two dimensions": ("w8a8", put(f"{O}.quant_bias", lambda t: t[None]), 8, f"{O}.quant_bias"),
    "a narrow scale_bias": ("w4a8", put(f"{O}.scale_bias", lambda t: t[:, :1]), 8, f"{O}.scale_bias"),
    "a row less": ("w8a8s", put(f"{K}.weight", lambda t: t[1:]), 8, f"{K}.weight"),
    "unpacked int4": ("w4a8", put(f"{K}.weight", lambda t: torch.cat([t, t])), 8, f"{K}.weight"),
    "a turned vision weight": ("w8a8", put(f"{VISION}.attn.qkv.weight", torch.t), 8, "attn.qkv"),
    "an unsigned weight": ("w8a8", put(f"{O}.weight", lambda t: t.view(torch.uint8)), 9, f"{O}.weight"),
    "a float deq_scale in a float16 model": ("w8a8s", put(f"{O}.deq_scale", lambda t: t.int().view(torch.float32)), 9, O),
    "deq_scale bits in a bfloat16 model": ("w8a8", put(f"{O}.deq_scale", lambda t: t.view(torch.int32).long()), 9, O),
    "a wide quant_bias": ("w8a8s", put(f"{O}.quant_bias", torch.Tensor.long), 9, f"{O}.quant_bias"),
    "a float32 norm": ("w8a8", put(f"{NORM}.weight", torch.Tensor.float), 9, f"{NORM}.weight"),
    "a float16 head in a bfloat16 model": ("w8a8", put("lm_head.weight", torch.Tensor.half), 9, "lm_head"),
    # values
    "a negative input_scale": ("w8a8s", put(f"{O}.input_scale", torch.neg), 10, f"{O}.input_scale"),
    "a zero input_scale": ("w8a8", put(f"{O}.input_scale", torch.zeros_like), 10, f"{O}.input_scale"),
    "half an offset": ("w8a8s", put(f"{O}.input_offset", lambda t: t + 0.5), 10, f"{O}.input_offset"),
    "an offset out of range": ("w8a8s", put(f"{O}.input_offset", lambda t: t * 0 + 200), 10, f"{O}.input_offset"),
    "a zero deq_scale": ("w8a8s", at(f"{O}.deq_scale", 3, lambda t: t * 0), 10, f"{O}.deq_scale"),
    "a negative deq_scale": ("w8a8", at(f"{O}.deq_scale", 3, torch.neg), 10, f"{O}.deq_scale"),
    "deq_scale with high bits": ("w8a8s", flip(f"{O}.deq_scale", 3, 40), 10, f"{O}.deq_scale"),
    "the sign bit of deq_scale": ("w8a8s", flip(f"{O}.deq_scale", 3, 31), 10, f"{O}.deq_scale"),
    "a negative weight_scale": ("dynamic", at(f"{O}.weight_scale", 5, torch.neg), 10, f"{O}.weight_scale"),
    "an asymmetric weight": ("dynamic", at(f"{O}.weight_offset", 5, lambda t: t + 1), 10, f"{O}.weight_offset"),
    "a zero second scale": ("w4a8", at(f"{O}.weight_scale_second", 0, lambda t: t * 0), 10, "weight_scale_second"),
    "NaN in the head": ("w8a8", at("lm_head.weight", 7, lambda t: t * torch.nan), 10, "lm_head"),
    "infinity in a norm": ("dynamic", at(f"{NORM}.weight", 0, lambda t: t + torch.inf), 10, f"{NORM}.weight"),
    # arithmetic
    "a high bit of an int8 weight": ("w8a8s", flip(f"{O}.weight", (3, 5), 7), 11, f"{O}.quant_bias"),
    "the lowest bit of an int8 weight": ("w8a8s", flip(f"{GATE_UP}.weight", (3, 5), 0), 32, f"{GATE_UP}.weight"),
    "a bit of quant_bias": ("w8a8", flip(f"{K}.quant_bias", 2, 12), 11, f"{K}.quant_bias"),
    "a quant_bias two off": ("w8a8s", at(f"{K}.quant_bias", 2, lambda t: t + 2), 11, f"{K}.quant_bias"),
    "quant_bias of another rank": ("w8a8s", put(f"{O}.quant_bias", torch.zeros_like), 11, f"{O}.quant_bias"),
    "an input_offset one off": ("w8a8", put(f"{O}.input_offset", lambda t: t + 1), 11, f"{O}.quant_bias"),
    "a top mantissa bit of deq_scale": ("w8a8", flip(f"{O}.deq_scale", 9, 22), 11, f"{O}.weight_scale"),
    "weight_scale of another row": ("w8a8", at(f"{O}.weight_scale", 9, lambda t: t * 1.5), 11, f"{O}.weight_scale"),
    "a bit of scale_bias": ("w4a8", flip(f"{O}.scale_bias", (4, 2), 25), 11, f"{O}.scale_bias"),
    "a turned square weight": ("w8a8s", put(f"{O}.weight", torch.t), 16, f"{O}.weight"),
    "k and v exchanged": ("w8a8s", swap(K, V, "weight", "bias", "deq_scale", "quant_bias"), 16, f"{K}.weight"),
    "q and o exchanged": (
        "w8a8", swap(Q, O, "weight", "deq_scale", "quant_bias", "weight_scale", "input_scale", "input_offset"),
        16, f"{O}.weight",
    ),
    "layers exchanged": ("deep", swap(O, O.replace(LAYER, OTHER), "weight", "weight_scale"), 16, f"{O}.weight"),
    "two rows exchanged": ("w8a8s", swap_rows(O, "weight", "deq_scale", "quant_bias"), 30, f"{O}.weight"),
    "two dynamic rows exchanged": ("dynamic", swap_rows(O, "weight", "weight_scale"), 30, f"{O}.weight"),
    "an exponent bit of a sparse deq_scale": ("w8a8s", flip(f"{O}.deq_scale", 9, 23), 30, f"{O}.weight row 9"),
    "a mantissa bit of a sparse deq_scale": ("w8a8s", flip(f"{O}.deq_scale", 9, 22), 30, f"{O}.weight row 9"),
    "a mantissa bit of a dynamic weight_scale": ("dynamic", flip(f"{O}.weight_scale", 9, 9), 30, f"{O}.weight row 9"),
    "a sparse input_scale": ("w8a8s", put(f"{O}.input_scale", lambda t: t * 1.5), 30, f"{O}.weight"),
    "a doubled second scale": ("w4a8", at(f"{O}.weight_scale_second", (6, 1), lambda t: t * 2), 11, f"{O}.scale_bias"),
    "the sign bit of a dynamic weight": ("dynamic", flip(f"{O}.weight", (3, 5), 7), 30, "steps from the float one"),
    "the lowest bit of a dynamic weight": ("dynamic", flip(f"{O}.weight", (3, 5), 0), 32, f"{O}.weight"),
    "the lowest bit of an int4 weight": ("w4a8", flip(f"{O}.weight", (3, 5), 0), 32, f"{O}.weight"),
    "a high bit of an int4 weight": ("w4a8", flip(f"{O}.weight", (3, 5), 7), 32, f"{O}.weight"),
    # what must agree
    "another input_scale for q": ("w8a8s", put(f"{Q}.input_scale", lambda t: t * 1.001), 12, f"{Q}.input_scale"),
    "a float q beside int8 k and v": ("w8a8s", describe_float_q, 12, Q),
    # norms and float tensors
    "a norm without its smoothing": ("w8a8", put(f"{NORM}.weight", lambda t: t * 4), 16, f"{Q}.weight"),
    "one channel of a norm": ("w8a8s", flip(f"{NORM}.weight", 11, 12), 30, "column 11"),
    "a shift in a norm": ("w8a8s", at(f"{NORM}.bias", 3, lambda t: t + 0.5), 11, f"{Q}.quant_bias"),
    "a shift that engines ignore": ("w8a8s", at(f"{LAYER}.post_mlp_layernorm.bias", 3, lambda t: t + 1), 15, "post_mlp"),
    "other doubled norms": ("mindie", put(f"{NORM}.module.weight", lambda t: t * 1.5), 15, f"{NORM}.module.weight"),
    "a bit of a vision weight": ("w8a8", flip(f"{VISION}.mlp.up_proj.weight", (2, 2), 3), 6, "mlp.up_proj"),
    "a bit of down_proj": ("w8a8s", flip(f"{LAYER}.mlp.down_proj.weight", (2, 2), 1), 6, "mlp.down_proj"),
    "a lost embedding row": ("w8a8", at("model.language_model.embed_tokens.weight", 9, lambda t: t * 0), 6, "embed_tokens"),
    "a bit of a float bias": ("dynamic", flip(f"{Q}.bias", 2, 4), 6, f"{Q}.bias"),
    # config.json
    "a run dtype that sparse types lack": ("w8a8s", config("text_config", "dtype", "bfloat16"), 17, "text_config.dtype"),
    "no run dtype": ("w8a8", config("text_config", "dtype", ...), 17, "text_config.dtype"),
    "a stale quantize": ("w8a8s", config("", "quantize", "w8a8"), 17, "quantize"),
    "a stale quantization_config": ("w8a8", config("", "quantization_config", {}), 17, "quantization_config"),
    "no quantize in the MindIE form": ("mindie", config("", "quantize", ...), 17, "quantize"),
    "another group size in the MindIE form": (
        "mindie", lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"].update(group_size=512)), 17, "512"
    ),
    "no rope": ("w8a8", config("text_config", "rope_scaling", ...), 17, "rope_scaling"),
    "a layer more": ("w8a8", config("text_config", "num_hidden_layers", 2), 6, "layers.1"),
    "another epsilon": ("w8a8", config("text_config", "rms_norm_eps", 1e-6), 17, "rms_norm_eps"),
    "another image token": ("w8a8", config("", "image_token_id", 3), 17, "image_token_id"),
    "another model": ("w8a8", config("", "model_type", "glm4v_moe"), 17, "glm4v_moe"),
    # side files and modes
    "no tokenizer": ("w8a8", remove("tokenizer.json"), 18, "tokenizer.json"),
    "no processor settings": ("w8a8", remove("preprocessor_config.json"), 18, "preprocessor_config.json"),
    "another chat template": ("w8a8", write("chat_template.jinja", "{{ messages }}"), 18, "chat_template.jinja"),
    "a file that all may write": ("w8a8", lambda folder: (folder / "config.json").chmod(0o666), 19, "config.json"),
    "a name with a space": ("w8a8", write("read me.txt", ""), 19, "read me.txt"),
    # compressed
    "a bit of a portable weight": ("portable", bytes_at("part0-of-1/*.safetensors", -9), 33, "is altered"),
    "a portable side file": ("portable", bytes_at("tokenizer.json", 50), 33, "tokenizer.json"),
    "an altered manifest": ("portable", bytes_at("glmq_manifest.json", 300), 33, "glmq_manifest.json"),
    "a foreign file among parts": ("parts", write("part0-of-2/extra.safetensors", "x"), 33, "extra.safetensors"),
    "a bit of a compressed weight": ("parts", bytes_at(PART.format(1), -9), 33, "is altered"),
    "a lost rank": ("parts", lose_part, 21, "rank 1 of 2"),
    "a description beside the parts": ("parts", top_description, 21, DESCRIPTION),
    "parts in bfloat16": ("parts", config("text_config", "dtype", "bfloat16"), 21, "bfloat16"),
    "a name of the un-sharded model": ("parts", part_tensors(1, rename_model), 22, "model.language_model.norm"),
    "other tiling": ("parts", part_tensors(0, lambda t: t[f"{PACKED}.o_proj.info"].__setitem__(0, 4)), 23, "o_proj.info"),
    "a short index": (
        "parts", part_tensors(0, lambda t: t.__setitem__(f"{PACKED}.o_proj.index", t[f"{PACKED}.o_proj.index"][1:].clone())),
        23, "o_proj.index",
    ),
    "no bias for q, k, v": ("parts", part_tensors(0, lambda t: t.pop(f"{PACKED}.query_key_value.bias")), 23, "value.bias"),
    "a bias on rank 1": (
        "parts", part_tensors(1, lambda t: t[f"{PACKED}.o_proj.quant_bias"].__setitem__(3, 7)), 24, "o_proj.quant_bias"
    ),
    "a scale that the source does not have": (
        "parts", part_tensors(1, lambda t: t[f"{PACKED}.o_proj.deq_scale"].__setitem__(3, 7 << 24)), 25, "o_proj.deq_scale"
    ),
    "an embedding without its zero row": (
        "parts", part_tensors(0, lambda t: t.__setitem__("language_model.embed_tokens.weight",
                                                         t["language_model.embed_tokens.weight"][1:].clone())),
        25, "embed_tokens",
    ),
    "a rank's wide weight": (
        "ranks", part_tensors(0, lambda t: t["language_model.model.layers.0.self_attn.o_proj.info"].__setitem__(2, 96)),
        25, "o_proj.info",
    ),
    "an un-compressed description": ("ranks", key("model_quant_type", "W8A8S"), 27, "W8A8S"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("label", KINDS)
def test_an_undamaged_checkpoint_has_no_findings(good: Good, label: str) -> None:
    assert findings(good.folders[label], good, label) == []


@pytest.mark.parametrize(("label", "damage", "check", "named"), MUTATIONS.values(), ids=MUTATIONS)
def test_each_damage_is_found_and_named(
    good: Good, tmp_path: Path, label: str, damage: Damage, check: int, named: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(good.folders[label], folder)
    damage(folder)
    found = findings(folder, good, label)
    own = [f"{finding.tensor} {finding.message}" for finding in found if finding.check.number == check]
    assert any(named in sentence for sentence in own), found
    # Checksums find every damage to a tensor; the other checks must find these without them.
    assert any(finding.severity == "error" and finding.check != Check.CHECKSUMS for finding in found)


UNCOMPRESSED = [label for label in OPTIONS if label != "sharded"]  # the tensors of w8a8 in other files
BIT_SAMPLES = re.compile(
    rf"({re.escape(LAYER)}\.self_attn\.[qo]_proj|{re.escape(NORM)}|{re.escape(GATE_UP)})\.|lm_head|embed_tokens"
    r"|mlp\.down_proj\.weight|visual\.(blocks\.0\.(norm1|attn\.qkv)|patch_embed|merger\.post)"
)


BITS = sorted({*range(0, 64, 4), 7, 15, 31, 63})
"""Every fourth, and the highest of each width."""


def flip_stored_bit(folder: Path, bit: int, names: re.Pattern[str]) -> list[str]:
    """Flip that bit of one element of each tensor whose dtype has it, in place; returns the tensors' names."""
    flipped = []
    for path in sorted(folder.glob("*.safetensors")):
        content = bytearray(path.read_bytes())
        for name, info in read_header(path).tensors.items():
            count = math.prod(info.shape)
            width = 8 * info.nbytes // max(1, count)
            if names.search(name) and bit < width:
                element = zlib.crc32(f"{name} {bit}".encode()) % count
                content[info.start + (element * width + bit) // 8] ^= 1 << bit % 8
                flipped.append(name)
        path.write_bytes(content)
    return sorted(flipped)


@pytest.mark.slow
@pytest.mark.parametrize("label", UNCOMPRESSED)
def test_one_flipped_bit_of_any_tensor_is_found_and_named_wherever_it_lies(
    good: Good, tmp_path: Path, label: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(good.folders[label], folder)
    report = read_json_object(folder / "glmq_report.json")
    suffixes = set()
    for bit in BITS:
        flipped = flip_stored_bit(folder, bit, BIT_SAMPLES)
        with Checkpoint.open(folder) as checkpoint:
            found = [f for f in check_checksums(checkpoint, report) if isinstance(f, Finding)]
        assert sorted(finding.tensor for finding in found) == flipped
        assert all("its bytes were changed since it was written" in finding.message for finding in found)
        assert flip_stored_bit(folder, bit, BIT_SAMPLES) == flipped  # back again
        suffixes |= {name.rpartition(".")[2] for name in flipped}
    static, steps = {"input_scale", "input_offset", "quant_bias", "deq_scale"}, {"weight_scale", "weight_offset"}
    second = {"weight_scale_second", "weight_offset_second", "scale_bias"}
    own = {"w8a8s": static, "dynamic": steps, "w4a8": steps | second}.get(label, static | steps)
    assert suffixes == {"weight", "bias"} | own


@pytest.mark.parametrize("label", UNCOMPRESSED)
def test_the_lowest_bit_of_every_single_tensor_is_found_by_verify(good: Good, tmp_path: Path, label: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(good.folders[label], folder)
    flipped = flip_stored_bit(folder, 0, re.compile(""))
    found = [finding for finding in findings(folder, good, label) if finding.check == Check.CHECKSUMS]
    assert sorted(finding.tensor for finding in found) == flipped
    assert all(finding.severity == "error" for finding in found)


def retouch(folder: Path) -> None:
    """Change a tensor and its checksum alike, as one does who rewrites the file."""
    edit_tensors(folder, lambda found: found[f"{O}.quant_bias"].__setitem__(0, found[f"{O}.quant_bias"][0] + 1))
    with Checkpoint.open(folder) as checkpoint:
        write_checksums(folder, {name: checksum_of(checkpoint, name) for name in checkpoint}, {})


@pytest.mark.slow
def test_a_corrected_quant_bias_is_right_if_it_is_what_the_report_says(good: Good, tmp_path: Path) -> None:
    recipe = make_recipe(Options(**W8A8S))
    corrected = replace(recipe, scheme=replace(recipe.scheme, bias_correction=True))
    folder = tmp_path / "corrected"
    glmq.quantize(good.source, good.source.parent / "stats", out=folder, recipe=corrected)
    assert findings(folder, good, "w8a8s") == []
    report = read_json_object(folder / "glmq_report.json")
    shift = row_of(report, f"{O}")["bias_shift"]
    assert isinstance(shift, int)
    assert shift > 1
    (folder / CHECKSUMS).unlink()
    put(f"{O}.quant_bias", lambda t: t.index_add(0, torch.tensor([5]), torch.tensor([3 * shift], dtype=torch.int32)))(
        folder
    )
    damaged = [finding for finding in findings(folder, good, "w8a8s") if finding.check is Check.RECOMPUTED]
    assert [finding.tensor for finding in damaged] == [f"{O}.quant_bias"]
    assert damaged[0].message.endswith(f"in row 5, glmq_report.json says that bias correction changed it by {shift}")


def test_a_correction_that_the_report_does_not_know_is_found(good: Good, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(good.folders["w8a8s"], folder)

    def say(report: dict) -> None:
        for row in report["linears"]:
            row["bias_shift"] = 7 * (row["name"] == K)

    edit_json(folder / "glmq_report.json", say)
    (finding,) = [f for f in findings(folder, good, "w8a8s") if f.check is not Check.CHECKSUMS]
    assert (finding.check, finding.tensor) == (Check.RECOMPUTED, f"{K}.quant_bias")
    assert finding.message.endswith("glmq_report.json says that bias correction changed it by 7")


# name -> (damage to a copy of the checkpoint, what the one finding says)
UNPROVEN: dict[str, tuple[Damage, str]] = {
    "lost": (remove(CHECKSUMS), "glmq_checksums.json is missing, glmq_report.json says it was written"),
    "altered": (bytes_at(CHECKSUMS, 300), "its digest does not fit its contents; it was altered"),
    "torn": (cut(CHECKSUMS, 40), "is not JSON"),
    "replaced": (retouch, "it was replaced"),
}


@pytest.mark.parametrize(("damage", "message"), UNPROVEN.values(), ids=UNPROVEN)
def test_lost_or_altered_checksums_are_an_error(good: Good, tmp_path: Path, damage: Damage, message: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(good.folders["w8a8s"], folder)
    damage(folder)
    (finding,) = findings(folder, good, "w8a8s")
    assert (finding.check, finding.severity, finding.tensor) == (Check.CHECKSUMS, "error", "")
    assert message in finding.message


def test_only_the_portable_form_of_one_rank_keeps_the_checksums_and_gives_them_back(good: Good, tmp_path: Path) -> None:
    kept = [path.relative_to(good.source.parent) for path in good.source.parent.glob(f"*/**/{CHECKSUMS}")]
    folders = [*OPTIONS, "deep", "portable/glmq_source"]
    assert sorted(map(str, kept)) == sorted(f"{folder}/{CHECKSUMS}" for folder in folders)
    glmq.restore(good.folders["portable"], out=tmp_path / "back")
    assert (tmp_path / "back" / CHECKSUMS).read_bytes() == (good.folders["w8a8s"] / CHECKSUMS).read_bytes()
    assert findings(tmp_path / "back", good, "w8a8s") == []


def test_there_are_more_than_a_hundred_damages_of_every_kind() -> None:
    assert len(MUTATIONS) > 100
    assert {label for label, *_ in MUTATIONS.values()} == set(KINDS)
