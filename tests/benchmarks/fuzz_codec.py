"""Corrupted GQSC files against every decoder, the compiled ones built with address and undefined-behaviour sanitizers.

    python tests/benchmarks/fuzz_codec.py [--count N] [--seed N]

Each decoder gets N files (20,000 unless told), altered in bits, bytes, lengths, header fields, tables and index, most of the
latter with checksums forged to fit. A decoder may refuse a file with a CodecError or return the very matrix that was
encoded; another matrix, another exception or a sanitizer's report is a failure, and the exit status is 1. Needs gcc.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

import numpy as np
from forge import HEAD, read_fields, sections, sign, with_fields
from numpy.random import Generator
from numpy.typing import NDArray
from sanitized import is_sanitized, load_sanitized, run_sanitized

MODULES = ("glmq.codec._codec",)


def make_matrix(rng: Generator) -> NDArray[np.int8]:
    """A small matrix of random shape; parts of it constant, incompressible or full of escapes."""
    rows, cols = int(rng.integers(1, 24)), int(rng.choice([1, 5, 31, 32, 33, 64, 90]))
    matrix = np.rint(rng.standard_normal((rows, cols)) * rng.choice([2, 2, 2, 30], cols)).astype(np.int8)
    part = slice(int(rng.integers(0, rows)), None)
    match rng.integers(6):
        case 0:
            matrix[part] = rng.integers(-128, 128)
        case 1:
            matrix[part] = rng.integers(-128, 128, matrix[part].shape)
        case 2:
            matrix[part] = np.where(rng.random(matrix[part].shape) < 0.5, -128, 1)
    return matrix


def corrupt(blob: bytes, rng: Generator) -> tuple[str, bytes]:
    """How, and the corrupted file."""
    altered = bytearray(blob)
    starts = [*sections(blob), len(blob) - 64, len(blob)]
    how = str(
        rng.choice(["bits", "noise", "truncated", "longer", "field", "signed head", "stream", "states", "spliced"])
    )
    if how == "bits":
        for _ in range(rng.integers(1, 9)):
            altered[rng.integers(len(blob))] ^= 1 << rng.integers(8)
    elif how == "noise":
        at = int(rng.integers(len(blob)))
        noise = rng.bytes(int(rng.integers(1, 64)))[: len(blob) - at]
        altered[at : at + len(noise)] = noise
    elif how == "truncated":
        del altered[rng.integers(len(blob)) :]
    elif how == "longer":
        altered += rng.bytes(int(rng.integers(1, 100)))
    elif how == "field":
        name = str(rng.choice(["classes", "tile_rows", "rows", "cols", "tiles", "table_bytes", "payload_bytes"]))
        found = read_fields(blob)[name]
        width = {"classes": 8, "tile_rows": 32, "tiles": 32, "table_bytes": 32}.get(name, 64)
        other = int(
            rng.choice([found - 1, found + 1, found * 2, 0, 1, (1 << width) - 1, 1 << (width - 1), 1 << (width // 2)])
        )
        other &= (1 << width) - 1
        # Signing walks the announced sections, so it is left out where they could not exist.
        return how, sign(with_fields(blob, **{name: other})) if other < 1 << 20 else with_fields(blob, **{name: other})
    elif how == "signed head":
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(64, starts[3]))
            altered[at] = rng.integers(256) if rng.random() < 0.5 else altered[at] ^ (1 << rng.integers(8))
        return how, sign(bytes(altered))
    elif how == "stream":
        at = int(rng.integers(starts[3], max(starts[4], starts[3] + 1)))
        altered[at] = rng.integers(256)
    elif how == "states":
        begin = starts[3] + 4 * int(rng.integers(32))
        altered[begin : begin + 4] = int(rng.choice([0, 2**15 - 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1])).to_bytes(
            4, "little"
        )
    else:
        size = int(rng.integers(1, 40))
        source, target = rng.integers(HEAD.size, len(blob) - size, 2)
        altered[target : target + size] = altered[source : source + size]
        if rng.random() < 0.5:
            return how, sign(bytes(altered))
    return how, bytes(altered)


def fuzz(count: int, seed: int) -> int:
    load_sanitized(MODULES)
    from glmq.codec import codec
    from glmq.errors import CodecError, SpaceError

    failures = 0
    for backend in ("numpy", *codec.KERNELS):
        rng = np.random.default_rng(seed)
        begin = time.perf_counter()
        outcomes: Counter[str] = Counter()
        hows: Counter[str] = Counter()
        for number in range(count):
            if number % 50 == 0:
                matrix = make_matrix(rng)
                blob = codec.encode(matrix, tile_bytes=int(rng.choice([1, 200, 500, 1 << 18])), backend=backend)
                if not np.array_equal(codec.decode(blob, backend=backend), matrix):
                    outcomes["ROUND TRIP FAILED"] += 1
            how, altered = corrupt(blob, rng)
            hows[how] += 1
            try:
                back = codec.decode(altered, backend=backend)
            except CodecError:
                outcomes["refused"] += 1
            except SpaceError:
                outcomes["refused, too large"] += 1
            except Exception as error:
                outcomes[f"WRONG EXCEPTION {error!r} ({how})"] += 1
            else:
                same = np.array_equal(back, matrix)
                outcomes["nothing changed" if same else f"WRONG DATA ACCEPTED ({how})"] += 1
        failures += sum(n for outcome, n in outcomes.items() if outcome[0].isupper())  # the ones in capitals
        summary = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common())
        print(f"{backend:7} {count} files in {time.perf_counter() - begin:.0f} s: {summary}", flush=True)
    print("altered by:", ", ".join(f"{how} {n}" for how, n in hows.most_common()))
    print("failures:", failures)
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000, help="files for each decoder")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    return fuzz(options.count, options.seed) if is_sanitized() else run_sanitized(MODULES)


if __name__ == "__main__":
    sys.exit(main())
