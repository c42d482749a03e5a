"""check_structure(): whether a folder is a quantized GLM-4.1V that the engines load and compute rightly with.

The checks are numbered: 1-3 description, 4-5 weight files, 6-7 which tensors, 8-9 shapes and dtypes, 10-11 values and
their relations, 12-14 what must agree between linears, 15 norms, 17 config.json, 18 side files, 19 modes and names. One
tensor, or a piece of one, is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from glmq.checkpoint.compressed_config import is_compressed_tensors
from glmq.checkpoint.description import Description, find_descriptions
from glmq.checkpoint.json_file import read_json_object
from glmq.checkpoint.linears import stored_weight
from glmq.checkpoint.reader import Checkpoint
from glmq.engines import Engine
from glmq.errors import CheckpointError, WrongFolderError
from glmq.inspection.scaling import UNSCALED, Scaling, find_scalings
from glmq.model.config import ModelConfig
from glmq.progress import Read, no_read
from glmq.spec import FloatDtype, Form, QuantType, type_named
from glmq.verification.compressed_linears import (
    CompressedSubject,
    check_compressed_config,
    check_compressed_linear,
)
from glmq.verification.engines.linears import run_dtype
from glmq.verification.files import (
    check_attention_bias,
    check_config,
    check_description,
    check_modes,
    check_side_files,
    check_weight_files,
    form_by_name,
    read_report,
    row_of,
    weights_stem,
)
from glmq.verification.findings import Check, Finding
from glmq.verification.linears import SUFFIXES, Subject, check_linear
from glmq.wording import counted

BIASED_NORMS: Final = (".input_layernorm", ".post_attention_layernorm")
"""The norms whose bias every engine adds; elsewhere a bias is ignored."""

_NORM_SUFFIXES: Final = {
    Form.ASCEND_V1: ("weight", "bias"),
    Form.MINDIE: ("weight", "bias"),
    Form.COMPRESSED_TENSORS: ("weight",),
}
"""What an RMSNorm may have; engines that read compressed-tensors know no bias."""

_CODES: Final = {FloatDtype.FP16: "F16", FloatDtype.BF16: "BF16"}


@dataclass(frozen=True, slots=True)
class _Case:
    """A checkpoint whose parts could all be read."""

    checkpoint: Checkpoint
    description: Description
    config: ModelConfig
    source: Checkpoint | None
    form: Form
    linears: Mapping[str, QuantType]
    """Quantized linears and their types, by the description."""

    dtype: FloatDtype | None
    """Of its float tensors."""


def check_structure(
    candidate: Path, source: Checkpoint | None, *, read: Read = no_read
) -> Generator[Finding, None, bool]:
    """Examine the quantized checkpoint in `candidate`.

    Args:
        candidate: a folder as `quantize` writes it, or another tool does.
        source: the float checkpoint it was made from; without it, what needs a comparison is left out.
        read: is told of each tensor whose values were looked at.

    Yields:
        What is wrong, nothing for a good checkpoint. Where a file cannot be read, what depends on it is left out.

    Returns:
        Whether nothing was left out.

    Raises:
        CheckpointError: `candidate` is not a folder.
    """
    if not candidate.is_dir():
        raise WrongFolderError(f"{candidate}: is not a folder; give the folder of the quantized checkpoint")
    if _is_compressed_tensors(candidate):
        return (yield from _check_compressed_tensors(candidate, source, read))
    description = yield from check_description(candidate)
    config = yield from check_config(candidate, description, source)
    yield from check_side_files(candidate, None if source is None else source.directory)
    yield from check_modes(candidate)
    if description is None or config is None:
        return False
    model_type = description.model_quant_type
    checkpoint = yield from check_weight_files(candidate, model_type, weights_stem(candidate, model_type))
    if checkpoint is None:
        return False
    with checkpoint:
        linears = {
            base: QuantType(quant_type)
            for name, quant_type in description.tensors.items()
            for base in [name.removesuffix(".weight")]
            if name in checkpoint and base != name and not base.endswith(".module") and quant_type in _known_types()
        }
        form, dtype = form_by_name(candidate), _float_dtype(config, checkpoint)
        case = _Case(checkpoint, description, config, source, form, linears, dtype)
        yield from check_attention_bias(candidate, checkpoint)
        yield from _check_keys(case)
        yield from _check_names(case)
        yield from _check_agreement(case)
        yield from _check_norms(case)
        scalings = {} if source is None else find_scalings(source, checkpoint, config.family.groups(config))
        yield from _check_floats(case, scalings, read)
        report = read_report(candidate)
        groups = case.config.family.groups(case.config)
        norms = {linear.name: group.norm for group in groups for linear in group.linears}
        for name, quant_type in linears.items():
            shift = row_of(report, name).get("bias_shift")
            yield from check_linear(
                Subject(
                    name=name,
                    quant_type=quant_type,
                    checkpoint=checkpoint,
                    source=source,
                    dtype=case.dtype,
                    form=case.form,
                    group_size=description.group_size,
                    scaling=scalings.get(name, UNSCALED),
                    norm=norms.get(name),
                    bias_shift=shift if isinstance(shift, int) else 0,
                )
            )
            _tell_weight(name, checkpoint, read)
    return True


def _is_compressed_tensors(candidate: Path) -> bool:
    """Whether config.json alone describes the checkpoint, in the compressed-tensors form."""
    path = candidate / "config.json"
    try:
        config = read_json_object(path) if path.is_file() and not find_descriptions(candidate) else {}
    except CheckpointError:
        return False
    return is_compressed_tensors(config)


def _check_compressed_tensors(candidate: Path, source: Checkpoint | None, read: Read) -> Generator[Finding, None, bool]:
    """What check_structure does, for this form: no description, float norms as they were, other tensors of the linears."""
    config = yield from check_config(candidate, None, source)
    yield from check_side_files(candidate, None if source is None else source.directory)
    yield from check_modes(candidate)
    if config is None:
        return False
    compressed = yield from check_compressed_config(candidate, config)
    if compressed is None:
        return False
    checkpoint = yield from check_weight_files(candidate, compressed.quant_type.value, "model")
    if checkpoint is None:
        return False
    with checkpoint:
        found = [
            (linear, compressed.group_of(linear.name)) for g in config.family.groups(config) for linear in g.linears
        ]
        linears = {linear.name: group.quant_type for linear, group in found if group is not None}
        described = Description(compressed.quant_type.value, None, None, compressed.tensor_types(checkpoint))
        dtype = _float_dtype(config, checkpoint)
        case = _Case(checkpoint, described, config, source, Form.COMPRESSED_TENSORS, linears, dtype)
        yield from check_attention_bias(candidate, checkpoint)
        yield from _check_names(case)
        yield from _check_agreement(case)
        scalings = {} if source is None else find_scalings(source, checkpoint, config.family.groups(config))
        yield from _check_floats(case, scalings, read)
        for linear, group in found:
            if group is not None:
                subject = CompressedSubject(linear, group.quant_type, group.group_size, checkpoint, case.dtype)
                yield from check_compressed_linear(subject)
                _tell_weight(linear.name, checkpoint, read)
    return True


def _float_dtype(config: ModelConfig, checkpoint: Checkpoint) -> FloatDtype | None:
    """By config.json; where its places contradict each other, that of most tensors, lest each be found besides."""
    said, at_root = run_dtype(config), config.nested.get("torch_dtype")
    if said is None or at_root not in [dtype.value for dtype in FloatDtype if dtype is not said]:
        return said
    codes = [checkpoint[name].dtype for name in checkpoint]
    return max(FloatDtype, key=lambda dtype: codes.count(dtype.code))


def _tell_weight(linear: str, checkpoint: Checkpoint, read: Read) -> None:
    name = stored_weight(linear, checkpoint)
    if name in checkpoint:
        read(name, checkpoint.nbytes(name))


def _known_types() -> set[str]:
    return {quant_type.value for quant_type in SUFFIXES}


def _check_keys(case: _Case) -> Iterator[Finding]:
    """Checks 5, 7, 12 and 14 on the description's keys."""
    tensors, quant_type = case.description.tensors, case.description.model_quant_type
    for name in case.checkpoint:
        if name not in tensors:
            yield Check.DESCRIBED_TENSORS.error(name, "is stored but not in the description")
    stored = {name: value for name, value in tensors.items() if name in case.checkpoint}
    aliases = {} if case.form is Form.MINDIE else case.config.family.engine_aliases(stored)
    for name, value in tensors.items():
        if name not in case.checkpoint and aliases.get(name) != value:
            yield Check.DESCRIBED_TENSORS.error(
                name,
                f"is described as {value} but not stored, and is no alias of what is",
            )
        elif value not in ("FLOAT", quant_type):
            is_known = value in _known_types()
            if not is_known or (name in case.checkpoint and name.rpartition(".")[0] not in case.linears):
                message = f"is described as {value}, all of a {quant_type} model is FLOAT or {quant_type}"
                yield Finding(Check.SHARED_INPUT, "warning" if is_known else "error", name, message)
    yield from _check_mixture(case)
    for name, value in stored.items():
        base, _, suffix = name.rpartition(".")
        if base in case.linears:
            wanted = "FLOAT" if suffix == "bias" else case.linears[base].value
            if value != wanted:
                yield Check.LINEAR_TENSORS.error(
                    name,
                    f"is described as {value}, wanted {wanted} as its linear's weight is",
                )
    for index in range(case.config.vision_depth):
        for part in ("gate_proj", "up_proj"):
            name = f"{case.config.family.vision}.blocks.{index}.mlp.{part}.weight"
            if name not in tensors:
                yield Check.VISION_KEYS.error(name, "is not in the description, where the engine looks it up")


def _check_mixture(case: _Case) -> Iterator[Finding]:
    """Check 12: linears of another type than the model's are wrong for some engines only, so it is said once for each type."""
    quant_type = case.description.model_quant_type
    model = type_named(quant_type)
    others: dict[QuantType, list[str]] = {}
    for base, kind in case.linears.items():
        if kind is not model:
            others.setdefault(kind, []).append(base)
    for kind, names in others.items():
        whole = [engine.spec.title for engine in Engine if model is None or not engine.spec.takes(kind, model)]
        if whole:
            yield Check.SHARED_INPUT.warning(
                f"{names[0]}.weight",
                f"is described as {kind.value}, {counted(len(names), 'linear')} of this {quant_type} model so: "
                f"{' and '.join(whole)} reads one type per model, other engines one per linear",
            )


def _check_names(case: _Case) -> Iterator[Finding]:
    """Check 6: every tensor of the model is there, and nothing else but what `quantize --keep-extra` keeps of the source."""
    expected = case.config.family.shapes(case.config)
    for name in expected:
        base, _, suffix = name.rpartition(".")
        is_linear = (
            case.form is Form.COMPRESSED_TENSORS and suffix == "weight" and base in case.linears
        )  # has own checks
        if name not in case.checkpoint and not is_linear:
            yield Check.FLOAT_TENSORS.error(name, "is missing, the float model has it")
    norms = set(case.config.family.rms_norms(case.config))
    owners = {name.rpartition(".")[0] for name in expected}
    for name in case.checkpoint:
        base, _, suffix = name.rpartition(".")
        is_norm = suffix in _NORM_SUFFIXES[case.form] and base.removesuffix(".module") in norms
        if name in expected or base in case.linears or is_norm:
            continue
        if base.removesuffix(".module") in owners or (case.source is not None and name not in case.source):
            yield Check.FLOAT_TENSORS.error(name, "is neither in the float model nor part of a quantized linear")
        else:
            yield Check.FLOAT_TENSORS.warning(name, "is no part of the model: MindIE does not read it, vLLM refuses it")


def _check_agreement(case: _Case) -> Iterator[Finding]:
    """Checks 12 and 13: linears of one input are of one type with one input scale; sparse types are float16."""
    for group in case.config.family.groups(case.config):
        names = [linear.name for linear in group.linears]
        types = {case.linears.get(name, QuantType.FLOAT) for name in names}
        if len(types) > 1:
            listed = ", ".join(
                f"{name.rpartition('.')[2]} {case.linears.get(name, QuantType.FLOAT).value}" for name in names
            )
            yield Check.SHARED_INPUT.error(names[0], f"the linears of this input differ in type: {listed}")
        elif len(names) > 1:
            for suffix in ("input_scale", "input_offset", "input_zero_point"):
                stored = [case.checkpoint.read(f"{n}.{suffix}") for n in names if f"{n}.{suffix}" in case.checkpoint]
                if any(not torch.equal(stored[0], other) for other in stored[1:]):
                    values = ", ".join(str(tensor.float().tolist()) for tensor in stored)
                    yield Check.SHARED_INPUT.error(
                        f"{names[0]}.{suffix}",
                        f"differs between the linears of this input: {values}",
                    )
    if case.description.model_quant_type == "W8A8S" and case.dtype is not FloatDtype.FP16:
        found = "no dtype" if case.dtype is None else case.dtype.value
        yield Check.SPARSE_DTYPE.error("", f"W8A8S runs in float16 only, config.json says {found}")


def _check_norms(case: _Case) -> Iterator[Finding]:
    """Check 15: the doubled norm tensors of the MindIE form, and biases where no engine adds them."""
    for norm in case.config.family.rms_norms(case.config):
        doubled = [f"{norm}.module.{suffix}" for suffix in ("weight", "bias")]
        present = [name for name in doubled if name in case.checkpoint]
        if present and case.form is Form.ASCEND_V1:
            yield Check.NORMS.error(present[0], "belongs to the MindIE form, ascendV1 must not have it")
        elif present and len(present) < 2:
            missing = doubled[0] if doubled[1] in present else doubled[1]
            yield Check.NORMS.error(missing, f"is missing beside {present[0]}")
        elif present and not _same(case, f"{norm}.weight", doubled[0]):
            yield Check.NORMS.error(doubled[0], f"differs from {norm}.weight")
        for name in (f"{norm}.bias", doubled[1]):
            if name in case.checkpoint and not norm.endswith(BIASED_NORMS) and bool(case.checkpoint.read(name).any()):
                yield Check.NORMS.error(name, "is not zero, but the engine ignores the bias of this norm")


def _same(case: _Case, one: str, other: str) -> bool:
    return one in case.checkpoint and torch.equal(case.checkpoint.read(one), case.checkpoint.read(other))


def _check_floats(case: _Case, scalings: Mapping[str, Scaling], read: Read) -> Iterator[Finding]:
    """Checks 6, 9 and 10 on what is not quantized: dtype, finite, equal to the source unless smoothed."""
    expected = case.config.family.shapes(case.config)
    norms = set(case.config.family.rms_norms(case.config))
    smoothed = {
        f"{group.norm}.weight"
        for group in case.config.family.groups(case.config)
        if any(x.name in case.linears for x in group.linears)
    }
    for name, info in case.checkpoint.items():
        base, _, suffix = name.rpartition(".")
        if base not in case.linears or name != stored_weight(base, case.checkpoint):
            read(name, info.nbytes)
        if base in case.linears:  # its own checks, but the float bias is compared here
            if suffix == "bias" and case.source is not None and name in case.source:
                yield from _check_pieces(case, name, rows=scalings.get(base, UNSCALED).rows)
            continue
        is_norm_bias = suffix == "bias" and base.removesuffix(".module") in norms
        allowed = [_CODES[case.dtype]] if case.dtype is not None else list(_CODES.values())
        allowed += ["F32"] if is_norm_bias else []
        if name not in expected and not is_norm_bias and info.dtype not in allowed:
            continue  # no part of the model, and kept as it was
        if info.dtype not in allowed:
            yield Check.DTYPES.error(name, f"has dtype {info.dtype}, wanted {' or '.join(allowed)}")
        elif name in expected and info.shape != expected[name]:
            yield Check.SHAPES.error(name, f"has shape {list(info.shape)}, wanted {list(expected[name])}")
        else:
            yield from _check_pieces(case, name, may_differ=name in smoothed)


def _check_pieces(case: _Case, name: str, *, may_differ: bool = False, rows: Tensor | None = None) -> Iterator[Finding]:
    source = case.source if case.source is not None and name in case.source and not may_differ else None
    if source is not None and source[name].shape != case.checkpoint[name].shape:
        return  # reported with the shapes
    bad = different = 0
    for start, piece in case.checkpoint.pieces(name):
        bad += 0 if bool(piece.isfinite().all()) else int((~piece.isfinite()).sum())
        if source is not None:
            whole = not piece.shape
            original = source.read(name) if whole else source.read_rows(name, start, start + piece.shape[0])
            original = original if rows is None else original * rows[start : start + piece.shape[0]]
            original = original.to(piece.dtype)
            different += 0 if torch.equal(original, piece) else int((original != piece).sum())
    if bad:
        yield Check.VALUES.error(name, f"holds {bad} NaN or infinite values")
    elif different:
        yield Check.FLOAT_TENSORS.error(name, f"differs from the source, cast to its dtype, in {different} values")
