"""The uncompressed parts of each rank, in the layout of MindIE: `--save_split_w8a8s_dir` of the engine's compress command.

config.json and side files
part{rank}-of-{world}/quant_model_weight_w8a8s.safetensors, quant_model_description.json
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from glmq.checkpoint.disk import make_directory
from glmq.checkpoint.json_file import write_json
from glmq.checkpoint.layout import plan_shards
from glmq.checkpoint.names import natural_key
from glmq.checkpoint.sidecar import copy_side_files, edit_config
from glmq.checkpoint.writer import ShardWriter
from glmq.compression.shard import RankTensor, read_pieces
from glmq.compression.source import Source
from glmq.compression.stream import Step, describe_rank_file
from glmq.progress import resident_bytes
from glmq.spec import FloatDtype, QuantType

SPLIT_STEM: Final = "quant_model_weight_w8a8s"


def split_checkpoint(
    source: Source, rank: int, world: int, tensors: Sequence[RankTensor], folder: Path
) -> Iterator[Step]:
    """Write one rank's part into `folder`.

    Args:
        source: the un-sharded checkpoint.
        rank: 0 to world - 1.
        world: number of ranks.
        tensors: of the rank, in MindIE's layout.
        folder: exists; not yet under its final name.

    Raises:
        CheckpointError: values that the engine cannot hold, or a file that changes while it is read.
        SpaceError: the disk fills up.
    """
    directory = folder / f"part{rank}-of-{world}"
    make_directory(directory)
    with ShardWriter(plan_shards([tensor.spec for tensor in tensors], SPLIT_STEM, None), directory) as sink:
        for tensor in tensors:
            at = 0
            for piece in read_pieces(source.checkpoint, tensor):
                sink.write_rows(tensor.spec.name, at, piece)
                at += piece.shape[0]
                yield Step(tensor.spec.name, rank, piece.nbytes, resident_bytes())
    linears = [tensor.spec.name.removesuffix(".weight") for tensor in tensors if tensor.is_matrix]
    names = sorted((tensor.spec.name for tensor in tensors), key=natural_key)
    describe_rank_file(directory, names, linears, QuantType.W8A8S)


def finish_split(source: Source, folder: Path) -> None:
    """Write what lies beside the parts: config.json and the side files."""
    copy_side_files(source.checkpoint.directory, folder)
    edited = edit_config(source.config.nested, dtype=FloatDtype.FP16, quant_type=QuantType.W8A8S, settings=None)
    write_json(folder / "config.json", edited, indent=4)
