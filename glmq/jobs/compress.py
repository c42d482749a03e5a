"""Compress and restore as the command runs them: check everything, then the engine under a progress bar."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from glmq.checkpoint.disk import check_room
from glmq.checkpoint.folder import OutputFolder, check_output
from glmq.checkpoint.json_file import JsonObject
from glmq.cli.compress_view import ByteProgress
from glmq.cli.render import stderr
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
from glmq.compression.restore import decompress_checkpoint, read_portable_manifest, restored_bytes
from glmq.compression.source import open_source
from glmq.compression.stream import (
    CompressedLinear,
    PartWritten,
    Step,
    choose_layout,
    compress_checkpoint,
    finish_folder,
    plan_ranks,
    planned_bytes,
)
from glmq.compression.weight_codec import Codec, PortableCodec
from glmq.errors import DeviceError, UsageError
from glmq.jobs.malloc import return_large_buffers
from glmq.jobs.shared_folder import SharedFolder
from glmq.ranks import Place, Ranks, read_place


@dataclass(frozen=True, slots=True)
class CompressionJob:
    """What to compress, how, and where to."""

    model_path: Path
    out_path: Path
    tp: int | None = None
    """Tensor-parallel size; None: of torchrun, or 1."""
    codec_name: Literal["auto", "portable", "ascend"] = "auto"
    executor: Path | None = None
    """The vendor's program; None looks for it."""
    layout: Layout = Layout.MINDIE
    jobs: int | None = None
    """Threads; None: as many as there are cores for."""


@dataclass(frozen=True, slots=True)
class CompressionResult:
    """What `glmq compress` shows at its end."""

    source: Path
    folder: Path
    codec: CodecKind
    layout: Layout
    world: int
    linears: tuple[CompressedLinear, ...]
    sizes: tuple[AreaSizes, ...]
    ranks: tuple[RankTotals, ...]
    document: JsonObject


def compress_folder(job: CompressionJob, *, overwrite: bool, quiet: bool) -> CompressionResult | None:
    """Run `glmq compress`; None on the ranks above 0 of torchrun.

    Whatever can be refused from headers and options is refused before anything is written.
    """
    return_large_buffers()
    place = read_place()
    world = settle_world(job.tp, place)
    check_folders(job.model_path, job.out_path)
    output = OutputFolder(job.out_path, overwrite=overwrite)
    is_first = place.rank == 0
    source = open_source(job.model_path)
    with source.checkpoint:
        codec = choose_codec(job.codec_name, job.executor, quiet=quiet or not is_first)
        chosen = choose_layout(codec.kind, job.layout, world)
        rank_numbers = range(world) if place.world == 1 else [place.rank]
        plans = plan_ranks(source, chosen, world, rank_numbers)
        total = planned_bytes(plans)
        check_room(job.out_path, disk_bytes(plans, codec) * place.world)  # every rank writes about as much as this one
        own_linears: list[CompressedLinear] = []
        own_parts: list[PartWritten] = []
        title = "compress" if place.world == 1 else f"compress rank 0 of {world}"
        jobs = job.jobs or default_jobs(place.world)
        with (
            Ranks(place) as ranks,
            SharedFolder(output, ranks) as folder,
            ByteProgress(title, total, quiet=quiet or not is_first) as progress,
            closing(compress_checkpoint(source, plans, codec, chosen, world, folder.path, jobs)) as records,
        ):
            for record in records:
                match record:
                    case Step():
                        progress.advance(record.name, record.nbytes, record.resident_bytes)
                    case CompressedLinear():
                        own_linears.append(record)
                        progress.advance(record.name, record.weights, record.resident_bytes)
                    case PartWritten():
                        own_parts.append(record)
                folder.check_others()
            linears: list[CompressedLinear] = []
            parts: list[PartWritten] = []
            for text in folder.all_gather(pack_results(own_linears, own_parts)):
                rank_linears, rank_parts = unpack_results(text)
                linears += rank_linears
                parts += rank_parts
            document = report_document(source, codec.kind, chosen, linears, parts)
            if is_first:
                write_report(folder.path, document, linears)
                finish_folder(source, codec.kind, chosen, world, [part.record for part in parts], folder.path)
            folder.finish()
        sizes, totals = area_sizes(source, parts), rank_totals(linears, parts)
    if not is_first:
        return None
    return CompressionResult(
        job.model_path, job.out_path, codec.kind, chosen, world, tuple(linears), tuple(sizes), tuple(totals), document
    )


def plan_compression(job: CompressionJob, *, overwrite: bool, quiet: bool) -> CompressionPlan:
    """Run `glmq compress --dry-run`: refuse what the run would refuse, and touch nothing."""
    if read_place().world > 1:
        raise UsageError("--dry-run: needs no torchrun, one process plans every rank; run `glmq compress --tp` itself")
    world = job.tp or 1
    check_folders(job.model_path, job.out_path)
    check_output(job.out_path, overwrite=overwrite)
    source = open_source(job.model_path)
    with source.checkpoint:
        codec = choose_codec(job.codec_name, job.executor, quiet=quiet)
        chosen = choose_layout(codec.kind, job.layout, world)
        plans = plan_ranks(source, chosen, world, range(world))
        return make_compression_plan(source, plans, codec, chosen, world, job.jobs or default_jobs(1))


@dataclass(frozen=True, slots=True)
class RestorationPlan:
    """What `glmq compress --decompress` would write."""

    layout: Layout
    world: int
    output_bytes: int
    """Exactly, of the restored tensors."""


def plan_restoration(model_path: Path, out_path: Path, *, overwrite: bool) -> RestorationPlan:
    """Run `glmq compress --decompress --dry-run`: read the manifest and headers, touch nothing."""
    check_folders(model_path, out_path)
    check_output(out_path, overwrite=overwrite)
    manifest = read_portable_manifest(model_path)
    return RestorationPlan(manifest.layout, manifest.world, restored_bytes(model_path, manifest))


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What `glmq compress --decompress` shows at its end."""

    folder: Path
    layout: Layout
    world: int
    weight_bytes: int
    """Of the restored tensors."""


def restore_folder(
    model_path: Path, out_path: Path, *, jobs: int | None, overwrite: bool, quiet: bool
) -> RestoreResult:
    """Run `glmq compress --decompress`."""
    if read_place().world > 1:
        raise UsageError("--decompress: needs no torchrun, one process restores every rank; run `glmq compress` itself")
    return_large_buffers()
    check_folders(model_path, out_path)
    output = OutputFolder(out_path, overwrite=overwrite)
    manifest = read_portable_manifest(model_path)
    total = restored_bytes(model_path, manifest)
    check_room(out_path, total)
    note_missing_kernels(quiet=quiet)
    with (
        output as folder,
        ByteProgress("decompress", total, quiet=quiet) as progress,
        closing(decompress_checkpoint(model_path, manifest, folder.path, jobs or default_jobs(1))) as steps,
    ):
        for step in steps:
            progress.advance(step.name, step.nbytes, step.resident_bytes)
        folder.finish()
    return RestoreResult(out_path, manifest.layout, manifest.world, total)


def settle_world(tp: int | None, place: Place) -> int:
    """The tensor-parallel size: of --tp, of torchrun, or 1.

    Raises:
        UsageError: the two disagree.
    """
    if place.world > 1 and tp not in (None, place.world):
        raise UsageError(f"--tp {tp}: torchrun started {place.world} processes, one per rank; leave --tp out")
    return place.world if place.world > 1 else tp or 1


def check_folders(model_path: Path, out_path: Path) -> None:
    """Raise UsageError if writing `out_path` would touch `model_path`."""
    source, target = model_path.resolve(), out_path.resolve()
    if target == source or target in source.parents:
        raise UsageError(f"{out_path}: is or holds the folder that is read; choose another --save_directory")


def choose_codec(name: Literal["auto", "portable", "ascend"], executor: Path | None, *, quiet: bool) -> Codec:
    """The codec; with `auto` the engine's if its program is there, else the portable one, which stderr is told.

    Raises:
        DeviceError: `ascend`, or --executor, and the program is not there.
    """
    if name == "portable":
        note_missing_kernels(quiet=quiet)
        return PortableCodec()
    program = find_executor(executor)
    if program is not None:
        if not quiet:
            stderr.print(f"codec ascend: {program}", soft_wrap=True)
        return AscendCodec(program)
    if name == "ascend":
        raise DeviceError(f"--codec ascend: {PROGRAM}, the vendor's compress program, was not found; {how_to_build()}")
    if not quiet:
        stderr.print(
            f"note: {PROGRAM}, the vendor's compress program, was not found, so the weights are written in glmq's portable "
            "form: lossless, for storage and transport, but no serving engine reads it. "
            f"For the engine's W8A8SC, {how_to_build()}.",
            soft_wrap=True,
        )
    note_missing_kernels(quiet=quiet)
    return PortableCodec()


def note_missing_kernels(*, quiet: bool) -> None:
    """Tell stderr if the portable codec runs in numpy: installed without a compiler, or run from inside the sources."""
    if not KERNELS and not quiet:
        stderr.print(
            f"note: the glmq in {Path(__file__).parents[1]} has no compiled codec, so compressing and restoring take "
            "some 20 times as long; install it with a C compiler at hand, and do not run it from inside its source folder",
            soft_wrap=True,
        )


def default_jobs(processes: int) -> int:
    """Weights to compress at a time in each of `processes` processes: all the cores that we may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)
