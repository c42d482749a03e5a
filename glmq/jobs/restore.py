"""Restore: what `compress` wrote in the portable form -> the tensors that it was made from, bit for bit."""

from __future__ import annotations

from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

from glmq.checkpoint.disk import check_room
from glmq.checkpoint.folder import OutputFolder
from glmq.checkpoint.run_note import RunNote
from glmq.checkpoint.workplace import check_output, foreseen
from glmq.compression.layouts import Layout
from glmq.compression.restore import decompress_checkpoint, read_portable_manifest, restored_bytes
from glmq.errors import LaunchError
from glmq.jobs.compress import check_folders, default_jobs, note_missing_kernels
from glmq.jobs.run_log import run_log
from glmq.jobs.shared_folder import SharedFolder
from glmq.jobs.watcher import Watcher
from glmq.progress import Watch
from glmq.ranks import Ranks, read_place
from glmq.records import PassTime
from glmq.values import check_least, to_path


@dataclass(frozen=True, slots=True)
class RestorationPlan:
    """What restoring would write."""

    layout: Layout
    world: int
    """Number of parts."""
    output_bytes: int
    """Exactly, of the restored tensors."""
    obstacles: tuple[str, ...] = ()
    """What lies where the output would, and stops a real run: a sentence each."""


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What restoring gave."""

    folder: Path
    layout: Layout
    world: int
    """Number of parts."""
    weight_bytes: int
    """Of the restored tensors."""
    times: tuple[PassTime, ...]


@overload
def restore(
    source: str | Path,
    *,
    out: str | Path,
    jobs: int | None = ...,
    overwrite: bool = ...,
    work_dir: Path | None = ...,
    dry_run: Literal[False] = ...,
    watch: Watch | None = ...,
) -> RestoreResult: ...
@overload
def restore(
    source: str | Path,
    *,
    out: str | Path,
    jobs: int | None = ...,
    overwrite: bool = ...,
    work_dir: Path | None = ...,
    dry_run: Literal[True],
    watch: Watch | None = ...,
) -> RestorationPlan: ...
@overload
def restore(
    source: str | Path,
    *,
    out: str | Path,
    jobs: int | None = ...,
    overwrite: bool = ...,
    work_dir: Path | None = ...,
    dry_run: bool,
    watch: Watch | None = ...,
) -> RestoreResult | RestorationPlan: ...
def restore(
    source: str | Path,
    *,
    out: str | Path,
    jobs: int | None = None,
    overwrite: bool = False,
    work_dir: Path | None = None,
    dry_run: bool = False,
    watch: Watch | None = None,
) -> RestoreResult | RestorationPlan:
    """Restore the un-sharded checkpoint that a portable folder was made from, bit for bit, whatever its number of parts.

    >>> import glmq
    >>> packed = glmq.compress("w8a8s", out="packed", codec="portable")
    >>> restored = glmq.restore("packed", out="restored")
    >>> glmq.compare("w8a8s", "restored").identical
    True

    Args:
        source: folder that `compress` wrote with the portable codec.
        out: folder to write into.
        jobs: weights worked on at a time; None: as many as there are cores.
        overwrite: replace what lies in `out`, once the weights are whole.
        work_dir: where the output grows until it is whole; None: beside `out`, on the same disk.
        dry_run: only say what it would do; nothing is written.
        watch: is called with the events of the run.

    Returns:
        Where the weights lie, or with `dry_run` the plan.

    Raises:
        UsageError: an output folder that may not be written, or several processes.
        InputError: no portable folder, or a damaged one.
        ResourceError: no disk or memory.
    """
    source, out, work_dir = to_path(source), to_path(out), None if work_dir is None else to_path(work_dir)
    check_least("--jobs", jobs, 1)
    if read_place().world > 1:
        raise LaunchError(
            "--decompress: needs no torchrun, one process restores every rank; run `glmq compress` itself"
        )
    obstacles: list[str] = []
    with foreseen(obstacles) if dry_run else nullcontext():
        check_folders(source, out)
        check_output(out, overwrite=overwrite, work_dir=work_dir)
    manifest = read_portable_manifest(source)
    total = restored_bytes(source, manifest)
    if dry_run:
        return RestorationPlan(manifest.layout, manifest.world, total, tuple(obstacles))
    watcher = Watcher(watch)
    check_room(out, total)
    note_missing_kernels(watcher)
    output = OutputFolder(out, overwrite=overwrite, work_dir=work_dir, run=RunNote("compress", "", {}))
    with (
        Ranks(read_place()) as ranks,
        SharedFolder(output, ranks) as folder,
    ):
        with (
            run_log(folder.work, out, {"source": source, "jobs": jobs}, ranks, watcher),
            watcher.bytes("decompress", total) as advance,
            closing(decompress_checkpoint(source, manifest, folder.path, jobs or default_jobs(1))) as steps,
        ):
            for step in steps:
                advance(step.name, step.nbytes, step.resident_bytes)
        times = watcher.times(ranks)
        folder.finish()
    return RestoreResult(out, manifest.layout, manifest.world, total, times)
