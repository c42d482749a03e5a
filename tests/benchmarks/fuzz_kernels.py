"""Hostile calls of the compiled kernels that observe, round and compare, built with address and undefined-behaviour sanitizers.

    python tests/benchmarks/fuzz_kernels.py [--count N] [--seed N]

Each kernel of `_moments.c`, `_rounding.c` and `_sums.c` gets N calls (20,000 unless told) of random shapes and values, NaN
and infinity among them; in two of three a buffer is too short, too long, misaligned, strided, read-only or no buffer, or a size
is odd. A call that keeps the contract in the function's docstring must return, bit for bit, what numpy computes in the same
order; any other must be refused and leave its buffers as they were. Everything else, and a sanitizer's report, is a failure:
the exit status is 1, and the number of the call is printed. Needs gcc.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from sanitized import is_sanitized, load_sanitized, run_sanitized

MODULES = ("glmq.numerics._moments", "glmq.numerics._rounding", "glmq.inspection._sums")
Arguments = dict[str, Any]
"""A call's arguments, in their order."""
Floats = NDArray[np.float32]

STRIP, LANES, RUN = 32, 8, 512
REFUSALS = (ValueError, TypeError, BufferError, OverflowError)
SIZES = (
    -(2**63),
    -64,
    -1,
    0,
    1,
    2,
    3,
    63,
    64,
    65,
    128,
    2**31,
    2**32,
    2**40,
    2**58,
    2**61,
    2**62,
    2**63 - 64,
    2**63 - 1,
    2**63,
)
SPECIAL = np.array([0, -0.0, 1e-45, 1e-38, 3e38, -3e38, np.inf, -np.inf, np.nan], np.float32)


def multiply_add(a: Floats, b: Floats, c: Floats, fused: bool) -> Floats:
    """a * b + c in float32, rounded twice or, where `fused`, once.

    Once: the product of two float32 is exact in float64; the sum is rounded to odd there, which rounding again to float32
    cannot tell from the exact one.
    """
    if not fused:
        return a * b + c
    p, q = a.astype(np.float64) * b, c.astype(np.float64)
    total = p + q
    part = total - p
    lost = (p - (total - part)) + (q - part)
    even = (total.view(np.int64) & 1) == 0
    to_odd = np.isfinite(total) & (lost != 0) & even
    return np.where(to_odd, np.nextafter(total, np.copysign(np.inf, lost)), total).astype(np.float32)


def floats(rng: Generator, *shape: int) -> Floats:
    """Values of one size or of many, some of them special."""
    values = rng.standard_normal(shape) * 10.0 ** (
        rng.integers(-6, 6) if rng.random() < 0.8 else rng.uniform(-44, 38, shape)
    )
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if rng.random() < 0.3:
        hit = rng.random(shape) < 0.02
        values[hit] = rng.choice(SPECIAL, int(hit.sum()))
    return values


def steps_of(rng: Generator, *shape: int) -> Floats:
    return np.abs(floats(rng, *shape)) if rng.random() < 0.9 else floats(rng, *shape)


def holds(value: object, size: int, align: int, writable: bool = False) -> bool:
    """Whether a kernel may take it for a buffer of that many bytes."""
    return (
        isinstance(value, np.ndarray)
        and value.flags.c_contiguous
        and (value.flags.writeable or not writable)
        and value.nbytes == size
        and value.ctypes.data % align == 0
    )


def make_rounding(rng: Generator) -> Arguments:
    columns = int(rng.choice([1, 2, 3, 8, 13, 40], p=[0.2, 0.2, 0.2, 0.2, 0.17, 0.03]))
    rows, groups = STRIP * int(rng.integers(1, 4)), int(rng.integers(1, 4))
    weight = floats(rng, columns, rows)
    return {
        "weight": weight,
        "target": weight.copy() if rng.random() < 0.5 else floats(rng, columns, rows),
        "feedback": floats(rng, columns, columns),
        "steps": steps_of(rng, groups, rows),
        "group": rng.integers(0, groups, columns, dtype=np.int32),
        "error": floats(rng, columns, rows),
        "q": rng.integers(-128, 128, (columns, rows), dtype=np.int8),
        "columns": columns,
        "rows": rows,
        "qmin": float(rng.choice([-128, -8, 0])),
        "qmax": float(rng.choice([127, 7])),
    }


def keeps_rounding(a: Arguments) -> bool:
    columns, rows = a["columns"], a["rows"]
    if not all(-(2**63) <= a[key] < 2**63 for key in ("columns", "rows")):
        return False
    if columns < 1 or rows < 1 or rows % STRIP:
        return False
    if not all(holds(a[key], columns * rows * 4, 4, key == "error") for key in ("weight", "target", "error")):
        return False
    if not holds(a["q"], columns * rows, 1, True) or not holds(a["feedback"], columns * columns * 4, 4):
        return False
    if not holds(a["group"], columns * 4, 4) or not isinstance(a["steps"], np.ndarray):
        return False
    groups = a["steps"].nbytes // 4 // rows
    group = a["group"].reshape(-1).view(np.int32)
    return holds(a["steps"], groups * rows * 4, 4) and bool(((group >= 0) & (group < groups)).all())


def compute_rounding(a: Arguments, fused: bool) -> Arguments:
    """What `round_block` leaves in error and q."""
    columns, rows = a["columns"], a["rows"]
    weight, target = (as_floats(a[key], columns, rows) for key in ("weight", "target"))
    feedback, steps = as_floats(a["feedback"], columns, columns), as_floats(a["steps"], -1, rows)
    error, q = as_floats(a["error"], columns, rows).copy(), a["q"].reshape(columns, rows).copy()
    low, high, rounder = np.float32(a["qmin"]), np.float32(a["qmax"]), np.float32(1.5 * 2**23)
    for column, group in enumerate(a["group"].reshape(-1).view(np.int32)):
        total = target[column]
        for i in range(column):
            total = multiply_add(feedback[column, i], error[i], total, fused)
        x = total / steps[group]
        x = np.where(x < low, low, x)
        x = np.where(x > high, high, x)
        x = (x + rounder) - rounder
        error[column] = multiply_add(-x, steps[group], weight[column], fused)
        q[column] = np.where(np.isnan(x), 0, x)  # the conversion of NaN gives -2^31, whose lowest byte is 0
    return {"error": error, "q": q}


def as_floats(values: NDArray[Any], *shape: int) -> Floats:
    return values.reshape(-1).view(np.float32).reshape(shape)


def make_moments(rng: Generator) -> Arguments:
    tokens = int(rng.integers(0, 20))
    channels = int(rng.choice([1, 2, 7, 8, 9, 31, 32, 33, 70]))
    first, end = sorted(int(at) for at in rng.integers(0, channels + 1, 2))
    return {
        "x": floats(rng, tokens, channels),
        "scales": (2.0 ** rng.integers(-20, 20, channels)).astype(np.float32),
        "counts": rng.integers(0, 2**30, (channels, 256), dtype=np.int32),
        "sums": rng.standard_normal((2, channels)),
        "tokens": tokens,
        "channels": channels,
        "first": first,
        "end": end,
    }


def keeps_moments(a: Arguments) -> bool:
    tokens, channels = a["tokens"], a["channels"]
    if not all(-(2**63) <= a[key] < 2**63 for key in ("tokens", "channels", "first", "end")):
        return False
    if tokens < 0 or channels < 1 or a["first"] < 0 or a["end"] > channels:
        return False
    return (
        holds(a["x"], tokens * channels * 4, 4)
        and holds(a["scales"], channels * 4, 4)
        and holds(a["counts"], channels * 1024, 4, True)
        and holds(a["sums"], channels * 16, 8, True)
    )


def compute_moments(a: Arguments, fused: bool) -> Arguments:
    """What `observe` leaves in counts and sums."""
    cut = slice(a["first"], max(a["first"], a["end"]))
    x = as_floats(a["x"], a["tokens"], a["channels"])[:, cut]
    scales = as_floats(a["scales"], -1)[cut]
    counts = a["counts"].reshape(-1).view(np.int32).reshape(-1, 256).copy()
    sums = a["sums"].reshape(-1).view(np.float64).reshape(2, -1).copy()
    product = x * scales
    bins = np.clip(np.floor(np.where(np.isnan(product), -128, product)), -128, 127)
    bins = np.where((x < 0) & (product == 0), -1, bins).astype(np.int64)
    for channel in range(bins.shape[1]):
        counts[a["first"] + channel] += np.bincount(bins[:, channel] + 128, minlength=256).astype(np.int32)
    sums[:, cut] = 0
    for row in x.astype(np.float64):
        sums[0, cut] += row
        sums[1, cut] += row * row
    return {"counts": counts, "sums": sums}


KINDS = (np.int8, np.uint16, np.float16, np.float32)
"""What `sum_pair` calls 0 to 3; bfloat16 is held as its bits."""


def make_sums(rng: Generator) -> Arguments:
    rows, width = (
        int(rng.integers(1, 6)),
        int(rng.choice([1, 2, 7, 8, 31, 64, 300, 511, 513], p=[0.125] * 7 + [0.0625] * 2)),
    )
    groups = int(rng.choice([1, 1, 2, 3]))
    columns = width * groups
    found: Arguments = {}
    same = rng.random() < 0.5
    for side in "ab":
        kind = found["kind_a"] if same and side == "b" else int(rng.integers(4))
        grouped = groups if rng.random() < 0.7 else 1
        stored = rng.integers(-128, 128, (rows, columns)) if kind == 0 else floats(rng, rows, columns)
        with np.errstate(over="ignore"):
            found[side] = (stored.view(np.uint32) >> 16 if kind == 1 else stored).astype(KINDS[kind])
        if side == "b" and same and rng.random() < 0.7:
            found["b"] = np.where(rng.random((rows, columns)) < 0.01, found["b"], found["a"])
        found[f"kind_{side}"] = kind
        found[f"steps_{side}"] = steps_of(rng, rows, grouped) if kind == 0 or rng.random() < 0.1 else None
        found[f"groups_{side}"] = grouped
    return {
        **found,
        "column_scales": steps_of(rng, columns) if rng.random() < 0.3 else None,
        "row_scales": steps_of(rng, rows) if rng.random() < 0.3 else None,
        "counts": rng.integers(0, 2**40, (2, 256)),
        "rows": rows,
        "columns": columns,
    }


def keeps_sums(a: Arguments) -> bool:
    rows, columns = a["rows"], a["columns"]
    numbers = [a[key] for key in ("rows", "columns", "kind_a", "kind_b", "groups_a", "groups_b")]
    if not all(-(2**63) <= number < 2**63 for number in numbers) or rows < 1 or columns < 1 or rows * columns >= 2**32:
        return False
    for side in "ab":
        kind, groups, steps = a[f"kind_{side}"], a[f"groups_{side}"], a[f"steps_{side}"]
        if not 0 <= kind < len(KINDS) or groups < 1 or columns % groups:
            return False
        width = np.dtype(KINDS[kind]).itemsize
        if not holds(a[side], rows * columns * width, width):
            return False
        if not holds(steps, rows * groups * 4, 4) and (steps is not None or kind == 0):
            return False
    for scales, count in ((a["column_scales"], columns), (a["row_scales"], rows)):
        if scales is not None and not holds(scales, count * 4, 4):
            return False
    return holds(a["counts"], 4096, 8, True) and (a["groups_a"] == a["groups_b"] or 1 in (a["groups_a"], a["groups_b"]))


def widened(a: Arguments, side: str) -> Floats:
    kind, rows, columns = a[f"kind_{side}"], a["rows"], a["columns"]
    stored = a[side].reshape(-1).view(KINDS[kind]).reshape(rows, columns)
    if kind == 0:
        steps = as_floats(a[f"steps_{side}"], rows, -1)
        return stored.astype(np.float32) * np.repeat(steps, columns // steps.shape[1], axis=1)
    return (stored.astype(np.uint32) << 16).view(np.float32) if kind == 1 else stored.astype(np.float32)


def compute_sums(a: Arguments, fused: bool) -> Arguments:
    """What `sum_pair` returns and leaves in counts."""
    rows, columns = a["rows"], a["columns"]
    x, y = widened(a, "a"), widened(a, "b")
    if a["column_scales"] is not None:
        y = y / as_floats(a["column_scales"], columns)
    if a["row_scales"] is not None:
        y = y / as_floats(a["row_scales"], rows, 1)
    one_kind, integers = a["kind_a"] == a["kind_b"], a["kind_a"] == 0
    bytes_of = {side: a[side].reshape(-1).view(np.uint8).reshape(rows, -1) for side in "ab"}
    width, item = columns // max(a["groups_a"], a["groups_b"]), bytes_of["a"].shape[1] // columns
    changed, parts = 0, []
    for group in range(0, columns, width):
        for start in range(group, group + width, RUN):
            stop = min(start + RUN, group + width)
            padding = ((0, 0), (0, -(stop - start) % LANES))
            p, q = (np.pad(values[:, start:stop], padding) for values in (x, y))
            sums = np.zeros((3, rows, LANES), np.float32)
            for at in range(0, p.shape[1], LANES):
                lanes = [p[:, at : at + LANES], q[:, at : at + LANES]]
                lanes.append(lanes[1] - lanes[0])
                sums = np.stack([multiply_add(v, v, total, fused) for v, total in zip(lanes, sums, strict=True)])
            parts.append(sums)
            if one_kind:
                differ = np.not_equal(*(values[:, start * item : stop * item] for values in bytes_of.values()))
                changed += int(differ.sum() if integers else differ.any(axis=1).sum())
    # [runs, 3, rows, lanes] -> [3, rows * runs * lanes], in the order in which the kernel adds them in float64
    ordered = np.stack(parts).transpose(1, 2, 0, 3).reshape(3, -1).astype(np.float64)
    counts = a["counts"].reshape(-1).view(np.int64).reshape(2, 256).copy()
    for row, side in enumerate("ab"):
        if a[f"kind_{side}"] == 0:
            counts[row] += np.bincount(a[side].reshape(-1).view(np.int8).astype(np.int64) + 128, minlength=256)
    largest = np.fmax.reduce(np.abs(y - x), axis=None, initial=0)
    return {"returned": np.array([*ordered.cumsum(axis=1)[:, -1], largest, changed]), "counts": counts}


def damage(a: Arguments, rng: Generator) -> None:
    """Make one argument wrong, or odd."""
    key = str(rng.choice(list(a)))
    value = a[key]
    if isinstance(value, float):
        a[key] = float(rng.choice([value, np.nan, np.inf, -np.inf, 1e30, -1e30]))
    elif isinstance(value, int):
        a[key] = value + int(rng.integers(-1, 2)) if rng.random() < 0.3 else int(rng.choice(np.array(SIZES, object)))
    elif isinstance(value, np.ndarray):
        a[key] = wrong_buffer(value, rng)
    else:
        a[key] = rng.integers(0, 256, int(rng.integers(9)), dtype=np.uint8)


def wrong_buffer(value: NDArray[Any], rng: Generator) -> object:
    flat = np.frombuffer(value.tobytes(), np.uint8)
    match rng.integers(9):
        case 0:
            return flat[: rng.integers(len(flat) + 1)].copy()
        case 1:
            return np.concatenate([flat, np.zeros(rng.integers(1, 65), np.uint8)])
        case 2:
            shifted = np.empty(len(flat) + 1, np.uint8)[1:]  # ends where its memory ends
            shifted[:] = flat
            return shifted
        case 3:
            return np.repeat(flat, 2)[::2]
        case 4:
            read_only = value.copy()
            read_only.flags.writeable = False
            return read_only
        case 5:
            return rng.choice(np.array([None, 0, "no buffer", 1.5, [1, 2]], object))
        case 6:
            return value.astype(np.float64 if value.dtype != np.float64 else np.float32)
        case 7:
            return value.T if value.ndim == 2 else value[::-1]
        case _:
            noise = np.frombuffer(rng.bytes(len(flat)), np.uint8).copy()
            return noise.view(value.dtype).reshape(value.shape)


@dataclass(frozen=True)
class Function:
    """A compiled function and its reference."""

    call: Callable[..., object]
    kernels: tuple[str, ...]
    make: Callable[[Generator], Arguments]
    keeps: Callable[[Arguments], bool]
    """Whether arguments keep the contract in the function's docstring."""
    compute: Callable[[Arguments, bool], Arguments]
    """What is written into each argument, and the tuple `returned`; with multiplication and addition fused or not."""


def run_call(function: Function, kernel: str, rng: Generator) -> str:
    """How a random call ended; in capitals: a failure."""
    a = function.make(rng)
    for _ in range(rng.choice([0, 1, 1, 2])):
        damage(a, rng)
    if rng.random() < 0.01:
        kernel = str(rng.choice(["", "none", "avx2", kernel.upper()]))
    keeps = function.keeps(a) and kernel in function.kernels
    before = {key: value.tobytes() for key, value in a.items() if isinstance(value, np.ndarray)}
    with np.errstate(all="ignore"):
        wanted = function.compute(a, kernel.endswith("fma")) if keeps else {}
    try:
        returned = function.call(kernel, *a.values())
    except REFUSALS as error:
        if keeps:
            return f"REFUSED A GOOD CALL: {error}"
        if before != {key: value.tobytes() for key, value in a.items() if isinstance(value, np.ndarray)}:
            return "REFUSED AND WRITTEN"
        return "refused"
    except Exception as error:
        return f"WRONG EXCEPTION: {error!r}"
    if not keeps:
        return "TOOK A WRONG CALL"
    found = {**a, "returned": np.array(returned, np.float64)}
    for key, value in wanted.items():
        if not np.array_equal(
            value.reshape(-1), found[key].reshape(-1).view(value.dtype), equal_nan=value.dtype.kind == "f"
        ):
            return f"WRONG VALUES: {key}"
    if any(found[key].tobytes() != content for key, content in before.items() if key not in wanted):
        return "WROTE INTO AN INPUT"
    return "right"


def fuzz(count: int, seed: int) -> int:
    load_sanitized(MODULES)
    from glmq.inspection import _sums
    from glmq.numerics import _moments, _rounding

    functions = (
        Function(_moments.observe, _moments.list_kernels(), make_moments, keeps_moments, compute_moments),
        Function(_rounding.round_block, _rounding.list_kernels(), make_rounding, keeps_rounding, compute_rounding),
        Function(_sums.sum_pair, _sums.list_kernels(), make_sums, keeps_sums, compute_sums),
    )
    failures = 0
    for function in functions:
        for kernel in function.kernels:
            begin = time.perf_counter()
            outcomes: Counter[str] = Counter()
            for number in range(count):
                outcome = run_call(function, kernel, np.random.default_rng([seed, number]))
                outcomes[outcome] += 1
                if outcome[0].isupper():
                    failures += 1
                    print(f"call {number} of {kernel}: {outcome}", flush=True)
            summary = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common())
            name = getattr(function.call, "__name__", "")
            print(f"{name} {kernel}: {count} calls in {time.perf_counter() - begin:.0f} s: {summary}", flush=True)
    print("failures:", failures)
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000, help="calls of each kernel")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    return fuzz(options.count, options.seed) if is_sanitized() else run_sanitized(MODULES)


if __name__ == "__main__":
    sys.exit(main())
