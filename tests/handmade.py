"""Small quantized checkpoints built without glmq's own quantize, and what tests change in them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glmq.checkpoint.ascend import encode_linear, encode_norm
from glmq.checkpoint.description import Description, tensor_types, write_description
from glmq.checkpoint.json_file import write_json
from glmq.checkpoint.layout import TensorSpec, plan_shards
from glmq.checkpoint.reader import Checkpoint, dtype_code
from glmq.checkpoint.sidecar import PROCESSOR_FILES, MindieSettings, copy_side_files, edit_config
from glmq.checkpoint.writer import ShardWriter
from glmq.model.config import parse_config
from glmq.records import ActivationQParams, QuantizedLinear
from glmq.spec import Activation, FloatDtype, Form, QuantType
from glmq.verification.findings import Check
from glmq.verification.structure import check_structure

TINY_CONFIG = Path(__file__).parents[1] / "glmq" / "model" / "tiny_glm4v" / "config.json"
LAYER = "model.language_model.layers.0"
Q, K, V, O = (f"{LAYER}.self_attn.{part}_proj" for part in "qkvo")
GATE_UP = f"{LAYER}.mlp.gate_up_proj"
GROUP = 64
SETTINGS = MindieSettings(group_size=0, act_method=2, anti_method="m2", is_lowbit=True, open_outlier=True)
SIDE_FILES = ("chat_template.jinja", *PROCESSOR_FILES)


def small_config() -> dict[str, object]:
    """A GLM-4.1V of one text layer and one vision block."""
    config = json.loads(TINY_CONFIG.read_text())
    config["text_config"] |= {
        "hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 1, "vocab_size": 64,
    }  # fmt: skip
    config["vision_config"] |= {"depth": 1, "hidden_size": 32, "out_hidden_size": 128, "intermediate_size": 64}
    assert isinstance(config, dict)
    return config


CONFIG = parse_config(small_config(), "config.json")


def make_tensor(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Norm weights and biases in 0.5..1.5, everything else normal."""
    values = (
        torch.rand(shape, generator=generator) + 0.5 if len(shape) == 1 else torch.randn(shape, generator=generator)
    )
    return values.bfloat16()


def quantize(weight: Tensor, bias: Tensor | None, quant_type: QuantType) -> QuantizedLinear:
    """Plain rounding, by the formulas of each type; every number exact in float16 where it must be."""
    if quant_type is QuantType.W4A8_DYNAMIC:
        step = weight.abs().amax(1, keepdim=True) / 119
        whole = (weight / step).round()
        second = (whole.unflatten(1, (-1, GROUP)).abs().amax(2) / 7).round().clamp_min(1)
        q = (whole / second.repeat_interleave(GROUP, 1)).round().clamp(-8, 7).to(torch.int8)
        return QuantizedLinear(quant_type, q, step, bias, weight_scale_second=second)
    step = weight.abs().amax(1, keepdim=True) / 127
    q = (weight / step).round().to(torch.int8)
    if quant_type.spec.activation is not Activation.STATIC:
        return QuantizedLinear(quant_type, q, step, bias)
    scale, offset = 0.0625, 5
    deq = (step * scale).flatten()
    folded = (0 if bias is None else bias.double() / deq.double()) - offset * q.sum(1).double()
    return QuantizedLinear(
        quant_type, q, step, bias, ActivationQParams(scale, offset), deq, folded.round().to(torch.int32)
    )


def build(
    source: Checkpoint, out: Path, quant_type: QuantType, dtype: FloatDtype, *, form: Form, shard_bytes: int | None
) -> None:
    """Quantize the text layer's linears but down_proj, with channel scales 2^0, 2^1, 2^2, ... in the norms before them."""
    tensors: dict[str, Tensor] = {}
    norms = set(CONFIG.family.rms_norms(CONFIG))
    types: dict[str, QuantType] = {}
    scales = 2.0 ** (torch.arange(128) % 3)
    for group in CONFIG.family.text_block(CONFIG, 0).groups[:3]:
        for linear in group.linears:
            weight = source.read(f"{linear.name}.weight").float() * (1 if group.norm is None else scales)
            bias = source.read(f"{linear.name}.bias").float() if linear.has_bias else None
            row_parallel = linear.name == O
            tensors |= encode_linear(
                linear.name, quantize(weight, bias, quant_type), dtype=dtype, form=form, row_parallel=row_parallel
            )
            types[linear.name] = quant_type
        if group.norm is not None:
            smoothed = source.read(f"{group.norm}.weight").float() / scales
            tensors |= encode_norm(group.norm, smoothed, dtype=dtype, form=form)
    for name in source:
        base = name.removesuffix(".weight")
        if base in norms and name not in tensors:
            tensors |= encode_norm(base, source.read(name), dtype=dtype, form=form)
        elif name not in tensors:
            tensors[name] = source.read(name).to(torch.float16 if dtype is FloatDtype.FP16 else torch.bfloat16)
    specs = [TensorSpec(name, dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    with ShardWriter(plan_shards(specs, f"quant_model_weight_{quant_type.tag}", shard_bytes), out) as sink:
        for name, tensor in tensors.items():
            sink.write(name, tensor)
    described = tensor_types(tensors, types, model_quant_type=quant_type, form=form)
    group_size = GROUP if quant_type is QuantType.W4A8_DYNAMIC and form is Form.ASCEND_V1 else None
    described = described if form is Form.MINDIE else described | CONFIG.family.vllm_aliases(described)
    write_description(
        out, Description(quant_type.value, None if form is Form.MINDIE else "1.0.0", group_size, described)
    )
    edited = edit_config(
        small_config(), dtype=dtype, quant_type=quant_type, settings=SETTINGS if form is Form.MINDIE else None
    )
    write_json(out / "config.json", edited, indent=4)
    copy_side_files(source.directory, out)


KINDS = {
    "w8a8": (QuantType.W8A8, FloatDtype.FP16, Form.ASCEND_V1, None),
    "w8a8-bf16": (QuantType.W8A8, FloatDtype.BF16, Form.ASCEND_V1, None),
    "w8a8s": (QuantType.W8A8S, FloatDtype.FP16, Form.ASCEND_V1, None),
    "w8a8s-mindie": (QuantType.W8A8S, FloatDtype.FP16, Form.MINDIE, None),
    "w8a8s-parts": (QuantType.W8A8S, FloatDtype.FP16, Form.ASCEND_V1, 50_000),
    "dynamic": (QuantType.W8A8_DYNAMIC, FloatDtype.BF16, Form.ASCEND_V1, None),
    "dynamic-mindie": (QuantType.W8A8_DYNAMIC, FloatDtype.FP16, Form.MINDIE, None),
    "w4a8": (QuantType.W4A8_DYNAMIC, FloatDtype.FP16, Form.ASCEND_V1, None),
    "w4a8-mindie": (QuantType.W4A8_DYNAMIC, FloatDtype.BF16, Form.MINDIE, None),
}


Make = Callable[[str], Path]


def found(directory: Path, source: Checkpoint | None) -> list[tuple[int, str, str]]:
    findings = list(check_structure(directory, source))
    # A mixture of types is wrong for MindIE alone; all else is wrong for every engine.
    assert {finding.check for finding in findings if finding.severity == "warning"} <= {Check.SHARED_INPUT}
    return [(finding.check.number, finding.tensor, finding.message) for finding in findings]


def alter(directory: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of the single weight file; new ones are described as FLOAT."""
    path = next(directory.glob("*.safetensors"))
    tensors = load_file(path) | changes
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path)
    description = next(directory.glob("quant_model_description*"))
    document = json.loads(description.read_text())
    for name, tensor in changes.items():
        if tensor is None:
            document.pop(name, None)
        else:
            document.setdefault(name, "FLOAT")
    description.write_text(json.dumps(document))


def describe(directory: Path, changes: dict[str, object]) -> None:
    """Replace, add or ("-") remove keys of the description."""
    path = next(directory.glob("quant_model_description*"))
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value != "-"}))


def configure(directory: Path, section: str, changes: dict[str, object]) -> None:
    path = directory / "config.json"
    document = json.loads(path.read_text())
    part = document[section] if section else document
    part |= changes
    for key in [key for key, value in part.items() if value == "-"]:
        del part[key]
    path.write_text(json.dumps(document))


def stored(directory: Path, name: str) -> Tensor:
    with Checkpoint.open(directory) as checkpoint:
        return checkpoint.read(name)
