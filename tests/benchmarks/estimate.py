"""How good the estimate of a whole run is: what is foretold after 10, 25 and 50 % of it against what it then takes.

    python tests/benchmarks/estimate.py [--hidden 1024] [--layers 8] [--images 4]

Calibrates and quantizes in one command, W8A8 and then W8A8S, and reads the file of events.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from make_checkpoint import make_checkpoint, text_size
from process import SEED, measure

from glmq.calibration.samples import default_images

SHARES = (0.1, 0.25, 0.5)
WANTED = 0.25
"""The largest error of what is left after a tenth of the run."""


def errors_of(events: Path) -> list[tuple[float, float, float]]:
    """By share of the run: seconds foretold to be left there, and those that were."""
    lines = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
    total = lines[-1]["elapsed_seconds"]
    known = [line for line in lines if line.get("remaining_seconds") is not None]
    found = []
    for share in SHARES:
        at = next(line for line in known if line["elapsed_seconds"] >= share * total)
        found.append((share, at["remaining_seconds"], total - at["elapsed_seconds"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--images", type=int, default=4)
    a = parser.parse_args()
    print(f"{'type':>6}{'of the run':>12}{'foretold s':>12}{'truth s':>10}{'error':>8}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder / "model", text_size(a.hidden, a.layers))
        for title, options in (("W8A8", []), ("W8A8S", SEED)):
            events = folder / f"{title}.jsonl"
            paths = ["--model_path", str(folder / "model"), "--save_directory", str(folder / title)]
            images = ["--calib_images", str(default_images().resolve()), "--limit", str(a.images)]
            command = [sys.executable, "-m", "glmq", "quantize", *paths, *images, "--events", str(events), *options]
            measure(command, folder)
            for share, foretold, truth in errors_of(events):
                error = foretold / truth - 1
                mark = "" if abs(error) <= WANTED else "  beyond the limit"
                print(f"{title:>6}{share:12.0%}{foretold:12.1f}{truth:10.1f}{error:8.0%}{mark}", flush=True)


if __name__ == "__main__":
    main()
