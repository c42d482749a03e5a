"""Inspect: what is in a folder of weights or statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from glmq.engines import Engine
from glmq.errors import CheckpointError, ModelError, StatisticsError
from glmq.inspection.folder import Folder, Kind, scan_file, scan_folder
from glmq.inspection.listing import TensorRow, choose_rows, tensor_rows
from glmq.inspection.parts import read_packed
from glmq.jobs.watcher import Watcher
from glmq.model.config import parse_config
from glmq.model.members import describe_member
from glmq.progress import Watch
from glmq.reporting.documents import Inspection
from glmq.values import check_least, check_word, to_path
from glmq.verification.engines.check import check_lookups

if TYPE_CHECKING:
    from glmq.inspection.statistics import StatisticsSummary
    from glmq.inspection.values import TensorValues

ORDERS: Final = ("name", "bytes", "type", "role")
"""Of the tensors that are shown."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which tensors of a folder are looked at, and in which order."""

    layer: str | None = None
    """A text layer (`3`), or layers like `visual.*`; None: all."""
    name: str | None = None
    """A pattern (`*`, `?`) that names end in, or text that they contain; None: all."""
    sort: Literal["name", "bytes", "type", "role"] = "name"
    """By `name`, `bytes`, `type` or `role`."""
    limit: int | None = None
    """At most this many."""

    def __post_init__(self) -> None:
        check_word("--sort", self.sort, ORDERS)
        check_least("--limit", self.limit, 1)


def inspect(
    folder: str | Path, *, choice: Choice = Choice(), values: bool = False, watch: Watch | None = None
) -> Inspection:
    """Look into a folder without loading it: float, quantized or compressed weights of any tool, or statistics.

    >>> import glmq
    >>> found = glmq.inspect("GLM-4.1V")
    >>> found.folder.kind.name
    'FLOAT'

    Args:
        folder: with weights or statistics, or one safetensors file.
        choice: the tensors to look at.
        values: also read them: range, spread, entropy, zeros, outliers, histogram.
        watch: is called with the events of the run.

    Returns:
        The chosen tensors, and what would keep each engine from loading the folder.

    Raises:
        InputError: nothing that can be inspected.
    """
    place = to_path(folder)
    scanned, statistics = _with_statistics(scan_file(place) if place.is_file() else scan_folder(place))
    rows = choose_rows(tensor_rows(scanned), layer=choice.layer, name=choice.name, sort=choice.sort)[: choice.limit]
    is_model = place.is_dir() and scanned.kind in (Kind.QUANTIZED, Kind.PARTS, Kind.SHARDED)
    return Inspection(
        folder=scanned,
        rows=rows,
        values=_read_values(rows, watch) if values else {},
        engines={engine: list(check_lookups(scanned, engine)) for engine in Engine} if is_model else {},
        packed=read_packed(scanned.directory),
        member=_member(scanned),
        statistics=statistics,
    )


def _with_statistics(folder: Folder) -> tuple[Folder, StatisticsSummary | None]:
    """The folder and what its statistics say, if it holds some; a damaged one has a problem more."""
    if folder.kind is not Kind.STATISTICS or not folder.directory.is_dir():
        return folder, None
    from glmq.inspection.statistics import summarize_statistics  # imports torch, which headers are read without

    try:
        return folder, summarize_statistics(folder.directory)
    except (CheckpointError, StatisticsError) as error:
        return replace(folder, problems=(*folder.problems, str(error))), None


def _member(folder: Folder) -> str | None:
    place = folder.directory if folder.directory.is_dir() else folder.directory.parent
    try:
        return describe_member(place, parse_config(folder.config, "config.json")) if folder.config else None
    except ModelError:
        return None


def _read_values(rows: Sequence[TensorRow], watch: Watch | None) -> Mapping[str, TensorValues]:
    from glmq.inspection.values import read_values  # imports torch, which headers are read without

    return Watcher(watch).drain("read values", sum(row.nbytes for row in rows), read_values(rows))
