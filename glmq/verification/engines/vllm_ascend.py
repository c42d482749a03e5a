"""vLLM-Ascend's look-ups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from glmq.checkpoint.description import ASCEND_V1, FOREIGN_KEYS
from glmq.checkpoint.json_file import JsonValue
from glmq.engines import LARGE_GROUPS, WITHOUT_BIAS, Chip, Engine
from glmq.inspection.folder import Folder, Kind, StoredTensor
from glmq.model.config import ModelConfig
from glmq.model.family import LinearShape
from glmq.spec import Form, QuantType
from glmq.verification.engines.linears import DTYPE_NAMES, VLLM_TYPES, Complaint, check_linear_tensors, section
from glmq.wording import counted

SPEC: Final = Engine.VLLM_ASCEND.spec
DEFAULT_GROUP_SIZE: Final = 256
"""Of its W4A8_DYNAMIC linears where the description gives none."""


def check_vllm_ascend(folder: Folder, config: ModelConfig | None) -> Iterator[Complaint]:
    """What keeps vLLM-Ascend from loading the folder, or makes it compute something else.

    Args:
        config: None where config.json cannot be read.
    """
    yield False, "", "vLLM-Ascend does not list GLM-4.1V as supported; that look-ups succeed does not mean that it runs"
    if "quantization_config" in folder.config:
        of_file = section(folder.config, "quantization_config")
        names_form_only = of_file.get("quant_method") == "ascend" and set(of_file) <= {
            "quant_method",
            "model_quant_type",
        }
        yield (
            not names_form_only,
            "",
            "config.json has quantization_config, which "
            + ("releases before 0.30 take" if names_form_only else "vLLM takes")
            + " for the whole description: every look-up fails",
        )
    if folder.kind is Kind.PARTS:
        yield True, "", "the weights are parts for MindIE; vLLM-Ascend reads model-rank-*.safetensors"
        return
    if folder.form is None:
        if folder.has_integers:
            yield True, "", f"there is no {ASCEND_V1}, which alone tells vLLM-Ascend that the model is quantized"
        return
    if folder.form is not Form.ASCEND_V1:
        yield True, "", f"the description has the MindIE form; vLLM-Ascend knows {ASCEND_V1} only"
        return
    for key in FOREIGN_KEYS:
        if key in folder.description:
            yield True, key, "is in the description and switches another feature on, even if null"
    if folder.kind is not Kind.SHARDED and (folder.directory / "model.safetensors.index.json").exists():
        yield True, "", "model.safetensors.index.json is there; vLLM drops every weight file that it does not name"
    if "W4A8_DYNAMIC" in folder.description.values():  # of the model, or of some linears in it
        for sentence in SPEC.by_release(QuantType.W4A8_DYNAMIC):
            yield False, "", sentence
        size = folder.description.get("group_size", DEFAULT_GROUP_SIZE)
        if isinstance(size, int) and SPEC.largest_group is not None and size > SPEC.largest_group:
            yield (
                False,
                "group_size",
                f"is {size}; vLLM-Ascend takes more than {SPEC.largest_group} with {LARGE_GROUPS} alone",
            )
    elif folder.quant_type in ("W8A8S", "W8A8SC"):
        fails = SPEC.chips[Chip.DUO_300I].fails
        yield False, "", f"{folder.quant_type} is known to vLLM-Ascend on the Atlas 300I Duo only; {fails}"
    if config is None:
        return
    if folder.kind is Kind.QUANTIZED:
        yield from _check_foreign(folder, config)
    for module, members in vllm_modules(config):
        yield from _check_type(folder.description, module, members)
    if folder.kind is Kind.SHARDED:
        return
    stored = {tensor.name: tensor for tensor in folder.tensors}
    yield from _check_biases(stored, folder.description, config)
    dtype = DTYPE_NAMES.get(str(section(folder.config, "text_config").get("dtype")))
    for group in config.family.groups(config):
        for linear in group.linears:
            yield from check_linear_tensors(stored, linear.name, folder, dtype, VLLM_TYPES)
            if folder.description.get(f"{linear.name}.weight") == "W4A8_DYNAMIC":
                yield from _check_groups(stored, linear, folder.description)


def _check_biases(
    stored: Mapping[str, StoredTensor], description: Mapping[str, JsonValue], config: ModelConfig
) -> Iterator[Complaint]:
    """Biases that it leaves out, of a type's linears, once for each type."""
    linears = [linear.name for group in config.family.groups(config) for linear in group.linears]
    for quant_type in SPEC.drops_bias:
        of_type = [f"{name}.bias" for name in linears if description.get(f"{name}.weight") == quant_type.value]
        lost = [name for name in of_type if name in stored]
        if lost:
            yield (
                True,
                lost[0],
                f"is left out of its linear's result, one of {counted(len(lost), f'such {quant_type.value} linear')}; "
                f"{WITHOUT_BIAS}",
            )


def _check_groups(
    stored: Mapping[str, StoredTensor], linear: LinearShape, description: Mapping[str, JsonValue]
) -> Iterator[Complaint]:
    """Second-stage scales, for which vLLM-Ascend makes room by the description's group size, whatever the model's type."""
    size = description.get("group_size", DEFAULT_GROUP_SIZE)
    if not isinstance(size, int) or size < 1:
        yield True, "group_size", f"is {size!r} in the description; {linear.name} needs input columns per group"
        return
    said = (
        "as the description says"
        if "group_size" in description
        else "its default, as the description has no group_size"
    )
    wanted = [linear.rows, linear.cols // size]
    for suffix in ("weight_scale_second", "weight_offset_second"):
        tensor = stored.get(f"{linear.name}.{suffix}")
        if tensor is not None and list(tensor.info.shape) != wanted:
            found = list(tensor.info.shape)
            yield True, tensor.name, f"has shape {found}, vLLM-Ascend wants {wanted}: {size} columns per group, {said}"


def _check_foreign(folder: Folder, config: ModelConfig) -> Iterator[Complaint]:
    """Tensors that no module of the model has."""
    owners = {name.rpartition(".")[0] for name in config.family.shapes(config)}
    for tensor in folder.tensors:
        base, _, suffix = tensor.name.rpartition(".")
        if base not in owners and suffix != "inv_freq":  # which vLLM leaves out by itself
            yield True, tensor.name, "is no part of the model; vLLM raises ValueError at it"


def vllm_modules(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every linear that vLLM builds, by its name in the checkpoint's words, and the keys that it looks up for it.

    The class maps of vLLM apply: in the vision tower qkv_proj stands for q, k, v and gate_up_proj for itself; in the text
    layers gate_up_proj stands for gate_proj and up_proj.
    """
    family = config.family
    for index in range(config.vision_depth):
        base = f"{family.vision}.blocks.{index}"
        yield f"{base}.attn.qkv_proj", tuple(f"{base}.attn.{part}_proj" for part in "qkv")
        for part in ("attn.qkv", "attn.proj", "mlp.gate_up_proj", "mlp.down_proj"):
            yield f"{base}.{part}", (f"{base}.{part}",)
    for part in ("proj", "gate_up_proj", "down_proj"):
        yield f"{family.vision}.merger.{part}", (f"{family.vision}.merger.{part}",)
    for index in range(config.layers):
        base = f"{family.text}.layers.{index}"
        yield f"{base}.self_attn.qkv_proj", tuple(f"{base}.self_attn.{part}_proj" for part in "qkv")
        yield f"{base}.self_attn.o_proj", (f"{base}.self_attn.o_proj",)
        yield f"{base}.mlp.gate_up_proj", tuple(f"{base}.mlp.{part}_proj" for part in ("gate", "up"))
        yield f"{base}.mlp.down_proj", (f"{base}.mlp.down_proj",)
    yield family.lm_head, (family.lm_head,)


def missing_key(module: str) -> str:
    """What becomes of a linear whose key is missing, by release where they differ."""
    is_packed = module.endswith(("qkv_proj", "gate_up_proj"))  # in vLLM's map, be it of one linear
    said = [(r.versions, r.missing_packed_key if is_packed else r.missing_key) for r in SPEC.releases]
    if len({what for _, what in said}) == 1:
        return said[0][1]
    return "; ".join(f"{versions}: {what}" for versions, what in said)


def _check_type(description: Mapping[str, JsonValue], module: str, members: tuple[str, ...]) -> Iterator[Complaint]:
    """One linear's look-up: KeyError where a key is missing, ValueError where packed members differ."""
    types: list[JsonValue] = []
    for member in members:
        key = f"{member}.weight"
        if key not in description:
            yield True, key, f"is not in the description, vLLM looks it up for {module}: {missing_key(module)}"
        else:
            types.append(description[key])
    if len({str(found) for found in types}) > 1:
        listed = ", ".join(str(found) for found in types)
        yield True, module, f"is packed from linears of different types ({listed}): ValueError"
    for found in types:
        if found not in VLLM_TYPES:
            yield True, module, f"is described as {found!r}, which vLLM-Ascend does not know"
