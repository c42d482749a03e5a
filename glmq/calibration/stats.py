"""The statistics folder: what `calibrate` hands to `quantize`.

    statistics.json                 schema, fingerprint of the model, samples, settings, one entry per input site
    {block}.safetensors             the tensors of the sites of one block, named `{site}.{field}`

Fields are those of InputStats. A second moment is stored as its upper triangle by rows, float32 [K * (K + 1) / 2].
`statistics.json` is written last, so a folder without it is not a statistics folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save
from torch import Tensor

from glmq.calibration.convergence import Convergence
from glmq.calibration.samples import Sample, digest
from glmq.checkpoint.json_file import JsonObject, JsonValue, json_bytes, read_json_object, write_whole
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import StatisticsError
from glmq.model.config import ModelConfig
from glmq.model.family import InputGroup
from glmq.numerics.moments import InputStats
from glmq.version import __version__

SCHEMA: Final = "glmq.statistics/1"
MANIFEST: Final = "statistics.json"
SAMPLE_ROWS: Final = 256
"""Tokens of each input that are kept as they are for error tables, evenly over all samples."""


MIRROR_ROWS: Final = 512


@dataclass(frozen=True, slots=True)
class Settings:
    """What the statistics depend on, beside the model and the samples."""

    compute_dtype: str
    """Of the forward pass, e.g. `float32`."""
    max_pixels: int | None
    wide_moments: bool
    """Second moments also of the vision tower and of down_proj's wide input."""
    generate: int | None = None
    """Most tokens that the model answers to a sample without an answer; None leaves such samples as they are."""


@dataclass(frozen=True, slots=True)
class SampleTokens:
    """One sample of a finished calibration."""

    name: str
    tokens: int
    """Image placeholders, prompt and answer together."""
    has_answer: bool


class StatsWriter:
    """Writes the files of a statistics folder.

    Args:
        directory: an existing empty folder.
    """

    def __init__(self, directory: Path, fingerprint: str, samples: Sequence[Sample], settings: Settings) -> None:
        self._directory = directory
        self._fingerprint, self._samples, self._settings = fingerprint, samples, settings
        self._inputs: JsonObject = {}
        self._tokens: dict[str, int] = {}

    def set_tokens(self, sample: Sample, tokens: int) -> None:
        """Remember how many tokens a sample had."""
        self._tokens[sample.name] = tokens

    def write(self, block: str, inputs: Sequence[tuple[InputStats, Convergence | None]]) -> JsonObject:
        """Store the finished sites of one block and how far they have settled. Returns their manifest entries."""
        tensors: dict[str, Tensor] = {}
        entries: JsonObject = {}
        for stats, settled in inputs:
            tensors |= {f"{stats.name}.{field}": tensor for field, tensor in _fields(stats).items()}
            entries[stats.name] = {
                "file": f"{block}.safetensors",
                "width": stats.width,
                "tokens": stats.tokens,
                "second_moment": stats.second_moment is not None,
                "settled": convergence_json(settled),
            }
        write_whole(self._directory / f"{block}.safetensors", save(tensors))
        self.restore(entries)
        return entries

    def restore(self, entries: Mapping[str, JsonValue]) -> None:
        """Take over the manifest entries of a block that an interrupted run has stored."""
        self._inputs.update(entries)

    def finish(self) -> None:
        """Write the manifest, which makes the folder a statistics folder."""
        write_whole(self._directory / MANIFEST, self.manifest_bytes())

    def manifest_bytes(self) -> bytes:
        """What `finish` writes."""
        samples: list[JsonValue] = [self._describe(sample) for sample in self._samples]
        manifest: JsonObject = {
            "schema": SCHEMA,
            "glmq": __version__,
            "model": self._fingerprint,
            "samples_sha256": digest(self._samples, self._settings.generate),
            "compute_dtype": self._settings.compute_dtype,
            "max_pixels": self._settings.max_pixels,
            "wide_moments": self._settings.wide_moments,
            "generate": self._settings.generate,
            "samples": samples,
            "inputs": self._inputs,
        }
        return json_bytes(manifest, indent=1)

    def _describe(self, sample: Sample) -> JsonObject:
        made = sample.generated
        entry: JsonObject = {
            "name": sample.name,
            "sha256": sample.digest,
            "tokens": self._tokens[sample.name],
            "answer": sample.has_answer,
        }
        return entry if made is None else {**entry, "generated": {"text": made.text, "ids": list(made.ids)}}


class Statistics:
    """A finished statistics folder, read site by site."""

    def __init__(self, directory: Path, manifest: JsonObject, tensors: Checkpoint) -> None:
        self.directory = directory
        self.model_fingerprint = str(manifest["model"])
        self.samples_digest = str(manifest["samples_sha256"])
        self.manifest = manifest
        self._tensors = tensors
        inputs = manifest["inputs"]
        assert isinstance(inputs, Mapping)
        self._inputs: Mapping[str, object] = inputs

    @classmethod
    def open(cls, directory: Path) -> Statistics:
        """Open a folder that `glmq calibrate` has finished.

        Raises:
            StatisticsError: not such a folder, an unfinished one, or one of another version of glmq.
            CheckpointError: a damaged file in it.
        """
        path = directory / MANIFEST
        if not path.is_file():
            raise StatisticsError(
                f"{directory}: has no {MANIFEST}, so it is not a finished statistics folder; run `glmq calibrate` first"
            )
        manifest = read_json_object(path)
        if manifest.get("schema") != SCHEMA:
            raise StatisticsError(
                f"{path}: schema is {manifest.get('schema')!r}, this glmq reads {SCHEMA!r}; run `glmq calibrate` again"
            )
        inputs, samples = manifest.get("inputs"), manifest.get("samples")
        sound = {
            "model": isinstance(manifest.get("model"), str),
            "samples_sha256": isinstance(manifest.get("samples_sha256"), str),
            "inputs": isinstance(inputs, Mapping)
            and all(_has(entry, width=int, tokens=int, second_moment=bool) for entry in inputs.values()),
            "samples": isinstance(samples, list)
            and all(_has(entry, name=str, tokens=int, answer=bool) for entry in samples),
        }
        for key, is_sound in sound.items():
            if not is_sound:
                raise StatisticsError(f"{path}: {key!r} is missing or damaged; run `glmq calibrate` again")
        return cls(directory, manifest, Checkpoint.open(directory))

    def check_model(self, fingerprint: str) -> None:
        """Raise StatisticsError unless the statistics come from the checkpoint with that fingerprint."""
        if self.model_fingerprint != fingerprint:
            raise StatisticsError(
                f"{self.directory}: these statistics come from another checkpoint "
                f"(theirs {self.model_fingerprint[:12]}, this model's {fingerprint[:12]}); run `glmq calibrate` on this model"
            )

    def check_samples(self, wanted: str) -> None:
        """Raise StatisticsError unless they were taken from the samples with that digest."""
        if self.samples_digest != wanted:
            raise StatisticsError(
                f"{self.directory}: these statistics come from other samples, prompt, limit or --generate than the command "
                f"names (theirs {self.samples_digest[:12]}, the command's {wanted[:12]}); drop --calib_images and "
                "--calib-samples to use them as they are, or run `glmq calibrate` again"
            )

    def check_settings(self, *, compute_dtype: str | None, max_pixels: int | None) -> None:
        """Raise StatisticsError unless they were taken with these settings; None accepts any."""
        wanted = {"compute_dtype": ("--compute-dtype", compute_dtype), "max_pixels": ("--max-pixels", max_pixels)}
        for key, (option, value) in wanted.items():
            if value is not None and self.manifest.get(key) != value:
                raise StatisticsError(
                    f"{self.directory}: these statistics were taken with {option} {self.manifest.get(key)}, the command asks "
                    f"for {value}; drop {option} to use them as they are, or run `glmq calibrate` again"
                )

    def samples(self) -> list[SampleTokens]:
        """The samples that the statistics were taken from."""
        entries = self.manifest["samples"]
        assert isinstance(entries, list)
        return [SampleTokens(str(e["name"]), int(e["tokens"]), bool(e["answer"])) for e in entries]

    def settled(self) -> dict[str, Convergence]:
        """By site, how much the second half of the samples changed; no site that one half alone reached."""
        found: dict[str, Convergence] = {}
        for site, entry in self._inputs.items():
            change = entry.get("settled") if isinstance(entry, Mapping) else None
            if isinstance(change, Mapping):
                correlation = change["correlation"]
                found[site] = Convergence(
                    float(change["range"]),
                    float(change["diagonal"]),
                    None if correlation is None else float(correlation),
                )
        return found

    def __contains__(self, site: str) -> bool:
        return site in self._inputs

    def input(self, site: str) -> InputStats:
        """The statistics of one input.

        Raises:
            StatisticsError: no such site.
        """
        entry = self._inputs.get(site)
        if not isinstance(entry, Mapping):
            raise StatisticsError(
                f"{self.directory}: has no statistics of {site!r}; run `glmq calibrate` on this model"
            )
        read = self._tensors.read
        moment = None
        if entry["second_moment"]:
            moment = unpack_triangle(read(f"{site}.second_moment"), int(entry["width"]))
        return InputStats(
            name=site,
            tokens=int(entry["tokens"]),
            minimum=read(f"{site}.minimum"),
            maximum=read(f"{site}.maximum"),
            mean=read(f"{site}.mean"),
            histogram=read(f"{site}.histogram"),
            exponent=read(f"{site}.exponent"),
            square_mean=read(f"{site}.square_mean"),
            second_moment=moment,
            sample=read(f"{site}.sample"),
        )


def convergence_json(settled: Convergence | None) -> JsonObject | None:
    """For the manifest: texts like `5.10e-02`, whose length a plan knows before the values."""
    if settled is None:
        return None
    values = {"range": settled.range_gap, "diagonal": settled.diagonal, "correlation": settled.correlation}
    return {key: None if value is None else f"{value:.2e}" for key, value in values.items()}


def _has(entry: object, **kinds: type) -> bool:
    """Whether a JSON value is an object with values of these types."""
    return isinstance(entry, Mapping) and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())


def has_moment(group: InputGroup, config: ModelConfig, *, wide_moments: bool) -> bool:
    """Whether a group's input gets a second moment: text inputs up to the hidden size, or all with `wide_moments`."""
    return wide_moments or (group.site.startswith(config.family.text) and group.width <= config.hidden_size)


def pack_triangle(matrix: Tensor) -> Tensor:
    """The upper triangle by rows of a symmetric [K, K]: [K * (K + 1) / 2]."""
    size = matrix.shape[0]
    packed = torch.empty(size * (size + 1) // 2, dtype=matrix.dtype)
    start = 0
    for row in range(size):
        packed[start : start + size - row] = matrix[row, row:]
        start += size - row
    return packed


def unpack_triangle(packed: Tensor, size: int) -> Tensor:
    """The symmetric [K, K] whose upper triangle by rows is `packed`."""
    matrix = torch.zeros(size, size, dtype=packed.dtype)
    start = 0
    for row in range(size):
        matrix[row, row:] = packed[start : start + size - row]
        start += size - row
    for begin in range(
        0, size, MIRROR_ROWS
    ):  # piece by piece: no second matrix, and the transposed reads stay in cache
        end = begin + MIRROR_ROWS
        matrix[end:, begin:end] = matrix[begin:end, end:].T
        corner = matrix[begin:end, begin:end]
        corner += corner.triu(1).T
    return matrix


def _fields(stats: InputStats) -> dict[str, Tensor]:
    fields = {
        "minimum": stats.minimum,
        "maximum": stats.maximum,
        "mean": stats.mean,
        "histogram": stats.histogram,
        "exponent": stats.exponent,
        "square_mean": stats.square_mean,
        "sample": stats.sample,
    }
    if stats.second_moment is not None:
        fields["second_moment"] = pack_triangle(stats.second_moment)
    return fields
