"""Compress: a W8A8S checkpoint -> one part per tensor-parallel rank."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, get_args, overload

from glmq.checkpoint.disk import check_room
from glmq.checkpoint.folder import OutputFolder, check_apart
from glmq.checkpoint.json_file import JsonObject
from glmq.checkpoint.run_note import RunNote
from glmq.checkpoint.sidecar import list_side_files
from glmq.checkpoint.workplace import check_output, foreseen
from glmq.codec.codec import KERNELS
from glmq.compression.dry_run import CompressionPlan, disk_bytes, make_compression_plan
from glmq.compression.executor import PROGRAM, AscendCodec, find_executor, how_to_build
from glmq.compression.layouts import Layout
from glmq.compression.manifest import CodecKind
from glmq.compression.report import (
    AreaSizes,
    RankTotals,
    area_sizes,
    pack_results,
    rank_totals,
    report_document,
    unpack_results,
    write_report,
)
from glmq.compression.shard import RankTensor, check_world
from glmq.compression.source import Source, open_source
from glmq.compression.split import finish_split, split_checkpoint
from glmq.compression.stream import (
    CompressedLinear,
    RankFileWritten,
    Step,
    choose_layout,
    compress_checkpoint,
    finish_folder,
    plan_ranks,
    planned_bytes,
)
from glmq.compression.weight_codec import Codec, PortableCodec
from glmq.engines import Engine
from glmq.errors import CompressProgramError, LaunchError, OutputError, UsageError
from glmq.jobs.joined_ranks import join_ranks
from glmq.jobs.run_log import run_log
from glmq.jobs.shared_folder import SharedFolder
from glmq.jobs.watcher import Watcher
from glmq.model.side_files import check_needed_files
from glmq.progress import Watch
from glmq.ranks import Place, Ranks, read_place
from glmq.records import PassTime
from glmq.values import check_least, check_word, member, take_paths, to_path

CodecName: TypeAlias = Literal["auto", "portable", "ascend"]


@dataclass(frozen=True, slots=True)
class CompressionOptions:
    """How weights are compressed, beside the codec and the number of ranks."""

    executor: Path | None = None
    """The vendor's program; None looks for it."""
    layout: Engine = Engine.MINDIE
    """The engine whose names and cuts are written."""
    jobs: int | None = None
    """Weights worked on at a time; None: as many as there are cores."""
    work_dir: Path | None = None
    """Where the output grows until it is whole; None: beside the output folder, on the same disk."""
    split_dir: Path | None = None
    """Folder for the uncompressed parts of each rank, in MindIE's layout, beside the compressed ones; None: not kept."""

    def __post_init__(self) -> None:
        take_paths(self, "executor", "work_dir", "split_dir")
        object.__setattr__(self, "layout", member("--layout", self.layout, Engine))
        check_least("--jobs", self.jobs, 1)


@dataclass(frozen=True, slots=True)
class CompressionJob:
    """What to compress, how, and where to."""

    model_path: Path
    out_path: Path
    tp: int | None = None
    """Tensor-parallel size; None: of torchrun, or 1."""
    codec_name: CodecName = "auto"
    options: CompressionOptions = CompressionOptions()

    def __post_init__(self) -> None:
        check_least("--tp", self.tp, 1)
        check_word("--codec", self.codec_name, get_args(CodecName))


@dataclass(frozen=True, slots=True)
class CompressionResult:
    """What compressing gave; the same on every rank."""

    source: Path
    folder: Path
    codec: CodecKind
    layout: Layout
    world: int
    """Number of parts."""
    linears: tuple[CompressedLinear, ...]
    sizes: tuple[AreaSizes, ...]
    ranks: tuple[RankTotals, ...]
    document: JsonObject
    """As glmq_compress_report.json holds it."""
    times: tuple[PassTime, ...]
    """On rank 0."""


@overload
def compress(
    source: str | Path,
    *,
    out: str | Path,
    tp: int | None = ...,
    codec: CodecName = ...,
    options: CompressionOptions = ...,
    overwrite: bool = ...,
    dry_run: Literal[False] = ...,
    watch: Watch | None = ...,
) -> CompressionResult: ...
@overload
def compress(
    source: str | Path,
    *,
    out: str | Path,
    tp: int | None = ...,
    codec: CodecName = ...,
    options: CompressionOptions = ...,
    overwrite: bool = ...,
    dry_run: Literal[True],
    watch: Watch | None = ...,
) -> CompressionPlan: ...
@overload
def compress(
    source: str | Path,
    *,
    out: str | Path,
    tp: int | None = ...,
    codec: CodecName = ...,
    options: CompressionOptions = ...,
    overwrite: bool = ...,
    dry_run: bool,
    watch: Watch | None = ...,
) -> CompressionResult | CompressionPlan: ...
def compress(
    source: str | Path,
    *,
    out: str | Path,
    tp: int | None = None,
    codec: CodecName = "auto",
    options: CompressionOptions = CompressionOptions(),
    overwrite: bool = False,
    dry_run: bool = False,
    watch: Watch | None = None,
) -> CompressionResult | CompressionPlan:
    """Compress a W8A8S checkpoint, one part per tensor-parallel rank.

    >>> import glmq
    >>> packed = glmq.compress("w8a8s", out="w8a8sc", tp=2, codec="portable")
    >>> packed.world
    2

    Args:
        source: folder of the W8A8S weights.
        out: folder to write into.
        tp: tensor-parallel size to serve with; None: the processes of torchrun, or 1.
        codec: `auto` or `ascend` for the engine, by the vendor's compress program; `portable` for storage and transport,
            which no engine reads.
        options: the vendor's program, the layout, the number of threads.
        overwrite: replace what lies in `out`, once the parts are whole.
        dry_run: only say what it would do; nothing is written.
        watch: is called with the events of the run.

    Returns:
        The sizes of every linear and part, or with `dry_run` the plan.

    Raises:
        UsageError: options that contradict each other, or an output folder that may not be written.
        InputError: weights that are no W8A8S checkpoint of the family, or damaged.
        ResourceError: no disk or memory, or the vendor's program is not there.
    """
    job = CompressionJob(to_path(source), to_path(out), tp, codec, options)
    if dry_run:
        return forecast_compression(job, overwrite=overwrite, watch=watch)
    return run_compression(job, overwrite=overwrite, watch=watch)


def run_compression(job: CompressionJob, *, overwrite: bool, watch: Watch | None) -> CompressionResult:
    """As `compress`, on one rank of all: what can be refused from headers and options is refused first."""
    place = read_place()
    watcher = Watcher(watch if place.is_first else None)
    world = settle_world(job.tp, place)
    check_folders(job.model_path, job.out_path)
    check_output(job.out_path, overwrite=overwrite, work_dir=job.options.work_dir)
    check_split(job, overwrite=overwrite)
    run = RunNote("compress", "", {})
    output = OutputFolder(job.out_path, overwrite=overwrite, work_dir=job.options.work_dir, run=run)
    numbers = range(world) if place.world == 1 else range(place.rank, place.rank + 1)
    with _prepared(job, world, numbers, watcher) as work:
        # Every rank writes about as much as this one.
        check_room(job.out_path, disk_bytes(work.plans, work.codec) * place.world)
        with join_ranks(place, {"job": job, "overwrite": overwrite}) as ranks:
            if job.options.split_dir is not None:
                _write_split(job.options.split_dir, work, numbers, watcher, ranks, overwrite=overwrite)
            with SharedFolder(output, ranks) as folder:
                with run_log(folder.work, job.out_path, job, ranks, watcher):
                    result = _write_parts(job, work, folder, watcher, ranks)
                folder.finish()
    return result


def forecast_compression(job: CompressionJob, *, overwrite: bool, watch: Watch | None) -> CompressionPlan:
    """As `compress` with `dry_run`: refuse what the run would refuse but for the output folder, and touch nothing."""
    if read_place().world > 1:
        raise LaunchError("--dry-run: needs no torchrun, one process plans every rank; run `glmq compress --tp` itself")
    world, obstacles = job.tp or 1, list[str]()
    with foreseen(obstacles):
        check_folders(job.model_path, job.out_path)
        check_output(job.out_path, overwrite=overwrite, work_dir=job.options.work_dir)
        check_split(job, overwrite=overwrite)
    with _prepared(job, world, range(world), Watcher(watch)) as work:
        threads = job.options.jobs or default_jobs(1)
        plan = make_compression_plan(work.source, work.plans, work.codec, work.layout, world, threads)
    return replace(plan, obstacles=tuple(obstacles))


@dataclass(frozen=True, slots=True)
class _Work:
    """Everything that compressing needs, checked, before its first weight."""

    source: Source
    codec: Codec
    layout: Layout
    world: int
    plans: Mapping[int, Sequence[RankTensor]]
    """The tensors of each rank that this process writes."""


@contextmanager
def _prepared(job: CompressionJob, world: int, numbers: Sequence[int], watcher: Watcher) -> Iterator[_Work]:
    source = open_source(job.model_path)
    with source.checkpoint:
        list_side_files(job.model_path)  # refuses what could not be copied at the end
        check_needed_files(job.model_path)
        if world > 1:  # wrong wherever it runs, so it is said before what this machine lacks
            check_world(source.config, world, job.options.layout)
        codec = choose_codec(job.codec_name, job.options.executor, watcher)
        layout = choose_layout(codec.kind, job.options.layout, world)
        yield _Work(source, codec, layout, world, plan_ranks(source, layout, world, numbers))


def _write_parts(
    job: CompressionJob, work: _Work, folder: SharedFolder, watcher: Watcher, ranks: Ranks
) -> CompressionResult:
    """Write this rank's part, or all parts where there is one process, and the documents that all share."""
    source, codec, layout, world, place = work.source, work.codec, work.layout, work.world, ranks.place
    own_linears: list[CompressedLinear] = []
    own_parts: list[RankFileWritten] = []
    title = "compress" if place.world == 1 else f"compress rank 0 of {world}"
    threads = job.options.jobs or default_jobs(place.world)
    with (
        watcher.bytes(title, planned_bytes(work.plans)) as advance,
        closing(compress_checkpoint(source, work.plans, codec, layout, world, folder.path, threads)) as records,
    ):
        for record in records:
            match record:
                case Step():
                    advance(record.name, record.nbytes, record.resident_bytes)
                case CompressedLinear():
                    own_linears.append(record)
                    advance(record.name, record.weights, record.resident_bytes)
                case RankFileWritten():
                    own_parts.append(record)
            folder.check_others()
    linears: list[CompressedLinear] = []
    parts: list[RankFileWritten] = []
    for text in folder.all_gather(pack_results(own_linears, own_parts)):
        rank_linears, rank_parts = unpack_results(text)
        linears += rank_linears
        parts += rank_parts
    document = report_document(source, codec.kind, layout, linears, parts)
    if place.is_first:
        write_report(folder.path, document, linears)
        finish_folder(source, codec.kind, layout, world, [part.record for part in parts], folder.path)
    return CompressionResult(
        source=job.model_path,
        folder=job.out_path,
        codec=codec.kind,
        layout=layout,
        world=world,
        linears=tuple(linears),
        sizes=tuple(area_sizes(source, parts)),
        ranks=tuple(rank_totals(linears, parts)),
        document=document,
        times=watcher.times(ranks),
    )


def check_split(job: CompressionJob, *, overwrite: bool) -> None:
    """Raise UsageError unless the uncompressed parts, if they are to be kept, have a folder of their own and a layout."""
    split = job.options.split_dir
    if split is None:
        return
    if job.options.layout is not Engine.MINDIE:
        raise UsageError(
            "--save_split_w8a8s_dir: keeps the parts in MindIE's layout only; leave it or --layout vllm-ascend out"
        )
    check_apart(
        split, "--save_split_w8a8s_dir", {"the W8A8S weights": job.model_path, "--save_directory": job.out_path}
    )
    check_output(split, overwrite=overwrite, work_dir=None)


def _write_split(
    split: Path, work: _Work, numbers: Sequence[int], watcher: Watcher, ranks: Ranks, *, overwrite: bool
) -> None:
    """Write the uncompressed parts of this process's ranks, before the compressed ones."""
    source, world = work.source, work.world
    plans = plan_ranks(source, Engine.MINDIE, world, numbers)
    check_room(split, planned_bytes(plans) * ranks.place.world)
    with SharedFolder(OutputFolder(split, overwrite=overwrite, run=RunNote("compress", "", {})), ranks) as folder:
        with watcher.bytes("split", planned_bytes(plans)) as advance:
            for rank, tensors in plans.items():
                for step in split_checkpoint(source, rank, world, tensors, folder.path):
                    advance(step.name, step.nbytes, step.resident_bytes)
        if ranks.place.is_first:
            finish_split(source, folder.path)
        folder.finish()


def settle_world(tp: int | None, place: Place) -> int:
    """The tensor-parallel size: of --tp, of torchrun, or 1.

    Raises:
        UsageError: the two disagree.
    """
    if place.world > 1 and tp not in (None, place.world):
        raise LaunchError(f"--tp {tp}: torchrun started {place.world} processes, one per rank; leave --tp out")
    return place.world if place.world > 1 else tp or 1


def check_folders(model_path: Path, out_path: Path) -> None:
    """Raise UsageError if writing `out_path` would touch `model_path`."""
    source, target = model_path.resolve(), out_path.resolve()
    if target == source or target in source.parents:
        raise OutputError(f"{out_path}: is or holds the folder that is read; choose another --save_directory")


def choose_codec(name: CodecName, executor: Path | None, watcher: Watcher) -> Codec:
    """The codec that was asked for: the engine's, unless it is the portable one by name.

    Raises:
        DeviceError: the engine's, and the vendor's program is not there.
    """
    if name == "portable":
        note_missing_kernels(watcher)
        return PortableCodec()
    program = find_executor(executor)
    if program is not None:
        watcher.note(f"codec ascend: {program}")
        return AscendCodec(program)
    raise CompressProgramError(
        f"--codec {name}: {PROGRAM}, the vendor's compress program, was not found; for the engine's W8A8SC {how_to_build()}; "
        "for glmq's own lossless form, which is for storage and which no engine reads, pass --codec portable"
    )


def note_missing_kernels(watcher: Watcher) -> None:
    """Note if the portable codec runs in numpy: installed without a compiler, or run from inside the sources."""
    if not KERNELS:
        watcher.note(
            f"note: the glmq in {Path(__file__).parents[1]} has no compiled codec, so compressing and restoring take "
            "some 20 times as long; install it with a C compiler at hand, and do not run it from inside its source folder"
        )


def default_jobs(processes: int) -> int:
    """Weights to compress at a time in each of `processes` processes: all the cores that we may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)
