"""Verify: is a quantized or compressed checkpoint right? Files first, then both models side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from glmq.calibration.lines import OptionNames
from glmq.calibration.pictures import PictureRules
from glmq.calibration.samples import Sample, list_images, read_samples
from glmq.checkpoint.checksums import CHECKSUMS
from glmq.engines import Chip, Engine, Place
from glmq.errors import CheckpointError, ModelError, UsageError
from glmq.inspection.folder import Folder, Kind, scan_folder
from glmq.inspection.listing import describe_folder
from glmq.jobs.served import verify_served
from glmq.jobs.side_by_side import Behaviour, forecast_both, opened_models, run_both
from glmq.jobs.watcher import Watcher
from glmq.model.config import FAMILY, parse_config
from glmq.model.inputs import DEFAULT_PROMPT
from glmq.progress import PassPlan, StepPlan, Watch, resident_bytes
from glmq.reporting.documents import Verification
from glmq.serve.agreement import require_vllm
from glmq.values import LEAST_PIXELS, check_least, member, take_paths, to_path
from glmq.verification.arithmetic import LinearArithmetic
from glmq.verification.checks import (
    judge_block,
    judge_predictions,
    open_reference,
    verify_files,
)
from glmq.verification.engines.check import check_chip
from glmq.verification.engines.schemes import ModuleScheme, module_schemes
from glmq.verification.findings import Check, Checked, Finding, Skipped
from glmq.verification.limits import Limits
from glmq.verification.situations import situation_of
from glmq.wording import counted

CASE_NAMES: Final = OptionNames("--cases", skip_bad=None)
FILES: Final = "files"
"""The pass over the files."""
COMPARED_RATE: Final = 1e8
ALONE_RATE: Final = 3e8
"""Bytes a second that are checked, against the float weights and without them, on a small machine."""


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

    def __post_init__(self) -> None:
        take_paths(self, "images", "cases")
        check_least("--limit", self.limit, 1)
        check_least("--max-pixels", self.max_pixels, LEAST_PIXELS)


def only_of_pictures(options: CaseOptions) -> dict[str, bool]:
    """Whether options are given that say something of a folder of pictures and of no other samples."""
    return {"--prompt": options.prompt != DEFAULT_PROMPT, "--recursive": options.recursive}


def refuse_unused(given: Mapping[str, bool], needed: str) -> None:
    """Raise UsageError for the first option that is given, as nothing that it would change is there without `needed`."""
    for option in (option for option, is_given in given.items() if is_given):
        raise UsageError(f"{option} has no effect without {needed}; drop it")


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
    engines = [member("engines", engine, Engine) for engine in engines]
    chip = None if chip is None else member("chip", chip, Chip)
    candidate = to_path(candidate)
    reference = None if reference is None else to_path(reference)
    watcher = Watcher(watch)
    samples = load_cases(cases, watcher)
    folder = scan_folder(candidate)
    _check_samples(folder, reference, samples, in_vllm=in_vllm)
    if watcher.is_watched:
        watcher.plan(_forecast(folder, reference, samples, cases.max_pixels))
    files = _verify_files(folder, reference, engines, watcher)
    findings, checked = files.findings, files.checked
    checked += [f"the look-ups of {engine.spec.title}, as its loader makes them" for engine in engines]
    findings += _check_chip(folder, engines, chip)
    behaviour = Behaviour()
    if samples and reference is not None:
        checked.append(f"behaviour on {counted(len(samples), 'sample')}")
        behaviour = _measure(reference, candidate, samples, cases.max_pixels, watcher)
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


def _verify_files(folder: Folder, reference: Path | None, engines: Sequence[Engine], watcher: Watcher) -> _Files:
    files = _Files()
    total = _bytes_to_read(folder)
    with watcher.bytes(FILES, total) if total else nullcontext(lambda *_: None) as advance:
        for record in verify_files(
            folder.directory, reference, engines, read=lambda name, nbytes: advance(name, nbytes, resident_bytes())
        ):
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


def _bytes_to_read(folder: Folder) -> int:
    """Of an un-sharded checkpoint: every tensor, and weights of linears again for their sums; 0 of other folders."""
    if folder.kind is not Kind.QUANTIZED:
        return 0
    weights = (tensor for tensor in folder.tensors if tensor.name.endswith((".weight", ".weight_packed")))
    return folder.nbytes + sum(tensor.info.nbytes for tensor in weights if tensor.info.dtype in ("I8", "I32"))


def load_cases(options: CaseOptions, watcher: Watcher) -> tuple[Sample, ...]:
    """The samples that the options name; none if they name none. What the user should know of them is noted."""
    if options.images is not None and options.cases is not None:
        raise UsageError("--calib-images and --cases: give one of them")
    rules = PictureRules(FAMILY, shrinks=options.max_pixels is not None)
    if options.images is not None:
        found = list_images(
            options.images,
            options.prompt,
            skip_bad=False,
            limit=options.limit,
            recursive=options.recursive,
            rules=rules,
            names=CASE_NAMES,
        )
    elif options.cases is None:
        sizes = {"--limit": options.limit is not None, "--max-pixels": options.max_pixels is not None}
        refuse_unused({**sizes, **only_of_pictures(options)}, "--calib-images or --cases")
        return ()
    else:
        refuse_unused(only_of_pictures(options), "--calib-images")
        found = read_samples(options.cases, limit=options.limit, rules=rules, names=CASE_NAMES)
    for sentence in found.notes:
        watcher.note(f"note: {sentence}")
    return found.samples


def _measure(
    reference: Path, candidate: Path, samples: Sequence[Sample], max_pixels: int | None, watcher: Watcher
) -> Behaviour:
    """Run both models on the samples, block by block; small ones also answer the first pictures."""
    with open_reference(reference) as source:
        try:
            with opened_models(source, candidate, max_pixels) as models:
                return run_both(models, samples, watcher)
        except CheckpointError as error:
            return Behaviour(findings=[Check.BEHAVIOUR.error("", f"cannot be measured: {error}")])


def _forecast(
    folder: Folder, reference: Path | None, samples: Sequence[Sample], max_pixels: int | None
) -> list[PassPlan]:
    """The passes: over the files, and with samples over both models; not if these cannot be run, which is found later."""
    seconds = _bytes_to_read(folder) / (ALONE_RATE if reference is None else COMPARED_RATE)
    passes = [PassPlan(FILES, (StepPlan("", "other", seconds),))] if seconds else []
    if samples and reference is not None:
        with (
            suppress(CheckpointError),
            open_reference(reference) as source,
            opened_models(source, folder.directory, max_pixels) as models,
        ):
            passes += forecast_both(models, samples)
    return passes
