"""compress_checkpoint(): rank after rank, a few weights in memory at a time.

A folder of the engine's codec, in the layout of MindIE:

    config.json, tokenizer, processor and chat template files
    part{rank}-of-{world}/quant_model_weight_w8a8sc.safetensors, quant_model_description.json

and in that of vLLM-Ascend:

    config.json and side files, quant_model_description.json, model-rank-{rank}-part-0.safetensors

A folder of the portable codec, which no engine shall mistake for its own:

    config.json and side files, but no description
    part{rank}-of-{world}/glmq_weight_w8a8s.gqsc.safetensors
    glmq_source/       what else the un-sharded folder had (origin.py), so that the very same files can be restored

With one rank the portable codec keeps the names and cuts of the un-sharded checkpoint; with several it holds the parts that
MindIE's layout asks for. Every folder also has a manifest (manifest.py) and a report (report.py).
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import torch

from glmq.checkpoint.checksums import digest_of
from glmq.checkpoint.description import ASCEND_V1_VERSION, Description, write_description
from glmq.checkpoint.disk import make_directory
from glmq.checkpoint.json_file import write_json, write_whole
from glmq.checkpoint.layout import ShardPlan, TensorSpec, plan_shards
from glmq.checkpoint.reader import Checkpoint, torch_dtype
from glmq.checkpoint.sidecar import copy_side_files, edit_config
from glmq.checkpoint.writer import ShardWriter
from glmq.codec.codec import zero_order_entropy
from glmq.compression.layouts import Layout, Unsharded, rank_file_types, rank_tensors, vllm_types
from glmq.compression.manifest import CodecKind, Manifest, RankFile, record_files, write_manifest
from glmq.compression.origin import keep_origin
from glmq.compression.shard import RankTensor, check_world, read_matrix, read_pieces
from glmq.compression.source import Source
from glmq.compression.weight_codec import BLOB_SUFFIX, Codec, Compressed
from glmq.engines import Engine
from glmq.errors import UsageError
from glmq.model.config import FAMILY
from glmq.model.family import Area
from glmq.progress import resident_bytes
from glmq.spec import FloatDtype, QuantType
from glmq.threads import run_ahead

log = logging.getLogger(__name__)

PORTABLE_STEM: Final = f"glmq_weight_w8a8s{BLOB_SUFFIX}"
ASCEND_STEM: Final = "quant_model_weight_w8a8sc"


@dataclass(frozen=True, slots=True)
class Step:
    """Some bytes are written: a step of the progress bar."""

    name: str
    rank: int
    nbytes: int
    """Uncompressed bytes of this step."""
    resident_bytes: int
    """Resident memory of the process after it."""


@dataclass(frozen=True, slots=True)
class CompressedLinear:
    """What compressing one weight of one rank did: a step of the progress bar and a row of the report."""

    rank: int
    name: str
    rows: int
    cols: int
    stored_bytes: int
    """Of everything that the codec stores for the weight."""
    entropy_bits: float
    """Zero-order entropy of the integers, bits per weight."""
    class_gain_bits: float | None
    """What tables by column class save against one table, bits per weight; None for the engine's codec."""
    seconds: float
    resident_bytes: int
    """Resident memory of the process after it."""

    @property
    def weights(self) -> int:
        return self.rows * self.cols

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.stored_bytes / self.weights

    @property
    def ratio(self) -> float:
        """Bytes before divided by bytes after."""
        return self.weights / self.stored_bytes


@dataclass(frozen=True, slots=True)
class RankFileWritten:
    """The weight file of one rank is whole."""

    record: RankFile
    before: Mapping[Area, int]
    """Bytes of the rank's tensors before compression, by area of the model."""
    after: Mapping[Area, int]
    """The same as stored."""


Record: TypeAlias = Step | CompressedLinear | RankFileWritten


def choose_layout(codec: CodecKind, layout: Engine, world: int) -> Layout:
    """The layout that is written when `layout` was asked for.

    Raises:
        UsageError: an engine that reads no parts, or a portable folder in the layout of vLLM-Ascend, which could only be
            mistaken for an engine's.
    """
    if not layout.spec.world_sizes:
        raise UsageError(f"--layout {layout.value}: {layout.spec.title} reads un-sharded checkpoints; choose another")
    if codec is CodecKind.ASCEND:
        return layout
    if layout is Engine.VLLM_ASCEND:
        raise UsageError("--layout vllm-ascend: exists only with --codec ascend; no engine reads the portable form")
    return Unsharded.SOURCE if world == 1 else layout


def plan_ranks(source: Source, layout: Layout, world: int, ranks: Sequence[int]) -> dict[int, list[RankTensor]]:
    """Every tensor of the given ranks, before compression.

    Raises:
        UsageError: a world size that does not divide the model.
        CheckpointError: a source tensor that the layout cannot take.
    """
    if not isinstance(layout, Unsharded):
        check_world(source.config, world, layout)
    return {rank: rank_tensors(source.checkpoint, source.config, layout, rank, world) for rank in ranks}


def planned_bytes(plans: Mapping[int, Sequence[RankTensor]]) -> int:
    """Uncompressed bytes of all tensors of all planned ranks."""
    return sum(tensor.spec.nbytes for tensors in plans.values() for tensor in tensors)


def compress_checkpoint(
    source: Source,
    plans: Mapping[int, Sequence[RankTensor]],
    codec: Codec,
    layout: Layout,
    world: int,
    folder: Path,
    jobs: int,
) -> Generator[Record, None, None]:
    """Write the weight files of the planned ranks (and MindIE's descriptions beside them) into `folder`.

    Args:
        source: what is compressed.
        plans: rank -> its tensors, from plan_ranks.
        codec: of the weights of quantized linears.
        layout: from choose_layout.
        world: number of ranks.
        folder: exists; not yet under its final name.
        jobs: weights compressed at a time.

    Raises:
        CheckpointError: values that the engine cannot hold, or a file that changes while it is read.
        CodecError, DeviceError: a weight that cannot be compressed.
        SpaceError: the disk fills up.
    """
    for tensor in (tensor for tensors in plans.values() for tensor in tensors if tensor.is_matrix):
        codec.check(tensor.spec.name.removesuffix(".weight"), *tensor.spec.shape)
    for rank, tensors in plans.items():
        directory, stem = _place(folder, codec.kind, layout, rank, world)
        make_directory(directory)
        work = directory / f".compressed-{rank}"
        work.mkdir()
        compressed: dict[str, Compressed] = {}
        for linear, result in _compress_matrices(source.checkpoint, tensors, codec, work, rank, jobs):
            compressed[f"{linear.name}.weight"] = result
            log.info("%s rank %d: %.3f bits per weight", linear.name, linear.rank, linear.bits_per_weight)
            yield linear
        specs = [spec for tensor in tensors for spec in _stored_specs(tensor, compressed)]
        plan = plan_shards(specs, stem, None)
        with ShardWriter(plan, directory) as sink:
            for tensor in tensors:
                name, at = tensor.spec.name, 0
                if tensor.is_matrix:
                    _write_stored(sink, name, compressed[name])
                    continue
                for piece in read_pieces(source.checkpoint, tensor):
                    sink.write_rows(name, at, piece)
                    at += piece.shape[0]
                    yield Step(name, rank, piece.nbytes, resident_bytes())
        shutil.rmtree(work)
        if codec.kind is CodecKind.ASCEND and layout is Engine.MINDIE:
            linears = [name.removesuffix(".weight") for name in compressed]
            describe_rank_file(directory, [spec.name for spec in specs], linears, QuantType.W8A8SC)
        matrices = _blob_shapes(tensors, compressed) if codec.kind is CodecKind.PORTABLE else {}
        yield _part_written(folder, directory, rank, plan, sink.checksums, matrices, tensors, compressed)


def describe_rank_file(directory: Path, names: Sequence[str], linears: Sequence[str], quant_type: QuantType) -> None:
    """Write the description of a part in MindIE's layout: tensors `names`, quantized `linears`, W8A8SC or W8A8S."""
    types = rank_file_types(names, linears, compressed=quant_type.spec.is_compressed)
    write_description(directory, Description(quant_type.value, ASCEND_V1_VERSION, None, types))


def finish_folder(
    source: Source, codec: CodecKind, layout: Layout, world: int, parts: Sequence[RankFile], folder: Path
) -> None:
    """Write everything but the weights into `folder`: config.json, side files, the description, and last the manifest.

    Args:
        source: what was compressed.
        codec: whose.
        layout: from choose_layout.
        world: number of ranks.
        parts: of all ranks, in their order.
        folder: holds the weight files and the report.

    Raises:
        CheckpointError: a side file cannot be read.
        SpaceError: the disk is full.
    """
    directory = source.checkpoint.directory
    copy_side_files(directory, folder)
    if layout is Unsharded.SOURCE:
        write_whole(folder / "config.json", (directory / "config.json").read_bytes())
        keep_origin(source.checkpoint, folder, None)
    else:
        edited = edit_config(source.config.nested, dtype=FloatDtype.FP16, quant_type=QuantType.W8A8SC, settings=None)
        write_json(folder / "config.json", edited, indent=4)
        if codec is CodecKind.PORTABLE:
            keep_origin(source.checkpoint, folder, list(plan_ranks(source, layout, world, range(world)).values()))
    if layout is Engine.VLLM_ASCEND:
        types = vllm_types(source.description.tensors)
        write_description(folder, Description(QuantType.W8A8SC.value, ASCEND_V1_VERSION, None, types))
    files = record_files(folder, exclude=[part.file for part in parts])
    fingerprint = source.checkpoint.fingerprint()
    write_manifest(folder, Manifest(codec, layout, world, fingerprint, tuple(parts), files))


def _place(folder: Path, codec: CodecKind, layout: Layout, rank: int, world: int) -> tuple[Path, str]:
    """Folder and stem of a rank's weight file."""
    if layout is Engine.VLLM_ASCEND:
        return folder, f"model-rank-{rank}-part-0"
    return folder / f"part{rank}-of-{world}", ASCEND_STEM if codec is CodecKind.ASCEND else PORTABLE_STEM


def weight_file(codec: CodecKind, layout: Layout, rank: int, world: int) -> Path:
    """Where a rank's weight file lies in the output folder."""
    directory, stem = _place(Path(), codec, layout, rank, world)
    return directory / f"{stem}.safetensors"


def _compress_matrices(
    source: Checkpoint, tensors: Sequence[RankTensor], codec: Codec, work: Path, rank: int, jobs: int
) -> Iterator[tuple[CompressedLinear, Compressed]]:
    """Compress every matrix of a rank, `jobs` at a time, in order; their bytes wait in files under `work`.

    The header of the weight file, which comes first, needs all their sizes.
    """

    def compress(number: int, tensor: RankTensor) -> tuple[CompressedLinear, Compressed]:
        started = time.perf_counter()
        name = tensor.spec.name.removesuffix(".weight")
        folder = work / str(number)
        folder.mkdir()
        matrix = read_matrix(source, tensor)
        rows, cols = matrix.shape
        result = codec.compress(name, matrix, folder)
        stored, entropy = sum(item.spec(name).nbytes for item in result.tensors), zero_order_entropy(matrix)
        seconds = time.perf_counter() - started
        gain = result.class_gain_bits
        return CompressedLinear(rank, name, rows, cols, stored, entropy, gain, seconds, resident_bytes()), result

    matrices = enumerate(tensor for tensor in tensors if tensor.is_matrix)
    yield from run_ahead((partial(compress, number, tensor) for number, tensor in matrices), jobs, stop=codec.stop)


def _stored_specs(tensor: RankTensor, compressed: Mapping[str, Compressed]) -> list[TensorSpec]:
    """What is stored for a tensor."""
    if not tensor.is_matrix:
        return [tensor.spec]
    linear = tensor.spec.name.removesuffix(".weight")
    return [item.spec(linear) for item in compressed[tensor.spec.name].tensors]


def _write_stored(sink: ShardWriter, name: str, compressed: Compressed) -> None:
    """Write a compressed weight from its files, which are deleted."""
    for item in compressed.tensors:
        spec, content = item.spec(name.removesuffix(".weight")), np.fromfile(item.path, dtype=np.uint8)
        sink.write(spec.name, torch.from_numpy(content).view(torch_dtype(spec.dtype)).reshape(spec.shape))
        item.path.unlink()


def _blob_shapes(tensors: Sequence[RankTensor], compressed: Mapping[str, Compressed]) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    for tensor in tensors:
        if tensor.is_matrix:
            rows, cols = tensor.spec.shape
            for spec in _stored_specs(tensor, compressed):
                shapes[spec.name] = (rows, cols)
    return shapes


def _part_written(
    folder: Path,
    directory: Path,
    rank: int,
    plan: ShardPlan,
    digests: Mapping[str, str],
    matrices: Mapping[str, tuple[int, int]],
    tensors: Sequence[RankTensor],
    compressed: Mapping[str, Compressed],
) -> RankFileWritten:
    (file,) = plan.files
    before, after = dict.fromkeys(Area, 0), dict.fromkeys(Area, 0)
    for tensor in tensors:
        area = FAMILY.area(tensor.source or tensor.spec.name)
        before[area] += tensor.spec.nbytes
        after[area] += sum(spec.nbytes for spec in _stored_specs(tensor, compressed))
    path = (directory / file.name).relative_to(folder).as_posix()
    record = RankFile(rank, path, file.nbytes, digest_of(file.header), digests, matrices)
    return RankFileWritten(record, before, after)
