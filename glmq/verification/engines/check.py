"""What a serving engine would look up in a folder, and what would make it refuse: from names, dtypes and JSON alone.

The steps are those of MindIE-LLM 8b4871a, vLLM-Ascend 0.18 to 0.30.0rc2 and SGLang 0.5.23, as read or run in November 2026;
all are emulated here, not run. Values are not read: `check_structure` does that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from glmq.engines import Engine, Place, name_cards, reads_type
from glmq.errors import ModelError
from glmq.inspection.folder import Folder, Kind
from glmq.model.config import ModelConfig, parse_config
from glmq.spec import FloatDtype, Form, QuantType, assert_never
from glmq.verification.engines.linears import Complaint, run_dtype
from glmq.verification.engines.mindie import check_mindie
from glmq.verification.engines.sglang import check_sglang
from glmq.verification.engines.vllm_ascend import check_vllm_ascend
from glmq.verification.findings import Check, Finding

ENGINE_OF_PARTS: Final = {Kind.PARTS: Engine.MINDIE, Kind.SHARDED: Engine.VLLM_ASCEND}
"""Whose layout compressed parts have."""


def check_lookups(folder: Folder, engine: Engine) -> Iterator[Finding]:
    """What would keep `engine` from loading the folder, or make it compute something else; nothing if all is well.

    A warning says that it loads, but not as one would think.
    """
    check, look_up = _look_ups_of(engine)
    if folder.kind is Kind.STATISTICS:
        yield check.error("", "the folder holds calibration statistics, no model")
        return
    if folder.kind is Kind.PORTABLE:
        yield check.error("", "the weights are in glmq's storage form; `glmq compress --decompress` restores them")
        return
    for problem in folder.problems:
        yield check.error("", problem)
    if not folder.is_whole:  # whatever is looked up may lie in what is missing
        return
    if folder.form is Form.COMPRESSED_TENSORS:
        title = engine.spec.title
        packed = [known.value for known in engine.spec.packed_types]
        others = sorted({tensor.quant_type for tensor in folder.tensors} - {QuantType.FLOAT.value, *packed})
        if folder.form in engine.spec.forms and others:
            yield check.error(
                "",
                f"is {', '.join(others)} in the compressed-tensors form, of which {title} reads {', '.join(packed)} alone",
            )
        elif folder.form in engine.spec.forms:
            yield check.warning("", f"is in the compressed-tensors form; how {title} reads that is not emulated")
        else:
            yield check.error(
                "", f"is in the compressed-tensors form, which {title} does not read; pass --format ascendv1"
            )
        return
    config = None
    if folder.config:
        try:
            config = parse_config(folder.config, str(folder.directory / "config.json"))
        except ModelError as error:
            yield check.error("", str(error))
    for severity, tensor, message in look_up(folder, config):
        yield Finding(check, "error" if severity else "warning", tensor, message)
    dtype = None if config is None else run_dtype(config)
    stored = {tensor.quant_type for tensor in folder.tensors}
    for quant_type in (known for known in QuantType if known.value in stored):
        refused = None if dtype is None else Place(engine, None).refuses_dtype(quant_type, dtype)
        if refused is not None:
            yield check.error("", refused)


def _look_ups_of(engine: Engine) -> tuple[Check, Callable[[Folder, ModelConfig | None], Iterator[Complaint]]]:
    """The check that an engine's findings belong to, and what emulates its look-ups."""
    match engine:
        case Engine.MINDIE:
            found = Check.MINDIE, check_mindie
        case Engine.VLLM_ASCEND:
            found = Check.VLLM_ASCEND, check_vllm_ascend
        case Engine.SGLANG:
            found = Check.SGLANG, check_sglang
        case other:
            assert_never(other)
    return found


def check_chip(folder: Folder, place: Place) -> Iterator[Finding]:
    """Which of the types in the folder the engine does not load on that chip, or not in the folder's dtype.

    Nothing if it loads all, or where it is the same on every chip, which `check_lookups` finds.
    """
    if place.chip is None:
        return
    check, _ = _look_ups_of(place.engine)
    dtype = _run_dtype(folder)
    first = {tensor.quant_type: tensor.name for tensor in reversed(folder.tensors)}
    if folder.quant_type is not None:
        first[folder.quant_type] = ""  # of the model, not of one tensor
    for quant_type in QuantType:
        if quant_type is QuantType.FLOAT or quant_type.value not in first:
            continue
        tensor = first[quant_type.value]
        if not place.dtypes(quant_type):
            yield check.error(tensor, f"{place.title} does not load {quant_type.value}: {place.why_not(quant_type)}")
        elif dtype is not None and Place(place.engine, None).refuses_dtype(quant_type, dtype) is None:
            refused = place.refuses_dtype(quant_type, dtype)
            if refused is not None:
                yield check.error(tensor, refused)


def _run_dtype(folder: Folder) -> FloatDtype | None:
    """Of its config.json; None where that cannot be read, which `check_lookups` says, or does not say it."""
    try:
        return run_dtype(parse_config(folder.config, "config.json"))
    except ModelError:
        return None


def is_for(folder: Folder, engine: Engine) -> bool:
    """Whether the folder is of a type and in a layout that the engine reads, so that what else stops it there is a fault."""
    own = ENGINE_OF_PARTS.get(folder.kind, engine)
    return own is engine and reads_type(engine, folder.quant_type)


def describe_engines(folder: Folder) -> str:
    """For which engine and chip a folder is, in one line."""
    if folder.problems:
        return "nothing as it is; the errors say why"
    if folder.form is Form.COMPRESSED_TENSORS:
        return "vLLM, and transformers with the compressed-tensors library"
    match folder.quant_type, folder.kind:
        case "W8A8SC", Kind.SHARDED:
            return "vLLM-Ascend (load_format sharded_state) on the Atlas 300I Duo; GLM-4.1V is not in its support table"
        case "W8A8SC", _:
            return f"{_mindie_on(QuantType.W8A8SC, None)}, with as many ranks as there are parts"
        case "W8A8S", _:
            return f"the input of `glmq compress`; as it is, {_mindie_on(QuantType.W8A8S, None)}"
        case "W8A8", _:
            sizes = " or ".join(map(str, Engine.MINDIE.spec.documented_world_sizes))
            return f"{_mindie_on(QuantType.W8A8, _run_dtype(folder))}, {sizes} ranks"
        case "W8A8_DYNAMIC", _:
            return "MindIE loads it, though it is not in its support table for GLM-4.1V"
        case "W8A16", _:
            return "vLLM-Ascend on the Atlas 800I A2; GLM-4.1V is not in its support table"
        case "W4A8_DYNAMIC", _:
            return "vLLM-Ascend 0.18 to 0.26, where activations stay float; neither later releases nor MindIE load it"
        case _, Kind.FLOAT:
            return "any engine for float GLM-4.1V and GLM-4.6V-Flash; the input of `glmq quantize`"
        case _, Kind.FOREIGN:
            takes = folder.method is not None and folder.method.is_fp8
            use = "; `glmq quantize --dequantize` takes it" if takes else "; not for glmq, which needs float weights"
            return f"engines that read {'it' if folder.method is None else folder.method.title}{use}"
        case _, Kind.PORTABLE:
            return "no engine; `glmq compress --decompress` restores the W8A8S weights"
        case _, Kind.STATISTICS:
            return "the input of `glmq quantize --stats`"
        case _:
            return "unknown"


def _mindie_on(quant_type: QuantType, dtype: FloatDtype | None) -> str:
    spec = Engine.MINDIE.spec
    return f"{spec.title} on the {name_cards(spec.chips_for(quant_type, dtype))}"
