"""How smoothing changed the linears between two checkpoints: columns by the norm in front, rows and columns by folds.

A norm tells its scales. A fold (rows of an earlier linear divided, the columns that read them multiplied, by powers of
two) leaves no note, so it is read off the weights themselves, and believed only where rows and columns tell the same: a
row that was damaged to half of itself is no fold as long as its columns were not doubled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from glmq.checkpoint.linears import stored_weight
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import CheckpointError
from glmq.inspection.weights import StoredMatrix, column_scales
from glmq.model.family import InputGroup, RowSource


@dataclass(frozen=True, slots=True)
class Scaling:
    """What one linear of the second checkpoint is, beside rounding: rows * (that of the first) * columns."""

    rows: Tensor | None = None
    """float32 [N], powers of two; None for ones."""
    columns: Tensor | None = None
    """float32 [K]; None for ones."""

    def applied(self, weight: Tensor, start: int) -> Tensor:
        """Rows of the first checkpoint's weight from `start` on, [n, K], as the second has them."""
        scaled = weight if self.columns is None else weight * self.columns
        return scaled if self.rows is None else scaled * self.rows[start : start + len(weight), None]

    def undone(self, weight: Tensor, start: int) -> Tensor:
        """Rows of the second checkpoint's weight from `start` on, [n, K], as the first has them."""
        plain = weight if self.columns is None else weight / self.columns
        return plain if self.rows is None else plain / self.rows[start : start + len(weight), None]


UNSCALED: Final = Scaling()


def find_scalings(before: Checkpoint, after: Checkpoint, groups: Iterable[InputGroup]) -> dict[str, Scaling]:
    """The scaling of every linear of the model; UNSCALED where tensors are missing or do not fit.

    Args:
        before, after: float or integer, un-sharded, not compressed.
        groups: of the model, those that make an input before those that read it.
    """
    found: dict[str, Scaling] = {}
    for group in groups:
        columns = column_scales(before, after, group.norm)
        for linear in group.linears:
            fits = columns is not None and columns.shape == (linear.cols,)
            found[linear.name] = Scaling(columns=columns) if fits else UNSCALED
        if group.source is None:
            continue
        try:
            scales = _find_fold(before, after, group, group.source, found)
        except CheckpointError:  # the checks of the linears themselves say what is wrong
            continue
        if scales is not None:
            maker, reader = group.source.linear, group.site
            rows = torch.ones(_rows_of(before, maker)) if found[maker].rows is None else found[maker].rows
            assert rows is not None
            cut = slice(group.source.first_row, group.source.first_row + len(scales))
            rows[cut] = 1 / scales
            found[maker] = replace(found[maker], rows=rows)
            found[reader] = Scaling(columns=_to_channels(scales, group.source))
    return found


def _rows_of(checkpoint: Checkpoint, linear: str) -> int:
    return StoredMatrix(checkpoint, linear).rows


def _find_fold(
    before: Checkpoint, after: Checkpoint, group: InputGroup, source: RowSource, found: Mapping[str, Scaling]
) -> Tensor | None:
    """What the columns of `group` are multiplied by and the rows behind it divided: float32, one for each of these rows."""
    linears = [source.linear, group.site]
    if any(stored_weight(name, checkpoint) not in checkpoint for name in linears for checkpoint in (before, after)):
        return None
    maker = StoredMatrix(before, source.linear), StoredMatrix(after, source.linear)
    reader = StoredMatrix(before, group.site), StoredMatrix(after, group.site)
    if not any(matrix.is_integer for matrix in reader) or any(
        (one.rows, one.cols) != (other.rows, other.cols) for one, other in (maker, reader)
    ):
        return None
    count = group.width // source.repeats
    if source.first_row + count > maker[0].rows or reader[0].cols != group.width:
        return None
    scales = _told_by_rows(*maker, found[source.linear], source.first_row, count)
    scales = torch.where(_denied_by_biases(before, after, source, count), 1.0, scales)
    if bool((scales == 1).all()):
        return None
    scales = torch.where(_denied_by_columns(*reader, scales, source), 1.0, scales)
    return None if bool((scales == 1).all()) else scales


def _told_by_rows(before: StoredMatrix, after: StoredMatrix, scaling: Scaling, first: int, count: int) -> Tensor:
    """The power of two closest to what each row was divided by; 1 where nothing can be said. float32 [count]."""
    gain = torch.ones(before.rows)
    for start, stop in before.pieces():
        old = scaling.applied(before.values(before.stored(start, stop), start), start)
        new = after.values(after.stored(start, stop), start)
        gain[start:stop] = (new * old).sum(1) / old.square().sum(1)
    exponent = torch.where(gain > 0, gain, 1.0).log2().neg().round()[first : first + count]
    return torch.ldexp(torch.ones(count), torch.where(exponent.isfinite(), exponent, 0.0))


def _denied_by_biases(before: Checkpoint, after: Checkpoint, source: RowSource, count: int) -> Tensor:
    """Whether each row's bias is what it was: a fold divides it exactly, where few bits tell little. bool [count]."""
    name, cut = f"{source.linear}.bias", slice(source.first_row, source.first_row + count)
    if name in before and name in after and before[name].shape == after[name].shape:
        old, new = before.read(name)[cut], after.read(name)[cut]
        return (old.to(new.dtype) == new) & (new != 0)
    return torch.zeros(count, dtype=torch.bool)


def _denied_by_columns(before: StoredMatrix, after: StoredMatrix, scales: Tensor, source: RowSource) -> Tensor:
    """Whether the columns that read each row are clearly not multiplied by its scale. bool, one for each row.

    They fit the unscaled ones better then, and what is left with the scale is more than rounding usually leaves:
    columns that all but vanish in rounding say nothing.
    """
    factor = _to_channels(scales, source)
    left = [torch.zeros(before.cols, dtype=torch.float64) for _ in range(2)]
    for start, stop in before.pieces():
        old = before.values(before.stored(start, stop), start)
        new = after.values(after.stored(start, stop), start)
        for total, wanted in zip(left, (old * factor, old), strict=True):
            total += (new - wanted).square().sum(0)
    scaled, plain = (_to_rows(total, source) for total in left)
    return (scaled > plain) & (scaled > torch.minimum(scaled, plain).nanmedian())


def _to_channels(by_row: Tensor, source: RowSource) -> Tensor:
    """One value for each channel that a row makes."""
    return by_row.reshape(-1, 1, source.run).expand(-1, source.repeats, -1).reshape(-1)


def _to_rows(by_channel: Tensor, source: RowSource) -> Tensor:
    """The sum over the channels that a row makes."""
    return by_channel.reshape(-1, source.repeats, source.run).sum(1).reshape(-1)
