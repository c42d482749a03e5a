"""What `glmq compress` shows: progress by bytes on stderr, tables on stdout, and the next step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from shlex import quote
from typing import TYPE_CHECKING

from glmq.checkpoint.disk import free_bytes
from glmq.cli.console import stdout
from glmq.cli.render import SHOWN_ROWS, duration, print_json, show_line, show_obstacles
from glmq.cli.tables import Column, FittedTable
from glmq.compression.manifest import CodecKind
from glmq.engines import Chip, Engine
from glmq.inspection.folder import layer_of, role_of
from glmq.inspection.listing import describe_place
from glmq.model.config import FAMILY
from glmq.records import COMPRESS_REPORT
from glmq.wording import counted, size

if TYPE_CHECKING:
    from pathlib import Path

    from glmq.compression.dry_run import CompressionPlan, WeightEstimate
    from glmq.compression.report import AreaSizes, RankTotals
    from glmq.compression.stream import CompressedLinear
    from glmq.jobs.compress import CompressionResult
    from glmq.jobs.restore import RestorationPlan, RestoreResult


def show_compression(result: CompressionResult, *, verbose: bool) -> None:
    """The linears, the ranks, the bytes in three forms, where the output lies, and what to do next."""
    stdout.print(linear_table(result.linears, result.world, verbose=verbose))
    stdout.print(rank_table(result.ranks))
    stdout.print(size_table(result.sizes, result.codec, result.world))
    what = "W8A8SC" if result.codec is CodecKind.ASCEND else "W8A8S in glmq's portable form"
    stdout.say(f"{what}, world size {result.world}, written to {result.folder}")
    for line in next_steps(result):
        show_line(line)


def linear_table(linears: Sequence[CompressedLinear], world: int, *, verbose: bool) -> FittedTable:
    """One row per linear and rank, most bits per weight first; the tail is left out unless `verbose`."""
    largest_first = sorted(linears, key=lambda linear: (-linear.bits_per_weight, linear.name, linear.rank))
    shown = largest_first if verbose else largest_first[:SHOWN_ROWS]
    left = len(largest_first) - len(shown)
    return FittedTable(
        "Compressed linears, most bits first",
        [
            Column("linear", left=True),
            Column("rank"),
            Column("rows x cols", drop=1),
            Column("bits"),
            Column("ratio"),
            Column("entropy", drop=2),
            Column("class gain", drop=4),
            Column("seconds", drop=3),
        ],
        [
            [
                FAMILY.short_name(linear.name),
                f"{linear.rank}/{world}",
                f"{linear.rows} x {linear.cols}",
                f"{linear.bits_per_weight:.3f}",
                f"{linear.ratio:.2f}",
                f"{linear.entropy_bits:.3f}",
                "" if linear.class_gain_bits is None else f"{linear.class_gain_bits:.3f}",
                f"{linear.seconds:.2f}",
            ]
            for linear in shown
        ],
        caption=f"{left} smaller ones are left out; -v shows all, {COMPRESS_REPORT}.csv has them" if left else "",
    )


def rank_table(ranks: Sequence[RankTotals]) -> FittedTable:
    """Each rank's file and its compressed linears together."""
    return FittedTable(
        "Ranks",
        [
            Column("rank", left=True),
            Column("linears", drop=2),
            Column("int8", drop=1),
            Column("compressed"),
            Column("bits"),
            Column("ratio"),
            Column("whole file"),
        ],
        [
            [
                str(rank.rank),
                str(rank.linears),
                size(rank.weights),
                size(rank.stored_bytes),
                f"{8 * rank.stored_bytes / rank.weights:.3f}",
                f"{rank.weights / rank.stored_bytes:.2f}",
                size(rank.file_bytes),
            ]
            for rank in ranks
        ],
    )


def size_table(sizes: Sequence[AreaSizes], codec: CodecKind, world: int) -> FittedTable:
    """Bytes by area of the model: float, quantized, compressed."""
    last = "W8A8SC" if codec is CodecKind.ASCEND else "portable"
    rows = [(s.area.value, s.float16, s.w8a8s, s.compressed) for s in sizes]
    total = ("total", sum(r[1] for r in rows), sum(r[2] for r in rows), sum(r[3] for r in rows))
    cells = [
        [name, size(float16), size(w8a8s), size(compressed), f"{compressed / float16:.3f}" if float16 else "-"]
        for name, float16, w8a8s, compressed in (*rows, total)
    ]
    columns = [
        Column("part", left=True),
        Column("float16", drop=2),
        Column("W8A8S"),
        Column(last if world == 1 else f"{last}, {world} ranks"),
        Column("ratio to float16", drop=1),
    ]
    return FittedTable("Bytes", columns, cells[:-1], total=cells[-1])


def next_steps(result: CompressionResult) -> list[str]:
    """The exact next step for a fresh folder."""
    folder, world = quote(str(result.folder)), result.world
    if result.codec is CodecKind.PORTABLE:
        source, engine_folder = quote(str(result.source)), quote(f"{result.source}-sc")
        return [
            "This form is for storage, transport and checks: no serving engine reads it. The engine's W8A8SC is made from the "
            "W8A8S folder on a host that has the vendor's compress program:",
            f"  glmq compress --model_path {source} --save_directory {engine_folder} --tp {world} --codec ascend",
            "Next: store or copy the folder, and restore what it was made from with",
            f"  glmq compress --decompress {folder} {quote(f'{result.folder}-restored')}",
        ]
    if result.layout is Engine.VLLM_ASCEND:
        return [
            "Note: this layout is a best effort, from reading vLLM-Ascend's source and never run; MindIE's is the tested one.",
            f"Note: {Engine.VLLM_ASCEND.spec.chips[Chip.DUO_300I].fails}.",
            f"Next, on the Atlas 300I Duo: vllm serve {folder} --quantization ascend --load-format sharded_state "
            f"--dtype float16 --tensor-parallel-size {world}",
        ]
    devices = ", ".join(str(rank) for rank in range(world))
    return [
        f"Next: serve it with MindIE on the Atlas 300I Duo: in conf/config.json of mindie-service set modelWeightPath to "
        f"{result.folder.absolute()}, worldSize to {world} and npuDeviceIds to [[{devices}]], then start mindieservice_daemon."
    ]


def show_compression_plan(plan: CompressionPlan, folder: Path, *, as_json: bool, verbose: bool) -> None:
    """What a run would write and need, as tables or JSON."""
    free = free_bytes(folder)
    if as_json:
        print_json(
            {
                "schema": "glmq.compress-plan/1",
                "codec": plan.codec.value,
                "layout": plan.layout.value,
                "world_size": plan.world,
                "weights": [asdict(weight) for weight in plan.weights],
                "bytes": [{"part": p.area.value, "before": p.before, "after_estimated": p.after} for p in plan.areas],
                "files": [asdict(file) for file in plan.files],
                "side_bytes": plan.side_bytes,
                "estimated_bytes": plan.estimated_bytes,
                "disk_bytes": plan.disk_bytes,
                "free_bytes": free,
                "peak_bytes": plan.peak_bytes,
                "trial": asdict(plan.trial),
                "estimated_seconds": round(plan.seconds, 3),
                "obstacles": list(plan.obstacles),
            }
        )
        return
    stdout.print(_planned_weights(plan, verbose=verbose))
    stdout.print(_planned_areas(plan))
    for file in plan.files:
        stdout.say(
            f"{file.path}: about {size(file.estimated_bytes)}, at most {file.at_most_bytes} bytes; exactly "
            f"{file.kept_bytes} of them are kept as they are"
        )
    verdict = "" if free >= plan.disk_bytes else ", too little: the run would refuse"
    stdout.say(
        f"disk: about {size(plan.estimated_bytes)} output, {size(plan.side_bytes)} side files, {size(plan.disk_bytes)} must "
        f"be free, {size(free)} are{verdict}"
    )
    stdout.say(f"memory: about {size(plan.peak_bytes)} resident at most")
    trial = plan.trial
    stdout.say(
        f"time: about {duration(plan.seconds)}, from {trial.name}: {trial.rows} x {trial.cols} in {trial.seconds:.2f} s at "
        f"{trial.bits_per_weight:.3f} bits; the disk's time to write comes on top"
    )
    show_obstacles(plan.obstacles)


def _planned_weights(plan: CompressionPlan, *, verbose: bool) -> FittedTable:
    """A line for the weights of one role that are alike, over layers and ranks; with `verbose` one per weight and rank."""
    grouped: dict[tuple[object, ...], list[WeightEstimate]] = {}
    for weight in plan.weights:
        alike = (weight.name, weight.rank) if verbose else role_of(f"{weight.name}.weight")
        grouped.setdefault((alike, weight.rows, weight.cols), []).append(weight)
    rows: list[list[str]] = []
    for weights in grouped.values():
        first, bits = weights[0], [weight.entropy_bits for weight in weights]
        layers = list(dict.fromkeys(layer_of(f"{weight.name}.weight") for weight in weights))
        low, high = f"{min(bits):.3f}", f"{max(bits):.3f}"
        rows.append(
            [
                describe_place(layers, role_of(f"{first.name}.weight")),
                f"{first.rank}/{plan.world}" if verbose else str(plan.world),
                f"{first.rows} x {first.cols}",
                low if low == high else f"{low}..{high}",
                size(sum(weight.estimated_bytes for weight in weights)),
            ]
        )
    return FittedTable(
        "Weights",
        [
            Column("layers and role", left=True),
            Column("rank" if verbose else "ranks", drop=3),
            Column("rows x cols", drop=2),
            Column("entropy of a sample", drop=1),
            Column("estimated"),
        ],
        rows,
        caption="" if verbose else "-v shows each weight and rank",
    )


def _planned_areas(plan: CompressionPlan) -> FittedTable:
    """Bytes of each area of the model, before and after."""
    return FittedTable(
        "Bytes",
        [Column("part", left=True), Column("W8A8S, exact"), Column("compressed, estimated")],
        [[area.area.value, size(area.before), size(area.after)] for area in plan.areas],
        total=[
            "total",
            size(sum(area.before for area in plan.areas)),
            size(sum(area.after for area in plan.areas)),
        ],
    )


def show_restoration_plan(plan: RestorationPlan, folder: Path, *, as_json: bool) -> None:
    """What `--decompress` would write, in two lines or JSON."""
    free = free_bytes(folder)
    if as_json:
        print_json(
            {
                "schema": "glmq.decompress-plan/1",
                "layout": plan.layout.value,
                "world_size": plan.world,
                "output_bytes": plan.output_bytes,
                "free_bytes": free,
                "obstacles": list(plan.obstacles),
            }
        )
        return
    verdict = "" if free >= plan.output_bytes else ", too little: the run would refuse"
    stdout.say(
        f"the W8A8S checkpoint, from {counted(plan.world, 'part')}: exactly {plan.output_bytes} bytes of weights"
    )
    stdout.say(f"disk: {size(plan.output_bytes)} must be free, {size(free)} are{verdict}")
    show_obstacles(plan.obstacles)


def show_restored(result: RestoreResult, *, as_json: bool, quiet: bool) -> None:
    """What was restored, and what to do with it."""
    if as_json:
        print_json(
            {
                "schema": "glmq.decompress/1",
                "folder": str(result.folder),
                "layout": result.layout.value,
                "world_size": result.world,
                "weight_bytes": result.weight_bytes,
            }
        )
    elif quiet:
        stdout.print(str(result.folder), soft_wrap=True)
    else:
        stdout.say(f"The W8A8S checkpoint, {size(result.weight_bytes)} of weights, restored to {result.folder}")
        stdout.say("Next: check it, then compress it for the engine on a host with the vendor's program:")
        stdout.print(f"  glmq verify {quote(str(result.folder))}", soft_wrap=True)
