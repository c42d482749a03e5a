"""Everything that differs between two folders, as one record."""

from __future__ import annotations

from collections.abc import Container, Generator, Sequence
from dataclasses import dataclass
from shlex import quote

from glmq.inspection.compare import (
    HistogramPair,
    Incomparable,
    LayerDiff,
    WeightDiff,
    compare_weights,
    sum_layers,
    weight_histograms,
)
from glmq.inspection.compare_keys import KeyChange, NamePattern, config_changes, description_changes, only_in
from glmq.inspection.folder import Folder, plain_name
from glmq.progress import resident_bytes
from glmq.records import REPORT, BytesDone


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two folders, the second against the first."""

    a: Folder
    b: Folder
    diffs: Sequence[WeightDiff]
    """Worst first."""
    incomparable: Sequence[Incomparable]
    layers: Sequence[LayerDiff]
    """In the order of the first folder, `total` last."""
    only_a: Sequence[NamePattern]
    only_b: Sequence[NamePattern]
    config: Sequence[KeyChange]
    description: Sequence[KeyChange]
    histograms: Sequence[HistogramPair]
    """Of the worst matrices; empty unless asked for."""

    @property
    def identical(self) -> bool:
        """Both hold the same tensors with the same values."""
        others = [*self.only_a, *self.only_b, *self.incomparable]
        return not others and all(diff.identical for diff in self.diffs)

    @property
    def verdict_place(self) -> str:
        """Where the output errors are, which a difference of weights is no word on; empty where nothing was rounded."""
        if not any(diff.is_rounded for diff in self.diffs):
            return ""
        report = f"{REPORT}.json"
        has_report = (self.b.directory / report).is_file()
        place = f"{report} of B has those of the calibration, and verify" if has_report else "Verify"
        return (
            "What rounding changes in a weight is no verdict on it: output errors are. "
            f"{place} measures them on pictures of yours:"
        )

    @property
    def verifying_command(self) -> str:
        """The command that measures how the second folder answers."""
        a, b = (quote(str(folder.directory)) for folder in (self.a, self.b))
        return f"glmq verify {b} --reference {a} --calib-images FOLDER"


def compare_folders(
    a: Folder, b: Folder, names: Container[str], *, histograms: int = 0
) -> Generator[BytesDone, None, Comparison]:
    """Compare two folders, weights a few megabytes at a time.

    Pieces of a weight are compared in threads of their own, so that torch needs no more than one in each.

    Args:
        names: tensors of `a` that are compared.
        histograms: of how many of the worst matrices the values are counted; each is read twice more.

    Yields:
        A record after each tensor.

    Returns:
        Everything that differs.

    Raises:
        UsageError: one of them is neither a float nor an un-sharded quantized checkpoint.
        CheckpointError: a weight file cannot be read.
    """
    nbytes = {plain_name(tensor.name): tensor.info.nbytes for tensor in a.tensors if tensor.name in names}
    diffs: list[WeightDiff] = []
    incomparable: list[Incomparable] = []
    for record in compare_weights(a, b, names):
        if isinstance(record, WeightDiff):
            diffs.append(record)
        else:
            incomparable.append(record)
        yield BytesDone(record.name, nbytes[record.name], resident_bytes())
    layers = sum_layers(diffs)
    diffs.sort(key=lambda diff: (-diff.relative_l2, diff.name))
    worst = [diff.name for diff in diffs if diff.name.endswith(".weight") and len(diff.shape) == 2 and diff.noise]
    return Comparison(
        a=a,
        b=b,
        diffs=diffs,
        incomparable=incomparable,
        layers=layers,
        only_a=only_in(a, b),
        only_b=only_in(b, a),
        config=config_changes(a, b),
        description=description_changes(a, b),
        histograms=list(weight_histograms(a, b, worst[:histograms])),
    )
