"""The three layouts of config.json in GLM-4.1V and GLM-4.6V-Flash, brought into one.

flat            before 2025-10-25: the text fields lie at the root.
nested          `text_config` with `rope_scaling`, `rope_theta`, `partial_rotary_factor` and (since 2025-10-25) `dtype`.
nested, v5      written by transformers 5: the same with `rope_parameters` in place of the three rope fields.

`nested` is the form that transformers 4.53 and 5.x both read exactly and that the serving engine needs, so it is the
one that glmq hands on; `rope_parameters`, where the file has it, stays beside the older fields. `attention_bias` is always
true in it: q, k and v of the family have biases whatever a file says, and vLLM leaves them out, without a word, where it
does not say so in `text_config`. What cannot be brought into that form is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glmq.checkpoint.disk import refuse_dangling
from glmq.checkpoint.json_file import JsonObject, JsonValue, read_json_object
from glmq.checkpoint.weight_files import folders_below
from glmq.errors import ModelError, OtherModelError
from glmq.model.family import Family, Sizes
from glmq.model.glm4v import GLM4V

# Fields of the flat layout that belong to text_config.
TEXT_FIELDS: Final = (
    "attention_bias", "attention_dropout", "eos_token_id", "head_dim", "hidden_act", "hidden_size", "initializer_range",
    "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "pad_token_id", "partial_rotary_factor", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "use_cache", "vocab_size",
)  # fmt: skip

LARGEST: Final[Mapping[str, int]] = {
    "hidden_size": 2**15, "intermediate_size": 2**17, "num_hidden_layers": 512, "num_attention_heads": 512,
    "num_key_value_heads": 512, "head_dim": 1024, "vocab_size": 2**21, "max_position_embeddings": 2**24,
    "depth": 512, "out_hidden_size": 2**15, "num_heads": 512, "patch_size": 112, "temporal_patch_size": 16,
    "spatial_merge_size": 16, "image_size": 2**13, "in_channels": 16,
}  # fmt: skip
"""Sizes that no model of the family comes near (the releases have about a tenth of each): a larger one is damage."""
RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "rms_norm_eps": (1e-12, 1e-2), "rope_theta": (1.0, 1e12), "partial_rotary_factor": (1e-2, 1.0),
    "attention_dropout": (0.0, 1.0), "initializer_range": (0.0, 10.0),
}  # fmt: skip
"""Numbers that may be left out, and what they lie between."""
TEXTS: Final = ("hidden_act", "dtype", "torch_dtype")
ACTIVATIONS: Final = ("silu", "swish")
"""Two names of the function between the linears of an MLP that serving engines compute, whatever config.json says."""
FLAGS: Final = ("attention_bias", "use_cache", "tie_word_embeddings")
ADAPTER_CONFIG: Final = "adapter_config.json"
DEFAULT_POSITIONS: Final = 32768
"""`max_position_embeddings` of transformers' Glm4vTextConfig."""
MROPE_SECTIONS: Final = 3
"""Of the rotary positions: time, height, width."""

FAMILY: Final = GLM4V
"""The family that glmq knows. Code that has a ModelConfig asks `config.family`; this is for names of tensors without one."""


@dataclass(frozen=True, slots=True)
class ModelConfig(Sizes):
    """A config.json in the nested layout, the sizes that glmq needs from it, and the family that gives them a meaning."""

    nested: JsonObject
    """The nested layout; equal to the file where the file already has it, but `tie_word_embeddings` is never true and
    `attention_bias` of the text always is."""
    ties_embeddings: bool
    """The file says that lm_head's weight is the embeddings', unless it is stored."""
    family: Family
    image_token_id: int
    max_tokens: int
    """Of one sequence: `max_position_embeddings`, or transformers' default for it."""
    eos_token_ids: tuple[int, ...]


def how_to_fetch(path: Path) -> str:
    """How to fetch what looks like the name of a model on a hub, as the end of a sentence; empty for other paths."""
    name = str(path)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) or path.parent.exists():
        return ""
    return f" (glmq downloads nothing: `hf download {name} --local-dir DIR` or `modelscope download {name} --local_dir DIR`)"


def read_config(directory: Path) -> ModelConfig:
    """Read `config.json` of a checkpoint folder.

    Raises:
        ModelError: no such folder or file, not one of the family, or a layout that glmq does not know.
        CheckpointError: the file is not a JSON object.
    """
    if not directory.is_dir():
        raise ModelError(_why_no_folder(directory))
    path = directory / "config.json"
    refuse_dangling(path)
    if not path.is_file():
        if (directory / ADAPTER_CONFIG).is_file():
            raise OtherModelError(_describe_adapter(directory / ADAPTER_CONFIG))
        snapshots = sorted(directory.glob("snapshots/*/config.json"))
        if snapshots:
            raise ModelError(
                f"{directory}: is a model's folder in a hub cache; give its snapshot {snapshots[-1].parent}"
            )
        advice = folders_below(directory, "config.json") or "give the folder that holds it"
        raise ModelError(f"{directory}: has no config.json, so it is not a model folder; {advice}")
    return parse_config(read_json_object(path), str(path))


def _why_no_folder(path: Path) -> str:
    """What is wrong with a path that is no folder, by how people come to give it."""
    text = str(path)
    if path.exists():
        return f"{path}: is a file; give the folder that holds it, {path.parent}"
    if text[:1] in "\"'" and text[-1:] == text[:1]:
        return f"{path}: no such folder: the quotation marks are part of what was given; leave them out"
    if text.startswith("~"):
        return (
            f"{path}: no such folder: the shell leaves ~ as it is after =; put a space there, or write the whole path"
        )
    return f"{path}: no such folder; give the folder of the float weights as --model-path{how_to_fetch(path)}"


def _describe_adapter(path: Path) -> str:
    """Why a folder with an adapter alone is no model, and what to do."""
    found = read_json_object(path)
    kind, base = found.get("peft_type"), found.get("base_model_name_or_path")
    of = f" of {base}" if isinstance(base, str) and base else ""
    return (
        f"{path.parent}: holds an adapter ({kind if isinstance(kind, str) else 'PEFT'}){of}, not a model; merge it into its "
        "base model first, e.g. with peft's merge_and_unload(), and give the folder of the merged weights"
    )


def parse_config(raw: JsonObject, where: str) -> ModelConfig:
    """Check a config.json's contents and bring it into the nested layout. `where` names it in messages."""
    family = FAMILY
    _check_family(raw.get("model_type"), where)
    nested = _nest(raw, where)
    text = _with_rope_fields(
        _section(nested, "text_config", where), where, "text_config " if "text_config" in raw else ""
    )
    vision = _section(nested, "vision_config", where)
    nested |= {"text_config": text, "architectures": [family.model_class]}  # trainers save that of their wrapper
    ties = _untie(text, nested)
    sections = {"text_config": text, "vision_config": vision, "": nested}

    def number(section: str, key: str, default: int | None = None) -> int:
        value = sections[section].get(key, default)
        place = f"{section}.{key}" if section in raw else key  # a flat file has no text_config
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{where}: {place} is {value!r:.60}, a positive integer is needed; restore the file")
        largest = LARGEST.get(key, vocab_size - 1)  # others are tokens' numbers
        if value > largest:
            raise ModelError(f"{where}: {place} is {value!r:.60}, at most {largest} is possible; restore the file")
        return value

    vocab_size = LARGEST["vocab_size"]
    vocab_size = number("text_config", "vocab_size")
    for section, fields in sections.items():
        _check_options(fields, f"{where}: {section}." if section in raw else f"{where}: ")
    text["attention_bias"] = True
    heads, hidden = number("text_config", "num_attention_heads"), number("text_config", "hidden_size")
    config = ModelConfig(
        nested=nested,
        ties_embeddings=ties,
        family=family,
        hidden_size=hidden,
        intermediate_size=number("text_config", "intermediate_size"),
        layers=number("text_config", "num_hidden_layers"),
        heads=heads,
        kv_heads=number("text_config", "num_key_value_heads"),
        head_dim=number("text_config", "head_dim", hidden // heads),
        vocab_size=vocab_size,
        vision_hidden=number("vision_config", "hidden_size"),
        vision_depth=number("vision_config", "depth"),
        vision_out=number("vision_config", "out_hidden_size"),
        vision_intermediate=number("vision_config", "intermediate_size"),
        patch_size=number("vision_config", "patch_size"),
        temporal_patch_size=number("vision_config", "temporal_patch_size", 2),
        merge_size=number("vision_config", "spatial_merge_size", 2),
        image_size=number("vision_config", "image_size", 336),
        in_channels=number("vision_config", "in_channels", 3),
        image_token_id=number("", "image_token_id"),
        max_tokens=number("text_config", "max_position_embeddings", DEFAULT_POSITIONS),
        eos_token_ids=_token_ids(text.get("eos_token_id", nested.get("eos_token_id")), where),
    )
    _check_consistency(config, number("vision_config", "num_heads", 1), where)
    _check_rope_sections(text, config.head_dim, where)
    return config


def _check_family(kind: JsonValue, where: str) -> None:
    if kind != FAMILY.model_type:
        why = f": {FAMILY.relatives[kind]}" if isinstance(kind, str) and kind in FAMILY.relatives else ""
        raise OtherModelError(
            f"{where}: model_type is {kind!r:.60}{why}, but glmq needs {FAMILY.model_type!r} ({FAMILY.members}); "
            f"give the folder of a {FAMILY.title}"
        )


def _untie(*sections: JsonObject) -> bool:
    """Whether a section ties lm_head to the embeddings. None does afterwards: lm_head is always written as a tensor."""
    tying = [fields for fields in sections if fields.get("tie_word_embeddings") is True]
    for fields in tying:
        fields["tie_word_embeddings"] = False
    return bool(tying)


def _check_consistency(config: ModelConfig, vision_heads: int, where: str) -> None:
    """Check what sizes have to do with each other."""
    if config.heads % config.kv_heads:
        raise ModelError(f"{where}: {config.heads} attention heads do not divide by {config.kv_heads} key-value heads")
    if config.vision_hidden % vision_heads:
        raise ModelError(
            f"{where}: a vision tower of width {config.vision_hidden} does not divide by {vision_heads} heads; restore the file"
        )
    if config.vision_out != config.hidden_size:
        raise ModelError(
            f"{where}: vision_config.out_hidden_size is {config.vision_out}, text_config.hidden_size {config.hidden_size}, "
            "but they are the same width; restore the file"
        )


def _nest(raw: JsonObject, where: str) -> JsonObject:
    """The config with the text fields inside `text_config`; `raw` itself is not changed."""
    nested = dict(raw)
    if isinstance(nested.get("text_config"), dict):
        return nested
    if "hidden_size" not in nested:
        raise ModelError(
            f"{where}: has neither text_config nor hidden_size, so its layout is none of the three known ones; "
            "take the config.json that belongs to the weights"
        )
    text: JsonObject = {key: nested.pop(key) for key in TEXT_FIELDS if key in nested}
    text["model_type"] = "glm4v_text"
    # The engine takes its run dtype from text_config.dtype alone.
    text["dtype"] = nested.get("torch_dtype", nested.get("dtype", "bfloat16"))
    nested["text_config"] = text
    return nested


def _section(nested: JsonObject, key: str, where: str) -> JsonObject:
    value = nested.get(key)
    if not isinstance(value, dict):
        raise OtherModelError(
            f"{where}: has no {key}, so it is no {FAMILY.title}, which see pictures; restore the file"
        )
    return value


def _with_rope_fields(text: JsonObject, where: str, place: str) -> JsonObject:
    """A copy of text_config with the three older rope fields, beside `rope_parameters` (transformers 5) if it has that."""
    text = dict(text)
    if isinstance(text.get("rope_parameters"), dict):
        rope = dict(_section(text, "rope_parameters", where))
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in rope:
                text[key] = rope.pop(key)
        text["rope_scaling"] = rope
    rope_scaling = text.get("rope_scaling")
    if not isinstance(rope_scaling, Mapping) or not isinstance(rope_scaling.get("mrope_section"), list):
        raise ModelError(
            f"{where}: {place}has no rope_scaling.mrope_section (found {rope_scaling!r:.200}); "
            "without it the positions of image tokens are wrong: take the config.json that belongs to the weights"
        )
    kind = rope_scaling.get("rope_type", rope_scaling.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ModelError(f"{where}: rope_type {kind!r:.60} is unknown, a {FAMILY.title} uses 'default'")
    return text


def _check_options(fields: JsonObject, where: str) -> None:
    """Check what may be left out of a section, and otherwise has a type and a range."""
    for key, value in fields.items():
        if value is None:
            continue
        if key in RANGES:
            low, high = RANGES[key]
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ModelError(
                    f"{where}{key} is {value!r:.60}, a number from {low:g} to {high:g} is needed; restore the file"
                )
        elif key in TEXTS and not isinstance(value, str):
            raise ModelError(f"{where}{key} is {value!r:.60}, a text is needed; restore the file")
        elif key == "hidden_act" and value not in ACTIVATIONS:
            raise ModelError(f"{where}hidden_act is {value!r:.60}, but engines compute silu; restore the file")
        elif key in FLAGS and not isinstance(value, bool):
            raise ModelError(f"{where}{key} is {value!r:.60}, true or false is needed; restore the file")


def _check_rope_sections(text: JsonObject, head_dim: int, where: str) -> None:
    """Check that the sections of the rotary positions divide what is rotated of a head, in pairs."""
    rope = text["rope_scaling"]
    assert isinstance(rope, Mapping)
    sections = rope["mrope_section"]
    factor = text.get("partial_rotary_factor") or 1.0  # without one transformers rotates whole heads
    assert isinstance(sections, list)
    assert isinstance(factor, int | float)
    pairs = int(head_dim * factor) // 2
    are_counts = len(sections) == MROPE_SECTIONS and all(type(size) is int and size > 0 for size in sections)
    if not are_counts or sum(sections) != pairs:
        raise ModelError(
            f"{where}: rope_scaling.mrope_section is {sections!r:.60}, three positive integers with the sum {pairs} are "
            "needed; take the config.json that belongs to the weights"
        )


def _token_ids(value: JsonValue, where: str) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    ids = tuple(v for v in values if type(v) is int and v >= 0)
    if len(ids) < len(values):
        raise ModelError(
            f"{where}: eos_token_id is {value!r:.60}, a token's number or a list of them is needed; restore the file"
        )
    return ids
