"""What compressing would write and need: from headers, samples of the weights, and one weight compressed for trial."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glmq.checkpoint.reader import raw_bytes
from glmq.checkpoint.sidecar import list_side_files
from glmq.codec.codec import zero_order_entropy
from glmq.compression.layouts import Layout
from glmq.compression.manifest import CodecKind
from glmq.compression.shard import RankTensor, read_matrix, read_pieces, read_sample
from glmq.compression.source import Source
from glmq.compression.stream import weight_file
from glmq.compression.weight_codec import Codec
from glmq.model.family import Area

PROCESS_BYTES: Final = 230 * 2**20
"""Python with torch loaded; measured on Linux x86-64."""
MATRIX_COPIES: Final = 4
"""What one weight needs while it is compressed, in its own sizes: itself, its tiles' payloads, the file, and room beside."""
SAMPLED_ROWS: Final = 64


@dataclass(frozen=True, slots=True)
class WeightEstimate:
    """One weight of one rank."""

    rank: int
    name: str
    rows: int
    cols: int
    entropy_bits: float
    """Zero-order entropy of some of its rows, bits per weight."""
    estimated_bytes: int
    """Stored bytes, from that entropy and what the codec made of the trial's."""


@dataclass(frozen=True, slots=True)
class FileEstimate:
    """The weight file of one rank."""

    rank: int
    path: str
    kept_bytes: int
    """Exactly, of the tensors that are stored as they are."""
    weight_bytes: int
    """Exactly, of the int8 weights before compression."""
    estimated_bytes: int
    """Of the whole file."""
    at_most_bytes: int
    """Of all its tensors, if no weight can be compressed."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One weight of the input, read and compressed as the run would."""

    name: str
    rows: int
    cols: int
    bits_per_weight: float
    entropy_bits: float
    seconds: float


@dataclass(frozen=True, slots=True)
class AreaEstimate:
    """Bytes by area of the model, all planned ranks together."""

    area: Area
    before: int
    """Exactly."""
    after: int
    """Estimated."""


@dataclass(frozen=True, slots=True)
class CompressionPlan:
    """What a run would write and need."""

    codec: CodecKind
    layout: Layout
    world: int
    weights: tuple[WeightEstimate, ...]
    areas: tuple[AreaEstimate, ...]
    files: tuple[FileEstimate, ...]
    side_bytes: int
    """Exactly, of the small files that are copied."""
    disk_bytes: int
    """That must be free, see `disk_bytes`."""
    peak_bytes: int
    """Estimated resident memory."""
    trial: Trial
    seconds: float
    """Estimated, beside the time that the disk takes to write."""
    obstacles: tuple[str, ...] = ()
    """What lies where the output would, and stops a real run: a sentence each."""

    @property
    def estimated_bytes(self) -> int:
        """Of all weight files."""
        return sum(file.estimated_bytes for file in self.files)


def disk_bytes(plans: Mapping[int, Sequence[RankTensor]], codec: Codec) -> int:
    """Bytes that a run over `plans` may have on the disk at once, side files aside.

    Every weight file at its largest, and the largest weight again: each waits in a file of its own until it is copied.
    """
    files = sum(_stored_at_most(tensor, codec) for tensors in plans.values() for tensor in tensors)
    return files + max(
        (_stored_at_most(tensor, codec) for tensors in plans.values() for tensor in tensors if tensor.is_matrix),
        default=0,
    )


def make_compression_plan(
    source: Source, plans: Mapping[int, Sequence[RankTensor]], codec: Codec, layout: Layout, world: int, jobs: int
) -> CompressionPlan:
    """Collect what can be known before anything is written; the trial's file lives in the system's temporary folder.

    Args:
        source: what would be compressed.
        plans: rank -> its tensors, from plan_ranks.
        codec: of the weights.
        layout: from choose_layout.
        world: number of ranks.
        jobs: weights compressed at a time.

    Raises:
        CheckpointError, CodecError, DeviceError: as compressing would.
    """
    everything = [(rank, tensor) for rank, tensors in plans.items() for tensor in tensors]
    matrices = [(rank, tensor) for rank, tensor in everything if tensor.is_matrix]
    for _, tensor in matrices:
        codec.check(tensor.spec.name.removesuffix(".weight"), *tensor.spec.shape)
    trial = _try_weight(source, sorted((tensor for _, tensor in matrices), key=_by_size)[len(matrices) // 2], codec)
    factor = trial.bits_per_weight / trial.entropy_bits if trial.entropy_bits else 1.0
    weights = []
    for rank, tensor in matrices:
        rows, cols = tensor.spec.shape
        entropy = zero_order_entropy(read_sample(source.checkpoint, tensor, SAMPLED_ROWS))
        stored = min(round(rows * cols * entropy * factor / 8), _stored_at_most(tensor, codec))
        weights.append(WeightEstimate(rank, tensor.spec.name.removesuffix(".weight"), rows, cols, entropy, stored))
    before, after = dict.fromkeys(Area, 0), dict.fromkeys(Area, 0)
    estimates = {(weight.rank, f"{weight.name}.weight"): weight.estimated_bytes for weight in weights}
    for rank, tensor in everything:
        area = source.config.family.area(tensor.source or tensor.spec.name)
        before[area] += tensor.spec.nbytes
        after[area] += estimates.get((rank, tensor.spec.name), tensor.spec.nbytes)
    files = []
    for rank, tensors in plans.items():
        kept = sum(tensor.spec.nbytes for tensor in tensors if not tensor.is_matrix)
        stored = sum(weight.estimated_bytes for weight in weights if weight.rank == rank)
        whole = sum(tensor.spec.nbytes for tensor in tensors)
        at_most = sum(_stored_at_most(tensor, codec) for tensor in tensors)
        path = weight_file(codec.kind, layout, rank, world).as_posix()
        files.append(FileEstimate(rank, path, kept, whole - kept, kept + stored, at_most))
    at_a_time = min(jobs, len(matrices))
    largest = max(tensor.spec.nbytes for _, tensor in matrices)
    per_weight = trial.seconds / (trial.rows * trial.cols)
    weight_seconds = per_weight * sum(weight.rows * weight.cols for weight in weights) / at_a_time
    directory = source.checkpoint.directory
    return CompressionPlan(
        codec=codec.kind,
        layout=layout,
        world=world,
        weights=tuple(weights),
        areas=tuple(AreaEstimate(area, before[area], after[area]) for area in Area),
        files=tuple(files),
        side_bytes=sum((directory / name).stat().st_size for name in list_side_files(directory)),
        disk_bytes=disk_bytes(plans, codec),
        peak_bytes=PROCESS_BYTES + MATRIX_COPIES * at_a_time * largest,
        trial=trial,
        seconds=weight_seconds + _copying_seconds(source, [tensor for _, tensor in everything if not tensor.is_matrix]),
    )


def _by_size(tensor: RankTensor) -> tuple[int, str]:
    return tensor.spec.nbytes, tensor.spec.name


def _stored_at_most(tensor: RankTensor, codec: Codec) -> int:
    return codec.at_most_bytes(*tensor.spec.shape) if tensor.is_matrix else tensor.spec.nbytes


def _try_weight(source: Source, tensor: RankTensor, codec: Codec) -> Trial:
    name = tensor.spec.name.removesuffix(".weight")
    with tempfile.TemporaryDirectory(prefix="glmq-trial-") as folder:
        started = time.perf_counter()
        matrix = read_matrix(source.checkpoint, tensor)
        result = codec.compress(name, matrix, Path(folder))
        entropy = zero_order_entropy(matrix)
        seconds = time.perf_counter() - started
    rows, cols = matrix.shape
    stored = sum(item.spec(name).nbytes for item in result.tensors)
    return Trial(name, rows, cols, 8 * stored / matrix.size, entropy, seconds)


def _copying_seconds(source: Source, tensors: Sequence[RankTensor]) -> float:
    """Estimated for reading and casting `tensors`, from a piece of the largest."""
    largest = max(tensors, key=_by_size)
    started = time.perf_counter()
    piece = len(raw_bytes(next(read_pieces(source.checkpoint, largest))))
    return (time.perf_counter() - started) / piece * sum(tensor.spec.nbytes for tensor in tensors)
