"""Is a checkpoint right? Structure, the engines' look-ups, arithmetic and behaviour, each as findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from glmq.checkpoint.linears import stored_weight
from glmq.checkpoint.reader import Checkpoint
from glmq.engines import Engine
from glmq.errors import CheckpointError, GlmqError, WrongFolderError
from glmq.inspection.folder import Folder, Kind, foreign_entries, scan_folder
from glmq.inspection.scaling import find_scalings
from glmq.model.config import ModelConfig, read_config
from glmq.model.source import SourceOptions, open_source
from glmq.progress import Read, no_read
from glmq.spec import assert_never
from glmq.verification.arithmetic import (
    LinearArithmetic,
    check_norms,
    check_shifts,
    judge_against_report,
    judge_distance,
    judge_linear,
    measure_linears,
)
from glmq.verification.behaviour import BlockBehaviour
from glmq.verification.checksums import check_checksums
from glmq.verification.engines.check import check_lookups
from glmq.verification.files import check_config_kept, check_side_files, read_report
from glmq.verification.findings import Check, Checked, Finding, Skipped
from glmq.verification.limits import Limits
from glmq.verification.origin import find_origins
from glmq.verification.parts import check_manifest, check_parts
from glmq.verification.portable import check_portable
from glmq.verification.predictions import Predictions
from glmq.verification.structure import check_structure
from glmq.wording import counted

VerifyRecord: TypeAlias = Finding | LinearArithmetic | Checked | Skipped


def verify_files(
    candidate: Path, reference: Path | None, engines: Sequence[Engine], *, read: Read = no_read
) -> Iterator[VerifyRecord]:
    """Everything but behaviour.

    Args:
        candidate: an un-sharded quantized checkpoint, an engine's parts, or a portable folder.
        reference: the float checkpoint it was made from; for compressed weights, the W8A8S checkpoint.
        engines: those whose look-ups are emulated.
        read: is told of each tensor of an un-sharded checkpoint whose values were looked at; of integers twice.

    Yields:
        Findings, the numbers of each integer linear of an un-sharded checkpoint, and what was looked at and what was not.

    Raises:
        CheckpointError: `candidate` is no folder with weights, or `reference` is unusable.
    """
    folder = scan_folder(candidate)
    if folder.kind is Kind.STATISTICS:
        raise WrongFolderError(f"{candidate}: holds calibration statistics, no weights; give a quantized checkpoint")
    if folder.kind is Kind.FLOAT and folder.tensors and not folder.has_integers:
        if folder.problems:
            raise WrongFolderError(
                f"{candidate}: is a float checkpoint, verify checks quantized ones, and as it is no --reference either: "
                f"{folder.problems[0]}"
            )
        raise WrongFolderError(
            f"{candidate}: is a float checkpoint, verify checks quantized ones; give what `glmq quantize` wrote, and this "
            "folder as --reference"
        )
    for name in foreign_entries(folder):
        message = f"{name} does not belong to a {folder.kind.value}; move one of the two into a folder of its own"
        yield Check.FOLDER_KIND.error("", message)
    for engine in engines:
        yield from check_lookups(folder, engine)
    match folder.kind:
        case Kind.PARTS | Kind.SHARDED | Kind.PORTABLE:
            yield from _verify_compressed(folder, reference)
        case Kind.FLOAT | Kind.FOREIGN | Kind.QUANTIZED:
            source = None if reference is None else open_reference(reference)
            try:
                is_whole = yield from check_structure(candidate, source, read=read)
                yield from _verify_linears(candidate, source, read, is_whole=is_whole)
            finally:
                if source is not None:
                    source.close()
        case unknown:
            assert_never(unknown)


def open_reference(directory: Path) -> Checkpoint:
    """The float checkpoint that a candidate is compared with, as `quantize` reads it, with all its tensors.

    Raises:
        CheckpointError, ModelError: as `open_source`.
    """
    return open_source(directory, SourceOptions(dequantize=True, keep_extra=True)).checkpoint


def _verify_compressed(folder: Folder, reference: Path | None) -> Iterator[VerifyRecord]:
    yield from check_manifest(folder)
    if folder.kind is not Kind.PORTABLE:
        yield from check_parts(folder, reference)
        yield Checked(f"names, dtypes and shapes of {_count_tensors(folder)}")
    elif reference is not None:
        yield from check_portable(folder.directory, reference)
    yield from check_side_files(folder.directory, reference)
    if reference is not None:
        yield from check_config_kept(folder.config, reference)
        yield Checked("config.json, side files and weights against the W8A8S checkpoint")


def _count_tensors(folder: Folder) -> str:
    files = len({tensor.file for tensor in folder.tensors})
    return f"{counted(len(folder.tensors), 'tensor')} in {counted(files, 'file')}"


def _verify_linears(
    candidate: Path, source: Checkpoint | None, read: Read, *, is_whole: bool
) -> Iterator[VerifyRecord]:
    """What needs the tensors alone, with `is_whole` after all that needs the folder's other files."""
    config = usable_config(candidate, source)
    groups = [] if config is None else config.family.groups(config)
    report = read_report(candidate)
    try:
        checkpoint = Checkpoint.open(candidate)
    except CheckpointError:  # the structure's findings say why
        yield Skipped("tensors and integers (the weight files cannot be read)")
        return
    with checkpoint:
        tensors = f"names, dtypes, shapes and values of {counted(len(checkpoint), 'tensor')}"
        yield Checked(tensors) if is_whole else Skipped(f"{tensors} (an error in a file that says what they must be)")
        origins = find_origins((yield from check_checksums(checkpoint, report)), source)
        yield from check_shifts(checkpoint, groups)
        if source is not None:
            yield from check_norms(checkpoint, source, groups)
        scalings = {} if source is None else find_scalings(source, checkpoint, groups)
        linears = 0
        for record in measure_linears(checkpoint, source, scalings):
            yield record
            if isinstance(record, LinearArithmetic):
                linears += 1
                weight = stored_weight(record.name, checkpoint)
                read(weight, checkpoint.nbytes(weight))
                yield from judge_linear(record, is_fp16=_is_fp16(checkpoint, record.name))
                if record.against is not None:
                    yield from judge_distance(record.name, record.against, origins.of(record.name))
                yield from judge_against_report(record, report)
        against = "" if source is None else " and their distance from the float weights"
        yield Checked(f"the integers of {counted(linears, 'linear')}{against}")


def _is_fp16(checkpoint: Checkpoint, linear: str) -> bool:
    """A static linear of a float16 model stores deq_scale as integers."""
    name = f"{linear}.deq_scale"
    return name in checkpoint and checkpoint[name].dtype == "I64"


def usable_config(candidate: Path, source: Checkpoint | None) -> ModelConfig | None:
    """The candidate's configuration, or the source's where it has no usable one; None where neither has."""
    for directory in (candidate, *(() if source is None else (source.directory,))):
        try:
            return read_config(directory)
        except GlmqError:
            continue
    return None


def judge_block(block: BlockBehaviour, limits: Limits, *, is_fp16: bool) -> Iterator[Finding]:
    """What is wrong with how a block behaves."""
    for linear in block.linears:
        if not linear.error <= limits.max_error:
            message = f"is {linear.error:.3g} away from the float linear's output, wanted at most {limits.max_error:g}"
            yield Check.BEHAVIOUR.error(linear.name, message)
        if is_fp16 and linear.largest_output > 65504:
            message = f"reaches {linear.largest_output:.4g}, float16 ends at 65504"
            yield Check.BEHAVIOUR.error(linear.name, message)
        if linear.wasted_bits > limits.max_wasted_bits:
            message = (
                f"covers inputs from {linear.covered_low:.3g} to {linear.covered_high:.3g}, {linear.seen_low:.3g} to "
                f"{linear.seen_high:.3g} were seen: {linear.wasted_bits:.2g} bits are wasted, wanted at most "
                f"{limits.max_wasted_bits:g}; its input_scale is wrong, or the pictures are not like those of the calibration"
            )
            yield Check.BEHAVIOUR.error(linear.name, message)
        if linear.clipped_share > limits.max_clipped:
            message = (
                f"clips {linear.clipped_share:.1%} of its inputs ({linear.seen_low:.3g} to {linear.seen_high:.3g} seen, "
                f"{linear.covered_low:.3g} to {linear.covered_high:.3g} covered), most on {linear.excess_sample}"
            )
            yield Check.BEHAVIOUR.warning(linear.name, message)


def judge_predictions(predictions: Predictions, limits: Limits) -> Iterator[Finding]:
    """What is wrong with the predicted tokens."""
    if not predictions.kl <= limits.max_kl:
        message = f"KL from the float model is {predictions.kl:.4g} nats, wanted at most {limits.max_kl:g}"
        yield Check.BEHAVIOUR.error("", message)
    severity = limits.below(predictions.good_tokens, predictions.positions)
    if severity is not None:
        same, positions = predictions.same_tokens, counted(predictions.positions, "position")
        places = f"{same} of {positions} ({predictions.top1:.1%}){predictions.tied}"
        message = f"agrees on the most likely token at {places}, wanted at least {limits.min_top1:.0%}"
        if severity == "warning":
            message += "; so few may be chance: give more pictures with --calib-images, or --cases with answers"
        yield Finding(Check.BEHAVIOUR, severity, "", message)
