"""A W8A8S checkpoint with random integers, and a program that stands in for the vendor's compress program."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import torch
from torch import Tensor

from glmq.checkpoint.description import Description, tensor_types, write_description
from glmq.checkpoint.json_file import write_json
from glmq.checkpoint.layout import TensorSpec, plan_shards
from glmq.checkpoint.reader import dtype_code
from glmq.checkpoint.sidecar import copy_side_files, edit_config
from glmq.checkpoint.writer import ShardWriter
from glmq.model.config import parse_config
from glmq.model.tiny import TINY_CHECKPOINT
from glmq.spec import FloatDtype, Form, QuantType

QUANTIZED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj")


def write_w8a8s(
    folder: Path,
    *,
    heads: int = 8,
    kv_heads: int = 2,
    vocab: int = 204,
    layers: int = 2,
    quantized: tuple[str, ...] = QUANTIZED,
    shard_bytes: int | None = None,
) -> Path:
    """Write a checkpoint as `glmq quantize` does, but with random integers, scales and biases; sizes divide by 4."""
    config = json.loads((TINY_CHECKPOINT / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": 16 * heads, "intermediate_size": 88, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "num_hidden_layers": layers, "vocab_size": vocab,
        "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    config["text_config"]["rope_scaling"] |= {"mrope_section": [1, 1, 2]}  # half of 16, in pairs
    config["vision_config"] |= {"depth": 2, "hidden_size": 24, "out_hidden_size": 16 * heads, "intermediate_size": 44}
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {}
    linears: dict[str, QuantType] = {}
    parsed = parse_config(config, "config.json")
    for name, shape in parsed.family.shapes(parsed).items():
        base, _, suffix = name.rpartition(".")
        if suffix == "weight" and base.endswith(quantized) and "language_model" in base:
            linears[base] = QuantType.W8A8S
            tensors |= random_linear(base, *shape, generator)
        else:
            tensors[name] = torch.randn(shape, generator=generator).half()
    for norm in parsed.family.rms_norms(parsed):
        tensors[f"{norm}.bias"] = torch.zeros(tensors[f"{norm}.weight"].shape)
    specs = [TensorSpec(name, dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    with ShardWriter(plan_shards(specs, "quant_model_weight_w8a8s", shard_bytes), folder) as sink:
        for name, tensor in tensors.items():
            sink.write(name, tensor)
    edited = edit_config(config, dtype=FloatDtype.FP16, quant_type=QuantType.W8A8S, settings=None)
    write_json(folder / "config.json", edited, indent=4)
    copy_side_files(TINY_CHECKPOINT, folder)
    types = tensor_types(tensors, linears, model_quant_type=QuantType.W8A8S, form=Form.ASCEND_V1)
    write_description(folder, Description("W8A8S", "1.0.0", None, types | parsed.family.vllm_aliases(types)))
    (folder / "glmq_report.csv").write_text("name,error\n")
    return folder


def random_linear(name: str, rows: int, cols: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The tensors of a quantized linear; q, k and v of a layer get the same input scale and offset."""
    weight = torch.randn(rows, cols, generator=generator) * torch.rand(cols, generator=generator) * 6
    scale = (torch.rand(rows, generator=generator) + 0.01) / 1000
    return {
        f"{name}.weight": weight.round().clamp(-128, 127).to(torch.int8),
        f"{name}.deq_scale": scale.view(torch.int32).long(),
        f"{name}.quant_bias": torch.randint(-(2**31), 2**31, (rows,), generator=generator).int(),
        f"{name}.input_scale": torch.tensor([0.0123456789]),
        f"{name}.input_offset": torch.tensor([-17.0]),
    }


STAND_IN = """#!{python} -IS
# Does what the vendor's compress program does for the outside: eleven arguments, three files. Its "compression" is zlib's.
import os, signal, struct, sys, time, zlib
mode = {mode!r}
if len(sys.argv) != 12:
    sys.exit(255)
k1, n1, tight, k_value, n_value, kind, tiling = map(int, sys.argv[1:8])
source, weight, index, info = sys.argv[8:]
data = open(source, "rb").read()
if len(data) != k1 * n1 * 512 or (tight, k_value, n_value, kind, tiling) != (1, 1, 1, 0, 0):
    sys.exit(255)
if mode == "fails":
    print("GE init failed")
    sys.exit(255)
if mode == "hangs":
    time.sleep(600)
if mode == "kills rank 1" and "part1-of-2" in source:
    os.kill(os.getppid(), signal.SIGKILL)
packed = zlib.compress(data, 1)
if mode == "empty weight":
    packed = b""
if mode == "large weight":
    packed = bytes(len(data) + 1)
places = 8 * -(-n1 // 8) * -(-k1 // 8)
if mode == "short index":
    places -= 1
tilings = (8, 4) if mode == "other tiling" else (8, 8)
numbers = struct.pack("<3I", *tilings, len(packed) + (mode == "wrong size"))
if mode == "short info":
    numbers = numbers[:8]
print("graph built")
if mode == "writes nothing":
    sys.exit(0)
if mode != "no weight":
    open(weight, "wb").write(packed)
if mode != "no index":
    open(index, "wb").write(bytes(i % 251 for i in range(places)))
if mode == "linked info":
    open(info + "2", "wb").write(numbers)
    os.symlink(info + "2", info)
elif mode != "no info":
    open(info, "wb").write(numbers)
"""


def write_stand_in(folder: Path, mode: str = "honest") -> Path:
    """A stand-in that keeps the program's contract (`honest`) or breaks the point of it that `mode` names."""
    path = folder / "compress_excutor"
    path.write_text(STAND_IN.format(python=sys.executable, mode=mode))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
