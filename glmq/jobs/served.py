"""Verify in a real engine: both checkpoints answer the samples' prompts in vLLM, and their answers are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

from glmq.calibration.pictures import thumbnail
from glmq.calibration.samples import Sample, open_image
from glmq.errors import UsageError
from glmq.model.config import read_config
from glmq.model.inputs import Preprocessor
from glmq.reporting.documents import Caption
from glmq.serve.agreement import Agreement, Question, RefusalError, compare_answers, require_vllm
from glmq.verification.findings import Check, Checked, Finding
from glmq.verification.limits import Limits


@dataclass(frozen=True, slots=True)
class Served:
    """What the engine showed."""

    findings: Sequence[Finding]
    checked: Sequence[Checked] = ()
    captions: Sequence[Caption] = ()


def verify_served(reference: Path, candidate: Path, samples: Sequence[Sample], limits: Limits) -> Served:
    """Ask both checkpoints in vLLM.

    Args:
        reference: folder of the float model.
        candidate: folder of the quantized one.
        samples: those with a prompt are asked; their own answers are not used.
        limits: `min_top1` and `max_kl` hold for the tokens of the float model's answers.

    Raises:
        EngineError: no vLLM.
        UsageError: no sample has a prompt.
        ModelError, SampleError: a reference or image that is unusable.
    """
    require_vllm()
    questions = ask_questions(reference, samples)
    if not questions:
        raise UsageError("--engine vllm: none of the samples has a prompt; give pictures or cases with one")
    try:
        agreement = compare_answers(reference, candidate, questions)
    except RefusalError as error:
        return Served([Check.SERVED.error("", str(error))])
    served = judge(agreement, limits)
    pictures = {f"{sample.name} ({agreement.engine})": sample for sample in samples}
    captions = [replace(caption, picture=small_picture(pictures[caption.name])) for caption in served.captions]
    return replace(served, captions=captions)


def small_picture(sample: Sample) -> bytes | None:
    """The sample's picture for a page; None without one."""
    image = open_image(sample)
    return None if image is None else thumbnail(image)


def ask_questions(reference: Path, samples: Sequence[Sample]) -> list[Question]:
    """The samples' prompts as vLLM takes them: tokens, the image placeholder once, and the image file."""
    config = read_config(reference)
    preprocessor = Preprocessor(reference, config, max_pixels=None, trust_remote_code=False)
    questions = []
    for sample in samples:
        if sample.prompt is not None:
            ids = preprocessor.encode(open_image(sample), sample.prompt, None).ids[0].tolist()
            once = [
                token for known, run in groupby(ids) for token in ([known] if known == config.image_token_id else run)
            ]
            questions.append(Question(sample.name, tuple(once), len(ids), partial(open_image, sample)))
    return questions


def judge(agreement: Agreement, limits: Limits) -> Served:
    """What is wrong with the answers, and what was compared."""
    findings = []
    severity = limits.below(round(agreement.top1 * agreement.tokens), agreement.tokens)
    if severity is not None:
        message = (
            f"in {agreement.engine} {agreement.top1:.1%} of the float model's {agreement.tokens} tokens are the "
            f"likeliest, wanted at least {limits.min_top1:.1%}"
        )
        if severity == "warning":
            message += "; so few may be chance: give more pictures"
        findings.append(Finding(Check.SERVED, severity, "", message))
    if agreement.drop > limits.max_kl:
        findings.append(
            Check.SERVED.error(
                "",
                f"in {agreement.engine} the float model's tokens are {agreement.drop:.3g} nats less likely on average, "
                f"wanted at most {limits.max_kl:g}",
            )
        )
    whole = sum(answer.reference == answer.candidate for answer in agreement.answers)
    checked = Checked(
        f"{len(agreement.answers)} answers in {agreement.engine}: {whole} word for word, {agreement.top1:.1%} of "
        f"{agreement.tokens} tokens the likeliest, {agreement.drop:.2g} nats less likely on average"
    )
    captions = [Caption(f"{a.name} ({agreement.engine})", a.reference, a.candidate) for a in agreement.answers]
    return Served(findings, [checked], captions)
