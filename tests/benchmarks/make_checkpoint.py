"""Write a GLM-4.1V checkpoint of any size with random weights: real names, shapes, config and side files.

    python tests/benchmarks/make_checkpoint.py OUT --size 9b
    python tests/benchmarks/make_checkpoint.py OUT --hidden 1024 --layers 2

Weights are normal numbers with lognormal row scales; norms have a few outlier channels, as large models have. Tokenizer and
processor files are the embedded tiny model's, so prompts have real token ids and the rest of the vocabulary is never used.
"""

from __future__ import annotations

import argparse
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from glmq.checkpoint.json_file import JsonObject, read_json_object, write_json
from glmq.checkpoint.layout import TensorSpec, plan_shards
from glmq.checkpoint.sidecar import copy_side_files
from glmq.checkpoint.writer import ShardWriter
from glmq.model.config import parse_config
from glmq.model.tiny import TINY_CHECKPOINT

GB = 10**9
POOL_ROWS = 4096


@dataclass(frozen=True)
class Size:
    """The sizes of a GLM-4.1V; the defaults are a very small one."""

    hidden: int = 64
    intermediate: int = 96
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 1536
    vision_hidden: int = 32
    vision_depth: int = 1
    vision_heads: int = 2
    image_size: int = 112


SIZES = {
    "tiny": Size(),
    "9b": Size(4096, 13696, 40, 32, 2, 151552, 1536, 24, 12, 336),
}


def text_size(hidden: int, layers: int) -> Size:
    """A model of that text width with a small vision tower, proportioned like the real one."""
    return Size(
        hidden=hidden,
        intermediate=hidden * 107 // 32 // 32 * 32,
        layers=layers,
        heads=max(2, hidden // 128),
        kv_heads=2,
        vision_hidden=64,
        vision_depth=2,
    )


def config_of(size: Size) -> JsonObject:
    """The hub-like config.json of a model of that size."""
    config = read_json_object(TINY_CHECKPOINT / "config.json")
    head_dim = size.hidden // size.heads
    half = head_dim // 4  # half of the rotated half: sections in the real model's proportion 8 : 12 : 12
    section = [half // 4, (half - half // 4) // 2, half - half // 4 - (half - half // 4) // 2]
    text = dict(config["text_config"]) | {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocab,
        "max_position_embeddings": 65536,
        "rope_scaling": {"rope_type": "default", "mrope_section": section},
    }
    vision = dict(config["vision_config"]) | {
        "hidden_size": size.vision_hidden,
        "depth": size.vision_depth,
        "num_heads": size.vision_heads,
        "out_hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "image_size": size.image_size,
    }
    return config | {"text_config": text, "vision_config": vision}


def make_checkpoint(directory: Path, size: Size, *, seed: int = 0, shard_bytes: int = 5 * GB) -> None:
    """Write the checkpoint, bf16, in shards named like the hub's.

    Args:
        directory: created; must not hold a checkpoint yet.
        seed: other seeds give other weights.
        shard_bytes: upper size of one shard.
    """
    config = config_of(size)
    parsed = parse_config(config, "config.json")
    shapes = parsed.family.shapes(parsed)
    specs = [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()]
    with ShardWriter(plan_shards(specs, "model", shard_bytes), directory) as sink:
        for name, shape in shapes.items():
            generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
            if len(shape) == 2 and shape[0] > POOL_ROWS:
                # Large matrices repeat a pool of rows under fresh row scales: disk speed, and still no two rows alike.
                pool = torch.randn(POOL_ROWS, shape[1], generator=generator).mul_(shape[1] ** -0.5)
                for start in range(0, shape[0], POOL_ROWS):
                    rows = min(POOL_ROWS, shape[0] - start)
                    scale = torch.randn(rows, 1, generator=generator).mul_(0.3).exp_()
                    sink.write_rows(name, start, (pool[:rows].roll(start // POOL_ROWS, 1) * scale).bfloat16())
            else:
                sink.write(name, _values(name, shape, generator).bfloat16())
    write_json(directory / "config.json", config, indent=2)
    copy_side_files(TINY_CHECKPOINT, directory)


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight") or ".norm" in name or "layernorm" in name:
        values = torch.randn(shape, generator=generator).mul_(0.1).add_(1)
        if len(shape) == 1 and name.endswith("weight") and "language_model" in name:
            outliers = torch.randperm(shape[0], generator=generator)[: max(1, shape[0] // 256)]
            values[outliers] *= 10
        return values
    if len(shape) == 1:
        return torch.randn(shape, generator=generator).mul_(0.02)
    fan_in = math.prod(shape[1:])
    values = torch.randn(shape, generator=generator).mul_(fan_in**-0.5)
    if len(shape) == 2:
        values *= torch.randn(shape[0], 1, generator=generator).mul_(0.3).exp_()
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES))
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    size = SIZES[arguments.size] if arguments.size else text_size(arguments.hidden, 2)
    if arguments.layers:
        size = replace(size, layers=arguments.layers)
    make_checkpoint(arguments.directory, size, seed=arguments.seed)


if __name__ == "__main__":
    main()
