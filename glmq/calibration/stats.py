"""The statistics folder: what `calibrate` hands to `quantize`.

    statistics.json                 what they come from, and one entry per input site, see `glmq.calibration.manifest`
    {block}.safetensors             the tensors of the sites of one block, named `{site}.{field}`
    text_inputs-NNNN.safetensors    if asked for, what enters the text layers, see `glmq.calibration.text_inputs`

Fields are those of InputStats; inputs of the vision tower and of lm_head have no `sensitivity`. A second moment is stored as
its upper triangle by rows, float32 [K * (K + 1) / 2].
`statistics.json` is written last, so a folder without it is not a statistics folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor

from glmq.calibration import text_inputs
from glmq.calibration.convergence import Convergence
from glmq.calibration.manifest import (
    MANIFEST,
    Manifest,
    SampleTokens,
    Site,
    field_specs,
    read_manifest,
)
from glmq.calibration.soundness import find_defect
from glmq.checkpoint.contents import ContentDigests
from glmq.checkpoint.names import natural_key
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import OtherStatisticsError, StatisticsError
from glmq.numerics.moments import InputStats
from glmq.numerics.triangle import unpack_triangle
from glmq.wording import say_absent


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
    text_inputs: bool = False
    """What enters the text layers is kept too (text_inputs.py)."""

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype, as torch has it."""
        found: torch.dtype = getattr(torch, self.compute_dtype)
        return found


class Statistics:
    """A finished statistics folder, read site by site; every field is held to its checksum as it is read."""

    def __init__(self, directory: Path, manifest: Manifest, tensors: Checkpoint) -> None:
        self.directory: Final = directory
        self.manifest: Final = manifest.document
        """As it was read."""
        self.model_fingerprint: Final = manifest.model_fingerprint
        self.samples_digest: Final = manifest.samples_digest
        self.has_checksums: Final = manifest.has_checksums
        """Whether damage that leaves plausible numbers would be found."""
        self.digest: Final = manifest.digest
        """Of everything in the folder that has a checksum."""
        self._tensors, self._sites = tensors, manifest.sites
        self.weights: Final = manifest.weights
        """xxh3-128 of each tensor of the float model, in hexadecimal; empty in a folder of an older glmq."""
        self._samples = manifest.samples
        self._text_inputs = manifest.text_inputs
        self._sound: set[str] = set()
        known = {
            f"{name}.{field}": value for name, site in self._sites.items() for field, value in site.checksums.items()
        }
        wanted = "the one that `glmq calibrate` wrote; copy the folder again or run `glmq calibrate` again"
        tensors.contents = ContentDigests(known, wanted)

    @classmethod
    def open(cls, directory: Path) -> Statistics:
        """Open a folder that `glmq calibrate` has finished.

        Raises:
            StatisticsError: not such a folder, an unfinished or incomplete one, one of another version of glmq, or a damaged
                manifest.
            CheckpointError: a damaged file in it.
        """
        path = directory / MANIFEST
        if not path.is_file():
            raise StatisticsError(
                f"{directory}: has no {MANIFEST}, so it is not a finished statistics folder; run `glmq calibrate` first"
            )
        manifest = read_manifest(path)
        present = {file.name for file in directory.glob("*.safetensors") if file.is_file()}
        missing = [name for name in manifest.files() if name not in present]
        if missing:
            raise StatisticsError(
                f"{directory}: is incomplete: {MANIFEST} names {say_absent(missing)}; copy the folder again or run "
                "`glmq calibrate` again"
            )
        return cls(directory, manifest, Checkpoint.open(directory))

    def check_model(self, fingerprint: str) -> None:
        """Raise StatisticsError unless the statistics come from a checkpoint with that fingerprint.

        It says nothing of the weights' values: `weights_wanted` does.
        """
        if self.model_fingerprint != fingerprint:
            raise OtherStatisticsError(
                f"{self.directory}: these statistics come from another checkpoint "
                f"(theirs {self.model_fingerprint[:12]}, this model's {fingerprint[:12]}); run `glmq calibrate` on this model"
            )

    def weights_wanted(self) -> ContentDigests | None:
        """What to hold the float weights to while they are read; None in a folder of an older glmq."""
        if not self.has_checksums:
            return None
        wanted = f"the one that the statistics in {self.directory} come from; run `glmq calibrate` on this model"
        return ContentDigests(self.weights, wanted)

    def check_samples(self, wanted: str) -> None:
        """Raise StatisticsError unless they were taken from the samples with that digest."""
        if self.samples_digest != wanted:
            raise OtherStatisticsError(
                f"{self.directory}: these statistics come from other samples, prompt, limit or --generate than the command "
                f"names (theirs {self.samples_digest[:12]}, the command's {wanted[:12]}); drop --calib_images and "
                "--calib-samples to use them as they are, or run `glmq calibrate` again"
            )

    def settings(self) -> Settings:
        """What they depend on, beside the model and the samples."""
        pixels, generate = self.manifest.get("max_pixels"), self.manifest.get("generate")
        return Settings(
            str(self.manifest.get("compute_dtype")),
            pixels if isinstance(pixels, int) else None,
            self.manifest.get("wide_moments") is True,
            generate if isinstance(generate, int) else None,
            bool(self._text_inputs),
        )

    def check_settings(self, *, compute_dtype: str | None, max_pixels: int | None) -> None:
        """Raise StatisticsError unless they were taken with these settings; None accepts any."""
        wanted = {"compute_dtype": ("--compute-dtype", compute_dtype), "max_pixels": ("--max-pixels", max_pixels)}
        for key, (option, value) in wanted.items():
            if value is not None and self.manifest.get(key) != value:
                raise OtherStatisticsError(
                    f"{self.directory}: these statistics were taken with {option} {self.manifest.get(key)}, the command asks "
                    f"for {value}; drop {option} to use them as they are, or run `glmq calibrate` again"
                )

    def samples(self) -> list[SampleTokens]:
        """The samples that the statistics were taken from."""
        return list(self._samples)

    def settled(self) -> dict[str, Convergence]:
        """By site, how much the second half of the samples changed; no site that one half alone reached."""
        return {name: site.settled for name, site in self._sites.items() if site.settled is not None}

    def sites(self) -> list[str]:
        """The names of all inputs, in natural order."""
        return sorted(self._sites, key=natural_key)

    def tokens(self, site: str) -> int:
        """How many tokens reached an input."""
        return self._sites[site].tokens

    def channels(self, site: str, field: Literal["minimum", "maximum", "square_mean"]) -> Tensor:
        """One number of each channel of an input: float32 [K].

        Raises:
            StatisticsError: the field is not as it was written, or of another shape.
            CheckpointError: it is missing.
        """
        self._checked_fields(site, self._sites[site])
        return self._tensors.read(f"{site}.{field}")

    def __contains__(self, site: str) -> bool:
        return site in self._sites

    def has_sensitivity(self, site: str) -> bool:
        """Whether it is known what the rows of the linears that read this input count for the answer."""
        return site in self._sites and self._sites[site].shape.rows > 0

    def input(self, site: str) -> InputStats:
        """The statistics of one input.

        Raises:
            StatisticsError: no such site; a field that is not as it was written, of another shape, or impossible.
            CheckpointError: a field is missing.
        """
        entry = self._sites.get(site)
        if entry is None:
            raise StatisticsError(
                f"{self.directory}: has no statistics of {site!r}; run `glmq calibrate` on this model"
            )
        read = {field: self._tensors.read(f"{site}.{field}") for field in self._checked_fields(site, entry)}
        moment = read.get("second_moment")
        stats = InputStats(
            name=site,
            tokens=entry.tokens,
            minimum=read["minimum"],
            maximum=read["maximum"],
            mean=read["mean"],
            histogram=read["histogram"],
            exponent=read["exponent"],
            square_mean=read["square_mean"],
            second_moment=None if moment is None else unpack_triangle(moment, entry.shape.width),
            sample=read["sample"],
            sensitivity=read.get("sensitivity"),
        )
        if site not in self._sound:  # every read is held to the checksums, so once is enough for what they cannot tell
            defect = find_defect(stats)
            if defect is not None:
                raise self._damaged(site, defect)
            self._sound.add(site)
        return stats

    def text_inputs(self) -> list[tuple[Tensor, Tensor]]:
        """What enters the text layers: of every sample its hidden states, [1, tokens, width], and positions, int64 [3, tokens].

        Raises:
            StatisticsError: it was not kept, or is not as it was written.
        """
        return text_inputs.read(self.directory, self._text_inputs)

    def _checked_fields(self, site: str, entry: Site) -> list[str]:
        """The fields of an input, every one with the dtype and shape that it must have."""
        kept = self._tensors.info(f"{site}.sample").shape
        specs = field_specs(site, entry.shape, kept[0] if kept else 0)
        for spec in specs:
            info = self._tensors.info(spec.name)
            if (info.dtype, info.shape) != (spec.dtype, spec.shape):
                raise self._damaged(
                    site,
                    f"{spec.name.rpartition('.')[2]} is {info.dtype} {list(info.shape)}, "
                    f"{spec.dtype} {list(spec.shape)} is needed",
                )
        return [spec.name.rpartition(".")[2] for spec in specs]

    def _damaged(self, site: str, what: str) -> StatisticsError:
        return StatisticsError(
            f"{self.directory}: the statistics of {site!r} are damaged: {what}; run `glmq calibrate` again"
        )
