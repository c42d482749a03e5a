"""What a statistics folder says: its samples, and of each input the range, the outlier channels and whether it has settled."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from glmq.calibration.convergence import Assessment, Convergence, assess
from glmq.calibration.stats import Statistics
from glmq.checkpoint.json_file import JsonValue
from glmq.progress import resident_bytes
from glmq.records import BytesDone

OUTLIER_FACTOR: Final = 8
"""A channel is an outlier if its largest magnitude is beyond so many times that of the median channel: int8 that covers it
leaves the median channel 16 steps to a side or fewer."""
SETTINGS: Final = ("compute_dtype", "max_pixels", "wide_moments", "generate")
"""Keys of statistics.json that the numbers depend on, beside the model and the samples."""


@dataclass(frozen=True, slots=True)
class InputSummary:
    """One input of linears."""

    site: str
    tokens: int
    """That reached it."""
    width: int
    """Channels."""
    low: float
    high: float
    """Smallest and largest value of all channels."""
    outliers: int
    """Channels whose largest magnitude is beyond OUTLIER_FACTOR times that of the median channel."""
    largest: float
    """The largest channel's magnitude over the median channel's; infinite where that is zero, as of channels never used."""
    settled: Convergence | None
    """How much the second half of the samples changed; None where one half alone reached the input."""


@dataclass(frozen=True, slots=True)
class StatisticsSummary:
    """A statistics folder."""

    directory: Path
    glmq: str
    """The version that wrote it."""
    model: str
    """Fingerprint of the float checkpoint."""
    samples_digest: str
    settings: Mapping[str, JsonValue]
    """By key of SETTINGS."""
    samples: int
    tokens: int
    """Of all samples."""
    answered: int
    """Samples whose answer calibration saw, those of the model's own included."""
    generated: int
    """Samples that the float model itself has answered."""
    generated_tokens: int
    inputs: tuple[InputSummary, ...]
    assessment: Assessment | None
    """None where one sample alone says nothing about it."""
    text_inputs: bool
    """What enters the text layers is kept, for propagation."""

    @property
    def unanswered(self) -> int:
        """Samples without an answer."""
        return self.samples - self.answered

    @property
    def in_words(self) -> str:
        """`16 samples, 4,321 tokens, float32; answers: 8, 3 of them written by the model (120 tokens)`."""
        shrunk = self.settings["max_pixels"]
        parts = [f"{self.samples} {'sample' if self.samples == 1 else 'samples'}, {self.tokens:,} tokens"]
        parts += [str(self.settings["compute_dtype"])]
        parts += [f"images of at most {shrunk} pixels"] if shrunk is not None else []
        parts += ["second moments also of the vision tower and down_proj"] if self.settings["wide_moments"] else []
        parts += ["what enters the text layers"] if self.text_inputs else []
        own = (
            f", {self.generated} of them written by the model ({self.generated_tokens} tokens)"
            if self.generated
            else ""
        )
        return f"{', '.join(parts)}; answers: {self.answered or 'none'}{own}"


@dataclass(frozen=True, slots=True)
class InputChange:
    """One input in two folders, the second against the first."""

    site: str
    widened: float
    """The second's range, largest less smallest value, over the first's."""
    mean_squares: float
    """||q_b / q_a - 1|| over channels / ||1||, of the mean squares q; channels that are zero in the first are left out."""
    outliers: tuple[int, int]
    tokens: tuple[int, int]


@dataclass(frozen=True, slots=True)
class StatisticsComparison:
    """Two statistics folders, the second against the first."""

    a: StatisticsSummary
    b: StatisticsSummary
    changes: tuple[InputChange, ...]
    """Of the inputs in both, the largest change of mean squares first."""
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def same_model(self) -> bool:
        """Whether both come from one float checkpoint, by its headers and config.json."""
        return self.a.model == self.b.model

    @property
    def same_samples(self) -> bool:
        """Whether both come from the same samples, prompts and answers."""
        return self.a.samples_digest == self.b.samples_digest

    @property
    def settings(self) -> list[tuple[str, JsonValue, JsonValue]]:
        """Those that differ."""
        return [
            (key, self.a.settings[key], self.b.settings[key])
            for key in SETTINGS
            if self.a.settings[key] != self.b.settings[key]
        ]


def summarize_statistics(directory: Path) -> StatisticsSummary:
    """Read the manifest and the extremes of every channel; second moments and histograms are left alone.

    Raises:
        StatisticsError: not a finished statistics folder, or a damaged one.
        CheckpointError: a damaged file in it.
    """
    statistics = Statistics.open(directory)
    samples, settled = statistics.samples(), statistics.settled()
    return StatisticsSummary(
        directory=directory,
        glmq=str(statistics.manifest.get("glmq")),
        model=statistics.model_fingerprint,
        samples_digest=statistics.samples_digest,
        settings={key: statistics.manifest.get(key) for key in SETTINGS},
        samples=len(samples),
        tokens=sum(sample.tokens for sample in samples),
        answered=sum(sample.has_answer for sample in samples),
        generated=len(answers := list(_generated(statistics.manifest.get("samples")))),
        generated_tokens=sum(answers),
        inputs=tuple(_summarize(statistics, site, settled.get(site)) for site in statistics.sites()),
        assessment=assess(settled, samples=len(samples)),
        text_inputs=statistics.settings().text_inputs,
    )


def compare_statistics(a: Path, b: Path) -> Generator[BytesDone, None, StatisticsComparison]:
    """Compare two statistics folders input by input.

    Yields:
        A record after each input.

    Returns:
        Everything that differs.

    Raises:
        StatisticsError: not finished statistics folders, or damaged ones.
        CheckpointError: a damaged file in one.
    """
    first, second = summarize_statistics(a), summarize_statistics(b)
    one, other = Statistics.open(a), Statistics.open(b)
    theirs = {entry.site: entry for entry in second.inputs}
    changes: list[InputChange] = []
    for entry in first.inputs:
        found = theirs.get(entry.site)
        if found is None or found.width != entry.width:
            continue
        q_a, q_b = (statistics.channels(entry.site, "square_mean").double() for statistics in (one, other))
        alive = q_a > 0
        change = (q_b[alive] / q_a[alive] - 1).square().mean().sqrt() if alive.any() else torch.zeros(())
        widened = (found.high - found.low) / (entry.high - entry.low) if entry.high > entry.low else math.inf
        changes.append(
            InputChange(
                entry.site,
                1.0 if found.high - found.low == entry.high - entry.low else widened,
                float(change),
                (entry.outliers, found.outliers),
                (entry.tokens, found.tokens),
            )
        )
        yield BytesDone(entry.site, 2 * 4 * entry.width, resident_bytes())
    changes.sort(key=lambda change: (-change.mean_squares, change.site))
    compared = {change.site for change in changes}
    return StatisticsComparison(
        first, second, tuple(changes), _others(first.inputs, compared), _others(second.inputs, compared)
    )


def _summarize(statistics: Statistics, site: str, settled: Convergence | None) -> InputSummary:
    low, high = (statistics.channels(site, field) for field in ("minimum", "maximum"))
    magnitudes = torch.maximum(low.abs(), high.abs())  # [K]
    typical, largest = float(magnitudes.median()), float(magnitudes.max())
    return InputSummary(
        site=site,
        tokens=statistics.tokens(site),
        width=low.numel(),
        low=float(low.min()),
        high=float(high.max()),
        outliers=int((magnitudes > OUTLIER_FACTOR * typical).sum()),
        largest=largest / typical if typical else math.inf if largest else 1.0,
        settled=settled,
    )


def _generated(samples: JsonValue) -> Iterator[int]:
    """Tokens of each answer that the float model gave."""
    for sample in samples if isinstance(samples, list) else ():
        answer = sample.get("generated") if isinstance(sample, Mapping) else None
        ids = answer.get("ids") if isinstance(answer, Mapping) else None
        if isinstance(ids, list):
            yield len(ids)


def _others(inputs: Sequence[InputSummary], compared: set[str]) -> tuple[str, ...]:
    return tuple(entry.site for entry in inputs if entry.site not in compared)
