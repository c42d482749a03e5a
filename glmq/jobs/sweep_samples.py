"""What a sweep measures KL on: samples that are found again, and the float model's run over them, once for all recipes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import torch
import xxhash
from safetensors.torch import load

from glmq.calibration.dry_run import plan_calibration
from glmq.calibration.encode import encode_sample
from glmq.calibration.samples import (
    GeneratedAnswer,
    Sample,
    builtin_texts,
    default_images,
    list_images,
)
from glmq.calibration.stats import Settings, Statistics
from glmq.checkpoint.disk import read_input
from glmq.checkpoint.journal import Journal
from glmq.checkpoint.reader import Checkpoint
from glmq.checkpoint.writer import write_tensors
from glmq.errors import CheckpointError, NonFiniteError, UsageError
from glmq.jobs.forecast import forecast_forward
from glmq.jobs.verify import CaseOptions, load_cases, only_of_pictures, refuse_unused
from glmq.jobs.watcher import Watcher
from glmq.model.config import ModelConfig
from glmq.model.inputs import DEFAULT_PROMPT, Preprocessor
from glmq.progress import StepPlan
from glmq.reporting.sweeps import Divergence
from glmq.verification.cases import Case, count_blocks
from glmq.verification.int8_model import open_model
from glmq.verification.last_states import LastStates, compare_states, run_forward
from glmq.verification.trial import weigh_cases
from glmq.wording import counted

STATES: Final = "float.safetensors"
"""In the work folder: the last states of the float model."""
FLOAT: Final = "float model"
"""The block of the journal, and the pass, that makes them."""
MOST_BYTES: Final = 2**34
"""Of that file."""


def find_samples(options: CaseOptions, statistics: Statistics, watcher: Watcher) -> tuple[Sample, ...]:
    """The samples that the options name, or those of the statistics that can be found again.

    Statistics keep checksums of their samples, not the samples: what came with glmq is found by these.

    Raises:
        UsageError: none can be found, or an option has no effect on them.
        SampleError: a sample that the options name cannot be used.
    """
    if options.images is not None or options.cases is not None:
        return load_cases(options, watcher)
    refuse_unused(only_of_pictures(options), "--calib-images")
    known = _described(statistics)
    pictures = list_images(default_images(), DEFAULT_PROMPT, skip_bad=True, limit=None).samples
    found = [sample for sample in pictures if sample.digest in known][: options.limit]
    found += [sample for sample in builtin_texts() if sample.digest in known]
    if not found:
        raise UsageError(
            f"KL: none of the {len(known)} samples that the statistics in {statistics.directory} were taken from came with "
            "glmq; name pictures with --calib-images or samples with --cases, or leave KL out with --no-kl"
        )
    return tuple(replace(sample, generated=_generated(known[sample.digest])) for sample in found)


def describe_samples(samples: Sequence[Sample]) -> str:
    """How many pictures and how many texts, of which `--limit` counts the built-in ones not: `8 pictures and 14 texts`."""
    texts = sum(sample.image is None for sample in samples)
    counts = {"picture": len(samples) - texts, "text": texts}
    return " and ".join(counted(count, noun) for noun, count in counts.items() if count)


def _described(statistics: Statistics) -> dict[str, Mapping[str, object]]:
    """What the statistics say of each of their samples, by its checksum."""
    entries = statistics.manifest.get("samples")
    assert isinstance(entries, list), "looked at when the folder was opened"
    return {str(entry.get("sha256")): entry for entry in entries if isinstance(entry, Mapping)}


def _generated(entry: Mapping[str, object]) -> GeneratedAnswer | None:
    """The float model's own answer, if calibration had it write one."""
    made = entry.get("generated")
    if not isinstance(made, Mapping) or not isinstance(made["ids"], list):
        return None
    return GeneratedAnswer(tuple(int(token) for token in made["ids"]), str(made["text"]))


@dataclass(frozen=True, slots=True)
class Ruler:
    """Measures checkpoints against the float model over the same samples."""

    source: Checkpoint
    """The float checkpoint."""
    config: ModelConfig
    samples: tuple[Sample, ...]
    preprocessor: Preprocessor
    max_pixels: int | None

    @property
    def cases(self) -> list[Case]:
        """The samples as the models are given them."""
        return [
            Case(one.name, one.image is not None, partial(encode_sample, self.preprocessor, one))
            for one in self.samples
        ]

    @property
    def blocks(self) -> int:
        """Of one run of a model."""
        return count_blocks(self.config, any(sample.image is not None for sample in self.samples))

    def run_float(self, work: Path, journal: Journal, watcher: Watcher) -> LastStates:
        """The last states of the float model: those that an interrupted run has left in `work`, or fresh ones, left there."""
        path = work / STATES
        stored = _read_states(path, journal)
        if stored is not None:
            return stored
        states = self._run(self.source, FLOAT, watcher)
        digest = write_tensors(path, {"hidden": states.hidden, "targets": states.targets})
        journal.record(FLOAT, {"states": digest, "counts": list(states.counts)})
        return states

    def measure(self, folder: Path, reference: LastStates, title: str, watcher: Watcher) -> Divergence:
        """Run the checkpoint in `folder`, as a pass of that title.

        Raises:
            CheckpointError: a tensor that is not finite, or contradicts others.
            NonFiniteError: what it predicts is not finite.
        """
        with Checkpoint.open(folder) as candidate:
            states = self._run(candidate, title, watcher)
            found = compare_states((self.source, reference), (candidate, states), self.config, self.cases)
        if not math.isfinite(found.kl):
            raise NonFiniteError(
                "its predictions hold NaN or infinity; give it more bits, or leave KL out with --no-kl"
            )
        return Divergence(found.positions, found.kl, found.kl_error, found.top1)

    def forecast(self) -> tuple[tuple[StepPlan, ...], int]:
        """The blocks of one run with the seconds that each is expected to take, and the memory that it needs, in bytes.

        Of a large model one sample goes through one block of each tower; calibrating needs as much memory.
        """
        settings = Settings("float32", self.max_pixels, wide_moments=False)
        plan = plan_calibration(
            self.config, self.source, self.samples, self.preprocessor, settings, element_bytes=torch.float32.itemsize
        )
        return forecast_forward(open_model(self.source, self.config), weigh_cases(self.cases)), plan.peak_bytes

    def _run(self, checkpoint: Checkpoint, title: str, watcher: Watcher) -> LastStates:
        states: LastStates | None = None
        with watcher.blocks(title, self.blocks) as advance:
            for record in run_forward(checkpoint, self.config, self.cases, watcher.step):
                if isinstance(record, LastStates):
                    states = record
                else:
                    advance(record)
        assert states is not None
        return states


def open_ruler(
    source: Checkpoint, config: ModelConfig, samples: Sequence[Sample], max_pixels: int | None, template: Path | None
) -> Ruler:
    """The ruler of a float checkpoint; pictures are shrunk to `max_pixels`, the chat template is the folder's unless given."""
    preprocessor = Preprocessor(
        source.directory, config, max_pixels=max_pixels, trust_remote_code=False, chat_template=template
    )
    return Ruler(source, config, tuple(samples), preprocessor, max_pixels)


def _read_states(path: Path, journal: Journal) -> LastStates | None:
    """What the journal says is in that file; None where it says nothing, or the file is not as it was."""
    line = journal.finished.get(FLOAT)
    if line is None:
        return None
    counts = line["counts"]
    assert isinstance(counts, list)
    try:
        content = read_input(path, MOST_BYTES)
    except CheckpointError:
        content = b""
    if xxhash.xxh3_128_hexdigest(content) != line["states"]:
        journal.drop([FLOAT])
        return None
    tensors = load(content)
    return LastStates(tensors["hidden"], tensors["targets"], tuple(int(str(count)) for count in counts))
