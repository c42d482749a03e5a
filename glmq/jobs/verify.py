"""Verify as the command runs it: files first, then both models side by side under a progress bar."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from glmq.calibration.samples import Sample, list_images, open_image, read_samples
from glmq.checkpoint.checksums import CHECKSUMS
from glmq.checkpoint.reader import Checkpoint
from glmq.cli.render import BlockProgress
from glmq.compression.manifest import MANIFEST
from glmq.errors import CheckpointError, SampleError, UsageError
from glmq.inspection.folder import Kind, scan_folder
from glmq.inspection.listing import describe_folder
from glmq.model.inputs import ModelInputs, Preprocessor
from glmq.reporting.documents import Caption, Verification
from glmq.verification.arithmetic import LinearArithmetic
from glmq.verification.behaviour import BlockBehaviour, Case, caption, compare_behaviour
from glmq.verification.checks import (
    Limits,
    judge_block,
    judge_predictions,
    usable_config,
    verify_files,
)
from glmq.verification.engines.check import Target
from glmq.verification.findings import Check, Finding
from glmq.verification.predictions import Predictions

SMALL_BYTES: Final = 256 * 2**20
"""Float checkpoints up to this size are also asked for captions, wholly in memory."""
CAPTIONS: Final = 3
CAPTION_TOKENS: Final = 64


def verify_folder(
    candidate: Path,
    reference: Path | None,
    targets: Sequence[Target],
    limits: Limits,
    samples: Sequence[Sample],
    *,
    max_pixels: int | None,
    quiet: bool,
) -> Verification:
    """Run `glmq verify`.

    Raises:
        UsageError: samples without a float reference to compare with.
        CheckpointError: nothing to verify in `candidate`, or an unusable reference.
    """
    folder = scan_folder(candidate)
    if samples and (reference is None or folder.kind is not Kind.QUANTIZED):
        raise UsageError(
            "behaviour needs an un-compressed quantized checkpoint and its float source as --reference; "
            "leave --calib-images and --cases out to verify the files alone"
        )
    findings: list[Finding] = []
    linears: list[LinearArithmetic] = []
    for record in verify_files(candidate, reference, targets):
        if isinstance(record, Finding):
            findings.append(record)
        else:
            linears.append(record)
    blocks: list[BlockBehaviour] = []
    predictions, captions = None, []
    if samples and reference is not None:
        with Checkpoint.open(reference) as source:
            try:
                blocks, predictions = _behave(source, candidate, samples, max_pixels=max_pixels, quiet=quiet)
                captions = _captions(source, candidate, samples, max_pixels=max_pixels)
            except CheckpointError as error:
                message = f"cannot be measured: {error}"
                findings.append(Check.BEHAVIOUR.error("", message))
        is_fp16 = folder.float_codes[:1] == ("F16",)
        findings += [] if predictions is None else judge_predictions(predictions, limits)
        findings += [found for block in blocks for found in judge_block(block, limits, is_fp16=is_fp16)]
    return Verification(
        candidate=candidate,
        reference=reference,
        what=describe_folder(folder),
        has_checksums=any((candidate / name).is_file() for name in (CHECKSUMS, MANIFEST)),
        findings=findings,
        linears=linears,
        blocks=blocks,
        predictions=predictions,
        captions=captions,
        limits=limits,
    )


def load_samples(images: Path | None, cases: Path | None, prompt: str, limit: int | None) -> tuple[Sample, ...]:
    """The samples that the options name; none if they name none."""
    if images is not None and cases is not None:
        raise UsageError("--calib-images and --cases: give one of them")
    if images is not None:
        return list_images(images, prompt, skip_bad=False, limit=limit).samples
    return () if cases is None else read_samples(cases, limit=limit).samples


def _behave(
    source: Checkpoint, candidate: Path, samples: Sequence[Sample], *, max_pixels: int | None, quiet: bool
) -> tuple[list[BlockBehaviour], Predictions | None]:
    config = usable_config(candidate, source)
    if config is None:
        raise CheckpointError(f"{source.directory}: has no config.json of a GLM-4.1V; restore it")
    preprocessor = Preprocessor(source.directory, config, max_pixels=max_pixels, trust_remote_code=False)
    cases = [Case(s.name, s.image is not None, partial(_encode, preprocessor, s)) for s in samples]
    blocks: list[BlockBehaviour] = []
    predictions = None
    with Checkpoint.open(candidate) as other, BlockProgress("verify", quiet=quiet) as progress:
        for record in compare_behaviour(source, other, config, cases):
            if isinstance(record, Predictions):
                predictions = record
            else:
                blocks.append(record)
                progress.advance(record.done)
    return blocks, predictions


def _captions(
    source: Checkpoint, candidate: Path, samples: Sequence[Sample], *, max_pixels: int | None
) -> list[Caption]:
    """What both say about the first few pictures; nothing for a large model."""
    config = usable_config(candidate, source)
    pictures = [sample for sample in samples if sample.image is not None][:CAPTIONS]
    if config is None or sum(info.nbytes for info in source.values()) > SMALL_BYTES:
        return []
    preprocessor = Preprocessor(source.directory, config, max_pixels=max_pixels, trust_remote_code=False)
    questions = [preprocessor.encode(open_image(sample), sample.prompt, None) for sample in pictures]
    with Checkpoint.open(candidate) as other:
        said = [
            [preprocessor.decode(ids) for ids in caption(checkpoint, config, questions, CAPTION_TOKENS)]
            for checkpoint in (source, other)
        ]
    return [Caption(sample.name, *texts) for sample, *texts in zip(pictures, *said, strict=True)]


def _encode(preprocessor: Preprocessor, sample: Sample) -> ModelInputs:
    try:
        return preprocessor.encode(open_image(sample), sample.prompt, sample.answer)
    except SampleError as error:
        raise SampleError(f"{sample.name}: {error}") from error
