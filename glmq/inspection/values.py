"""The values of one stored tensor: range, spread, entropy, zeros, outliers, a histogram. Read in pieces."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from glmq.checkpoint.header import DTYPE_BYTES, Header
from glmq.checkpoint.reader import Checkpoint, torch_dtype
from glmq.inspection.folder import StoredTensor
from glmq.numerics.metrics import entropy_bits
from glmq.progress import resident_bytes
from glmq.records import BytesDone

if TYPE_CHECKING:
    from glmq.inspection.listing import TensorRow

BINS: Final = 32
OUTLIER_DEVIATIONS: Final = 4.0
PIECE_BYTES: Final = 16 * 2**20
_CODES_16: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class TensorValues:
    """What is stored in one tensor; of compressed bytes, the bytes."""

    minimum: float
    maximum: float
    mean: float
    std: float
    entropy_bits: float | None
    """Zero-order entropy of the stored codes, bits per value: of 8 and 16 bit dtypes only."""
    zero_share: float
    outlier_share: float
    """Share of values more than 4 standard deviations away from the mean."""
    nonfinite: int
    """NaN and infinite values; they are left out of everything else."""
    histogram: tuple[int, ...]
    """Counts in BINS equal bins from minimum to maximum."""


def read_values(rows: Sequence[TensorRow]) -> Generator[BytesDone, None, dict[str, TensorValues]]:
    """The values of some tensors, a few megabytes in memory.

    Yields:
        A record after each tensor.

    Returns:
        By tensor name.

    Raises:
        CheckpointError: a file that ends early or cannot be opened.
    """
    found: dict[str, TensorValues] = {}
    for row in rows:
        found[row.name] = tensor_values(row.tensor)
        yield BytesDone(row.name, row.nbytes, resident_bytes())
    return found


def tensor_values(stored: StoredTensor) -> TensorValues:
    """Read the tensor and describe its values; float64 sums.

    deq_scale in int64 is read as the float32 numbers whose bits it holds.

    Raises:
        CheckpointError: the file changed or cannot be read.
    """
    dtype = torch_dtype(stored.info.dtype)
    if DTYPE_BYTES[stored.info.dtype] <= 2 and dtype != torch.bool:
        values, counts = _count_codes(stored, dtype)
        return _from_counts(values, counts)
    pieces = [piece.unique(return_counts=True) for piece in _numbers(stored)]
    values, inverse = torch.cat([v for v, _ in pieces] or [torch.zeros(0, dtype=torch.float64)]).unique(
        return_inverse=True
    )
    counts = torch.zeros(values.numel(), dtype=torch.int64)
    if pieces:
        counts.index_add_(0, inverse, torch.cat([c for _, c in pieces]))
    return _from_counts(values, counts, has_entropy=False)


def _count_codes(stored: StoredTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every value of an 8 or 16 bit dtype, float64, and how often it is stored, int64."""
    wide = DTYPE_BYTES[stored.info.dtype] == 2
    size = _CODES_16 if wide else 256
    counts = torch.zeros(size, dtype=torch.int64)
    for piece in _pieces(stored):
        codes = piece.reshape(-1).view(torch.int16 if wide else torch.uint8).int()
        counts += torch.bincount(codes & (size - 1), minlength=size)
    order = torch.arange(size)
    every = order.to(torch.int16 if wide else torch.uint8).view(dtype).double()
    return every, counts


def _from_counts(values: Tensor, counts: Tensor, *, has_entropy: bool = True) -> TensorValues:
    seen = counts > 0
    values, counts = values[seen], counts[seen]
    finite = values.isfinite()
    nonfinite = int(counts[~finite].sum())
    entropy = entropy_bits(counts) if has_entropy else None
    values, counts = values[finite], counts[finite]
    total = int(counts.sum())
    if total == 0:
        return TensorValues(0.0, 0.0, 0.0, 0.0, entropy, 0.0, 0.0, nonfinite, (0,) * BINS)
    weights = counts.double() / total
    low, high = float(values.min()), float(values.max())
    mean = float((values * weights).sum())
    std = math.sqrt(float(((values - mean).square() * weights).sum()))
    width = (high - low) / BINS
    bins = ((values - low) / width).long().clamp_(0, BINS - 1) if width else torch.zeros_like(counts)
    histogram = torch.zeros(BINS, dtype=torch.int64).index_add_(0, bins, counts)
    far = (values - mean).abs() > OUTLIER_DEVIATIONS * std
    return TensorValues(
        minimum=low,
        maximum=high,
        mean=mean,
        std=std,
        entropy_bits=entropy,
        zero_share=float(weights[values == 0].sum()),
        outlier_share=float(weights[far].sum()),
        nonfinite=nonfinite,
        histogram=tuple(histogram.tolist()),
    )


def _numbers(stored: StoredTensor) -> Iterator[Tensor]:
    """The values as float64 vectors."""
    is_bits = stored.name.endswith(".deq_scale") and stored.info.dtype == "I64"
    for piece in _pieces(stored):
        flat = piece.reshape(-1)
        yield flat.to(torch.int32).view(torch.float32).double() if is_bits else flat.double()


def _pieces(stored: StoredTensor) -> Iterator[Tensor]:
    """The stored values as vectors of PIECE_BYTES: what is computed with them takes eight times as much."""
    info = stored.info
    header = Header({info.name: info}, {}, b"", 0)  # of this tensor alone: it was checked when the folder was scanned
    with Checkpoint(stored.file.parent, {stored.file: header}) as checkpoint:
        for _, piece in checkpoint.pieces(info.name):
            yield from piece.reshape(-1).split(max(1, PIECE_BYTES // piece.element_size()))
