"""Which scheme an engine will take for each module: what a description makes it build, before a card is there to tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from glmq.engines import Engine
from glmq.inspection.folder import Folder, Kind, layer_of, role_of
from glmq.inspection.listing import describe_layers
from glmq.model.config import ModelConfig
from glmq.spec import Form, assert_never
from glmq.verification.engines.mindie import why_not
from glmq.verification.engines.sglang import sglang_modules
from glmq.verification.engines.vllm_ascend import missing_key, vllm_modules


@dataclass(frozen=True, slots=True)
class ModuleScheme:
    """One linear of an engine."""

    module: str
    """Its name in the checkpoint's words; in SGLang's where that looks for others."""
    scheme: str
    """The quantization type, FLOAT, or what happens where the description gives none."""


def module_schemes(folder: Folder, config: ModelConfig, engine: Engine) -> list[ModuleScheme]:
    """The scheme of every linear that the engine builds from an un-sharded checkpoint with an ascendV1 description.

    Empty for any other folder: there is no description to look into, or every part has its own.
    """
    if folder.kind is not Kind.QUANTIZED or folder.form is not Form.ASCEND_V1:
        return []
    modules: Iterator[tuple[str, tuple[str, ...]]]
    match engine:
        case Engine.MINDIE:
            modules, missing = _mindie_modules(config), "KeyError"
        case Engine.VLLM_ASCEND:
            modules, missing = vllm_modules(config), ""
        case Engine.SGLANG:
            modules, missing = sglang_modules(config), "integers run as float"
        case other:
            assert_never(other)
    found: list[ModuleScheme] = []
    for module, members in modules:
        types = [folder.description.get(f"{member}.weight") for member in members]
        if None in types:
            scheme = f"no key: {missing or missing_key(module)}"
        else:
            kinds = list(dict.fromkeys(str(kind) for kind in types))
            reason = why_not(kinds[0], members[0], str(folder.quant_type)) if engine is Engine.MINDIE else None
            if len(kinds) > 1:
                scheme = f"refused: mixes {', '.join(kinds)}"
            else:
                scheme = kinds[0] if reason is None else f"refused: it {reason}"
        found.append(ModuleScheme(module, scheme))
    return found


def _mindie_modules(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every linear that MindIE builds, and the keys that say its type: it packs q, k, v of the text layers."""
    family = config.family
    for group in family.groups(config):
        names = tuple(linear.name for linear in group.linears)
        packed = names[0].startswith(family.text) and len(names) > 1
        if packed:
            yield f"{names[0].rpartition('.')[0]}.query_key_value", names
        else:
            yield from ((name, (name,)) for name in names)


def group_schemes(schemes: Sequence[ModuleScheme]) -> list[tuple[str, str]]:
    """Lines for people: modules alike in their layers as one, e.g. `layers.0-39.self_attn.qkv_proj`, and the scheme."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for found in schemes:
        layer, role = layer_of(found.module), role_of(f"{found.module}.weight")
        kind = layer.rstrip("0123456789")
        groups.setdefault((kind, role, found.scheme), []).append(layer)
    return [
        (layers[0] if layers[0].endswith(role) else f"{describe_layers(layers)}.{role}", scheme)
        for (_, role, scheme), layers in groups.items()
    ]
