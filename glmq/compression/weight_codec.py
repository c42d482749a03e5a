"""The two ways to store a quantized weight, behind one small interface.

`ascend` (executor.py): the vendor's program; what it writes is the W8A8SC that the serving engine runs.
`portable` (here): our own lossless codec; for storage and transport, and no engine reads it. So that none ever tries, the
blob's tensor is called `.weight.gqsc`, never `.weight`, and its file `glmq_weight_w8a8s.gqsc.safetensors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from glmq.checkpoint.json_file import write_whole
from glmq.checkpoint.layout import TensorSpec
from glmq.codec.codec import at_most_bytes, encode, read_info
from glmq.compression.manifest import CodecKind

BLOB_SUFFIX: Final = ".gqsc"
"""Follows the name of the weight that the blob holds."""


@dataclass(frozen=True, slots=True)
class EncodedTensor:
    """One tensor that stands for a compressed weight; its bytes wait in a file."""

    suffix: str
    """After the linear's name, e.g. `.weight`."""
    dtype: str
    """Safetensors code."""
    shape: tuple[int, ...]
    path: Path

    def spec(self, linear: str) -> TensorSpec:
        """The tensor as it will be written for `linear`."""
        return TensorSpec(f"{linear}{self.suffix}", self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Compressed:
    """One compressed weight."""

    tensors: tuple[EncodedTensor, ...]
    class_gain_bits: float | None
    """What tables by column class save against one table, bits per weight; None if the codec has no classes."""


class Codec(Protocol):
    """Compresses one weight. May be called from several threads at once."""

    @property
    def kind(self) -> CodecKind: ...

    def check(self, name: str, rows: int, cols: int) -> None:
        """Raise CodecError if a weight of this size cannot be compressed; called for all before the first is."""
        ...

    def at_most_bytes(self, rows: int, cols: int) -> int:
        """Bytes to keep free for a compressed weight of this size."""
        ...

    def compress(self, name: str, matrix: NDArray[np.int8], folder: Path) -> Compressed:
        """Compress int8 [N, K] into files in `folder`, which is empty; `name` is for error messages."""
        ...

    def stop(self) -> None:
        """End what other threads are doing, as far as it can be ended; their calls raise."""
        ...


class PortableCodec:
    """Our own codec."""

    @property
    def kind(self) -> CodecKind:
        return CodecKind.PORTABLE

    def check(self, name: str, rows: int, cols: int) -> None:
        """Every weight of a model can be compressed."""

    def at_most_bytes(self, rows: int, cols: int) -> int:
        """See Codec: what no weight of this size exceeds."""
        return at_most_bytes(rows, cols)

    def compress(self, name: str, matrix: NDArray[np.int8], folder: Path) -> Compressed:
        """See Codec. Raises SpaceError if the disk is full."""
        blob = encode(matrix)
        info = read_info(blob)
        path = folder / "weight"
        write_whole(path, blob)
        gain = 0.0
        if info.entropy_bits is not None and info.class_entropy_bits is not None:
            gain = info.entropy_bits - info.class_entropy_bits
        return Compressed((EncodedTensor(f".weight{BLOB_SUFFIX}", "U8", (len(blob),), path),), gain)

    def stop(self) -> None:
        """Nothing to end: one weight takes less than a second."""
