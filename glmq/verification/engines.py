"""What a serving engine would look up in a folder, and what would make it refuse: from names, dtypes and JSON alone.

The steps are those of MindIE-LLM 8b4871a and vLLM-Ascend 182b75e, as read or run when this project's format notes were made;
both are emulated here, not run. Values are not read: `check_structure` does that.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from enum import Enum
from typing import Final

from glmq.checkpoint.description import ASCEND_V1, FOREIGN_KEYS
from glmq.checkpoint.json_file import JsonValue
from glmq.errors import ModelError
from glmq.inspection.folder import FLOAT_CODES, Folder, Kind, StoredTensor
from glmq.model.config import ModelConfig, parse_config
from glmq.model.glm4v import LM_HEAD, TEXT, VISION, all_blocks, expected_shapes, text_blocks
from glmq.records import Finding

MINDIE_CHECK: Final = 20
VLLM_CHECK: Final = 29

GROUP_SIZES: Final = (0, 64, 128, 256)
STATIC: Final = ("W8A8", "W8A8S")
TYPES: Final = ("FLOAT", *STATIC, "W8A8SC", "W8A8_DYNAMIC", "W4A8_DYNAMIC")
SUFFIXES: Final[Mapping[str, tuple[str, ...]]] = {
    "W8A8": ("input_scale", "input_offset", "quant_bias", "deq_scale"),
    "W8A8S": ("input_scale", "input_offset", "quant_bias", "deq_scale"),
    "W8A8SC": ("input_scale", "input_offset", "quant_bias", "deq_scale", "index"),
    "W8A8_DYNAMIC": ("weight_scale", "weight_offset"),
}
"""What both engines read beside `.weight`."""
PROCESSOR_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
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
DTYPE_NAMES: Final = {"float16": "F16", "bfloat16": "BF16"}


class Target(Enum):
    """A serving engine."""

    MINDIE = "mindie"
    VLLM_ASCEND = "vllm-ascend"


def check_target(folder: Folder, target: Target) -> Iterator[Finding]:
    """What would keep `target` from loading the folder, or make it compute something else; nothing if all is well.

    A warning says that it loads, but not as one would think.
    """
    number = MINDIE_CHECK if target is Target.MINDIE else VLLM_CHECK
    if folder.kind is Kind.STATISTICS:
        yield Finding(number, "error", "", "the folder holds calibration statistics, no model")
        return
    if folder.kind is Kind.PORTABLE:
        yield Finding(
            number, "error", "", "the weights are in glmq's storage form; `glmq compress --decompress` restores them"
        )
        return
    for problem in folder.problems:
        yield Finding(number, "error", "", problem)
    config = None
    if folder.config:
        try:
            config = parse_config(folder.config, str(folder.directory / "config.json"))
        except ModelError as error:
            yield Finding(number, "error", "", str(error))
    for severity, tensor, message in _mindie(folder, config) if target is Target.MINDIE else _vllm(folder, config):
        yield Finding(number, "error" if severity else "warning", tensor, message)


def describe_engines(folder: Folder) -> str:
    """For which engine and chip a folder is, in one line."""
    match folder.quant_type, folder.kind:
        case "W8A8SC", Kind.SHARDED:
            return "vLLM-Ascend (load_format sharded_state) on the Atlas 300I Duo; GLM-4.1V is not in its support table"
        case "W8A8SC", _:
            return "MindIE on the Atlas 300I Duo, with as many ranks as there are parts"
        case "W8A8S", _:
            return "the input of `glmq compress`; as it is, MindIE on the Atlas 300I Duo"
        case "W8A8", _:
            return "MindIE on the Atlas 800I A2 or 300I Duo, 1 or 2 ranks"
        case "W8A8_DYNAMIC", _:
            return "MindIE loads it, though it is not in its support table for GLM-4.1V"
        case "W4A8_DYNAMIC", _:
            return "no current engine: MindIE refuses it, vLLM-Ascend has it for mixtures of experts only"
        case _, Kind.FLOAT:
            return "any engine for float GLM-4.1V; the input of `glmq quantize`"
        case _, Kind.PORTABLE:
            return "no engine; `glmq compress --decompress` restores the W8A8S weights"
        case _, Kind.STATISTICS:
            return "the input of `glmq quantize --stats`"
        case _:
            return "unknown"


_Complaints = Iterator[tuple[bool, str, str]]
"""(is an error, tensor, message)."""


def _mindie(folder: Folder, config: ModelConfig | None) -> _Complaints:
    yield from _mindie_config(folder)
    for name in PROCESSOR_FILES:
        if not (folder.directory / name).is_file():
            yield True, "", f"{name} is missing; MindIE builds its processor from it and does not start"
    if folder.kind is Kind.SHARDED:
        yield True, "", "the weights are sharded for vLLM-Ascend; MindIE reads part folders"
    elif config is None:
        return
    elif folder.kind is Kind.PARTS:
        yield from _mindie_parts(folder, config)
    else:
        if (yield from _mindie_route(folder)):
            yield from _mindie_description(folder, config)
        yield from _mindie_tensors(folder, config)


def _mindie_config(folder: Folder) -> _Complaints:
    if not folder.config:
        return
    text = _section(folder.config, "text_config")
    dtype = text.get("dtype")
    if dtype not in DTYPE_NAMES:
        yield True, "", f"text_config.dtype is {dtype!r}; MindIE takes its run dtype from it: float16 or bfloat16"
    for key in TEXT_KEYS:
        if not text.get(key):
            yield True, "", f"text_config.{key} is {text.get(key)!r}; MindIE needs it"
    if not isinstance(_section(text, "rope_scaling").get("mrope_section"), list):
        yield True, "", "text_config.rope_scaling.mrope_section is missing; MindIE needs it"
    if folder.quant_type in ("W8A8S", "W8A8SC") and dtype == "bfloat16":
        yield (
            True,
            "",
            f"text_config.dtype is bfloat16; {folder.quant_type} runs on the Atlas 300I Duo, in float16 only",
        )


def _mindie_route(folder: Folder) -> Generator[tuple[bool, str, str], None, bool]:
    """How MindIE finds the quantization; returns whether it finds a description."""
    quantize = folder.config.get("quantize")
    if folder.form is None:
        if quantize is not None:
            yield True, "", f"config.json says quantize {quantize!r}, but there is no description: FileNotFoundError"
        return False
    if folder.form != "ascendV1":
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
        _section(folder.config, "quantization_config").get("group_size", 0),
    ]
    for size in sizes:
        if size not in GROUP_SIZES:
            yield True, "group_size", f"is {size!r}; MindIE takes 64, 128 or 256: NotImplementedError"
    for key in FOREIGN_KEYS:
        if key in folder.description:
            yield True, key, "is in the description and switches another feature on"
    return True


def _mindie_description(folder: Folder, config: ModelConfig) -> _Complaints:
    """The look-ups in the description, and the kinds of quantization that MindIE packs."""
    for block in text_blocks(config):
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
            yield False, f"{block.name}.self_attn", f"q, k, v are {', '.join(types)}; this cannot be compressed"
        for name, kinds in ((f"{block.name}.self_attn", types), (key, [str(gate_up)])):
            if "W4A8_DYNAMIC" in kinds:
                yield True, name, "is W4A8_DYNAMIC, for which MindIE has no dense kernel: AssertionError"
    for index in range(config.vision_depth):
        for part in ("gate_proj", "up_proj"):
            key = f"{VISION}.blocks.{index}.mlp.{part}.weight"
            found = folder.description.get(key)
            if found not in TYPES:
                yield True, key, f"is {found!r} in the description; MindIE looks it up and knows {', '.join(TYPES)}"


def _mindie_tensors(folder: Folder, config: ModelConfig) -> _Complaints:
    stored = {tensor.name: tensor for tensor in folder.tensors}
    dtype = DTYPE_NAMES.get(str(_section(folder.config, "text_config").get("dtype")))
    for name in expected_shapes(config):
        if name not in stored:
            yield True, name, "does not exist; MindIE stops when it loads it"
    for block in all_blocks(config):
        for group in block.groups:
            for linear in group.linears:
                yield from _linear_tensors(stored, linear.name, folder, dtype)


def _linear_tensors(stored: Mapping[str, StoredTensor], name: str, folder: Folder, dtype: str | None) -> _Complaints:
    """What both engines need of one linear of an un-sharded checkpoint."""
    weight = stored.get(f"{name}.weight")
    if weight is None:
        return
    described = str(folder.description.get(weight.name, "FLOAT"))
    if weight.info.dtype in FLOAT_CODES:
        if described != "FLOAT":
            yield False, weight.name, f"is described as {described} but stored as {weight.info.dtype}; it runs as float"
        return
    if described == "FLOAT" or described not in TYPES:
        yield (
            True,
            weight.name,
            f"is stored as {weight.info.dtype} but described as {described}: its integers run as float",
        )
        return
    for suffix in SUFFIXES.get(described, ()):
        tensor = stored.get(f"{name}.{suffix}")
        if tensor is None:
            yield True, f"{name}.{suffix}", f"does not exist; a {described} linear needs it"
        elif suffix in ("input_scale", "input_offset") and tensor.info.shape != (1,):
            yield True, tensor.name, f"has shape {list(tensor.info.shape)}, wanted [1]: IndexError"
        elif suffix.startswith("weight_") and len(tensor.info.shape) != 2:
            yield True, tensor.name, f"has shape {list(tensor.info.shape)}, wanted [rows, 1]: IndexError"
        elif suffix == "deq_scale" and dtype is not None and tensor.info.dtype != ("I64" if dtype == "F16" else "F32"):
            wanted = "the bits of float32 as I64" if dtype == "F16" else "F32"
            yield (
                True,
                tensor.name,
                f"is {tensor.info.dtype}, a model that runs in {dtype} wants {wanted}: silent garbage",
            )


def _mindie_parts(folder: Folder, config: ModelConfig) -> _Complaints:
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


def _vllm(folder: Folder, config: ModelConfig | None) -> _Complaints:
    yield False, "", "vLLM-Ascend does not list GLM-4.1V as supported; that look-ups succeed does not mean that it runs"
    if "quantization_config" in folder.config:
        yield (
            True,
            "",
            "config.json has quantization_config, which vLLM takes for the whole description: every look-up fails",
        )
    if folder.kind is Kind.PARTS:
        yield True, "", "the weights are parts for MindIE; vLLM-Ascend reads model-rank-*.safetensors"
        return
    if folder.form is None:
        if any(tensor.info.dtype == "I8" for tensor in folder.tensors):
            yield True, "", f"there is no {ASCEND_V1}, which alone tells vLLM-Ascend that the model is quantized"
        return
    if folder.form != "ascendV1":
        yield True, "", f"the description has the MindIE form; vLLM-Ascend knows {ASCEND_V1} only"
        return
    for key in FOREIGN_KEYS:
        if key in folder.description:
            yield True, key, "is in the description and switches another feature on, even if null"
    if folder.kind is not Kind.SHARDED and (folder.directory / "model.safetensors.index.json").exists():
        yield True, "", "model.safetensors.index.json is there; vLLM drops every weight file that it does not name"
    if folder.quant_type == "W4A8_DYNAMIC":
        yield (
            True,
            "",
            "W4A8_DYNAMIC is for mixtures of experts in vLLM-Ascend; a dense linear raises NotImplementedError",
        )
    elif folder.quant_type in ("W8A8S", "W8A8SC"):
        yield False, "", f"{folder.quant_type} is known to vLLM-Ascend on the Atlas 300I Duo only"
    if config is None:
        return
    for module, members in _vllm_modules(config):
        yield from _vllm_type(folder.description, module, members)
    if folder.kind is Kind.SHARDED:
        return
    stored = {tensor.name: tensor for tensor in folder.tensors}
    dtype = DTYPE_NAMES.get(str(_section(folder.config, "text_config").get("dtype")))
    for block in all_blocks(config):
        for group in block.groups:
            for linear in group.linears:
                yield from _linear_tensors(stored, linear.name, folder, dtype)


def _vllm_modules(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every linear that vLLM builds, by its name in the checkpoint's words, and the keys that it looks up for it.

    The class maps of vLLM apply: in the vision tower qkv_proj stands for q, k, v and gate_up_proj for itself; in the text
    layers gate_up_proj stands for gate_proj and up_proj.
    """
    for index in range(config.vision_depth):
        base = f"{VISION}.blocks.{index}"
        yield f"{base}.attn.qkv_proj", tuple(f"{base}.attn.{part}_proj" for part in "qkv")
        for part in ("attn.qkv", "attn.proj", "mlp.gate_up_proj", "mlp.down_proj"):
            yield f"{base}.{part}", (f"{base}.{part}",)
    for part in ("proj", "gate_up_proj", "down_proj"):
        yield f"{VISION}.merger.{part}", (f"{VISION}.merger.{part}",)
    for index in range(config.layers):
        base = f"{TEXT}.layers.{index}"
        yield f"{base}.self_attn.qkv_proj", tuple(f"{base}.self_attn.{part}_proj" for part in "qkv")
        yield f"{base}.self_attn.o_proj", (f"{base}.self_attn.o_proj",)
        yield f"{base}.mlp.gate_up_proj", tuple(f"{base}.mlp.{part}_proj" for part in ("gate", "up"))
        yield f"{base}.mlp.down_proj", (f"{base}.mlp.down_proj",)
    yield LM_HEAD, (LM_HEAD,)


def _vllm_type(description: Mapping[str, JsonValue], module: str, members: tuple[str, ...]) -> _Complaints:
    """One linear's look-up: KeyError where a key is missing, ValueError where packed members differ."""
    types: list[JsonValue] = []
    for member in members:
        key = f"{member}.weight"
        if key not in description:
            yield True, key, f"is not in the description, vLLM looks it up for {module}: KeyError"
        else:
            types.append(description[key])
    if len({str(found) for found in types}) > 1:
        listed = ", ".join(str(found) for found in types)
        yield True, module, f"is packed from linears of different types ({listed}): ValueError"
    for found in types:
        if found not in TYPES:
            yield True, module, f"is described as {found!r}, which vLLM-Ascend does not know"


def _section(raw: Mapping[str, JsonValue], key: str) -> Mapping[str, JsonValue]:
    value = raw.get(key)
    return value if isinstance(value, Mapping) else {}
