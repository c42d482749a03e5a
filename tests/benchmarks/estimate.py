"""How good the estimate of a whole run is: what is foretold after 10, 25 and 50 % of it against what it then takes.

    python tests/benchmarks/estimate.py [--hidden 1024] [--layers 8] [--images 4] [--cpu-time] [--runs ask sweep]

The runs: `W8A8` and `W8A8S` calibrate and quantize in one, `calibrate` does the first alone and `quantize` the second, `sweep`
is of two recipes with KL, `verify` runs both models over the pictures, `ask` lets the quantized one answer. A random model ends
no answer, so that of `ask` is as long as is allowed.
With --cpu-time every clock counts the processor's seconds, in one thread, so that what else the machine does changes little.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if "--cpu-time" in sys.argv:
    time.perf_counter = time.process_time  # before anything of glmq looks at it

import torch
from make_checkpoint import make_checkpoint, text_size

import glmq
from glmq import CalibrationOptions, CaseOptions, Event, Recipe, SweepOptions, Variant
from glmq.calibration.samples import default_images
from glmq.cli.remaining import Remaining
from glmq.jobs.quantization_job import QuantizationJob
from glmq.jobs.quantize import run_quantization
from glmq.progress import Watch

SHARES = (0.1, 0.25, 0.5)
WANTED = 0.25
"""The largest error of what is left after a tenth of the run."""
RUNS = ("W8A8", "W8A8S", "calibrate", "quantize", "sweep", "verify", "ask")
TAKE_STATISTICS = {"quantize", "sweep"}
TAKE_WEIGHTS = {"verify", "ask"}
TOKENS = 128
"""Of an answer."""


def record(run: Callable[[Watch], object]) -> list[tuple[float, float]]:
    """Seconds that have passed and that are foretold to be left, at each event of a run; the last one is its end."""
    remaining = Remaining(time.perf_counter)
    told: list[tuple[float, float]] = []

    def watch(event: Event) -> None:
        remaining.see(event)
        left = remaining.left()
        if left is not None:
            told.append((remaining.elapsed(), left))

    run(watch)
    return [*told, (remaining.elapsed(), 0.0)]


def runs(folder: Path, images: int) -> dict[str, Callable[[Watch], object]]:
    """What can be timed, by name."""
    model, stats, quantized = folder / "model", folder / "stats", folder / "W8A8"
    calibration = CalibrationOptions(images=default_images(), limit=images)
    cases = CaseOptions(images=default_images(), limit=images)
    variants = [Variant("w8a8", Recipe.w8a8()), Variant("sigma", Recipe.w8a8s(sigma=3.0))]

    def quantize(recipe: Recipe, out: Path) -> Callable[[Watch], object]:
        job = QuantizationJob(model, out, recipe, calibration)
        return lambda watch: run_quantization(job, overwrite=True, resume=False, watch=watch)

    def calibrate(watch: Watch) -> object:
        return glmq.calibrate(model, out=stats, options=calibration, overwrite=True, watch=watch)

    def sweep(watch: Watch) -> object:
        options = SweepOptions(cases=cases)
        return glmq.sweep(
            model, stats, variants, out=folder / "sweep", options=options, overwrite=True, watch=watch
        )  # fmt: skip

    def ask(watch: Watch) -> object:
        picture = next(path for path in sorted(default_images().iterdir()) if path.suffix == ".jpg")
        return glmq.ask(quantized, image=picture, max_new_tokens=TOKENS, watch=watch)

    return {
        "W8A8": quantize(Recipe.w8a8(), quantized),
        "W8A8S": quantize(Recipe.w8a8s(sigma=3.0), folder / "W8A8S"),
        "calibrate": calibrate,
        "quantize": lambda watch: glmq.quantize(
            model, stats, out=folder / "quantized", recipe=Recipe.w8a8s(sigma=3.0), overwrite=True, watch=watch
        ),
        "sweep": sweep,
        "verify": lambda watch: glmq.verify(quantized, reference=model, cases=cases, watch=watch),
        "ask": ask,
    }


def prepare(folder: Path, a: argparse.Namespace) -> None:
    """Make what the runs that are asked for take and none of those before them leaves."""
    model, stats, quantized = folder / "model", folder / "stats", folder / "W8A8"
    if not model.is_dir():
        make_checkpoint(model, text_size(a.hidden, a.layers))
    lacks_weights = bool(TAKE_WEIGHTS.intersection(a.runs)) and "W8A8" not in a.runs and not quantized.is_dir()
    if (lacks_weights or TAKE_STATISTICS.intersection(a.runs)) and not stats.is_dir():
        glmq.calibrate(model, out=stats, options=CalibrationOptions(images=default_images(), limit=a.images))
    if lacks_weights:
        glmq.quantize(model, stats, out=quantized, recipe=Recipe.w8a8())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--folder", type=Path, help="where the model and what is made of it stay")
    a = parser.parse_args()
    if a.cpu_time:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) if a.folder is None else a.folder
        timed = runs(folder, a.images)
        prepare(folder, a)
        print(f"{'run':>9}{'of the run':>12}{'foretold s':>12}{'truth s':>10}{'error':>8}")
        for title in a.runs:
            told = record(timed[title])
            total = told[-1][0]
            for share in SHARES:
                passed, foretold = next(pair for pair in told if pair[0] >= share * total)
                error = foretold / max(total - passed, 1e-9) - 1
                mark = "" if abs(error) <= WANTED else "  beyond the limit"
                row = f"{title:>9}{share:12.0%}{foretold:12.1f}{total - passed:10.1f}{error:8.0%}{mark}"
                print(row, flush=True)


if __name__ == "__main__":
    main()
