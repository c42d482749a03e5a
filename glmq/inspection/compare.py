"""Two checkpoints against each other: weights as the model uses them, worst first; names, config.json, description.

Integers are compared by the weights they stand for. Where smoothing scaled a norm or rows of one against columns of the
linears behind it, the scales are taken out, so that a difference is one of the function and not of how it is spread.
"""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from glmq.checkpoint.linears import stored_weight
from glmq.checkpoint.names import natural_key
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import CheckpointError, ModelError, UsageError
from glmq.inspection.folder import LINEAR_SUFFIXES, Folder, Kind, layer_of, plain_name, role_of
from glmq.inspection.scaling import UNSCALED, Scaling, find_scalings
from glmq.inspection.sums import Sums, sum_rows
from glmq.inspection.weights import StoredMatrix, column_scales, is_same, tells_scale
from glmq.model.config import ModelConfig, parse_config
from glmq.model.family import InputGroup
from glmq.model.naming import find_naming
from glmq.numerics.metrics import entropy_bits, error_of_energies, sqnr_db
from glmq.threads import run_ahead

_COMPARED: Final = (Kind.FLOAT, Kind.QUANTIZED)
HISTOGRAM_BINS: Final = 64
ROUNDING: Final = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""The largest relative error of rounding to a dtype."""
INTEGERS: Final = ("INT8", "INT4")
"""Types of weights that were rounded."""
WORKERS: Final = min(8, 2 * (os.cpu_count() or 1))
"""Threads that read and compare pieces of a weight: while some wait for the disk, others compute."""


@dataclass(frozen=True, slots=True)
class WeightDiff:
    """One tensor of both checkpoints, the second against the first."""

    name: str
    """Of the tensor, with `.weight` or `.bias`."""
    layer: str
    role: str
    type_a: str
    type_b: str
    """INT8 or INT4 for integers with steps, else the dtype code."""
    shape: tuple[int, ...]
    """Rows and columns of an integer weight as the model uses it, not as it is packed."""
    identical: bool
    """The stored bytes, and for integers their steps, are equal."""
    noise: float
    """Sum of squared differences, after the scales of smoothing are taken out; infinite where one of them is, as of a NaN or
    an infinity that the other has not. What both have does not count."""
    signal: float
    """Sum of squares of the first, NaN and infinity left out."""
    max_abs: float
    """Infinite with `noise`."""
    cosine: float
    """0 where the difference is infinite."""
    undone: tuple[float, float] | None
    """Smallest and largest channel scale that was taken out; of a norm that was, only channels that are zero in one of both
    count as different. None where norms agree."""
    changed_share: float | None
    """Share of integers that differ; None unless both are integers."""
    step_ratio: tuple[float, float, float] | None
    """Smallest, median and largest step of the second over that of the first; None unless both are integers."""
    input_scale_ratio: float | None
    """Of static int8 linears in both."""
    input_offset_change: int | None
    entropy_a: float | None
    entropy_b: float | None
    """Bits per integer; None for floats."""

    @property
    def is_rounded(self) -> bool:
        """The second has integers where the first has floats."""
        return self.type_b in INTEGERS and self.type_a not in INTEGERS

    @property
    def equal_within(self) -> str | None:
        """The coarser of two float dtypes, if the values differ no more than by being rounded to it; else None."""
        steps = [(ROUNDING[code], code) for code in (self.type_a, self.type_b) if code in ROUNDING]
        if len(steps) < 2 or self.type_a == self.type_b:
            return None
        step, coarser = max(steps)
        return coarser if self.relative_l2 <= step else None

    @property
    def relative_l2(self) -> float:
        """||B - A|| / ||A||; infinite where only A vanishes, or only one has a NaN or an infinity."""
        return error_of_energies(self.noise, self.signal)

    @property
    def sqnr_db(self) -> float:
        return sqnr_db(self.relative_l2)


@dataclass(frozen=True, slots=True)
class Incomparable:
    """A tensor of both that cannot be compared."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class LayerDiff:
    """All compared tensors of one layer, or of everything."""

    layer: str
    tensors: int
    relative_l2: float
    worst: str
    """The role of the tensor with the largest relative difference."""
    worst_relative_l2: float


def compare_weights(a: Folder, b: Folder, names: Container[str]) -> Iterator[WeightDiff | Incomparable]:
    """Compare every weight and bias in `names` that both have, in natural order, a few megabytes in memory.

    Raises:
        UsageError: one of them is neither a float nor an un-sharded quantized checkpoint.
        CheckpointError: a weight file cannot be read.
    """
    for folder in (a, b):
        if folder.kind not in _COMPARED:
            raise UsageError(
                f"{folder.directory}: holds {folder.kind.value}; weights of float and un-compressed quantized "
                "checkpoints can be compared, run `glmq compress --decompress` first"
            )
    groups = _groups(a, b)
    folding = {group.norm for group in groups}
    with open_weights(a) as one, open_weights(b) as other:
        scalings = find_scalings(one, other, groups)
        for stored in one:
            name = plain_name(stored)
            base, _, suffix = name.rpartition(".")
            found = stored_weight(base, other) if suffix == "weight" else name
            if stored not in names or found not in other or base.endswith(".module") or suffix in LINEAR_SUFFIXES:
                continue
            try:
                norm = column_scales(one, other, base) if suffix == "weight" and base in folding else None
                yield _compare(name, one, other, scalings.get(base, UNSCALED), norm)
            except CheckpointError as error:
                yield Incomparable(name, str(error))


def named_as_model(folder: Folder, other: Folder) -> Folder:
    """The folder with its tensors under the model's own names, as `quantize` reads them, where trainers renamed them.

    Args:
        folder: any.
        other: its config.json serves where the folder has none of a GLM-4.1V.

    Raises:
        CheckpointError: an adapter that is not merged into the weights, or two tensors of one name.
    """
    config = _config(folder, other)
    if config is None or folder.kind not in _COMPARED:
        return folder
    try:
        naming = find_naming([tensor.name for tensor in folder.tensors], config.family, config.family.shapes(config))
    except CheckpointError as error:
        raise CheckpointError(f"{folder.directory}: {error}") from None
    if naming.changed is None:
        return folder
    own = {stored: name for name, stored in naming.names.items()}
    tensors = sorted((replace(t, name=own[t.name]) for t in folder.tensors), key=lambda t: natural_key(t.name))
    return replace(folder, tensors=tuple(tensors), stored=naming.names)


def open_weights(folder: Folder) -> Checkpoint:
    """The folder's weights, under the names that `folder` has for them. Raises CheckpointError as Checkpoint.open."""
    opened = Checkpoint.open(folder.directory)
    if folder.stored is None:
        return opened
    return opened.selected({name: stored for name, stored in folder.stored.items() if stored in opened})


@dataclass(frozen=True, slots=True)
class HistogramPair:
    """Both sides' real weights of one tensor, over the same bins."""

    name: str
    low: float
    high: float
    a: tuple[int, ...]
    b: tuple[int, ...]


def weight_histograms(a: Folder, b: Folder, names: Sequence[str]) -> Iterator[HistogramPair]:
    """Histograms of some matrices that `compare_weights` compared, each read twice: for its range, then for its counts.

    NaN and infinity are left out.
    """
    with open_weights(a) as one, open_weights(b) as other:
        scalings = find_scalings(one, other, _groups(a, b))
        for name in names:
            base = name.removesuffix(".weight")
            matrices = StoredMatrix(one, base), StoredMatrix(other, base)
            undo = (UNSCALED, scalings.get(base, UNSCALED))
            low, high = math.inf, -math.inf
            for matrix, scaling in zip(matrices, undo, strict=True):
                for values in _real_values(matrix, scaling):
                    smallest, largest = torch.aminmax(values)
                    low, high = min(low, float(smallest)), max(high, float(largest))
            low, high = (low, high) if low <= high else (0.0, 0.0)
            counts = [torch.zeros(HISTOGRAM_BINS, dtype=torch.float64) for _ in matrices]
            for total, matrix, scaling in zip(counts, matrices, undo, strict=True):
                for values in _real_values(matrix, scaling):
                    total += torch.histc(values, HISTOGRAM_BINS, low, high if high > low else low + 1)
            yield HistogramPair(name, low, high, *(tuple(int(n) for n in total.tolist()) for total in counts))


def _real_values(matrix: StoredMatrix, scaling: Scaling) -> Iterator[Tensor]:
    """The finite ones, some rows at a time, flat."""
    for start, stop in matrix.pieces():
        values = scaling.undone(matrix.values(matrix.stored(start, stop), start), start)
        finite = values[values.isfinite()]
        if finite.numel():
            yield finite


def sum_layers(diffs: Iterable[WeightDiff]) -> list[LayerDiff]:
    """One row per layer in the order of the diffs, and `total` at the end."""
    layers: dict[str, list[WeightDiff]] = {}
    for diff in diffs:
        layers.setdefault(diff.layer, []).append(diff)
    everything = [diff for members in layers.values() for diff in members]
    return [_sum(layer, members) for layer, members in (*layers.items(), ("total", everything)) if members]


def _config(*folders: Folder) -> ModelConfig | None:
    """The first config.json that is a GLM-4.1V's."""
    for folder in folders:
        try:
            return parse_config(folder.config, str(folder.directory))
        except ModelError:
            continue
    return None


def _groups(a: Folder, b: Folder) -> list[InputGroup]:
    """The model's groups; empty without a config.json of one."""
    config = _config(a, b)
    return [] if config is None else config.family.groups(config)


def _compare(
    name: str, a: Checkpoint, b: Checkpoint, scaling: Scaling, norm: Tensor | None
) -> WeightDiff | Incomparable:
    """One weight or bias; `norm`: what the linears behind it carry of a norm."""
    base, _, suffix = name.rpartition(".")
    held = [stored_weight(base, checkpoint) if suffix == "weight" else name for checkpoint in (a, b)]
    shapes = a.info(held[0]).shape, b.info(held[1]).shape
    if suffix == "weight" and all(len(shape) == 2 for shape in shapes):
        one, other = StoredMatrix(a, base), StoredMatrix(b, base)
        if (one.rows, one.cols) != (other.rows, other.cols):
            return Incomparable(
                name, f"is {one.rows} x {one.cols} in the first, {other.rows} x {other.cols} in the other"
            )
        return _compare_matrices(name, one, other, scaling, *_inputs(base, a, b))
    if shapes[0] != shapes[1]:
        return Incomparable(name, f"has shape {list(shapes[0])} in the first, {list(shapes[1])} in the other")
    fits = suffix == "bias" and scaling.rows is not None and scaling.rows.shape == shapes[0]
    return _compare_plain(name, a, b, norm, scaling.rows if fits else None)


def _inputs(base: str, a: Checkpoint, b: Checkpoint) -> tuple[float | None, int | None]:
    """Ratio of the input scales and difference of the input offsets of a static linear in both."""
    names = f"{base}.input_scale", f"{base}.input_offset"
    if any(name not in checkpoint for name in names for checkpoint in (a, b)):
        return None, None
    stored = [[checkpoint.read(name).flatten().tolist() for checkpoint in (a, b)] for name in names]
    if not all(len(values) == 1 and math.isfinite(values[0]) for pair in stored for values in pair):
        return None, None
    ((scale_a,), (scale_b,)), ((offset_a,), (offset_b,)) = stored
    return (scale_b / scale_a if scale_a else None), round(offset_b - offset_a)


def _compare_matrices(
    name: str,
    a: StoredMatrix,
    b: StoredMatrix,
    scaling: Scaling,
    input_scale_ratio: float | None,
    input_offset_change: int | None,
) -> WeightDiff:
    same_steps = _equal(a.step, b.step) and _equal(a.second, b.second)
    sums = Sums()
    for piece in run_ahead((partial(sum_rows, a, b, scaling, rows) for rows in a.pieces()), WORKERS):
        sums.merge(piece)
    both = a.is_integer and b.is_integer
    return WeightDiff(
        name=name,
        layer=layer_of(name),
        role=role_of(name),
        type_a=_type(a),
        type_b=_type(b),
        shape=(a.rows, a.cols),
        identical=sums.identical and same_steps and scaling is UNSCALED,
        noise=sums.noise,
        signal=sums.a,
        max_abs=sums.max_abs,
        cosine=sums.cosine,
        undone=_extremes(scaling.columns),
        changed_share=sums.changed / max(1, a.rows * a.cols) if both else None,
        step_ratio=_step_ratio(a, b),
        input_scale_ratio=input_scale_ratio,
        input_offset_change=input_offset_change,
        entropy_a=entropy_bits(sums.counts[0]) if a.is_integer else None,
        entropy_b=entropy_bits(sums.counts[1]) if b.is_integer else None,
    )


def _extremes(scales: Tensor | None) -> tuple[float, float] | None:
    return None if scales is None else (float(scales.min()), float(scales.max()))


def _compare_plain(
    name: str, a: Checkpoint, b: Checkpoint, scales: Tensor | None, rows: Tensor | None = None
) -> WeightDiff:
    """A bias, norm or convolution: small enough to read as a whole.

    `scales` of a norm are those that linears carry, `rows` of a bias those that a fold multiplied its linear's rows by.
    """
    one, other = a.read(name), b.read(name)
    values = other.to(one.dtype if one.dtype == torch.float64 else torch.float32, copy=True)
    if scales is not None:
        values = torch.where(tells_scale(one) & tells_scale(other), one, values)
    if rows is not None:
        values /= rows
    sums = Sums()
    sums.add(one.float(), values.float().clone())
    if not sums.is_finite:
        sums = Sums()
        sums.add_any(one.double(), values.double())
    return WeightDiff(
        name=name,
        layer=layer_of(name),
        role=role_of(name),
        type_a=a.info(name).dtype,
        type_b=b.info(name).dtype,
        shape=tuple(one.shape),
        identical=is_same(one, other),
        noise=sums.noise,
        signal=sums.a,
        max_abs=sums.max_abs,
        cosine=sums.cosine,
        undone=_extremes(scales),
        changed_share=None,
        step_ratio=None,
        input_scale_ratio=None,
        input_offset_change=None,
        entropy_a=None,
        entropy_b=None,
    )


def _type(matrix: StoredMatrix) -> str:
    if matrix.is_integer:
        return f"INT{matrix.bits}"
    return matrix.dtype


def _step_ratio(a: StoredMatrix, b: StoredMatrix) -> tuple[float, float, float] | None:
    if a.step is None or b.step is None:
        return None
    ratio = b.step / a.step
    return float(ratio.min()), float(ratio.median()), float(ratio.max())


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else is_same(a, b)


def _sum(layer: str, diffs: list[WeightDiff]) -> LayerDiff:
    noise, signal = sum(d.noise for d in diffs), sum(d.signal for d in diffs)
    worst = max(diffs, key=lambda d: d.relative_l2)
    label = worst.role if layer != "total" else worst.name
    return LayerDiff(layer, len(diffs), error_of_energies(noise, signal), label, worst.relative_l2)
