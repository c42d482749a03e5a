"""What more cores bring: every stage of calibrate and quantize with one thread and with two, the share of it that runs in
parallel, and from both a model of the real size on a machine of many cores.

    python tests/benchmarks/cores.py WORK
    python tests/benchmarks/cores.py WORK --cores 64 --core-gflops 25

WORK is a folder with room: about 5 GB. The model has the real widths, two text layers and two blocks of the vision tower; a
block of the real size takes what a block of its kind took. Everything is computed in float32, which every processor has.

The share p that runs in parallel follows from the two times (Amdahl's law): t(1) / t(2) = 1 / (1 - p + p / 2). A stage then
takes (1 - p + p / N) t(1) on N cores, times the ratio of the two machines' float32 rates on one core. What reads and writes
stays as it was measured. The rate of one core of the other machine is an assumption, and so is that memory keeps up.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from make_checkpoint import SIZES, make_checkpoint
from process import SEED, best_seconds, measure
from scale import DISK_STAGES, GLMQ, make_images, scratch, wait_for_idle_cores

from glmq.model.config import ModelConfig, read_config

REAL = SIZES["9b"]
SMALL = replace(REAL, layers=2, vision_depth=2)
PART = 0.05
"""Of the run's time with two threads: a smaller stage is not asked to run in parallel."""

Stages = Mapping[tuple[str, str, str], float]
"""Mean seconds of a block, by pass, kind of block and stage."""


def core_gflops() -> float:
    """GFLOP/s of F.linear in float32 on one core, on the shape of a text layer's widest linear."""
    torch.set_num_threads(1)
    x, weight = torch.randn(512, REAL.hidden), torch.randn(2 * REAL.intermediate, REAL.hidden)
    return 2e-9 * x.shape[0] * weight.numel() / best_seconds(lambda: torch.nn.functional.linear(x, weight))


def run(model: Path, images: Path, work: Path, threads: int) -> Stages:
    """Both verbs with that many threads."""
    events, stats, out = work / "events.jsonl", work / "stats", work / "out"
    os.environ["OMP_NUM_THREADS"] = str(threads)
    config = read_config(model)
    seconds: defaultdict[tuple[str, str, str], float] = defaultdict(float)
    blocks: Counter[tuple[str, str]] = Counter()
    common = ["--model_path", str(model), "--stats", str(stats), "--overwrite"]
    for command in (
        ["calibrate", *common, "--calib-images", str(images), "--compute-dtype", "fp32"],
        ["quantize", *common, "--save_directory", str(out), *SEED],
    ):
        busy = wait_for_idle_cores()
        events.unlink(missing_ok=True)
        done = measure([*GLMQ, *command, "--events", str(events)], work)
        print(f"{threads} threads: {command[0]} {done.wall_s:.1f} s, cores {busy:.0f} % busy before", flush=True)
        title = ""
        for event in map(json.loads, events.read_text().splitlines()):
            title = event["title"] if event["event"] == "pass_started" else title
            if event["event"] == "block_done":
                kind = kind_of(config, event["name"])
                blocks[title, kind] += 1
                stages = {stage["stage"]: stage["seconds"] for stage in event["stages"]}
                stages["other"] = event["seconds"] - sum(stages.values())
                for stage, taken in stages.items():
                    seconds[title, kind, stage] += taken
    return {key: taken / blocks[key[:2]] for key, taken in seconds.items()}


def kind_of(config: ModelConfig, block: str) -> str:
    """Of a block, or of what lies outside of all."""
    known = {one.name for one in config.family.blocks(config)}
    return config.family.kind_of(block) if block in known else "rest"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="a folder with room")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--cores", type=int, nargs="+", default=[2, 8, 64])
    parser.add_argument("--core-gflops", type=float, default=25.0, help="float32 rate of one core of the other machine")
    a = parser.parse_args()
    with scratch(a.work / "cores") as work:
        model = work / "model"
        make_checkpoint(model, SMALL)
        images = make_images(work / "images", a.images)
        one, two = (run(model, images, work, threads) for threads in (1, 2))
    here = core_gflops()
    counts = {"vision": REAL.vision_depth - 1, "text": REAL.layers}
    totals = [sum(taken[key] * counts.get(key[1], 1) for key in one) for taken in (one, two)]
    print(f"one core: {here:.0f} GFLOP/s here, {a.core_gflops:.0f} assumed there")
    print(f"{'pass':10}{'block':8}{'stage':12}{'1 thread s':>11}{'2 threads s':>12}{'ratio':>7}{'of all':>8}")
    modelled = dict.fromkeys(a.cores, 0.0)
    for key, single in one.items():
        double, count = two[key], counts.get(key[1], 1)
        share = count * double / totals[1]
        of_disk = key[2] in DISK_STAGES
        parallel = 0.0 if of_disk else min(max(2 * (1 - double / single), 0.0), 1.0) if single > 0 else 0.0
        for cores in a.cores:
            there = single * (here / a.core_gflops) * (1 - parallel + parallel / cores)
            modelled[cores] += count * (double if of_disk else there)
        if share >= 0.002:
            mark = "  alone" if share >= PART and not of_disk and single / double < 1.8 else ""
            print(
                f"{key[0]:10}{key[1]:8}{key[2]:12}{single:11.2f}{double:12.2f}{single / double:7.2f}{share:8.1%}{mark}"
            )
    print(f"the real size here: {totals[0]:.0f} s with one thread, {totals[1]:.0f} s with two")
    for cores, seconds in modelled.items():
        print(f"modelled there, {cores} cores: {seconds:.0f} s")


if __name__ == "__main__":
    main()
