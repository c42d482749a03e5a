"""quantize_checkpoint(): plan every output tensor, check the headers, then loop over blocks, one in memory at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from torch import Tensor

from glmq.calibration.stats import Statistics
from glmq.checkpoint.ascend import CODES, TORCH_DTYPES, encode_linear, encode_norm, linear_specs, norm_specs
from glmq.checkpoint.checksums import write_checksums
from glmq.checkpoint.description import ASCEND_V1_VERSION, Description, tensor_types, write_description
from glmq.checkpoint.journal import Journal
from glmq.checkpoint.json_file import JsonObject, write_json
from glmq.checkpoint.layout import ShardPlan, TensorSpec, plan_shards
from glmq.checkpoint.reader import Checkpoint
from glmq.checkpoint.sidecar import MindieSettings, copy_side_files, edit_config
from glmq.checkpoint.writer import ShardWriter
from glmq.errors import CheckpointError
from glmq.model.config import FAMILY, ModelConfig
from glmq.model.family import Area, Block, InputGroup, LinearShape
from glmq.model.source import FLOAT_CODES, check_source
from glmq.numerics.moments import InputStats
from glmq.numerics.rate import RateCurve
from glmq.progress import Stopwatch
from glmq.quantization.fold import fold_into_rows, row_divisors
from glmq.quantization.layer import FloatLinear, GroupResult, RowFold, quantize_group, rate_curves
from glmq.quantization.recipe import GroupPlan, Recipe
from glmq.ranks import Ranks
from glmq.records import BlockDone, LinearReport, parse_row, report_row
from glmq.spec import Activation, FloatDtype, Form, QuantType, Smoothing, StepRule

COPY_BYTES: Final = 64 * 2**20
"""Float tensors are copied in pieces of about this size."""


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """Everything that is known before the first weight is read."""

    groups: Mapping[str, GroupPlan]
    """By site, in model order."""
    linears: Mapping[str, QuantType]
    """The linears that become integers."""
    shards: ShardPlan


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """One block is written: a step of the progress bar and the rows of its error table."""

    done: BlockDone
    reports: tuple[LinearReport, ...]


@dataclass(frozen=True, slots=True)
class RatedBlock:
    """One block's linears are measured: what each loses at how many bits."""

    done: BlockDone
    curves: tuple[RateCurve, ...]


@dataclass(frozen=True, slots=True)
class AreaBytes:
    """Bytes of one area of the model, float checkpoint against quantized one."""

    area: Area
    before: int
    after: int


def plan_output(
    source: Checkpoint, config: ModelConfig, recipe: Recipe, groups: Mapping[str, GroupPlan], shard_bytes: int | None
) -> OutputPlan:
    """Lay out the output from the headers alone.

    Raises:
        CheckpointError: the source lacks a tensor of the model, or one has another shape than config.json says.
        UsageError: a width that the type cannot take.
    """
    check_source(source, config)
    types = {
        linear.name: plan.quant_type for plan in groups.values() if plan.is_quantized for linear in plan.group.linears
    }
    shapes = {linear.name: linear for plan in groups.values() for linear in plan.group.linears}
    norms = set(config.family.rms_norms(config))
    specs: list[TensorSpec] = []
    for name in source:
        base, _, suffix = name.rpartition(".")
        if base in types:
            if suffix == "weight":
                specs += _specs_of(shapes[base], types[base], recipe)
        elif base in norms:
            specs += norm_specs(base, source[name].shape[0], dtype=recipe.dtype, form=recipe.form)
        else:
            specs.append(TensorSpec(name, _float_code(source[name].dtype, recipe.dtype), source[name].shape))
    stem = f"quant_model_weight_{recipe.quant_type.tag}"
    return OutputPlan(groups, types, plan_shards(specs, stem, shard_bytes))


def bytes_by_area(source: Checkpoint, shards: ShardPlan) -> list[AreaBytes]:
    """Tensor bytes before and after, by area of the model."""
    before, after = dict.fromkeys(Area, 0), dict.fromkeys(Area, 0)
    for name in source:
        before[FAMILY.area(name)] += source.nbytes(name)
    for file in shards.files:
        for info in file.tensors:
            after[FAMILY.area(info.name)] += info.nbytes
    return [AreaBytes(area, before[area], after[area]) for area in Area]


@dataclass(frozen=True, slots=True)
class QuantizationRun:
    """What all passes over the weights share: what they read, and where they note what is done."""

    source: Checkpoint
    config: ModelConfig
    statistics: Statistics
    journal: Journal
    ranks: Ranks
    """They divide the blocks among themselves."""
    clock: Stopwatch = field(default_factory=Stopwatch)
    """Of this rank's work."""


def quantize_checkpoint(
    run: QuantizationRun, recipe: Recipe, plan: OutputPlan, folder: Path, *, bits: Mapping[str, float]
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
        job = _Job(run, recipe, plan.groups, sink, bits)

        def write(block: Block) -> JsonObject:
            reports = [r for group in block.groups for r in job.quantize(plan.groups[group.site])]
            job.copy_rest(f"{block.name}.")
            with run.clock.stage("write"):
                sink.sync()
            return job.take_payload(reports)

        for index, (block, payload, seconds) in enumerate(_each_block(run, blocks, "", write)):
            yield QuantizedBlock(_done(block.name, index, total, seconds, run), tuple(job.restore(payload)))
        started = time.perf_counter()
        if is_first:
            job.copy_rest("")
            with run.clock.stage("write"):
                sink.finish()
        else:
            sink.leave()
    if is_first:
        write_checksums(folder, sink.checksums)
        _write_side_files(run.source, run.config, recipe, plan, folder)
    yield QuantizedBlock(_done("embeddings and side files", total - 1, total, time.perf_counter() - started, run), ())


def measure_checkpoint(
    run: QuantizationRun, recipe: Recipe, groups: Mapping[str, GroupPlan], *, bits: Mapping[str, float]
) -> Iterator[QuantizedBlock]:
    """Quantize every planned group and report its errors, but write nothing. Raises as `quantize_checkpoint` does."""
    every = run.config.family.blocks(run.config)
    blocks = [b for b in every if any(groups[g.site].is_quantized for g in b.groups)]

    def measure(block: Block) -> JsonObject:
        plans = [groups[g.site] for g in block.groups if groups[g.site].is_quantized]
        results = [_quantize_plan(run, recipe, groups, plan, bits) for plan in plans]
        return {"reports": [report_row(report) for result in results for report in result.reports]}

    for index, (block, payload, seconds) in enumerate(_each_block(run, blocks, "measure ", measure)):
        yield QuantizedBlock(_done(block.name, index, len(blocks), seconds, run), tuple(_parse_reports(payload)))


def rate_checkpoint(run: QuantizationRun, recipe: Recipe, groups: Mapping[str, GroupPlan]) -> Iterator[RatedBlock]:
    """Measure what each sparse linear loses at how many bits: the first pass over a model of a sparse type."""
    every = run.config.family.blocks(run.config)
    blocks = [b for b in every if any(groups[g.site].quant_type.spec.is_sparse for g in b.groups)]
    plans = [plan for plan in groups.values() if plan.quant_type.spec.is_sparse]
    sparse = {linear.name for plan in plans for linear in plan.group.linears}

    def rate(block: Block) -> JsonObject:
        curves: list[RateCurve] = []
        for group in block.groups:
            if groups[group.site].quant_type.spec.is_sparse:
                linears, norm, stats, fold = read_group(run.source, run.statistics, recipe, groups, group, run.clock)
                with run.clock.stage("rate"):
                    curves += rate_curves(
                        linears, stats, recipe.scheme, norm_weight=norm, dtype=recipe.dtype, fold=fold
                    )
        return {"curves": [asdict(curve) for curve in curves]}

    for index, (block, payload, seconds) in enumerate(_each_block(run, blocks, "rate ", rate)):
        rows = payload["curves"]
        assert isinstance(rows, list)
        # The journal may have rated more than stays sparse after a fallback.
        curves = tuple(curve for curve in map(_parse_curve, rows) if curve.name in sparse)
        yield RatedBlock(_done(block.name, index, len(blocks), seconds, run), curves)


def _each_block(
    run: QuantizationRun, blocks: Sequence[Block], pass_name: str, work: Callable[[Block], JsonObject]
) -> Iterator[tuple[Block, JsonObject, float]]:
    """Do the work of each block on one of the ranks, unless the journal has it already, and journal what it returned.

    The same float comes back from JSON, so that it does not matter who did the work, or when.

    Yields:
        On every rank each block, what was returned for it, and seconds.
    """
    rank, world = run.ranks.place.rank, run.ranks.place.world
    for first in range(0, len(blocks), world):
        row = blocks[first : first + world]
        started = time.perf_counter()
        own = ""
        if rank < len(row) and pass_name + row[rank].name not in run.journal.finished:
            after = blocks[first + world + rank : first + world + rank + 1]
            run.source.prefetch(name for block in after for name in run.source if name.startswith(f"{block.name}."))
            own = json.dumps(work(row[rank]))
        texts = run.ranks.all_gather(own)
        for block, text in zip(row, texts):
            key = pass_name + block.name
            if key not in run.journal.finished:
                run.journal.record(key, json.loads(text))
            yield block, run.journal.finished[key], (time.perf_counter() - started) / len(row)


def _quantize_plan(
    run: QuantizationRun, recipe: Recipe, groups: Mapping[str, GroupPlan], plan: GroupPlan, bits: Mapping[str, float]
) -> GroupResult:
    """Read one group's weights and quantize them."""
    linears, norm, stats, fold = read_group(run.source, run.statistics, recipe, groups, plan.group, run.clock)
    result = quantize_group(
        linears,
        stats,
        recipe.scheme_of(plan.quant_type),
        norm_weight=norm,
        dtype=recipe.dtype,
        fold=fold,
        bits=[bits[linear.name] for linear in linears] if plan.group.linears[0].name in bits else None,
    )
    run.clock.include(result.stages)
    return result


def read_group(
    source: Checkpoint,
    statistics: Statistics,
    recipe: Recipe,
    groups: Mapping[str, GroupPlan],
    group: InputGroup,
    clock: Stopwatch,
) -> tuple[list[FloatLinear], Tensor | None, InputStats, RowFold]:
    """The float weights of a group with what their rows absorb for later inputs; its norm's; its input; its own fold."""
    with clock.stage("read"):
        # First, so that the weights of only one group are in memory at a time.
        divisors = row_divisors(source, statistics, recipe, groups, group)
        fold = fold_into_rows(source, statistics, recipe, groups, group)
        norm = None if group.norm is None else source.read_finite(f"{group.norm}.weight")
        linears = [
            FloatLinear(
                shape.name,
                source.read_finite(f"{shape.name}.weight").float(),
                source.read_finite(f"{shape.name}.bias").float() if shape.has_bias else None,
                divisors.get(shape.name),
            )
            for shape in group.linears
        ]
        stats = statistics.input(group.site)
    weights = sum(source.nbytes(f"{shape.name}.weight") for shape in group.linears)
    clock.count("read", nbytes=weights + stats.nbytes)
    return linears, norm, stats, fold


class _Job:
    """The pass that writes: what has been written so far.

    A source tensor that was taken is written under its own name, among others.
    """

    def __init__(
        self,
        run: QuantizationRun,
        recipe: Recipe,
        groups: Mapping[str, GroupPlan],
        sink: ShardWriter,
        bits: Mapping[str, float],
    ) -> None:
        self._run, self._source, self._recipe, self._sink = run, run.source, recipe, sink
        self._groups, self._bits = groups, bits
        self._norms = set(run.config.family.rms_norms(run.config))
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
        return _parse_reports(payload)

    def quantize(self, plan: GroupPlan) -> list[LinearReport]:
        """Quantize and write one group with its norm; nothing for a group that stays float."""
        if not plan.is_quantized:
            return []
        recipe, group = self._recipe, plan.group
        result = _quantize_plan(self._run, recipe, self._groups, plan, self._bits)
        for shape, linear in zip(group.linears, result.linears):
            parallel = shape.name.endswith(FAMILY.row_parallel)
            self._write(encode_linear(shape.name, linear, dtype=recipe.dtype, form=recipe.form, row_parallel=parallel))
        if group.norm is not None and result.norm_weight is not None:
            self._write(encode_norm(group.norm, result.norm_weight, dtype=recipe.dtype, form=recipe.form))
        return result.reports

    def copy_rest(self, prefix: str) -> None:
        """Write every source tensor under `prefix` that no group has taken, cast to the stored dtype."""
        for name in self._source:
            if name.startswith(prefix) and name not in self._written:
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
        if not tensor.is_floating_point():
            return tensor
        stored = tensor.to(TORCH_DTYPES[self._recipe.dtype])
        if stored is not tensor and stored.numel() and not torch.isfinite(torch.stack(torch.aminmax(stored))).all():
            raise CheckpointError(
                f"{self._source.file_of(name).name}: tensor {name!r} reaches {float(tensor.abs().max()):g}, "
                f"float16 ends at 65504; pass --torch_dtype bf16 (W8A8 only) or repair the checkpoint"
            )
        return stored


def _specs_of(shape: LinearShape, quant_type: QuantType, recipe: Recipe) -> Sequence[TensorSpec]:
    return linear_specs(
        shape.name,
        quant_type,
        (shape.rows, shape.cols),
        has_bias=shape.has_bias,
        dtype=recipe.dtype,
        group_size=recipe.scheme_of(quant_type).weight.group_size,
        form=recipe.form,
        row_parallel=shape.name.endswith(FAMILY.row_parallel),
    )


def _float_code(code: str, dtype: FloatDtype) -> str:
    return CODES[dtype] if code in FLOAT_CODES else code


def _write_side_files(source: Checkpoint, config: ModelConfig, recipe: Recipe, plan: OutputPlan, folder: Path) -> None:
    scheme = recipe.scheme
    settings = MindieSettings(
        group_size=scheme.weight.group_size,
        act_method=scheme.act_range.value,
        anti_method=Smoothing.M2.value,
        is_lowbit=scheme.weight.step_rule in (StepRule.SIGMA, StepRule.FRACTION),
        mm_tensor=False,
        w_sym=True,
        open_outlier=scheme.weight.keep_outliers,
        is_dynamic=recipe.quant_type.spec.activation is Activation.PER_TOKEN,
        w_bit=recipe.quant_type.spec.weight_bits,
        a_bit=8,
        dev_type="npu",
    )
    edited = edit_config(
        config.nested,
        dtype=recipe.dtype,
        quant_type=recipe.quant_type,
        settings=settings if recipe.form is Form.MINDIE else None,
    )
    write_json(folder / "config.json", edited, indent=4)
    copy_side_files(source.directory, folder)
    names = [info.name for file in plan.shards.files for info in file.tensors]
    types = tensor_types(names, plan.linears, model_quant_type=recipe.quant_type, form=recipe.form)
    description = Description(
        model_quant_type=recipe.quant_type.value,
        version=None if recipe.form is Form.MINDIE else ASCEND_V1_VERSION,
        group_size=None if recipe.form is Form.MINDIE else scheme.weight.group_size or None,
        tensors=types if recipe.form is Form.MINDIE else types | config.family.vllm_aliases(types),
    )
    write_description(folder, description)


def _parse_reports(payload: JsonObject) -> list[LinearReport]:
    rows = payload["reports"]
    assert isinstance(rows, list)
    return [parse_row(row) for row in rows]


def _parse_curve(row: Mapping[str, Any]) -> RateCurve:
    return RateCurve(**{**row, "bits": tuple(row["bits"]), "loss": tuple(row["loss"])})


def _done(name: str, index: int, total: int, seconds: float, run: QuantizationRun) -> BlockDone:
    return BlockDone(name, index, total, seconds, psutil.Process().memory_info().rss, run.clock.take())
