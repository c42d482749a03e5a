"""Rate-distortion curve of the sparse types on the embedded tiny model: bits per weight, errors on held-out pictures.

    python tests/benchmarks/curve.py --judge judge.py [--keep FOLDER] \
        [--reference-python vendor/bin/python --reference-runner run_reference.py]

Writes results/curve.json beside this file and docs/images/bits-against-error.svg; --draw draws the SVG from the JSON alone.
Four series, all calibrated on the same 16 pictures without answers, all W8A8S, judged as in fidelity.py:

    reference    the vendor's package: its sigma rule, and fractions of outliers
    nearest      the same flags with glmq's smoothing and ranges, --method plain
    compensated  the same flags, each linear at the bits that its own rule spends
    planned      --target-bits, spread over the linears for the least error
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from fidelity import Judge, Peer

from glmq.jobs import measured
from glmq.jobs.calibrate import calibrate
from glmq.jobs.calibration_options import CalibrationOptions
from glmq.jobs.quantize import quantize
from glmq.model.tiny import TINY_CHECKPOINT, TINY_PICTURES
from glmq.quantization.options import Options
from glmq.quantization.recipe import make_recipe
from glmq.spec import Method

RESULTS: Final = Path(__file__).parent / "results"
CHART: Final = Path(__file__).parents[2] / "docs" / "images" / "bits-against-error.svg"
SPARSE: Final = Options(w_bit=4, is_lowbit=True, torch_dtype="fp16")
FRACTIONS: Final = (0.01, 0.02, 0.05, 0.1)
TARGETS: Final = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)


@dataclass(frozen=True)
class Point:
    """One checkpoint."""

    series: str
    setting: str
    bits: float
    """Zero-order entropy of the integers per weight, as they came out."""
    error: float
    """Mean relative output error of the linears on held-out pictures."""
    kl: float
    """Nats per scored position on held-out pictures."""


def measure_points(judge: Judge, peer: Peer | None, folder: Path) -> Iterator[Point]:
    """Make and judge every checkpoint."""

    def judged(series: str, setting: str, candidate: Path) -> Point:
        found = judge(candidate, "images")
        print(
            f"{series:12} {setting:14} {found.entropy_bits:.2f} bits  {found.linear_err:.4f}  {found.kl:.1e}",
            flush=True,
        )
        return Point(series, setting, found.entropy_bits, found.linear_err, found.kl)

    sigma = ("--w_bit", "4", "--is_lowbit", "--use_sigma")
    fractions = [("--w_bit", "4", "--is_lowbit", *(("--fraction", str(f)) if f != 0.01 else ())) for f in FRACTIONS]
    labels = ["sigma", *(f"fraction {f}" for f in FRACTIONS)]
    if peer is not None:
        for label, flags in zip(labels, (sigma, *fractions), strict=True):
            yield judged("reference", label, peer.run(flags)[0])
    calibration = CalibrationOptions(images=TINY_PICTURES, texts=False)
    stats = folder / "stats"
    calibrate(TINY_CHECKPOINT, out=stats, options=calibration)

    def quantized(**changes: object) -> Path:
        options = Options(**{**asdict(SPARSE), **changes})  # type: ignore[arg-type]
        recipe = make_recipe(options)
        return quantize(TINY_CHECKPOINT, stats, out=folder / "out", recipe=recipe, overwrite=True).folder

    flags_of = [{"use_sigma": True}, *({"fraction": f} for f in FRACTIONS)]
    for label, flags in zip(labels, flags_of, strict=True):
        yield judged("nearest", label, quantized(method=Method.PLAIN.value, **flags))
    spread = measured.spread_bits
    measured.spread_bits = lambda *_, **__: {}  # each linear then follows its own rule
    try:
        for label, flags in zip(labels, flags_of, strict=True):
            yield judged("compensated", label, quantized(**flags))
    finally:
        measured.spread_bits = spread
    for target in TARGETS:
        yield judged("planned", f"{target} bits", quantized(target_bits=target))


WIDTH, HEIGHT = 860, 380
LEFT, RIGHT, TOP, BOTTOM, GAP = 66, 14, 54, 52, 78
COLOURS: Final = {"reference": "#c0392b", "nearest": "#8a6d1f", "compensated": "#2471a3", "planned": "#1e8449"}
NAMES: Final = {
    "reference": "msmodelslim 26.1.0",
    "nearest": "glmq --method plain",
    "compensated": "glmq, compensated, each linear by the flags",
    "planned": "glmq --target-bits",
}
PLOT_WIDTH = (WIDTH - LEFT - RIGHT - GAP) / 2


def draw(points: Sequence[Point]) -> str:
    """Two panels side by side, errors on a logarithmic scale; readable on light and dark pages."""
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>']
    x = float(LEFT)
    for series in (s for s in NAMES if any(p.series == s for p in points)):
        parts.append(_mark(series, x + 5, 18))
        parts.append(_text(x + 16, 22, NAMES[series]))
        x += 40 + 6.6 * len(NAMES[series])
    panels = (
        ("output error of the linears, relative", [p.error for p in points]),
        ("KL(float, quantized), nats per position", [p.kl for p in points]),
    )
    for number, (title, values) in enumerate(panels):
        parts += _panel(LEFT + number * (PLOT_WIDTH + GAP), title, points, values)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#222222">\n{body}\n</svg>\n'
    )


def _panel(left: float, title: str, points: Sequence[Point], values: Sequence[float]) -> Iterator[str]:
    bottom = HEIGHT - BOTTOM
    first, last = math.floor(2 * min(p.bits for p in points)) / 2, math.ceil(2 * max(p.bits for p in points)) / 2
    ticks = _ticks(min(values), max(values))
    low, high = math.log(ticks[0]), math.log(ticks[-1])

    def place(bits: float, value: float) -> tuple[float, float]:
        return (
            left + PLOT_WIDTH * (bits - first) / (last - first),
            bottom - (bottom - TOP) * (math.log(value) - low) / (high - low),
        )

    for value in ticks:
        y = place(first, value)[1]
        yield f'<path d="M{left:.1f} {y:.1f}h{PLOT_WIDTH:.1f}" stroke="#dddddd"/>'
        yield _text(left - 6, y + 4, f"{value:g}", anchor="end")
    for half in range(int(2 * first), int(2 * last) + 1):
        x = place(half / 2, ticks[0])[0]
        yield f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="#eeeeee"/>'
        if half % 2 == 0:
            yield _text(x, bottom + 17, f"{half // 2}", anchor="middle")
    yield f'<path d="M{left:.1f} {TOP}V{bottom}h{PLOT_WIDTH:.1f}" fill="none" stroke="#888888"/>'
    yield _text(left + PLOT_WIDTH / 2, bottom + 38, "bits per weight (entropy of the integers)", anchor="middle")
    yield f'<text x="{left:.1f}" y="{TOP - 10}" font-weight="bold">{title}</text>'
    for series in NAMES:
        own = sorted((p.bits, v, p.setting) for p, v in zip(points, values, strict=True) if p.series == series)
        path = " ".join("{:.1f},{:.1f}".format(*place(bits, value)) for bits, value, _ in own)
        yield f'<polyline points="{path}" fill="none" stroke="{COLOURS[series]}" stroke-width="1.8"/>'
        for bits, value, setting in own:
            yield _mark(series, *place(bits, value), title=f"{NAMES[series]}, {setting}: {bits:.2f} bits, {value:.2g}")


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten around the values; powers of ten alone where they span three of them or more."""
    steps = (1,) if high / low > 1000 else (1, 2, 5)
    every = [s * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for s in steps]
    start = max((v for v in every if v <= low), default=every[0])
    stop = min((v for v in every if v >= high), default=every[-1])
    return [float(f"{v:.1g}") for v in every if start <= v <= stop]


def _mark(series: str, x: float, y: float, *, title: str = "") -> str:
    colour, note = COLOURS[series], f"<title>{title}</title>" if title else ""
    shapes = {
        "reference": f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}">{note}</rect>',
        "nearest": f'<path d="M{x:.1f} {y - 5:.1f}l5 9h-10z" fill="{colour}">{note}</path>',
        "compensated": f'<path d="M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z" fill="{colour}">{note}</path>',
        "planned": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.2" fill="{colour}">{note}</circle>',
    }
    return shapes[series]


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--reference-python", type=Path)
    parser.add_argument("--reference-runner", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for the reference's checkpoints")
    parser.add_argument("--draw", action="store_true", help="draw again from results/curve.json")
    a = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "curve.json"
    if a.draw:
        points = [Point(**point) for point in json.loads(path.read_text())]
    else:
        torch.set_num_threads(1)  # the tiny model's matrices are too small to share between threads
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            keep = a.keep or folder / "peers"
            peer = a.reference_python and Peer(
                "reference", a.reference_python, a.reference_runner, TINY_CHECKPOINT, keep
            )
            points = list(measure_points(Judge(a.judge, TINY_CHECKPOINT), peer, folder))
        path.write_text("[\n" + ",\n".join(json.dumps(asdict(point)) for point in points) + "\n]\n")
    CHART.write_text(draw(points))


if __name__ == "__main__":
    main()
