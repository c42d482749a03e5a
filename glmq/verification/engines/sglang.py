"""SGLang's look-ups: those of its ModelSlim loader, 0.5.23, for this class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from glmq.checkpoint.description import ASCEND_V1
from glmq.inspection.folder import Folder, Kind
from glmq.model.config import ModelConfig
from glmq.model.family import renamed
from glmq.spec import Form
from glmq.verification.engines.linears import Complaint

TYPES: Final = ("FLOAT", "W8A8", "W8A8_DYNAMIC")
"""What the loader has linears for."""


def check_sglang(folder: Folder, config: ModelConfig | None) -> Iterator[Complaint]:
    """What keeps SGLang from loading the folder, or makes it compute something else. The vision tower was not checked.

    Args:
        config: None where config.json cannot be read.
    """
    if folder.kind in (Kind.PARTS, Kind.SHARDED):
        yield True, "", "the weights are parts of single ranks; SGLang reads the un-sharded checkpoint"
        return
    if folder.form is not Form.ASCEND_V1:
        if folder.form is not None or folder.has_integers:
            yield True, "", f"there is no {ASCEND_V1}, which alone tells SGLang that the model is quantized"
        return
    if config is None:
        return
    for module, keys in sglang_modules(config):
        types = [folder.description.get(f"{key}.weight") for key in keys]
        known = [found for found in types if found is not None]
        if len(known) < len(types) and folder.has_integers:
            key = f"{keys[types.index(None)]}.weight"
            yield True, key, f"is not in the description, where SGLang looks it up for {module}: integers run as float"
        elif len({str(found) for found in known}) > 1:
            yield True, module, f"is packed from linears of different types ({', '.join(map(str, known))})"
        elif known and known[0] not in TYPES:
            yield True, module, f"is {known[0]}, for which SGLang has no linear: it knows {', '.join(TYPES)}"


def sglang_modules(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every linear of a text layer by SGLang's name, and the keys that it looks up for it."""
    family = config.family
    for block in family.text_blocks(config):
        base = renamed(block.name, family.short_keys)
        yield f"{base}.self_attn.qkv_proj", tuple(f"{base}.self_attn.{part}_proj" for part in "qkv")
        yield f"{base}.self_attn.o_proj", (f"{base}.self_attn.o_proj",)
        yield f"{base}.mlp.gate_up_proj", (f"{base}.mlp.gate_proj", f"{base}.mlp.up_proj")
        yield f"{base}.mlp.down_proj", (f"{base}.mlp.down_proj",)
