"""`glmq inspect A B` against a plain sequential read of the same two checkpoints, and headers-only inspect of many tensors.

    python tests/benchmarks/inspect_rate.py [--gb 2] [--rounds 3] [--folder DIR]

Makes two float checkpoints of the given size and two quantized ones, then reads and compares them in turns: cold, with
their pages dropped from the cache before each run, and warm. The plain read goes through every file once, 8 MiB at a time.
Times are medians over whole processes, less that of comparing the embedded tiny model with itself, which is all start-up and
does not grow with the size. On a busy machine look at the processor time: spread over the cores, it is what a quiet one needs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from make_checkpoint import GB, Size, make_checkpoint, text_size
from process import Measured, measure

from glmq.checkpoint.ascend import encode_linear, encode_norm, linear_specs, norm_specs
from glmq.checkpoint.description import ASCEND_V1_VERSION, Description, tensor_types, write_description
from glmq.checkpoint.layout import TensorSpec, plan_shards
from glmq.checkpoint.reader import Checkpoint
from glmq.checkpoint.sidecar import copy_side_files
from glmq.checkpoint.writer import ShardWriter
from glmq.model.config import read_config
from glmq.model.tiny import TINY_CHECKPOINT
from glmq.numerics.affine import quantize_weight
from glmq.records import QuantizedLinear
from glmq.spec import INT8, FloatDtype, Form, QuantType

HIDDEN = 2048
PAIRS = (("float", "other"), ("float", "fine"), ("fine", "coarse"))
READ_BYTES = 8 * 2**20
HEADERS = Size(layers=50, vision_depth=4)
"""Some 700 tensors."""


def size_of(nbytes: float) -> Size:
    """A model of about that many bytes in bfloat16."""
    one = text_size(HIDDEN, 1)
    layer = one.hidden * (one.hidden * 2 + one.hidden * 2 * one.kv_heads // one.heads + 3 * one.intermediate) * 2
    return text_size(HIDDEN, max(1, round(nbytes / layer)))


def quantize_simply(source_dir: Path, folder: Path, levels: int) -> None:
    """A W8A8_DYNAMIC checkpoint with smoothed norms: steps of max / levels, rounded to nearest."""
    config = read_config(source_dir)
    dtype, kind = FloatDtype.BF16, QuantType.W8A8_DYNAMIC
    groups = [group for group in config.family.groups(config) if group.norm and "visual" not in group.norm]
    norms = {str(group.norm): group for group in groups}
    taken = {linear.name: linear for group in groups for linear in group.linears}
    with Checkpoint.open(source_dir) as source:
        specs: list[TensorSpec] = []
        for name in source:
            base, _, suffix = name.rpartition(".")
            if base in taken:
                if suffix == "weight":
                    has_bias = taken[base].has_bias
                    rows, cols = source[name].shape
                    specs += linear_specs(
                        base, kind, (rows, cols), has_bias=has_bias, dtype=dtype, group_size=0, form=Form.ASCEND_V1,
                        row_parallel=False,
                    )  # fmt: skip
            elif base in norms:
                specs += norm_specs(base, source[name].shape[0], dtype=dtype, form=Form.ASCEND_V1)
            else:
                specs.append(TensorSpec(name, "BF16", source[name].shape))
        generator = torch.Generator().manual_seed(0)
        with ShardWriter(plan_shards(specs, "quant_model_weight_w8a8_dynamic", None), folder) as sink:
            for norm, group in norms.items():
                before = source.read(f"{norm}.weight").float()
                after = (before / torch.randn(before.shape, generator=generator).mul_(0.3).exp_()).bfloat16()
                tensors = dict(encode_norm(norm, after, dtype=dtype, form=Form.ASCEND_V1))
                for linear in group.linears:
                    weight = source.read(f"{linear.name}.weight").float() * (before / after.float())
                    step = weight.abs().amax(1, keepdim=True) / levels
                    bias = source.read(f"{linear.name}.bias").float() if linear.has_bias else None
                    made = QuantizedLinear(kind, quantize_weight(weight, step, INT8), step, bias)
                    tensors |= encode_linear(linear.name, made, dtype=dtype, form=Form.ASCEND_V1, row_parallel=False)
                for name, tensor in tensors.items():
                    sink.write(name, tensor)
            for name in source:
                base = name.rpartition(".")[0]
                if base not in taken and base not in norms:
                    sink.write(name, source.read(name))
    (folder / "config.json").write_bytes((source_dir / "config.json").read_bytes())
    copy_side_files(source_dir, folder)
    types = tensor_types(
        [spec.name for spec in specs], dict.fromkeys(taken, kind), model_quant_type=kind, form=Form.ASCEND_V1
    )
    write_description(folder, Description(kind.value, ASCEND_V1_VERSION, None, types))


def weight_files(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]


def drop_from_cache(paths: Sequence[Path]) -> None:
    """The next read of these files goes to the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_plainly(paths: Sequence[Path]) -> tuple[float, float]:
    """Seconds on the clock and of processor time to read the files one after the other."""
    buffer = bytearray(READ_BYTES)
    started, busy = time.perf_counter(), time.process_time()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started, time.process_time() - busy


def inspect(folder: Path, *arguments: Path) -> Measured:
    return measure([sys.executable, "-m", "glmq", "inspect", *map(str, arguments), "-q"], folder)


def compare(folder: Path, a: Path, b: Path, rounds: int, start_up: Measured, *, cold: bool) -> None:
    paths = weight_files(a, b)
    gigabytes = sum(path.stat().st_size for path in paths) / GB
    plain: list[tuple[float, float]] = []
    ours: list[Measured] = []
    for _ in range(rounds):
        for run in (lambda: plain.append(read_plainly(paths)), lambda: ours.append(inspect(folder, a, b))):
            if cold:
                drop_from_cache(paths)
            run()
    read, read_cpu = (statistics.median(times) for times in zip(*plain))
    wall = statistics.median(one.wall_s for one in ours) - start_up.wall_s
    cpu = statistics.median(one.cpu_s for one in ours) - start_up.cpu_s
    peak = max(one.peak_mib for one in ours)
    label = f"{a.name} {b.name}"
    print(
        f"{label:14}{'cold' if cold else 'warm':>6}{gigabytes:8.2f}{read:9.2f}{read_cpu:8.2f}{gigabytes / read:8.2f}"
        f"{wall:11.2f}{cpu:8.2f}{gigabytes / wall:8.2f}{read / wall:10.0%}{peak:10.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2, help="size of each float checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="a disk with room for 3.3 times --gb; what is there is used again")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=a.folder) as temporary:
        folder = Path(temporary)
        data = a.folder or folder
        for seed, name in enumerate(("float", "other")):
            if not (data / name).exists():
                make_checkpoint(data / name, size_of(a.gb * GB), seed=seed)
        for name, levels in (("fine", 127), ("coarse", 40)):
            if not (data / name).exists():
                quantize_simply(data / "float", data / name, levels)
        if not (data / "many").exists():
            make_checkpoint(data / "many", HEADERS)
        empty = min((inspect(folder, TINY_CHECKPOINT, TINY_CHECKPOINT) for _ in range(a.rounds)), key=lambda m: m.cpu_s)
        print(f"start-up of a comparison {empty.wall_s:.2f} s, {empty.cpu_s:.2f} s of processor time")
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        print(
            f"{'pair':14}{'':>6}{'GB':>8}{'read s':>9}{'cpu s':>8}{'GB/s':>8}{'inspect s':>11}{'cpu s':>8}{'GB/s':>8}"
            f"{'of a read':>10}{'peak MiB':>10}"
        )
        for one, other in PAIRS:
            for cold in (True, False):
                compare(folder, data / one, data / other, a.rounds, empty, cold=cold)
        with Checkpoint.open(data / "many") as many:
            count = len(many)
        headers = [inspect(folder, data / "many") for _ in range(a.rounds)]
        wall, cpu = (statistics.median(getattr(one, field) for one in headers) for field in ("wall_s", "cpu_s"))
        print(f"headers of {count} tensors: {wall:.2f} s, {cpu:.2f} s of processor time, the whole process")


if __name__ == "__main__":
    main()
