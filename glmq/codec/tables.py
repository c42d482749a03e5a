"""Which class each column of a matrix belongs to, and the symbol frequencies of each class.

Columns of a quantized weight differ mostly in scale: outlier smoothing leaves a few per cent of them several times larger
than the rest. One table per class of alike columns takes the code below the zero-order entropy of the matrix.

    1. Two samples of rows are taken, each of a third of the matrix but of 3 * 2^14 to 2^20 values, evenly spread and not in
       step with any power of two: one to choose classes from, and other rows to count for the tables. Counted on the first,
       the tables would fit the chance by which its columns were told apart.
    2. Each column gets a histogram over 64 folds (sign, and magnitude: exact to 15, then coarser), and a scale group: its mean
       magnitude in eighths of an octave.
    3. Neighbouring groups are merged, each time the pair whose merging costs the fewest bits; of the partitions into 1 to
       8 classes the one with the fewest bits wins, tables and class map included.
    4. Twice, each column moves to the class that codes its histogram in the fewest bits (Lloyd's iteration under
       Kullback-Leibler divergence).
    5. Each class's counts are scaled to frequencies of sum 2^11. A value rarer than a quarter of a slot gets none and is
       written as an escape, so a value that the sample missed costs bits, never correctness.

Only integers decide, so the same matrix gives the same bytes everywhere. The compiled coder repeats this step by step
(`_tables.h`); this module is its oracle and stands in where it could not be built.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from glmq.codec.container import ESCAPE, FREQUENCY_SUM, MAX_CLASSES, PROB_BITS, class_bits

IntArray = NDArray[np.int64]

_FOLDS: Final = 64
_SCALE_GROUPS: Final = 128
_SAMPLE: Final = 1 << 20
_LEAST_SAMPLE: Final = 3 << 14
_MAX_SAMPLED_ROWS: Final = 32767
_MIN_CLASSIFIED_ROWS: Final = 8
_MAX_CLASSIFIED_COLS: Final = 1 << 16
_TABLE_COST: Final = 600
"""Bits of one stored table, about: 32 bytes and one for each live value."""
_ROUNDS: Final = 2
_LOG_STEPS: Final = 1024


def choose_tables(matrix: NDArray[np.int8]) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """The classes and tables to code `matrix` with.

    Args:
        matrix: int8 [rows, cols], not empty.

    Returns:
        the class of each column, uint8 [cols], and the frequencies, uint16 [classes, 256], each row of sum 2048.
    """
    rows, cols = matrix.shape
    choosing, counting = _sampled_rows(rows, cols)
    if rows < _MIN_CLASSIFIED_ROWS or cols > _MAX_CLASSIFIED_COLS:
        class_of_column = np.zeros(cols, dtype=np.int64)
    else:
        class_of_column = _choose_classes(matrix[choosing].view(np.uint8), rows)
    values = matrix[counting].view(np.uint8)
    classes = int(np.max(class_of_column)) + 1
    counts = np.bincount((values + (class_of_column << 8)).reshape(-1), minlength=classes * 256).reshape(classes, 256)
    return class_of_column.astype(np.uint8), np.stack([normalise(row) for row in counts])


def encoder_table(frequencies: NDArray[np.uint16]) -> NDArray[np.uint32]:
    """Per class and value: first slot in bits 0-10, `write as an escape` in bit 11, frequency in bits 12-23.

    Returns:
        uint32 [classes + 1, 256]; the last row is the padding class, whose one value has all slots and so costs no bits.
    """
    classes = len(frequencies)
    frequency = frequencies.astype(np.uint32)
    entries = np.empty((classes + 1, 256), dtype=np.uint32)
    entries[:classes] = frequency << 12 | (np.cumsum(frequency, axis=1, dtype=np.uint32) - frequency)
    as_escape = frequency == 0
    as_escape[:, ESCAPE] = True
    escapes = entries[:classes, ESCAPE : ESCAPE + 1] | np.uint32(1 << PROB_BITS)
    np.copyto(entries[:classes], escapes, where=as_escape)
    entries[classes] = FREQUENCY_SUM << 12
    return entries


def decoder_table(frequencies: NDArray[np.uint16]) -> NDArray[np.uint32]:
    """Per class and slot: value in bits 0-7, slot minus the value's first slot in bits 8-18, frequency in bits 19-30.

    Returns:
        uint32 [classes + 1, 2048]; the last row is the padding class.
    """
    slots = np.arange(FREQUENCY_SUM, dtype=np.uint32)
    tables = [np.uint32(FREQUENCY_SUM << 19) | slots << 8]
    for row in frequencies[::-1].astype(np.uint32):
        value = np.repeat(np.arange(256, dtype=np.uint32), row)
        first = np.cumsum(row, dtype=np.uint32) - row
        tables.append(row[value] << 19 | (slots - first[value]) << 8 | value)
    return np.stack(tables[::-1])


def padded_classes(class_of_column: NDArray[np.uint8], classes: int) -> NDArray[np.uint8]:
    """The class of each lane's columns: `class_of_column`, filled up to whole rounds with the padding class `classes`."""
    cols = len(class_of_column)
    padded = np.full(-(-cols // 32) * 32, classes, dtype=np.uint8)
    padded[:cols] = class_of_column
    return padded


def normalise(counts: IntArray) -> NDArray[np.uint16]:
    """Scale counts to frequencies of sum 2048; 0 for a value to be written as an escape.

    A live value keeps at least one slot; the rest of the rounding goes, slot by slot, where it changes the coded size least:
    n * log2((f + 1) / f) is about n / (f + 1/2).

    Args:
        counts: int64 [256], sum below 2^38.
    """
    total = int(counts.sum()) + 1
    rare = counts * (4 * FREQUENCY_SUM) < total
    rare[ESCAPE] = True
    n = np.where(rare, 0, counts)
    n[ESCAPE] = int(counts[rare].sum()) + 1
    live = np.flatnonzero(n)
    n = n[live]
    f = np.maximum((n * (2 * FREQUENCY_SUM) + total) // (2 * total), 1)
    left = FREQUENCY_SUM - int(f.sum())
    while left > 0:
        f[np.argmax((n << 24) // (2 * f + 1))] += 1
        left -= 1
    while left < 0:
        f[np.argmin(np.where(f > 1, (n << 24) // (2 * f - 1), np.iinfo(np.int64).max))] -= 1
        left += 1
    frequencies = np.zeros(256, dtype=np.uint16)
    frequencies[live] = f
    return frequencies


def _sampled_rows(rows: int, cols: int) -> tuple[IntArray, IntArray]:
    """Indices of the rows to choose classes from, and of those to count for the tables, one of each per stretch of rows."""
    wanted, least = min(-(-_SAMPLE // cols), rows // 3), -(-_LEAST_SAMPLE // cols)
    count = min(max(wanted, least), _MAX_SAMPLED_ROWS, rows)
    at = np.arange(count, dtype=np.int64)
    stride, rest = divmod(rows, count)
    start = at * stride + at * rest // count
    # The last terms walk through all residues: a pattern that repeats every few rows is met in every phase.
    return start + at % stride, start + (at + stride // 2) % stride


def _choose_classes(values: NDArray[np.uint8], rows: int) -> IntArray:
    """Class of each column, int64 [cols], from the sampled rows [sampled, cols] of a matrix of `rows` rows."""
    sampled, cols = values.shape
    folded = _FOLD_OF[values] + np.arange(cols) * _FOLDS
    hist = np.bincount(folded.reshape(-1), minlength=cols * _FOLDS).reshape(cols, _FOLDS)
    magnitude = hist @ np.tile(_FOLD_MAGNITUDE, 2)
    group = _log2_fixed(magnitude * 256 // sampled + 1) >> 13
    class_of_column = _merge_groups(hist, group, sampled, rows)
    classes = int(np.max(class_of_column)) + 1
    for _ in range(_ROUNDS):
        class_of_column = _reassign(hist, class_of_column, classes)
    return np.unique(class_of_column, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _merge_groups(hist: IntArray, group: IntArray, sampled: int, rows: int) -> IntArray:
    """Class of each column, when neighbouring scale groups are merged as cheaply as possible."""
    cols = len(hist)
    found, at = np.unique(group, return_inverse=True)
    at = at.reshape(-1)
    merged = [hist[at == i].sum(0) for i in range(len(found))]
    bits = [_code_bits(h) for h in merged]
    loss = [_code_bits(a + b) - bits_a - bits_b for a, b, bits_a, bits_b in zip(merged, merged[1:], bits, bits[1:])]
    best, best_cost = at, -1
    while True:
        n = len(merged)
        if n <= MAX_CLASSES:
            side = (n * _TABLE_COST + class_bits(n) * cols) << 16
            cost = sum(bits) + side * sampled // rows
            if best_cost < 0 or cost <= best_cost:
                best, best_cost = at, cost
        if n == 1:
            return best
        i = min(range(n - 1), key=loss.__getitem__)
        merged[i : i + 2] = [merged[i] + merged[i + 1]]
        bits[i : i + 2] = [bits[i] + bits[i + 1] + loss[i]]
        del loss[i]
        at = at - (at > i)
        for j in (i - 1, i):
            if 0 <= j < n - 2:
                loss[j] = _code_bits(merged[j] + merged[j + 1]) - bits[j] - bits[j + 1]


def _reassign(hist: IntArray, class_of_column: IntArray, classes: int) -> IntArray:
    """Each column to the class that codes it in the fewest bits; the lowest of equals."""
    sums = np.stack([hist[class_of_column == k].sum(0) for k in range(classes)])
    whole = _log2_fixed(2 * sums.sum(1) + _FOLDS)
    length = (whole[:, None] - _log2_fixed(2 * sums + 1)) >> 8  # [classes, folds], bits * 2^8
    nearest: IntArray = np.argmin(hist @ length.T, axis=1)
    return nearest


def _code_bits(hist: IntArray) -> int:
    """Bits * 2^16 of coding `hist` with its own frequencies."""
    total: IntArray = np.sum(hist, keepdims=True)
    return int((total * _log2_fixed(total)).item() - (hist * _log2_fixed(hist)).sum())


def _log2_fixed(n: IntArray) -> IntArray:
    """log2(n) * 2^16 by table and interpolation, within 1, for 1 <= n < 2^32; 0 for n = 0."""
    n = np.asarray(n, dtype=np.int64)
    exponent = np.frexp(np.maximum(n, 1).astype(np.float64))[1].astype(np.int64) - 1  # exact below 2^53
    mantissa = np.maximum(n, 1) << (31 - exponent)
    step = (mantissa >> 21) & (_LOG_STEPS - 1)
    rise = _LOG_FRACTION[step + 1] - _LOG_FRACTION[step]
    return np.where(n > 0, (exponent << 16) + _LOG_FRACTION[step] + (rise * (mantissa & 0x1FFFFF) >> 21), 0)


def _log_fractions() -> IntArray:
    """log2(1 + i / 1024) * 2^16, rounded down: squaring a number doubles its logarithm, which yields it bit by bit."""
    y = np.arange(_LOG_STEPS, 2 * _LOG_STEPS, dtype=np.uint64) << np.uint64(21)  # in [2^31, 2^32)
    bits = np.zeros(_LOG_STEPS, dtype=np.int64)
    for _ in range(16):
        y = y * y >> np.uint64(31)
        above = y >> np.uint64(32)
        bits = bits << 1 | above.astype(np.int64)
        y >>= above
    return np.append(bits, 1 << 16)


def _fold_of_magnitude(m: IntArray) -> IntArray:
    return np.select(
        [m < 16, m < 32, m < 64, m < 128], [m, 16 + (m - 16) // 2, 24 + (m - 32) // 8, 28 + (m - 64) // 16], 31
    )


_LOG_FRACTION: Final = _log_fractions()
_FOLD_OF: Final = np.concatenate([_fold_of_magnitude(np.arange(128)), 32 + _fold_of_magnitude(np.arange(128, 0, -1))])
_FOLD_MAGNITUDE: Final = np.concatenate(
    [np.arange(16), 16 + 2 * np.arange(8), 32 + 8 * np.arange(4), 64 + 16 * np.arange(4)]
)
