"""Verify: is a quantized or compressed checkpoint right? Files first, then both models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

from glmq.calibration.encode import encode_sample
from glmq.calibration.pictures import PictureRules
from glmq.calibration.samples import Sample, list_images, open_image, read_samples
from glmq.checkpoint.checksums import CHECKSUMS
from glmq.checkpoint.reader import Checkpoint
from glmq.engines import Chip, Engine, Place
from glmq.errors import CheckpointError, ModelError, UsageError
from glmq.inspection.folder import Folder, Kind, scan_folder
from glmq.inspection.listing import describe_folder
from glmq.jobs.forecast import forecast_forward
from glmq.jobs.served import small_picture, verify_served
from glmq.jobs.watcher import Watcher
from glmq.model.config import FAMILY, ModelConfig, parse_config
from glmq.model.inputs import DEFAULT_PROMPT, Preprocessor
from glmq.model.side_files import TEMPLATE
from glmq.progress import PassPlan, Watch
from glmq.reporting.documents import Caption, Verification
from glmq.serve.agreement import require_vllm
from glmq.verification.arithmetic import LinearArithmetic
from glmq.verification.behaviour import BlockBehaviour, caption, compare_behaviour
from glmq.verification.cases import Case, count_blocks
from glmq.verification.checks import (
    Limits,
    judge_block,
    judge_predictions,
    open_reference,
    usable_config,
    verify_files,
)
from glmq.verification.engines.check import check_chip
from glmq.verification.engines.schemes import ModuleScheme, module_schemes
from glmq.verification.findings import Check, Checked, Finding, Skipped
from glmq.verification.int8_model import open_model
from glmq.verification.predictions import Predictions
from glmq.verification.situations import situation_of
from glmq.verification.trial import weigh_cases
from glmq.wording import counted

SMALL_BYTES: Final = 256 * 2**20
"""Float checkpoints up to this size are also asked for captions, wholly in memory."""
BEHAVIOUR: Final = "verify"
"""The pass in which both models run."""
CAPTIONS: Final = 3
CAPTION_TOKENS: Final = 64


@dataclass(frozen=True, slots=True)
class CaseOptions:
    """Samples that both models are run on."""

    images: Path | None = None
    """Folder of pictures; at most one of this and `cases`."""
    recursive: bool = False
    """Enter the sub-folders of `images`."""
    cases: Path | None = None
    """JSON lines of cases with image, prompt and text (answer)."""
    prompt: str = DEFAULT_PROMPT
    """What is asked about each picture."""
    limit: int | None = None
    """Use only the first pictures or lines, this many."""
    max_pixels: int | None = None
    """Shrink larger pictures to this many pixels."""


def verify(
    candidate: str | Path,
    *,
    reference: str | Path | None = None,
    engines: Sequence[Engine] = (),
    chip: Chip | None = None,
    limits: Limits = Limits(),
    cases: CaseOptions = CaseOptions(),
    in_vllm: bool = False,
    watch: Watch | None = None,
) -> Verification:
    """Check a quantized or compressed checkpoint: its files and integers, and with samples its behaviour.

    >>> import glmq
    >>> report = glmq.verify("w8a8s", reference="GLM-4.1V")
    >>> assert report.passed, report.findings

    Args:
        candidate: folder of the checkpoint, whoever wrote it.
        reference: folder of the float weights that it was made from; of a compressed one, of its W8A8S weights.
        engines: whose look-ups to emulate too.
        chip: where these will run; None: on any that they know.
        limits: what behaviour is still right.
        cases: the samples to run both models on; none by default.
        in_vllm: also let both answer the samples' prompts in vLLM.
        watch: is called with the events of the run.

    Returns:
        What is wrong, what was measured and what was not checked. Problems are findings, not exceptions.

    Raises:
        UsageError: samples without a float reference to compare with, or vLLM without samples.
        EngineError: vLLM is not installed.
        InputError: nothing to verify in `candidate`, or an unusable reference or sample.
    """
    candidate = Path(candidate)
    reference = None if reference is None else Path(reference)
    samples = load_cases(cases)
    folder = scan_folder(candidate)
    _check_samples(folder, reference, samples, in_vllm=in_vllm)
    files = _verify_files(candidate, reference, engines)
    findings, checked = files.findings, files.checked
    checked += [f"the look-ups of {engine.spec.title}, as its loader makes them" for engine in engines]
    findings += _check_chip(folder, engines, chip)
    behaviour = _Behaviour()
    if samples and reference is not None:
        checked.append(f"behaviour on {counted(len(samples), 'sample')}")
        behaviour = _measure(reference, candidate, samples, cases.max_pixels, Watcher(watch))
        is_fp16 = folder.float_codes[:1] == ("F16",)
        findings += behaviour.findings
        findings += [] if behaviour.predictions is None else judge_predictions(behaviour.predictions, limits)
        findings += [found for block in behaviour.blocks for found in judge_block(block, limits, is_fp16=is_fp16)]
    captions = list(behaviour.captions)
    if in_vllm and reference is not None:
        served = verify_served(reference, candidate, samples, limits)
        findings += served.findings
        checked += [record.what for record in served.checked]
        captions += served.captions
    return Verification(
        candidate=candidate,
        reference=reference,
        what=describe_folder(folder),
        checked=checked,
        skipped=files.skipped,
        findings=findings,
        linears=files.linears,
        blocks=behaviour.blocks,
        predictions=behaviour.predictions,
        captions=captions,
        limits=limits,
        situation=situation_of(
            has_checksums=(candidate / CHECKSUMS).exists(),
            has_reference=reference is not None,
            has_samples=bool(samples),
        )
        if files.linears
        else None,
        schemes=_schemes(folder, engines),
    )


def _check_samples(folder: Folder, reference: Path | None, samples: Sequence[Sample], *, in_vllm: bool) -> None:
    """Raise UsageError for samples with nothing to run on, or an engine with nothing to answer."""
    if samples and (reference is None or folder.kind is not Kind.QUANTIZED):
        raise UsageError(
            "behaviour needs an un-compressed quantized checkpoint and its float source as --reference; "
            "leave --calib-images and --cases out to verify the files alone"
        )
    if in_vllm:
        require_vllm()
        if not samples:
            raise UsageError("--engine vllm needs prompts to answer; give --reference and --calib-images or --cases")


def _check_chip(folder: Folder, engines: Sequence[Engine], chip: Chip | None) -> list[Finding]:
    return [found for engine in engines for found in check_chip(folder, Place(engine, chip))]


def _schemes(folder: Folder, engines: Sequence[Engine]) -> dict[Engine, list[ModuleScheme]]:
    """What each engine will build; nothing where config.json is unusable, which the findings say."""
    try:
        config = parse_config(folder.config, "config.json")
    except ModelError:
        return {}
    return {engine: found for engine in engines if (found := module_schemes(folder, config, engine))}


@dataclass(frozen=True, slots=True)
class _Files:
    """What the files alone show."""

    findings: list[Finding] = field(default_factory=list)
    linears: list[LinearArithmetic] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def _verify_files(candidate: Path, reference: Path | None, engines: Sequence[Engine]) -> _Files:
    files = _Files()
    for record in verify_files(candidate, reference, engines):
        match record:
            case Finding():
                files.findings.append(record)
            case LinearArithmetic():
                files.linears.append(record)
            case Checked():
                files.checked.append(record.what)
            case Skipped():
                files.skipped.append(record.what)
    return files


@dataclass(frozen=True, slots=True)
class _Behaviour:
    """How both models answer."""

    blocks: Sequence[BlockBehaviour] = ()
    predictions: Predictions | None = None
    captions: Sequence[Caption] = ()
    findings: Sequence[Finding] = ()
    """Why it could not be measured, if it could not."""


def _measure(
    reference: Path, candidate: Path, samples: Sequence[Sample], max_pixels: int | None, watcher: Watcher
) -> _Behaviour:
    """Run both models on the samples, block by block; small ones also answer the first pictures."""
    with open_reference(reference) as source:
        try:
            blocks, predictions = _behave(source, candidate, samples, max_pixels, watcher)
            return _Behaviour(blocks, predictions, _captions(source, candidate, samples, max_pixels))
        except CheckpointError as error:
            return _Behaviour(findings=[Check.BEHAVIOUR.error("", f"cannot be measured: {error}")])


def load_cases(options: CaseOptions) -> tuple[Sample, ...]:
    """The samples that the options name; none if they name none."""
    if options.images is not None and options.cases is not None:
        raise UsageError("--calib-images and --cases: give one of them")
    rules = PictureRules(FAMILY, shrinks=options.max_pixels is not None)
    if options.images is not None:
        return list_images(
            options.images,
            options.prompt,
            skip_bad=False,
            limit=options.limit,
            recursive=options.recursive,
            rules=rules,
        ).samples
    return () if options.cases is None else read_samples(options.cases, limit=options.limit, rules=rules).samples


def _behave(
    source: Checkpoint, candidate: Path, samples: Sequence[Sample], max_pixels: int | None, watcher: Watcher
) -> tuple[list[BlockBehaviour], Predictions | None]:
    config = usable_config(candidate, source)
    if config is None:
        raise CheckpointError(f"{source.directory}: has no config.json of a GLM-4.1V or GLM-4.6V-Flash; restore it")
    preprocessor = _preprocessor(source, candidate, config, max_pixels)
    cases = [Case(s.name, s.image is not None, partial(encode_sample, preprocessor, s)) for s in samples]
    blocks: list[BlockBehaviour] = []
    predictions = None
    has_images = any(case.has_image for case in cases)
    with Checkpoint.open(candidate) as other:
        if watcher.is_watched:
            watcher.plan([_forecast(source, other, config, cases)])
        with watcher.blocks(BEHAVIOUR, count_blocks(config, has_images)) as advance:
            for record in compare_behaviour(source, other, config, cases, watcher.step):
                if isinstance(record, Predictions):
                    predictions = record
                else:
                    blocks.append(record)
                    advance(record.done)
    return blocks, predictions


def _forecast(source: Checkpoint, candidate: Checkpoint, config: ModelConfig, cases: Sequence[Case]) -> PassPlan:
    """Both models over the cases; the candidate's linears run twice, on their own inputs and on the float model's."""
    load = weigh_cases(cases)
    pairs = zip(*(forecast_forward(open_model(one, config), load) for one in (source, candidate)), strict=True)
    return PassPlan(BEHAVIOUR, tuple(replace(one, seconds=one.seconds + 2 * other.seconds) for one, other in pairs))


def _captions(source: Checkpoint, candidate: Path, samples: Sequence[Sample], max_pixels: int | None) -> list[Caption]:
    """What both say about the first few pictures; nothing for a large model."""
    config = usable_config(candidate, source)
    pictures = [sample for sample in samples if sample.image is not None][:CAPTIONS]
    if config is None or sum(info.nbytes for info in source.values()) > SMALL_BYTES:
        return []
    preprocessor = _preprocessor(source, candidate, config, max_pixels)
    questions = [preprocessor.encode(open_image(sample), sample.prompt, None) for sample in pictures]
    with Checkpoint.open(candidate) as other:
        of_float, of_candidate = (
            [preprocessor.decode(ids) for ids in caption(checkpoint, config, questions, CAPTION_TOKENS)]
            for checkpoint in (source, other)
        )
    return [
        Caption(sample.name, first, second, small_picture(sample))
        for sample, first, second in zip(pictures, of_float, of_candidate, strict=True)
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
