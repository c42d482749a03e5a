"""MindIE-LLM's look-ups."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Final

from glmq.checkpoint.description import ASCEND_V1, FOREIGN_KEYS
from glmq.checkpoint.sidecar import PROCESSOR_FILES
from glmq.engines import FLOAT_ELSEWHERE, Engine
from glmq.errors import InputError
from glmq.inspection.folder import Folder, Kind
from glmq.model.config import FAMILY, ModelConfig
from glmq.model.side_files import TEMPLATE, TOKENIZER_CONFIG, engine_side_files
from glmq.spec import Form, type_named
from glmq.verification.engines.linears import (
    DTYPE_NAMES,
    STATIC,
    SUFFIXES,
    TYPES,
    Complaint,
    check_linear_tensors,
    section,
)
from glmq.wording import counted

GROUP_SIZES: Final = (0, *Engine.MINDIE.spec.group_sizes)
TEXT_KEYS: Final = (
    "max_position_embeddings",
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "rope_theta",
    "partial_rotary_factor",
)
"""Read from text_config by MindIE."""


def check_mindie(folder: Folder, config: ModelConfig | None) -> Iterator[Complaint]:
    """What keeps MindIE from loading the folder, or makes it compute something else.

    Args:
        config: None where config.json cannot be read.
    """
    yield from _check_config(folder)
    for name in PROCESSOR_FILES:  # the video processor too comes from the last, where it has no file of its own
        if not (folder.directory / name).is_file():
            yield True, "", f"{name} is missing; MindIE builds its processor from it and does not start"
    yield from _check_side_files(folder)
    if folder.kind is Kind.SHARDED:
        yield True, "", "the weights are sharded for vLLM-Ascend; MindIE reads part folders"
    elif config is None:
        return
    elif folder.kind is Kind.PARTS:
        yield from _check_parts(folder, config)
    else:
        if (yield from _check_route(folder)):
            yield from _check_description(folder, config)
        yield from _check_tensors(folder, config)


def _check_side_files(folder: Folder) -> Iterator[Complaint]:
    """What transformers 4.53.0, which MindIE pins, does not read of the tokenizer's and processor's files."""
    if not (folder.directory / TOKENIZER_CONFIG).is_file():
        yield False, "", f"{TOKENIZER_CONFIG} is missing; the tokenizer then has no end and padding tokens"
    try:
        changed = engine_side_files(folder.directory, FAMILY, for_mindie=True, chat_template=None)
    except InputError as error:
        yield True, "", f"{error}"
        return
    for name in changed:
        if name == TEMPLATE:
            yield (
                False,
                "",
                f"the chat template lies where only some readers look; MindIE's users are told to copy {name}",
            )
        elif (folder.directory / name).is_file():
            yield (
                True,
                "",
                f"{name} names classes or has settings that transformers 4.53.0, which MindIE runs, does not know: its "
                "processor becomes a bare tokenizer, or does not load; quantize again with `glmq quantize`",
            )


def _check_config(folder: Folder) -> Iterator[Complaint]:
    if not folder.config:
        return
    text = section(folder.config, "text_config")
    dtype = text.get("dtype")
    if dtype not in DTYPE_NAMES:
        yield True, "", f"text_config.dtype is {dtype!r}; MindIE takes its run dtype from it: float16 or bfloat16"
    for key in TEXT_KEYS:
        if not text.get(key):
            yield True, "", f"text_config.{key} is {text.get(key)!r}; MindIE needs it"
    if not isinstance(section(text, "rope_scaling").get("mrope_section"), list):
        yield True, "", "text_config.rope_scaling.mrope_section is missing; MindIE needs it"
    if folder.quant_type in ("W8A8S", "W8A8SC") and dtype == "bfloat16":
        yield (
            True,
            "",
            f"text_config.dtype is bfloat16; {folder.quant_type} runs on the Atlas 300I Duo, in float16 only",
        )


def _check_route(folder: Folder) -> Generator[Complaint, None, bool]:
    """How MindIE finds the quantization; returns whether it finds a description."""
    quantize = folder.config.get("quantize")
    if folder.form is None:
        if quantize is not None:
            yield True, "", f"config.json says quantize {quantize!r}, but there is no description: FileNotFoundError"
        return False
    if folder.form is not Form.ASCEND_V1:
        found = None if folder.quant_type is None else folder.quant_type.lower()
        if quantize is None:
            yield (
                True,
                "",
                "config.json has no quantize, so MindIE does not look for a description with a type in its name",
            )
            return False
        if quantize != found:
            yield (
                True,
                "",
                f"config.json says quantize {quantize!r}, the description is for {found!r}: FileNotFoundError",
            )
            return False
        yield False, "", f"MindIE calls this form deprecated; it wants {ASCEND_V1}"
    elif quantize is not None and quantize != str(folder.quant_type).lower():
        yield (
            True,
            "",
            f"config.json says quantize {quantize!r}, which MindIE takes over the description's {folder.quant_type}",
        )
    if folder.quant_type is None:
        yield True, "model_quant_type", "is not in the description: KeyError"
        return False
    sizes = [
        folder.description.get("group_size", 0),
        section(folder.config, "quantization_config").get("group_size", 0),
    ]
    for size in sizes:
        if size not in GROUP_SIZES:
            yield True, "group_size", f"is {size!r}; MindIE takes 64, 128 or 256: NotImplementedError"
    for key in FOREIGN_KEYS:
        if key in folder.description:
            yield True, key, "is in the description and switches another feature on"
    return True


def _check_description(folder: Folder, config: ModelConfig) -> Iterator[Complaint]:
    """The look-ups in the description, and the kinds of quantization that MindIE packs."""
    for block in config.family.text_blocks(config):
        types: list[str] = []
        for part in ("q_proj", "k_proj", "v_proj"):
            found = folder.description.get(f"{block.name}.self_attn.{part}.weight")
            if found is None:
                yield True, f"{block.name}.self_attn.{part}.weight", "is not in the description: KeyError"
            types.append(str(found))
        key = f"{block.name}.mlp.gate_up_proj.weight"
        gate_up = folder.description.get(key)
        if gate_up is None:
            yield True, key, "is not in the description: KeyError"
        if 0 < types.count("W8A8_DYNAMIC") < len(types):
            yield True, f"{block.name}.self_attn", f"q, k, v are {', '.join(types)}; MindIE refuses such a mixture"
        elif 0 < sum(found in STATIC for found in types) < len(types):
            message = (
                f"q, k, v are {', '.join(types)}: they cannot be compressed, and 4 ranks share out k and v wrongly"
            )
            yield False, f"{block.name}.self_attn", message
        for name, kinds in ((f"{block.name}.self_attn", types), (key, [str(gate_up)])):
            if "W4A8_DYNAMIC" in kinds:
                yield True, name, "is W4A8_DYNAMIC, for which MindIE has no dense kernel: AssertionError"
    yield from _check_kinds(folder, config)
    for index in range(config.vision_depth):
        for part in ("gate_proj", "up_proj"):
            key = f"{config.family.vision}.blocks.{index}.mlp.{part}.weight"
            found = folder.description.get(key)
            if found not in TYPES:
                yield True, key, f"is {found!r} in the description; MindIE looks it up and knows {', '.join(TYPES)}"


def why_not(kind: str, linear: str, model: str) -> str | None:
    """What MindIE reads instead of a linear of that type in a model of that type; None where it takes it."""
    if kind == "FLOAT":
        return None
    if not FAMILY.in_text_layers(linear):
        return f"reads {FLOAT_ELSEWHERE}"
    if kind == model:
        return None
    quant_type, of_model = type_named(kind), type_named(model)
    if quant_type is not None and of_model is not None and Engine.MINDIE.spec.takes(quant_type, of_model):
        return None
    return f"reads one type per model, here {model}"


def _check_kinds(folder: Folder, config: ModelConfig) -> Iterator[Complaint]:
    """Linears of types that MindIE does not take there, each reason once."""
    refused: dict[tuple[str, str], list[str]] = {}
    for group in config.family.groups(config):
        for linear in group.linears:
            kind = str(folder.description.get(f"{linear.name}.weight", "FLOAT"))
            reason = why_not(kind, linear.name, str(folder.quant_type))
            if reason is not None:
                refused.setdefault((kind, reason), []).append(linear.name)
    for (kind, reason), names in refused.items():
        yield True, names[0], f"is {kind}, one of {counted(len(names), 'such linear')}; MindIE {reason}"


def _check_tensors(folder: Folder, config: ModelConfig) -> Iterator[Complaint]:
    stored = {tensor.name: tensor for tensor in folder.tensors}
    dtype = DTYPE_NAMES.get(str(section(folder.config, "text_config").get("dtype")))
    for name in config.family.shapes(config):
        if name not in stored:
            yield True, name, "does not exist; MindIE stops when it loads it"
    for group in config.family.groups(config):
        for linear in group.linears:
            yield from check_linear_tensors(stored, linear.name, folder, dtype, TYPES)


def _check_parts(folder: Folder, config: ModelConfig) -> Iterator[Complaint]:
    quantize = folder.config.get("quantize")
    if quantize not in (None, "w8a8sc"):
        yield (
            True,
            "",
            f"config.json says quantize {quantize!r}; MindIE then does not look into the parts: FileNotFoundError",
        )
    if (folder.directory / ASCEND_V1).exists():
        yield True, "", f"{ASCEND_V1} lies beside the parts; MindIE takes its type for theirs"
    stored = {tensor.name: tensor for tensor in folder.tensors}
    for part in sorted({name.partition("/")[0] for name in stored}):
        for index in range(config.layers):
            for linear in ("self_attn.query_key_value", "self_attn.o_proj", "mlp.gate_up_proj"):
                base = f"{part}/language_model.layers.{index}.{linear}"
                weight = stored.get(f"{base}.weight")
                if weight is None:
                    yield True, f"{base}.weight", "does not exist; MindIE stops when it loads it"
                elif weight.quant_type == "?":
                    yield True, weight.name, "is not in the part's description: KeyError"
                elif weight.info.dtype == "I8":
                    for suffix in SUFFIXES["W8A8SC"]:
                        if f"{base}.{suffix}" not in stored:
                            yield True, f"{base}.{suffix}", "does not exist; a W8A8SC linear needs it"
            bias = f"{part}/language_model.layers.{index}.self_attn.query_key_value.bias"
            if bias not in stored:
                yield True, bias, "does not exist; MindIE loads it, though it is folded into quant_bias"
