"""The portable weight codec side by side with zstd and ZipNN, at the same tile size, in one run.

    python tests/benchmarks/codec.py [--json FILE] [--rounds N]

Speeds are millions of weights per CPU-second of one thread, medians of interleaved rounds: wall time means little on a shared
machine, and only numbers of one run compare. Ours includes the choice of tables, all checksums and the copy into one
matrix; the peers' is their call per tile and nothing else. Sizes of ours are whole files; of the peers, the sum of their tiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

import numpy as np
import zstandard
from numpy.typing import NDArray
from zipnn import ZipNN

from glmq.codec import codec

Matrix = NDArray[np.int8]

TILE = codec.TILE_BYTES
_IN_CACHE = np.ones(8192, dtype=np.float32)


@dataclass(frozen=True)
class Data:
    name: str
    rows: int
    cols: int
    shape: str
    """Of the weights: gauss, student (5 degrees of freedom), laplace."""
    step: float
    """Quantization step, in standard deviations of the row."""
    outliers: bool
    """3 % of the columns 4 to 30 times larger, as smoothing leaves them."""
    column_spread: float = 0.15
    """Standard deviation of the columns' log scale."""


LARGE = (
    Data("g4k", 4096, 4096, "gauss", 0.26, outliers=False),
    Data("t4k", 4096, 4096, "student", 0.26, outliers=False),
    Data("g4k_s05", 4096, 4096, "gauss", 0.5, outliers=False),
    Data("g4k_flat", 4096, 4096, "gauss", 0.26, outliers=False, column_spread=0.0),
    Data("g4k_o", 4096, 4096, "gauss", 0.26, outliers=True),
    Data("t4k_o", 4096, 4096, "student", 0.26, outliers=True),
    Data("l4k_o", 4096, 4096, "laplace", 0.26, outliers=True),
    Data("t4k_o_s05", 4096, 4096, "student", 0.5, outliers=True),
    Data("t1k_o", 1024, 4096, "student", 0.26, outliers=True),
)
_SCALED = "t4k_o"
"""What two workers are measured on."""
SMALL = (
    Data("g100k", 256, 400, "gauss", 0.26, outliers=False),
    Data("t100k_o", 256, 400, "student", 0.26, outliers=True),
    Data("t300k_o", 768, 400, "student", 0.26, outliers=True),
    Data("t1m_o", 256, 4096, "student", 0.26, outliers=True),
)


@dataclass(frozen=True)
class Reached:
    """One codec on one matrix."""

    data: str
    codec: str
    entropy_bits: float
    bits_per_weight: float
    encode_mb_s: float
    decode_mb_s: float


@dataclass(frozen=True)
class Goal:
    what: str
    target: float
    at_most: bool
    reached: float
    data: str
    """Where the worst was found."""

    @property
    def met(self) -> bool:
        return self.reached <= self.target if self.at_most else self.reached >= self.target


def make(data: Data) -> Matrix:
    rng = np.random.default_rng(sum(map(ord, data.name)))
    size = (data.rows, data.cols)
    match data.shape:
        case "gauss":
            weight = rng.standard_normal(size, dtype=np.float32)
        case "student":
            weight = rng.standard_t(5, size).astype(np.float32)
        case _:
            weight = rng.laplace(size=size).astype(np.float32)
    scale = np.exp(data.column_spread * rng.standard_normal(data.cols))
    if data.outliers:
        large = rng.permutation(data.cols)[: max(data.cols * 3 // 100, 1)]
        scale[large] *= rng.uniform(4, 30, large.size)
    weight *= scale.astype(np.float32) * np.exp(0.3 * rng.standard_normal((data.rows, 1))).astype(np.float32)
    step = weight.std(1, keepdims=True) * data.step
    return np.clip(np.rint(weight / step), -127, 127).astype(np.int8)


def entropy_bits(matrix: Matrix) -> float:
    p = np.bincount(matrix.view(np.uint8).reshape(-1), minlength=256) / matrix.size
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


def seconds(function: Callable[[], object]) -> float:
    begin = time.process_time()
    function()
    return time.process_time() - begin


def tiles_of(matrix: Matrix) -> list[bytes]:
    whole = matrix.tobytes()
    return [whole[at : at + TILE] for at in range(0, len(whole), TILE)]


class Ours:
    def __init__(self, name: codec.Backend, matrix: Matrix) -> None:
        self.name, self.matrix, self.blob = f"glmq {name}", matrix, codec.encode(matrix)
        self.backend, self.size = name, len(self.blob)
        if not np.array_equal(codec.decode(self.blob, backend=name), matrix):
            raise RuntimeError(f"{self.name}: another matrix came back")

    def round(self) -> tuple[float, float]:
        return (
            seconds(lambda: codec.encode(self.matrix, backend=self.backend)),
            seconds(lambda: codec.decode(self.blob, backend=self.backend)),
        )


class Zstd:
    def __init__(self, level: int, matrix: Matrix) -> None:
        self.name, self.tiles = f"zstd {level}", tiles_of(matrix)
        self.encoder, self.decoder = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
        self.coded = [self.encoder.compress(tile) for tile in self.tiles]
        self.size = sum(map(len, self.coded))

    def round(self) -> tuple[float, float]:
        return (
            seconds(lambda: [self.encoder.compress(tile) for tile in self.tiles]),
            seconds(lambda: [self.decoder.decompress(tile) for tile in self.coded]),
        )


class Zipnn:
    def __init__(self, matrix: Matrix) -> None:
        self.name, self.tiles = "ZipNN", tiles_of(matrix)
        # Its path for one-byte floats: one Huffman stream of whole bytes, which is the best it does on int8.
        self.zipnn = ZipNN(bytearray_dtype="float8_e4m3fn", input_format="byte", threads=1)
        self.coded = [bytes(self.zipnn.compress(bytearray(tile))) for tile in self.tiles]
        self.size = sum(map(len, self.coded))

    def round(self) -> tuple[float, float]:
        fresh = [bytearray(tile) for tile in self.tiles]
        return (
            seconds(lambda: [self.zipnn.compress(tile) for tile in fresh]),
            seconds(lambda: [self.zipnn.decompress(tile) for tile in self.coded]),
        )


def measure(data: Data, matrix: Matrix, entrants: Sequence[Ours | Zstd | Zipnn], rounds: int) -> list[Reached]:
    spent: dict[str, list[tuple[float, float]]] = {entrant.name: [] for entrant in entrants}
    for _ in range(rounds):
        for entrant in entrants:
            spent[entrant.name].append(entrant.round())
    found = []
    for entrant in entrants:
        encode, decode = (statistics.median(side) for side in zip(*spent[entrant.name]))
        found.append(
            Reached(
                data.name,
                entrant.name,
                entropy_bits(matrix),
                8 * entrant.size / matrix.size,
                matrix.size / 1e6 / encode,
                matrix.size / 1e6 / decode,
            )
        )
    return found


def small_encode_mb_s(data: Data) -> float:
    matrix = make(data)
    repeat = max(4_000_000 // matrix.size, 1)
    spent = [seconds(lambda: [codec.encode(matrix) for _ in range(repeat)]) for _ in range(9)]
    return matrix.size * repeat / 1e6 / statistics.median(spent)


def numpy_decode_mb_s(matrix: Matrix, rounds: int) -> float:
    blob = codec.encode(matrix)
    spent = [seconds(lambda: codec.decode(blob, backend="numpy")) for _ in range(rounds)]
    return matrix.size / 1e6 / statistics.median(spent)


class Workers:
    """Two workers, processes or threads, each bound to a core of its own, that do the same piece of work when told to."""

    def __init__(self, kind: str, matrix: Matrix) -> None:
        blob = codec.encode(matrix)
        self.works: dict[str, Callable[[], object]] = {
            "encode": lambda: codec.encode(matrix),
            "decode": lambda: codec.decode(blob),
            "arithmetic": lambda: [np.sqrt(_IN_CACHE, out=np.empty_like(_IN_CACHE)) for _ in range(400)],
            "copying": lambda: [matrix.copy() for _ in range(4)],
        }
        self.ends, theirs = zip(*(Pipe() for _ in range(2)))
        start = Thread if kind == "threads" else get_context("fork").Process
        for end, core in zip(theirs, sorted(os.sched_getaffinity(0))[-2:]):
            start(target=self._serve, args=(end, core), daemon=True).start()

    def _serve(self, end: Connection, core: int) -> None:
        os.sched_setaffinity(0, {core})
        while (name := end.recv()) is not None:
            self.works[name]()
            end.send(None)

    def wall(self, name: str, count: int) -> float:
        begin = time.perf_counter()
        for end in self.ends[:count]:
            end.send(name)
        for end in self.ends[:count]:
            end.recv()
        return time.perf_counter() - begin

    def stop(self) -> None:
        for end in self.ends:
            end.send(None)


def scaling(matrix: Matrix, rounds: int) -> dict[tuple[str, str], float]:
    """Throughput of two workers over twice that of one, medians over rounds of wall time of one against two.

    The machine's own, on plain arithmetic and copying, stands beside the codec's: a shared machine may have no two idle
    cores, and then nothing reaches 1.
    """
    ratios: dict[tuple[str, str], list[float]] = {}
    for kind in ("processes", "threads"):
        workers = Workers(kind, matrix)
        for _ in range(rounds):
            for name in workers.works:
                one = workers.wall(name, 1)
                both = workers.wall(name, 2)
                ratios.setdefault((kind, name), []).append(one / both)
        workers.stop()
    return {key: statistics.median(found) for key, found in ratios.items()}


def judge(
    found: Sequence[Reached],
    small: dict[str, float],
    numpy_speeds: dict[str, float],
    scaled: dict[tuple[str, str], float],
) -> list[Goal]:
    ours = "glmq auto"
    by = {(reached.data, reached.codec): reached for reached in found}
    # Where columns do not differ at all, every code ends at the entropy: no goal against peers there.
    plain = [data.name for data in LARGE if not data.outliers and data.column_spread]
    outliers = [data.name for data in LARGE if data.outliers]

    def worst(what: str, target: float, names: Sequence[str], value: Callable[[str], float], at_most: bool) -> Goal:
        name = (max if at_most else min)(names, key=value)
        return Goal(what, target, at_most, value(name), name)

    def size(names: Sequence[str], peer: str, target: float, what: str) -> Goal:
        return worst(what, target, names, lambda n: by[n, ours].bits_per_weight / by[n, peer].bits_per_weight, True)

    def over_entropy(name: str) -> float:
        return by[name, ours].bits_per_weight / by[name, ours].entropy_bits

    goals = [
        worst("size / zero-order entropy, any", 1.002, [data.name for data in LARGE], over_entropy, True),
        worst("size / zero-order entropy, outlier columns", 0.965, outliers, over_entropy, True),
    ]
    for peer, at_plain, at_outliers in (("zstd 3", 0.93, 0.78), ("zstd 1", 0.985, 0.85), ("ZipNN", 0.985, 0.92)):
        goals.append(size(plain, peer, at_plain, f"size / {peer}, plain"))
        goals.append(size(outliers, peer, at_outliers, f"size / {peer}, outlier columns"))
    everything = [data.name for data in LARGE]
    for peer, target in (("zstd 3", 4.0), ("ZipNN", 0.9)):
        ratio = lambda n, peer=peer: by[n, ours].encode_mb_s / by[n, peer].encode_mb_s  # noqa: E731 (one use, below)
        goals.append(worst(f"encode / {peer}", target, everything, ratio, False))
    for peer, target in (("zstd 3", 1.6), ("ZipNN", 1.0)):
        ratio = lambda n, peer=peer: by[n, ours].decode_mb_s / by[n, peer].decode_mb_s  # noqa: E731 (one use, below)
        goals.append(worst(f"decode / {peer}", target, everything, ratio, False))
    goals.append(worst("encode 0.1-1 MB, MB/s", 300, list(small), small.__getitem__, False))
    goals.append(worst("numpy decode, MB/s", 50, list(numpy_speeds), numpy_speeds.__getitem__, False))
    for kind in ("processes", "threads"):
        machine = min(scaled[kind, "arithmetic"], scaled[kind, "copying"])
        for work in ("encode", "decode"):
            what = f"two {kind} / (2 x one), {work}, of the machine's"
            goals.append(Goal(what, 0.85, False, scaled[kind, work] / machine, _SCALED))
    return goals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the records here")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"load average {load:.1f} on {os.cpu_count()} cores; two workers need idle ones")
    print("kernels:", ", ".join(codec.KERNELS) or "none, numpy only")
    print(f"{'data':10} {'codec':18} {'bpw':>7} {'x H0':>7} {'encode':>7} {'decode':>7}  MB per CPU-second")
    found: list[Reached] = []
    numpy_speeds: dict[str, float] = {}
    for data in LARGE:
        matrix = make(data)
        if data.name == _SCALED:
            scaled = scaling(matrix, 3 * options.rounds)
        if data.name in ("t4k_o", "t1k_o"):
            numpy_speeds[data.name] = numpy_decode_mb_s(matrix, options.rounds)
        kernels: list[codec.Backend] = ["avx512-gather", "avx2", "scalar"] if data.name == "t4k_o" else []
        own = [Ours(name, matrix) for name in ("auto", *kernels) if name == "auto" or name in codec.KERNELS]
        for reached in measure(data, matrix, [*own, Zstd(1, matrix), Zstd(3, matrix), Zipnn(matrix)], options.rounds):
            found.append(reached)
            share = reached.bits_per_weight / reached.entropy_bits
            print(
                f"{reached.data:10} {reached.codec:18} {reached.bits_per_weight:7.4f} {share:7.4f} "
                f"{reached.encode_mb_s:7.0f} {reached.decode_mb_s:7.0f}"
            )
    small = {data.name: small_encode_mb_s(data) for data in SMALL}
    print("small matrices, encode:", ", ".join(f"{name} {speed:.0f}" for name, speed in small.items()), "MB/s")
    print("numpy decode:", ", ".join(f"{name} {speed:.0f}" for name, speed in numpy_speeds.items()), "MB/s")
    for kind in ("processes", "threads"):
        print(
            f"two {kind} / (2 x one):",
            ", ".join(f"{work} {ratio:.2f}" for (of, work), ratio in scaled.items() if of == kind),
        )
    goals = judge(found, small, numpy_speeds, scaled)
    print(f"\n{'must reach':52} {'target':>9} {'reached':>9}  worst at")
    for goal in goals:
        sign = "<=" if goal.at_most else ">="
        print(
            f"{goal.what:52} {sign} {goal.target:6g} {goal.reached:9.5g}  {goal.data:10} {'' if goal.met else 'MISSED'}"
        )
    if options.json:
        record = {
            "results": [asdict(r) for r in found],
            "small_encode_mb_s": small,
            "numpy_decode_mb_s": numpy_speeds,
            "two_over_twice_one": {" ".join(key): ratio for key, ratio in scaled.items()},
            "goals": [asdict(g) for g in goals],
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
