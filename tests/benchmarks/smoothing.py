"""What smoothing is worth: none, m2 by the vendor tool's rule, and glmq's, everything else the same.

    python tests/benchmarks/smoothing.py --judge judge.py [--modes seed W8A8]

The embedded model, 16 pictures without answers and glmq's own texts, held-out cases, judged as in fidelity.py. The vendor's
rule (Outlier Suppression+, arXiv 2304.09145, its scale part): with h_j half the range of input j and w_j the largest
|W[:, j]| of the group, s_j = sqrt(h_j / w_j) where h_j exceeds a threshold, else 1; of 100 thresholds from the inputs'
deviation to their largest value the one with the least output error, weights and activations in int8, on the sample of
tokens that the statistics keep (the tool itself looks at its first sample alone, and without the image's features).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from fidelity import Judge
from torch import Tensor

from glmq.jobs.calibrate import calibrate
from glmq.jobs.calibration_options import CalibrationOptions
from glmq.jobs.quantize import quantize
from glmq.model.tiny import TINY_CHECKPOINT, TINY_PICTURES
from glmq.numerics.moments import InputStats
from glmq.numerics.smooth import ScaleChoice
from glmq.quantization import group
from glmq.quantization.options import Options
from glmq.quantization.recipe import make_recipe
from glmq.spec import QuantType, Smoothing

THRESHOLDS: Final = 100
MODES: Final = {
    "seed": Options(w_bit=4, is_lowbit=True, use_sigma=True, torch_dtype="fp16"),
    "fraction 0.01": Options(w_bit=4, is_lowbit=True, torch_dtype="fp16"),
    "W8A8": Options(torch_dtype="fp16"),
    "W8A8_DYNAMIC": Options(is_dynamic=True, torch_dtype="fp16"),
    "W4A8_DYNAMIC g64": Options(w_bit=4, is_lowbit=True, is_dynamic=True, torch_dtype="fp16"),
}
Chooser = Callable[[Smoothing, InputStats, Sequence[Tensor], Tensor, QuantType], ScaleChoice]


def choose_by_vendors_rule(
    _: Smoothing, stats: InputStats, weights: Sequence[Tensor], __: Tensor, ___: QuantType
) -> ScaleChoice:
    """m2 as the vendor's tool chooses it."""
    half = (stats.maximum - stats.minimum) / 2
    top = torch.cat(list(weights)).abs().amax(0).clamp_min(1e-5)
    wanted = (half / top).sqrt().clamp_min(1e-5)
    weight, x = torch.cat(list(weights)), stats.sample
    y = x @ weight.T

    def error(scales: Tensor) -> float:
        return float((_int8_rows(x / scales) @ _int8_rows(weight * scales).T - y).square().sum())

    limits = torch.linspace(float(x.std()), float(half.max()), THRESHOLDS).tolist()
    tried = [torch.where(half > limit, wanted, 1.0) for limit in limits]
    return ScaleChoice(min(tried, key=error), "vendor's m2")


def _int8_rows(x: Tensor) -> Tensor:
    step = x.abs().amax(1, keepdim=True).clamp_min(1e-9) / 127
    return (x / step).round().clamp(-128, 127) * step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    a = parser.parse_args()
    torch.set_num_threads(1)
    judge = Judge(a.judge, TINY_CHECKPOINT)
    print("| mode | method | smoothing | bits | images: error | KL | texts: error | KL |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    own: Chooser = group.choose_scales
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        calibration = CalibrationOptions(images=TINY_PICTURES)
        calibrate(TINY_CHECKPOINT, out=folder / "stats", options=calibration)
        for name in a.modes:
            for method in ("plain", "compensated"):
                for label, anti, chooser in (
                    ("none", "none", own),
                    ("vendor's m2", "m2", choose_by_vendors_rule),
                    ("glmq", "m2", own),
                ):
                    options = replace(MODES[name], anti_method=anti, method=method)
                    out = folder / "out"
                    recipe = make_recipe(options)
                    group.choose_scales = chooser  # type: ignore[assignment]
                    try:
                        quantize(TINY_CHECKPOINT, folder / "stats", out=out, recipe=recipe, overwrite=True)
                    finally:
                        group.choose_scales = own  # type: ignore[assignment]
                    images, texts = (judge(out, kind) for kind in ("images", "texts"))
                    print(
                        f"| {name} | {method} | {label} | {images.entropy_bits:.2f} | {images.linear_err:.4f} | "
                        f"{images.kl:.1e} | {texts.linear_err:.4f} | {texts.kl:.1e} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
