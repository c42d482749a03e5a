"""Fidelity on the embedded tiny model: the vendor's package and glmq, same calibration pictures, held-out cases.

    python tests/benchmarks/fidelity.py --vendor-python vendor/bin/python [--modes sigma w8a8] [--answers]

Both are measured by `glmq verify`: bits is the zero-order entropy of the stored integers per weight, error the mean over
linears of ||y_q - y|| / ||y|| (each fed the float model's own hidden states), KL the mean over positions in nats. Calibration
pictures and held-out cases never overlap. With --answers glmq is calibrated on the same pictures with their true descriptions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from process import measure

from glmq.audit.arithmetic import LinearArithmetic
from glmq.audit.verify import Limits
from glmq.checkpoint.reader import Checkpoint
from glmq.checkpoint.sidecar import copy_side_files
from glmq.cli.verify_job import load_samples, verify_folder
from glmq.model.inputs import DEFAULT_PROMPT
from glmq.model.tiny import TINY_CASES, TINY_CHECKPOINT, TINY_PICTURES


@dataclass(frozen=True)
class Mode:
    """One quantization type in the words of both tools."""

    vendor: dict[str, object]
    glmq: tuple[str, ...]


MODES = {
    "sigma": Mode(
        {"w_bit": 4, "is_lowbit": True, "use_sigma": True},
        ("--w_bit", "4", "--is_lowbit", "True", "--use_sigma", "True"),
    ),
    "fraction 0.01": Mode({"w_bit": 4, "is_lowbit": True}, ("--w_bit", "4", "--is_lowbit", "True")),
    "co_sparse": Mode({"w_bit": 4, "co_sparse": True}, ("--co_sparse", "True")),
    "w8a8": Mode({}, ()),
    "dynamic": Mode({"is_dynamic": True}, ("--is_dynamic", "True")),
    "w4a8 g64": Mode(
        {"w_bit": 4, "is_lowbit": True, "is_dynamic": True, "open_outlier": False, "group_size": 64},
        ("--w_bit", "4", "--is_lowbit", "True", "--is_dynamic", "True"),
    ),
}


@dataclass(frozen=True)
class Fidelity:
    """One checkpoint on one set of cases."""

    bits: float
    error: float
    kl: float
    top1: float


def judge(candidate: Path, cases: Path) -> Fidelity:
    """Run `glmq verify`'s measurements."""
    samples = load_samples(None, cases, DEFAULT_PROMPT, None)
    found = verify_folder(candidate, TINY_CHECKPOINT, [], Limits(), samples, max_pixels=None, quiet=True)
    errors = [linear.error for linear in found.behaviours.values()]
    linears: list[LinearArithmetic] = list(found.linears)
    with Checkpoint.open(TINY_CHECKPOINT) as source:
        weights = [source.nbytes(f"{linear.name}.weight") for linear in linears]
    bits = sum(linear.entropy_bits * count for linear, count in zip(linears, weights)) / sum(weights)
    assert found.predictions is not None
    return Fidelity(bits, sum(errors) / len(errors), found.predictions.kl, found.predictions.top1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vendor-python", type=Path, required=True)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--answers", action="store_true")
    a = parser.parse_args()
    runner = Path(__file__).with_name("vendor_runner.py").resolve()
    samples = ["--calib_samples", str(TINY_PICTURES / "answers.jsonl")] if a.answers else []
    samples = samples or ["--calib_images", str(TINY_PICTURES)]
    print(f"{'mode':14} {'tool':7} {'bits':>6}  {'images: error':>14} {'KL':>9}  {'texts: error':>13} {'KL':>9}")
    for name in a.modes:
        mode = MODES[name]
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            vendor, own = folder / "vendor", folder / "glmq"
            paths = ["--model_path", str(TINY_CHECKPOINT), "--save_directory", str(own), "--torch_dtype", "fp16"]
            measure([sys.executable, "-m", "glmq", "quantize", *paths, *samples, *mode.glmq], folder)
            python = str(a.vendor_python.absolute())
            config = ["--config", json.dumps(mode.vendor)]
            measure(
                [python, str(runner), str(TINY_CHECKPOINT), str(vendor), "--images", str(TINY_PICTURES), *config],
                folder,
            )
            copy_side_files(TINY_CHECKPOINT, vendor)  # the runner writes weights and description alone
            shutil.copyfile(own / "config.json", vendor / "config.json")
            for tool, candidate in (("vendor", vendor), ("glmq", own)):
                images, texts = (judge(candidate, TINY_CASES / f"{kind}.jsonl") for kind in ("images", "texts"))
                print(
                    f"{name:14} {tool:7} {images.bits:6.2f}  {images.error:14.4f} {images.kl:9.2e}"
                    f"  {texts.error:13.4f} {texts.kl:9.2e}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
