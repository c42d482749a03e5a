"""Compare: two folders of weights, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

from glmq.inspection.compare import named_as_model
from glmq.inspection.comparison import Comparison, compare_folders
from glmq.inspection.folder import scan_folder
from glmq.inspection.listing import choose_rows, tensor_rows
from glmq.inspection.statistics import StatisticsComparison
from glmq.inspection.statistics import compare_statistics as compare_folders_of_statistics
from glmq.jobs.watcher import Watcher
from glmq.progress import Watch
from glmq.values import to_path

PAGE_HISTOGRAMS: Final = 6
"""Weights whose distributions are compared, the worst ones."""


def compare(
    a: str | Path,
    b: str | Path,
    *,
    layer: str | None = None,
    name: str | None = None,
    histograms: bool = False,
    watch: Watch | None = None,
) -> Comparison:
    """Compare two folders weight by weight, integers by the weights that they stand for.

    >>> import glmq
    >>> diff = glmq.compare("GLM-4.1V", "w8a8s")
    >>> diff.identical
    False

    Args:
        a, b: folders of weights, float or quantized, of any tool.
        layer: only this text layer (`3`), or layers like `visual.*`.
        name: only tensors whose name ends in this pattern (`*`, `?`) or contains this text. Both choose by names in `a`.
        histograms: also compare the distributions of the worst matrices.
        watch: is called with the events of the run.

    Returns:
        The tensors that differ, worst first; what only one of them has; changes of config.json and description.

    Raises:
        InputError: nothing that can be compared.
    """
    watcher = Watcher(watch)
    scanned = scan_folder(to_path(a)), scan_folder(to_path(b))
    one, other = (named_as_model(folder, beside) for folder, beside in zip(scanned, scanned[::-1], strict=True))
    for folder in (one, other):
        if folder.stored is not None:
            own, theirs = next((own, theirs) for own, theirs in folder.stored.items() if own != theirs)
            watcher.note(
                f"note: {folder.directory}: tensors are named as trainers leave them: {theirs} is compared as {own}, "
                "and so on"
            )
    names = {row.name for row in choose_rows(tensor_rows(one), layer=layer, name=name, sort="name")}
    total = sum(tensor.info.nbytes for tensor in one.tensors if tensor.name in names)
    steps = compare_folders(one, other, names, histograms=PAGE_HISTOGRAMS if histograms else 0)
    with _one_torch_thread():
        return watcher.drain("compare weights", total, steps)


def compare_statistics(a: str | Path, b: str | Path, *, watch: Watch | None = None) -> StatisticsComparison:
    """Compare two statistics folders input by input: ranges, mean squares, outlier channels, samples and settings.

    >>> import glmq
    >>> glmq.compare_statistics("stats", "stats").same_samples
    True

    Args:
        a, b: folders that `calibrate` wrote.
        watch: is called with the events of the run.

    Returns:
        The inputs in both, the largest change of mean squares first, and what else differs.

    Raises:
        InputError: not finished statistics folders, or damaged ones.
    """
    one, other = to_path(a), to_path(b)
    total = sum(tensor.info.nbytes for tensor in scan_folder(one).tensors if tensor.name.endswith(".square_mean"))
    return Watcher(watch).drain("compare statistics", 2 * total, compare_folders_of_statistics(one, other))


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Weights are compared piece by piece, each in a thread of its own: torch's own threads would fight with them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
