"""Verify with samples: the float model and the candidate run over them side by side, and small ones say what they see."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from glmq.calibration.encode import encode_sample
from glmq.calibration.samples import Sample, open_image
from glmq.checkpoint.linears import integer_linears
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import CheckpointError
from glmq.jobs.forecast import forecast_forward, forecast_token
from glmq.jobs.served import small_picture
from glmq.jobs.watcher import Watcher
from glmq.model.config import ModelConfig
from glmq.model.inputs import Preprocessor
from glmq.model.side_files import TEMPLATE
from glmq.progress import PassPlan, StepPlan, resident_bytes
from glmq.records import BlockDone
from glmq.reporting.documents import Caption
from glmq.verification.behaviour import BlockBehaviour, caption, compare_behaviour
from glmq.verification.cases import Case, count_blocks
from glmq.verification.checks import usable_config
from glmq.verification.findings import Finding
from glmq.verification.int8_model import open_model
from glmq.verification.predictions import Predictions
from glmq.verification.trial import weigh_cases

SMALL_BYTES: Final = 256 * 2**20
"""Float checkpoints up to this size are also asked for captions, wholly in memory."""
CAPTIONS: Final = 3
CAPTION_TOKENS: Final = 64
BEHAVIOUR: Final = "verify"
SPEAKING: Final = "captions"
"""The passes in which both models run."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How both models answer."""

    blocks: Sequence[BlockBehaviour] = ()
    predictions: Predictions | None = None
    captions: Sequence[Caption] = ()
    findings: Sequence[Finding] = ()
    """Why it could not be measured, if it could not."""


@dataclass(frozen=True, slots=True)
class Models:
    """The two checkpoints that are run, float and candidate."""

    source: Checkpoint
    candidate: Checkpoint
    config: ModelConfig
    preprocessor: Preprocessor

    @property
    def pair(self) -> tuple[Checkpoint, Checkpoint]:
        return self.source, self.candidate

    def cases(self, samples: Sequence[Sample]) -> list[Case]:
        """The samples as both are given them."""
        return [Case(s.name, s.image is not None, partial(encode_sample, self.preprocessor, s)) for s in samples]

    def pictures(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples that small models also caption; none for a large one."""
        if sum(self.source.nbytes(name) for name in self.source) > SMALL_BYTES:
            return []
        return [sample for sample in samples if sample.image is not None][:CAPTIONS]


@contextmanager
def opened_models(source: Checkpoint, candidate: Path, max_pixels: int | None) -> Iterator[Models]:
    """Raises CheckpointError for a candidate that cannot be run."""
    config = usable_config(candidate, source)
    if config is None:
        raise CheckpointError(f"{source.directory}: has no config.json of a GLM-4.1V or GLM-4.6V-Flash; restore it")
    with Checkpoint.open(candidate) as other:
        yield Models(source, other, config, _preprocessor(source, candidate, config, max_pixels))


def run_both(models: Models, samples: Sequence[Sample], watcher: Watcher) -> Behaviour:
    config, cases, pictures = models.config, models.cases(samples), models.pictures(samples)
    blocks: list[BlockBehaviour] = []
    predictions = None
    has_images = any(case.has_image for case in cases)
    with watcher.blocks(BEHAVIOUR, count_blocks(config, has_images)) as advance:
        for record in compare_behaviour(*models.pair, config, cases, watcher.step):
            if isinstance(record, Predictions):
                predictions = record
            else:
                blocks.append(record)
                advance(record.done)
    return Behaviour(blocks, predictions, _captions(models, pictures, watcher) if pictures else ())


def forecast_both(models: Models, samples: Sequence[Sample]) -> list[PassPlan]:
    """Both models over the samples, and what both say about some pictures."""
    cases, pictures = models.cases(samples), len(models.pictures(samples))
    load, opened = weigh_cases(cases), [open_model(one, models.config) for one in models.pair]
    forecasts = [forecast_forward(model, load) for model in opened]
    blocks = models.config.family.blocks(models.config)
    integers = set(integer_linears(models.candidate))
    quantized = {
        block.name for block in blocks for group in block.groups for one in group.linears if one.name in integers
    }
    encoding = load.encoding_seconds
    both = []
    for one, other in zip(*forecasts, strict=True):
        # Quantized linears run twice: on the candidate's own inputs, and on the float model's.
        times = 2 if other.name in quantized else 1
        both.append(replace(one, seconds=one.seconds + times * (other.seconds - encoding)))
        encoding = 0.0  # once, in the first block
    passes = [PassPlan(BEHAVIOUR, tuple(both))]
    if pictures:
        reading = [sum(step.seconds for step in of_one) / len(cases) for of_one in forecasts]
        seconds = [CAPTION_TOKENS * forecast_token(model) + read for model, read in zip(opened, reading, strict=True)]
        steps = [
            StepPlan("", kind, one)
            for kind, one in zip(("float", "candidate"), seconds, strict=True)
            for _ in range(pictures)
        ]
        passes.append(PassPlan(SPEAKING, tuple(steps)))
    return passes


def _captions(models: Models, pictures: Sequence[Sample], watcher: Watcher) -> list[Caption]:
    """What both say about the pictures."""
    preprocessor, total = models.preprocessor, 2 * len(pictures)
    questions = [preprocessor.encode(open_image(sample), sample.prompt, None) for sample in pictures]
    said: list[str] = []
    with watcher.blocks(SPEAKING, total, "answers") as advance:
        started = time.perf_counter()
        for checkpoint in models.pair:
            for sample, ids in zip(
                pictures, caption(checkpoint, models.config, questions, CAPTION_TOKENS), strict=True
            ):
                now = time.perf_counter()
                advance(BlockDone(sample.name, len(said), total, now - started, resident_bytes()))
                said.append(preprocessor.decode(ids))
                started = now
    return [
        Caption(sample.name, first, second, small_picture(sample))
        for sample, first, second in zip(pictures, said, said[len(pictures) :], strict=False)
    ]


def _preprocessor(source: Checkpoint, candidate: Path, config: ModelConfig, max_pixels: int | None) -> Preprocessor:
    """With the reference's files, and the candidate's chat template: a base model may have none of its own."""
    template = candidate / TEMPLATE
    return Preprocessor(
        source.directory,
        config,
        max_pixels=max_pixels,
        trust_remote_code=False,
        chat_template=template if template.is_file() else None,
    )
