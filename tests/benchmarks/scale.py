"""The four verbs at a chosen size, each a process of its own: seconds, peak memory, and what share of this machine's rates
the stages reached.

    python tests/benchmarks/scale.py WORK --size 9b --images 8
    python tests/benchmarks/scale.py WORK --hidden 4096 --layers 1 --vision-depth 2 --images 8
    python tests/benchmarks/scale.py WORK --hidden 512 --fit
    python tests/benchmarks/scale.py WORK --hidden 512 --peers VENDOR_PYTHON VENDOR_RUNNER LLMC_PYTHON LLMC_RUNNER

WORK is a folder with room: about 20 GB for the float stand-in of 9b, 14 for the W8A8S, 12 for the compressed one or 10 for the
statistics. What is made there is removed again. Images are 640x480 copies of eight photographs. The rates of the
machine are measured in the same run: F.linear on the model's own shapes, and a plain read and write of a file.

--fit runs 2 and 4 layers, then 2 and 4 images, and prints the seconds of one layer and of one image. --peers runs the vendor's
tool and llm-compressor, each by a runner `RUNNER FLOAT OUT --images DIR` that prints a last line of JSON, on the same
checkpoint and two images: three times each, in turn, each when the cores have come to rest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import psutil
import torch
from inspect_rate import drop_from_cache
from make_checkpoint import SIZES, Size, make_checkpoint, text_size
from photographs import photographs
from PIL import Image
from process import SEED, Measured, best_seconds, measure

from glmq.model.config import read_config

GLMQ = [sys.executable, "-m", "glmq"]
MATRIX_STAGES = ("vision", "forward", "statistics", "rounding", "report")
DISK_STAGES = ("read", "write", "copy")
PLAIN_BYTES = 4 * 2**30
IDLE_PERCENT = 3.0
"""Of all cores: below it nothing else is at work."""


def make_images(folder: Path, count: int) -> Path:
    """`count` different images of 640 x 480 pixels."""
    folder.mkdir()
    originals = photographs()
    for number in range(count):
        turn, index = divmod(number, len(originals))
        image = Image.open(originals[index]).convert("RGB").resize((640, 480))
        image.rotate(7 * turn).save(folder / f"{number:03d}.png")
    return folder


def matrix_rate(model: Path, tokens: int, patches: int) -> dict[str, float]:
    """FLOP/s of F.linear in float32 on the linears of one block of each tower, all of them one after the other."""
    config = read_config(model)
    rates = {}
    for label, block, rows in (
        ("text", config.family.text_block(config, 0), tokens),
        ("vision", config.family.vision_block(config, 0), patches),
    ):
        linears = [linear for group in block.groups for linear in group.linears]
        seconds = 0.0
        for linear in linears:
            x, weight = torch.randn(rows, linear.cols), torch.randn(linear.rows, linear.cols)
            seconds += best_seconds(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight))
        rates[label] = 2 * rows * sum(linear.rows * linear.cols for linear in linears) / seconds
    return rates


def plain_seconds(model: Path, folder: Path) -> tuple[float, float]:
    """Seconds per byte of a plain read of the model's own files, cold, and of a plain write with fsync, in 8 MiB pieces."""
    path, piece = folder / "plain.bin", bytearray(os.urandom(8 * 2**20))

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for _ in range(PLAIN_BYTES // len(piece)):
                file.write(piece)
            os.fsync(file.fileno())

    shards = sorted(model.glob("*.safetensors"))
    drop_from_cache(shards)
    started, found = time.perf_counter(), 0
    for shard in shards:
        with shard.open("rb", buffering=0) as file:
            while found < PLAIN_BYTES and (count := file.readinto(piece)):
                found += count
    read = (time.perf_counter() - started) / found
    written = best_seconds(write, 1) / PLAIN_BYTES
    path.unlink()
    return read, written


def run_verb(name: str, arguments: list[object], work: Path, *, codes: tuple[int, ...] = (0,)) -> tuple[Measured, dict]:
    """One verb in a process of its own, and its --json."""
    done = measure([*GLMQ, name, *map(str, arguments), "--json"], work, codes=codes)
    return done, json.loads(done.output[done.output.index("{") :])


def show_verb(name: str, done: Measured, document: dict, rates: dict[str, float], plain: tuple[float, float]) -> float:
    """The process, then its passes stage by stage. Returns the seconds that this machine needs at least: the products at
    F.linear's rate, and what is read and written at the disk's."""
    bound = 0.0
    print(f"{name:12}{done.wall_s:10.1f} s wall{done.cpu_s:10.1f} s CPU{done.peak_mib:10.0f} MiB peak", flush=True)
    for one in document.get("passes", ()):
        measured = sum(stage["seconds"] for stage in one["stages"])
        stages = [*one["stages"], {"stage": "other", "seconds": one["seconds"] - measured, "flops": 0, "nbytes": 0}]
        for stage in stages:
            line = f"    {one['title']:10}{stage['stage']:12}{stage['seconds']:9.1f} s{stage['seconds'] / one['seconds']:7.1%}"
            if stage["flops"] and stage["stage"] in MATRIX_STAGES:
                rate = stage["flops"] / stage["seconds"]
                of = rates["vision" if stage["stage"] == "vision" else "text"]
                bound += stage["flops"] / of
                line += f"{rate / 1e9:9.1f} GFLOP/s, {rate / of:.0%} of F.linear"
            elif stage["nbytes"] and stage["stage"] in DISK_STAGES:
                wanted = stage["nbytes"] * {"read": plain[0], "write": plain[1], "copy": sum(plain) / 2}[stage["stage"]]
                bound += wanted
                line += (
                    f"{stage['nbytes'] / stage['seconds'] / 1e9:9.2f} GB/s, {wanted / stage['seconds']:.0%} of plain"
                )
            print(line)
    return bound


def run_pipeline(model: Path, images: Path, work: Path) -> None:
    """calibrate, quantize, compress, verify, with their rates."""
    stats, quantized, packed = work / "stats", work / "w8a8s", work / "w8a8sc"
    torch.manual_seed(0)
    calibrated = run_verb("calibrate", ["--model-path", model, "--calib-images", images, "--stats", stats], work)
    tokens = calibrated[1]["samples"][0]["tokens"]
    patches = calibrated[1]["inputs"]["model.visual.blocks.0.attn.qkv"]["tokens"] // len(list(images.iterdir()))
    rates, plain = matrix_rate(model, tokens, patches), plain_seconds(model, work)
    print(
        f"F.linear float32: {rates['text'] / 1e9:.0f} GFLOP/s on text shapes, {rates['vision'] / 1e9:.0f} on vision shapes; "
        f"plain read {1e-9 / plain[0]:.2f} GB/s, write {1e-9 / plain[1]:.2f} GB/s; {torch.get_num_threads()} threads"
    )
    least = show_verb("calibrate", *calibrated, rates, plain)
    nothing_done = run_verb(
        "quantize",
        ["--model_path", model, "--stats", stats, "--save_directory", work / "w8a8", "--method", "plain",
         "--anti_method", "none", "--act_method", "1"],
        work,
    )  # fmt: skip
    show_verb("plain W8A8", *nothing_done, rates, plain)
    read, written = (sum(p.stat().st_size for p in f.glob("*.safetensors")) for f in (model, work / "w8a8"))
    wanted = read * plain[0] + written * plain[1]
    seconds = sum(one["seconds"] for one in nothing_done[1]["passes"])
    stages = [stage for one in nothing_done[1]["passes"] for stage in one["stages"]]
    reports = sum(stage["seconds"] for stage in stages if stage["stage"] == "report")
    print(
        f"    plain read + write of the same bytes {wanted:.1f} s: plain rounding and writing reaches "
        f"{wanted / (seconds - reports):.0%}, {wanted / seconds:.0%} with the error table"
    )
    shutil.rmtree(work / "w8a8")
    options: list[object] = ["--model_path", model, "--stats", stats, "--save_directory", quantized, *SEED]
    made = run_verb("quantize", options, work)
    least += show_verb("quantize", *made, rates, plain)
    both = calibrated[0].wall_s + made[0].wall_s
    print(
        f"both {both:.0f} s; the products at F.linear's float32 rate, reading and writing at the disk's take {least:.0f} s: "
        f"{both / least:.2f} x",
        flush=True,
    )
    verified = run_verb(
        "verify", [quantized, "--reference", model, "--calib-images", images, "--limit", 1], work, codes=(0, 3)
    )
    show_verb("verify", *verified, rates, plain)
    errors = [found["message"] for found in verified[1]["findings"] if found["severity"] == "error"]
    print(f"    {len(errors)} errors found{''.join(f'; {one}' for one in errors[:3])}", flush=True)
    shutil.rmtree(stats)  # room for what follows
    show_verb(
        "compress",
        *run_verb("compress", ["--model_path", quantized, "--save_directory", packed, "--codec", "portable"], work),
        rates,
        plain,
    )


def run_fit(size: Size, work: Path) -> None:
    """Seconds of a layer and of an image, each from two points and checked at a third."""
    found = {}
    for layers, images in ((2, 2), (4, 2), (6, 2), (2, 4), (2, 6)):
        with scratch(work / "fit") as folder:
            make_checkpoint(folder / "model", replace(size, layers=layers))
            paths = ["--model_path", folder / "model", "--save_directory", folder / "out"]
            done, document = run_verb(
                "quantize", [*paths, "--calib-images", make_images(folder / "images", images), *SEED], folder
            )
            found[layers, images] = sum(one["seconds"] for one in document["passes"])
            print(
                f"{layers} layers, {images} images: {found[layers, images]:8.1f} s{done.peak_mib:8.0f} MiB peak",
                flush=True,
            )
    layer, image = (found[4, 2] - found[2, 2]) / 2, (found[2, 4] - found[2, 2]) / 2
    print(
        f"one layer more {layer:.2f} s: 6 layers foretold {found[2, 2] + 4 * layer:.1f} s, measured {found[6, 2]:.1f} s"
    )
    print(
        f"one image more {image:.2f} s: 6 images foretold {found[2, 2] + 4 * image:.1f} s, measured {found[2, 6]:.1f} s"
    )


def wait_for_idle_cores() -> float:
    """Wait, five minutes at most, until three seconds pass in which the cores do next to nothing.

    The load of a minute would still count the run before. Returns how busy they were, in percent.
    """
    busy = 100.0
    for _ in range(100):
        busy = psutil.cpu_percent(interval=3.0)
        if busy < IDLE_PERCENT:
            break
    return busy


def run_peers(size: Size, work: Path, peers: list[str], times: int) -> None:
    """The same checkpoint and two images through all three tools, without and with the texts that glmq adds.

    Whole processes, one tool after the other, several times; medians.
    """
    vendor, vendor_runner, llmc, llmc_runner = (str(Path(path).absolute()) for path in peers)
    model, images = work / "model", work / "two images"
    make_checkpoint(model, size)
    make_images(images, 2)
    ours = [
        "--model_path",
        str(model),
        "--calib_images",
        str(images),
        "--save_directory",
        str(work / "ours"),
        "--overwrite",
    ]
    rows = {
        "glmq, W8A8S": [*GLMQ, "quantize", *ours, "--no-texts", *SEED],
        "glmq, W8A8S, texts": [*GLMQ, "quantize", *ours, *SEED],
        "vendor, W8A8S": [
            vendor, vendor_runner, str(model), str(work / "vendor"), "--images", str(images),
            "--w_bit", "4", "--is_lowbit", "--use_sigma",
        ],
        "glmq, W8A8_DYNAMIC": [*GLMQ, "quantize", *ours, "--no-texts", "--is_dynamic", "True"],
        "llm-compressor": [llmc, llmc_runner, str(model), str(work / "llmc"), "--images", str(images)],
    }  # fmt: skip
    found: dict[str, list[Measured]] = {label: [] for label in rows}
    for number in range(times):
        for label, command in rows.items():
            for folder in ("vendor", "llmc"):
                shutil.rmtree(work / folder, ignore_errors=True)
            busy = wait_for_idle_cores()
            done = measure(command, work)
            found[label].append(done)
            print(
                f"{number + 1} {label:20}{done.wall_s:9.1f} s wall{done.cpu_s:9.1f} s CPU{done.peak_mib:9.0f} MiB peak; "
                f"cores {busy:.0f} % busy before",
                flush=True,
            )
    wall = {label: median(one.wall_s for one in runs) for label, runs in found.items()}
    peak = {label: median(one.peak_mib for one in runs) for label, runs in found.items()}
    for label in rows:
        print(f"median {label:20}{wall[label]:9.1f} s wall{peak[label]:9.0f} MiB peak")
    for ours_, theirs in (
        ("glmq, W8A8S", "vendor, W8A8S"),
        ("glmq, W8A8S, texts", "vendor, W8A8S"),
        ("glmq, W8A8_DYNAMIC", "llm-compressor"),
    ):
        print(f"{theirs} / {ours_}: {wall[theirs] / wall[ours_]:.1f} x time, {peak[theirs] / peak[ours_]:.2f} x memory")


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A fresh folder that is removed at the end."""
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="a folder with room")
    parser.add_argument("--model", type=Path, help="a float checkpoint to take instead of making one")
    parser.add_argument("--size", choices=sorted(SIZES))
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vision-depth", type=int, help="blocks of the vision tower, then of the real width")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--peers", nargs=4, metavar=("VENDOR_PYTHON", "VENDOR_RUNNER", "LLMC_PYTHON", "LLMC_RUNNER"))
    parser.add_argument("--times", type=int, default=3, help="runs of each tool, with --peers")
    a = parser.parse_args()
    size = SIZES[a.size] if a.size else text_size(a.hidden, 4)
    if a.layers:
        size = replace(size, layers=a.layers)
    if a.vision_depth:
        real = SIZES["9b"]
        size = replace(
            size,
            vision_hidden=real.vision_hidden,
            vision_heads=real.vision_heads,
            vision_depth=a.vision_depth,
            image_size=real.image_size,
        )
    print(f"{a.model or size}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    with scratch(a.work / "scale") as work:
        if a.fit:
            run_fit(size, work)
        elif a.peers:
            run_peers(size, work, a.peers, a.times)
        else:
            model = a.model.absolute() if a.model else work / "model"
            if not a.model:
                make_checkpoint(model, size)
            run_pipeline(model, make_images(work / "images", a.images), work)


if __name__ == "__main__":
    main()
