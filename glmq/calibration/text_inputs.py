"""What enters the text layers, kept with the statistics for quantizing layers one after the other (`quantize --propagation`).

text_inputs-NNNN.safetensors    of sample NNNN, in the order in which calibration ran them
    text_inputs.NNNN.hidden     [1, tokens, width] in the compute dtype: embeddings, with what the vision tower made of images
    text_inputs.NNNN.positions  int32 [3, tokens]: rotary positions for time, height and width
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
import xxhash
from safetensors.torch import load
from torch import Tensor

from glmq.checkpoint.layout import TensorSpec, bare_file_bytes
from glmq.checkpoint.writer import write_tensors
from glmq.errors import StatisticsError

BEGIN: Final = "text_inputs"
"""Of the names of files and tensors."""


def name_of(sample: int) -> str:
    """Of that sample's file."""
    return f"{BEGIN}-{sample:04d}.safetensors"


def among(files: Mapping[str, str]) -> dict[str, str]:
    """Those of the files, with what is said of them."""
    return {name: value for name, value in files.items() if name.startswith(f"{BEGIN}-")}


def write(folder: Path, sample: int, hidden: Tensor, positions: Tensor) -> str:
    """Write one sample's file; returns its xxh3-128."""
    stem = _stem(sample)
    tensors = {f"{stem}.hidden": hidden.cpu().contiguous(), f"{stem}.positions": positions.cpu().to(torch.int32)}
    return write_tensors(folder / name_of(sample), tensors)


def file_bytes(sample: int, tokens: int, width: int, dtype: str) -> int:
    """Size of one sample's file; `dtype` is the safetensors code of the hidden states."""
    stem = _stem(sample)
    specs = [
        TensorSpec(f"{stem}.hidden", dtype, (1, tokens, width)),
        TensorSpec(f"{stem}.positions", "I32", (3, tokens)),
    ]
    return bare_file_bytes(specs)


def read(folder: Path, files: Mapping[str, str]) -> list[tuple[Tensor, Tensor]]:
    """Hidden states and positions of every sample, in order.

    Args:
        files: xxh3-128 by name, as the manifest has them.

    Raises:
        StatisticsError: there are none, or a file is not as it was written.
    """
    if not files:
        raise StatisticsError(
            f"{folder}: these statistics do not hold what enters the text layers, which --propagation needs; run `glmq "
            "calibrate --text-inputs`, or leave --propagation out"
        )
    found = []
    for sample in range(len(files)):
        path = folder / name_of(sample)
        content = path.read_bytes() if path.is_file() else b""
        if xxhash.xxh3_128_hexdigest(content) != files.get(path.name):
            raise StatisticsError(
                f"{path}: is missing or not as it was written; copy the folder again or run `glmq calibrate` again"
            )
        tensors = load(content)
        found.append((tensors[f"{_stem(sample)}.hidden"], tensors[f"{_stem(sample)}.positions"].long()))
    return found


def _stem(sample: int) -> str:
    return f"{BEGIN}.{sample:04d}"
