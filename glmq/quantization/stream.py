"""quantize_checkpoint(): the pass that writes, one block in memory at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from glmq.checkpoint.checksums import write_checksums
from glmq.checkpoint.header import FLOAT_CODES
from glmq.checkpoint.json_file import JsonObject
from glmq.checkpoint.linears import encode_linear, encode_norm
from glmq.checkpoint.reader import torch_dtype
from glmq.checkpoint.writer import ShardWriter
from glmq.errors import DtypeRangeError
from glmq.model.config import FAMILY
from glmq.model.family import Block
from glmq.quantization.output import OutputPlan, write_side_files
from glmq.quantization.passes import (
    QuantizationRun,
    QuantizedBlock,
    block_done,
    each_block,
    each_group,
    parse_reports,
    quantize_plan,
)
from glmq.quantization.plan import GroupPlan
from glmq.quantization.propagation import Propagation
from glmq.quantization.recipe import Recipe
from glmq.records import LinearReport, report_row

log = logging.getLogger(__name__)

REST: Final = "embeddings and side files"
"""What the last record of the pass speaks of."""
COPY_BYTES: Final = 64 * 2**20
"""Float tensors are copied in pieces of about this size."""


def quantize_checkpoint(
    run: QuantizationRun,
    recipe: Recipe,
    plan: OutputPlan,
    folder: Path,
    *,
    bits: Mapping[str, float],
    propagation: Propagation | None = None,
) -> Iterator[QuantizedBlock]:
    """Write the quantized checkpoint into `folder`: weights, their checksums, description, config.json, side files.

    Weights are read by range, one norm group at a time; float tensors are copied in pieces. Each finished block is
    journalled; blocks that the journal has already are not done again. Several ranks each write their blocks' tensors into
    the same files; rank 0 makes and finishes these.

    Yields:
        A record after each block, also for those of an interrupted run and of other ranks.

    Raises:
        CheckpointError: a tensor with NaN or infinity, or one that the stored dtype cannot hold.
        StatisticsError: the statistics lack an input.
        SpaceError: the disk fills up.
        OtherRankError, LostRanksError: another rank stopped.
    """
    blocks = run.config.family.blocks(run.config)
    total = len(blocks) + 1
    is_first = run.ranks.place.is_first
    is_begun = any(block.name in run.journal.finished for block in blocks)
    if not is_first:
        run.ranks.barrier()  # rank 0 has made the files
    with ShardWriter(plan.shards, folder, resume=is_begun or not is_first, keep_partial=True) as sink:
        if is_first:
            run.ranks.barrier()
        job = _Job(run, recipe, plan.groups, sink, bits, propagation)
        if is_begun:
            log.info("resumed: %d blocks are in the journal", len(run.journal.finished))

        def write(index: int, block: Block) -> JsonObject:
            plans = [plan.groups[group.site] for group in block.groups if plan.groups[group.site].is_quantized]
            reports = [r for group in each_group(run, index, block, plans) for r in job.quantize(block, group)]
            job.copy_rest(f"{block.name}.")
            with run.clock.stage("write"):
                sink.sync()
            payload = job.take_payload(reports)
            return payload if propagation is None else {**payload, "streams": propagation.finish(block, run.clock)}

        for index, (block, payload, seconds) in enumerate(each_block(run, blocks, "", write)):
            reports = tuple(job.restore(payload))
            for report in reports:
                log.info(
                    "%s: %s %s, %.3f bits, output error %.4g, smoothing %s",
                    report.name, report.quant_type.value, report.method, report.entropy_bits, report.output_error,
                    report.smoothing,
                )  # fmt: skip
            yield QuantizedBlock(block_done(block.name, index, total, seconds, run), reports)
        started = time.perf_counter()
        if is_first:
            job.copy_rest("")
            with run.clock.stage("write"):
                sink.finish()
        else:
            sink.leave()
    if is_first:
        write_side_files(run.source, run.config, recipe, plan, folder)
        write_checksums(folder, sink.checksums, run.folds.statistics.weights)
    yield QuantizedBlock(block_done(REST, total - 1, total, time.perf_counter() - started, run), ())


class _Job:
    """The writing pass of one rank, with the names of the tensors that are written.

    A norm has among its stored tensors one of each source tensor's name, and so has a quantized linear unless its weight is
    packed, so the names tell as well which source tensors are done.
    """

    def __init__(
        self,
        run: QuantizationRun,
        recipe: Recipe,
        groups: Mapping[str, GroupPlan],
        sink: ShardWriter,
        bits: Mapping[str, float],
        propagation: Propagation | None,
    ) -> None:
        self._run, self._source, self._recipe, self._sink = run, run.source, recipe, sink
        self._groups, self._bits, self._propagation = groups, bits, propagation
        self._norms = set(run.config.family.rms_norms(run.config))
        self._integer_weights = {
            f"{linear.name}.weight" for plan in groups.values() if plan.is_quantized for linear in plan.group.linears
        }
        self._written: set[str] = set()
        self._fresh: list[str] = []

    def take_payload(self, reports: Sequence[LinearReport]) -> JsonObject:
        """What a resumed run needs of the block that was just written."""
        written, self._fresh = {name: self._sink.checksums[name] for name in self._fresh}, []
        return {"written": written, "reports": [report_row(r) for r in reports]}

    def restore(self, payload: JsonObject) -> list[LinearReport]:
        """Count a block as done, whoever did it; returns its reports."""
        written = payload["written"]
        assert isinstance(written, dict)
        self._sink.mark_written({name: written[name] for name in written if name not in self._written})
        self._written |= set(written)
        return parse_reports(payload)

    def quantize(self, block: Block, plan: GroupPlan) -> Sequence[LinearReport]:
        """Quantize and write one group with its norm."""
        recipe, group, folds, drift = self._recipe, plan.group, self._run.folds, None
        if self._propagation is not None and plan.quant_type.spec.weight_bits == 4:
            drift = self._propagation.drift(block, group, self._run.clock)
        result = quantize_plan(self._run, recipe, self._groups, plan, self._bits, drift)
        if self._propagation is not None:
            self._propagation.take(block, group, result, folds.divisors(recipe, self._groups, group))
        for shape, linear in zip(group.linears, result.linears):
            parallel = shape.name.endswith(FAMILY.row_parallel)
            self._write(encode_linear(shape.name, linear, dtype=recipe.dtype, form=recipe.form, row_parallel=parallel))
        if group.norm is not None and result.norm_weight is not None:
            norm = encode_norm(
                group.norm, result.norm_weight, dtype=recipe.dtype, form=recipe.form, bias=result.norm_bias
            )
            self._write(norm)
        return result.reports

    def copy_rest(self, prefix: str) -> None:
        """Write every source tensor under `prefix` that no group has taken, cast to the stored dtype."""
        for name in self._source:
            if name.startswith(prefix) and name not in self._written and name not in self._integer_weights:
                base = name.rpartition(".")[0]
                if base in self._norms:
                    weight = self._source.read_finite(name)
                    self._write(encode_norm(base, weight, dtype=self._recipe.dtype, form=self._recipe.form))
                else:
                    self._copy(name)

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            with self._run.clock.stage("write"):
                self._sink.write(name, tensor)
            self._run.clock.count("write", nbytes=tensor.nbytes)
            self._note(name)

    def _note(self, name: str) -> None:
        self._written.add(name)
        self._fresh.append(name)

    def _copy(self, name: str) -> None:
        self._note(name)
        info = self._source[name]
        if not info.shape or 0 in info.shape:
            self._sink.write(name, self._cast(name, self._source.read_finite(name)))
            return
        step = max(1, COPY_BYTES * info.shape[0] // info.nbytes)
        for start in range(0, info.shape[0], step):
            with self._run.clock.stage("copy"):
                rows = self._source.read_rows(name, start, min(start + step, info.shape[0]))
                self._sink.write_rows(name, start, self._cast(name, self._source.check_finite(name, rows)))
        self._run.clock.count("copy", nbytes=2 * info.nbytes)

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        if self._source.dtype_read(name) not in FLOAT_CODES:
            return tensor  # kept as it is: no part of the model
        stored = tensor.to(torch_dtype(self._recipe.dtype.code))
        if stored is not tensor and stored.numel() and not torch.isfinite(torch.stack(torch.aminmax(stored))).all():
            raise DtypeRangeError(
                f"{self._source.file_of(name).name}: tensor {name!r} reaches {float(tensor.abs().max()):g}, "
                f"float16 ends at 65504; pass --torch_dtype bf16 (not for W8A8S) or repair the checkpoint"
            )
        return stored
