"""How good the estimate of a whole run is: what is foretold after 10, 25 and 50 % of it against what it then takes.

    python tests/benchmarks/estimate.py [--hidden 1024] [--layers 8] [--images 4] [--cpu-time]

Calibrates and quantizes in one run, W8A8 and then W8A8S. With --cpu-time every clock counts the processor's seconds, in one
thread, so that what else the machine does changes little.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

if "--cpu-time" in sys.argv:
    time.perf_counter = time.process_time  # before anything of glmq looks at it

import torch
from make_checkpoint import make_checkpoint, text_size

from glmq import CalibrationOptions, Event, Recipe
from glmq.calibration.samples import default_images
from glmq.cli.remaining import Remaining
from glmq.jobs.quantize import QuantizationJob, run_quantization

SHARES = (0.1, 0.25, 0.5)
WANTED = 0.25
"""The largest error of what is left after a tenth of the run."""


def record(job: QuantizationJob) -> list[tuple[float, float]]:
    """Seconds that have passed and that are foretold to be left, at each event of a run; the last one is its end."""
    remaining = Remaining(time.perf_counter)
    told: list[tuple[float, float]] = []

    def watch(event: Event) -> None:
        remaining.see(event)
        left = remaining.left()
        if left is not None:
            told.append((remaining.elapsed(), left))

    run_quantization(job, overwrite=False, resume=False, watch=watch)
    return [*told, (remaining.elapsed(), 0.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--cpu-time", action="store_true")
    a = parser.parse_args()
    if a.cpu_time:
        torch.set_num_threads(1)
    print(f"{'type':>6}{'of the run':>12}{'foretold s':>12}{'truth s':>10}{'error':>8}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder / "model", text_size(a.hidden, a.layers))
        for title, recipe in (("W8A8", Recipe.w8a8()), ("W8A8S", Recipe.w8a8s(sigma=3.0))):
            calibration = CalibrationOptions(images=default_images(), limit=a.images)
            told = record(QuantizationJob(folder / "model", folder / title, recipe, calibration))
            total = told[-1][0]
            for share in SHARES:
                passed, foretold = next(pair for pair in told if pair[0] >= share * total)
                error = foretold / max(total - passed, 1e-9) - 1
                mark = "" if abs(error) <= WANTED else "  beyond the limit"
                row = f"{title:>6}{share:12.0%}{foretold:12.1f}{total - passed:10.1f}{error:8.0%}{mark}"
                print(row, flush=True)


if __name__ == "__main__":
    main()
