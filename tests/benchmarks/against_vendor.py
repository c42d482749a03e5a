"""The seed command of glmq beside the vendor's published package: same checkpoint, same photographs, one run.

    python tests/benchmarks/against_vendor.py --vendor-python vendor/bin/python [--hidden 1024 --layers 2 --images 2]

Whole processes, one after the other; `vendor_runner.py` says how to make the vendor's environment. Prints wall seconds, CPU
seconds and peak resident memory of both, their ratios, and the stages of both without the start of Python.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from make_checkpoint import make_checkpoint, text_size
from photographs import link_photographs
from process import SEED, measure

VENDOR_SEED = {"w_bit": 4, "is_lowbit": True, "fraction": 0.01, "use_sigma": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vendor-python", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = link_photographs(folder / "images")
        model = folder / "model"
        make_checkpoint(model, text_size(a.hidden, a.layers))
        runner = Path(__file__).with_name("vendor_runner.py").resolve()
        common = ["--images", str(images), "--limit", str(a.images), "--config", json.dumps(VENDOR_SEED)]
        vendor_python = str(a.vendor_python.absolute())
        vendor = measure([vendor_python, str(runner), str(model), str(folder / "vendor"), *common], folder)
        paths = ["--model_path", str(model), "--save_directory", str(folder / "glmq"), "--calib_images", str(images)]
        ours = measure([sys.executable, "-m", "glmq", "quantize", *paths, "--limit", str(a.images), *SEED], folder)
    print(f"hidden {a.hidden}, {a.layers} layers, {a.images} photographs, {os.cpu_count()} cores")
    print(f"{'':10}{'wall s':>10}{'CPU s':>10}{'peak MiB':>10}")
    for label, m in (("vendor", vendor), ("glmq", ours)):
        print(f"{label:10}{m.wall_s:10.1f}{m.cpu_s:10.1f}{m.peak_mib:10.0f}")
    wall, cpu, peak = vendor.wall_s / ours.wall_s, vendor.cpu_s / ours.cpu_s, vendor.peak_mib / ours.peak_mib
    print(f"{'ratio':10}{wall:10.1f}{cpu:10.1f}{peak:10.2f}")
    stages = json.loads(vendor.output.splitlines()[-1])["seconds"]
    own = [float(s) for s in re.findall(r"^(?:calibrate|rate|quantize): ([\d.]+) s, peak", ours.output, re.MULTILINE)]
    total = sum(stages.values())
    print(f"stages: vendor {stages}, {total:.1f} s; glmq calibrate, rate, quantize {own}; ratio {total / sum(own):.1f}")
    if a.json:
        a.json.write_text(json.dumps({"vendor": asdict(vendor), "glmq": asdict(ours)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
