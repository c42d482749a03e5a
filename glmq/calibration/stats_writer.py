"""The writing side of the statistics folder of `glmq.calibration.stats`: block by block, the manifest last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import xxhash
from torch import Tensor

from glmq.calibration import text_inputs
from glmq.calibration.convergence import Convergence
from glmq.calibration.manifest import MANIFEST, SCHEMA, SiteShape, digest_of, site_entry
from glmq.calibration.samples import Sample, digest
from glmq.calibration.stats import Settings
from glmq.checkpoint.json_file import JsonObject, JsonValue, json_bytes, write_whole
from glmq.checkpoint.names import natural_key
from glmq.checkpoint.writer import write_tensors
from glmq.errors import StatisticsError
from glmq.model.config import ModelConfig
from glmq.model.family import InputGroup
from glmq.numerics.moments import InputStats
from glmq.numerics.triangle import pack_triangle
from glmq.version import __version__

SAMPLE_ROWS: Final = 256
"""Tokens of each input that are kept as they are for error tables, evenly over all samples."""


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """The statistics of one block, as they were stored."""

    inputs: JsonObject
    """The manifest's entries of its sites."""
    files: Mapping[str, str]
    """xxh3-128 of its file by name; nothing where no sample reaches the block."""


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
        self._text_inputs: dict[str, str] = {}

    def set_tokens(self, sample: Sample, tokens: int) -> None:
        """Remember how many tokens a sample had."""
        self._tokens[sample.name] = tokens

    def write(self, block: str, inputs: Sequence[tuple[InputStats, Convergence | None]]) -> StoredBlock:
        """Store the finished sites of one block and how far they have settled.

        Raises:
            StatisticsError: a number is beyond float32.
        """
        tensors: dict[str, Tensor] = {}
        entries: JsonObject = {}
        for stats, settled in inputs:
            fields = _fields(stats)
            for field, tensor in fields.items():
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise StatisticsError(
                        f"{stats.name}: its {field} is beyond float32; weights near it are far too large, look for them with "
                        "`glmq inspect --values` and repair the checkpoint"
                    )
            tensors |= {f"{stats.name}.{field}": tensor for field, tensor in fields.items()}
            checksums = {field: _tensor_digest(tensor) for field, tensor in fields.items()}
            shape = SiteShape(stats.width, stats.second_moment is not None, _rows(stats))
            entries[stats.name] = site_entry(block, shape, stats.tokens, settled, checksums)
        path = self._directory / f"{block}.safetensors"
        stored = StoredBlock(entries, {path.name: write_tensors(path, tensors)})
        self.restore(stored)
        return stored

    def write_text_inputs(self, sample: int, hidden: Tensor, positions: Tensor) -> dict[str, str]:
        """Store what enters the text layers of one sample; returns the name and xxh3-128 of its file, for a StoredBlock."""
        return {text_inputs.name_of(sample): text_inputs.write(self._directory, sample, hidden, positions)}

    def restore(self, stored: StoredBlock) -> None:
        """Take over what the manifest says of a block that is stored, perhaps by an interrupted run or another rank."""
        self._inputs.update(stored.inputs)
        self._text_inputs |= text_inputs.among(stored.files)

    def finish(self, weights: Mapping[str, str]) -> list[str]:
        """Write the manifest, which makes the folder a statistics folder.

        Args:
            weights: xxh3-128 of every tensor of the checkpoint.

        Returns:
            The names of the folder's files.
        """
        write_whole(self._directory / MANIFEST, self.manifest_bytes(weights))
        files = {str(entry["file"]) for entry in self._inputs.values() if isinstance(entry, Mapping)}
        return [MANIFEST, *sorted(files), *self._text_inputs]

    def manifest_bytes(self, weights: Mapping[str, str]) -> bytes:
        """What `finish` writes."""
        samples: list[JsonValue] = [self._describe(sample) for sample in self._samples]
        manifest: JsonObject = {
            "schema": SCHEMA,
            "glmq": __version__,
            "model": self._fingerprint,
            "weights": {name: weights[name] for name in sorted(weights, key=natural_key)},
            "samples_sha256": digest(self._samples, self._settings.generate),
            "compute_dtype": self._settings.compute_dtype,
            "max_pixels": self._settings.max_pixels,
            "wide_moments": self._settings.wide_moments,
            "generate": self._settings.generate,
            "samples": samples,
            "inputs": self._inputs,
        }
        if self._settings.text_inputs:
            manifest["text_inputs"] = self._text_inputs
        return json_bytes({**manifest, "digest": digest_of(manifest)}, indent=1)

    def _describe(self, sample: Sample) -> JsonObject:
        made = sample.generated
        entry: JsonObject = {
            "name": sample.name,
            "sha256": sample.digest,
            "tokens": self._tokens[sample.name],
            "answer": sample.has_answer,
        }
        return entry if made is None else {**entry, "generated": {"text": made.text, "ids": list(made.ids)}}


def has_moment(group: InputGroup, config: ModelConfig, *, wide_moments: bool) -> bool:
    """Whether a group's input gets a second moment: text inputs up to the hidden size, or all with `wide_moments`."""
    return wide_moments or (group.site.startswith(config.family.text) and group.width <= config.hidden_size)


def _tensor_digest(tensor: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


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
    if stats.sensitivity is not None:
        fields["sensitivity"] = stats.sensitivity
    return fields


def _rows(stats: InputStats) -> int:
    return 0 if stats.sensitivity is None else len(stats.sensitivity)
