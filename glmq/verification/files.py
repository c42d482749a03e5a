"""What lies in a quantized checkpoint's folder around the tensors: description, weight files, config.json, side files.

Each function yields findings; the generators that also parse something return it.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Final

from glmq.checkpoint.checksums import CHECKSUMS, digest_of, read_checksums
from glmq.checkpoint.description import (
    ASCEND_V1,
    ASCEND_V1_VERSION,
    FOREIGN_KEYS,
    Description,
    description_name,
    find_descriptions,
    form_of,
    parse_description,
)
from glmq.checkpoint.header import Header, read_header
from glmq.checkpoint.json_file import JsonObject, JsonValue, read_json_object
from glmq.checkpoint.reader import Checkpoint
from glmq.checkpoint.sidecar import PROCESSOR_FILES, list_side_files
from glmq.checkpoint.weight_files import INDEX_SUFFIX
from glmq.checkpoint.workplace import OF_FILE_SYSTEM
from glmq.engines import Engine
from glmq.errors import CheckpointError, InputError, ModelError
from glmq.model.config import FAMILY, ModelConfig, parse_config
from glmq.model.side_files import PREPROCESSOR, TEMPLATE, engine_side_files, processor_settings
from glmq.records import REPORT
from glmq.spec import FloatDtype, Form, QuantType
from glmq.verification.findings import Check, Finding
from glmq.verification.tokens import check_tokens

TYPES: Final = ("W8A8", "W8A8S", "W8A8_DYNAMIC", "W4A8_DYNAMIC", "W8A16")
GROUP_SIZES: Final = (64, 128, 256)
_NOT_FOR_MINDIE: Final = (32, 512)


_MAX_PATH: Final = 4096
_MAX_ENTRIES: Final = 1024
_QKV_BIASES: Final = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
_DTYPE_KEYS: Final = ("torch_dtype", "dtype")
_STEM_OF_ONE_COMMAND: Final = "quant_model_weights"
"""How weight files of the vendor's one-command flow begin, whatever their type."""


def form_by_name(directory: Path) -> Form:
    """The form of the folder's description, by its name."""
    return Form.ASCEND_V1 if (directory / ASCEND_V1).exists() else Form.MINDIE


def check_description(directory: Path) -> Generator[Finding, None, Description | None]:
    """Checks 1 to 3: one description, well-formed, with the right type, version and group size."""
    paths = find_descriptions(directory)
    if len(paths) != 1:
        names = ", ".join(path.name for path in paths) or "none"
        yield Check.DESCRIPTION_FILE.error(
            "",
            f"wanted one {ASCEND_V1} or quant_model_description_TYPE.json, found {names}",
        )
        return None
    try:
        document = read_json_object(paths[0])
    except CheckpointError as error:
        yield Check.DESCRIPTION_FILE.error("", str(error))
        return None
    for key in FOREIGN_KEYS:
        if key in document:
            yield Check.DESCRIPTION_KEYS.error(
                key,
                "the description has this key, which switches another feature on, even if null",
            )
    for key in ("version", "group_size"):
        if key in document and document[key] is None:
            yield Check.DESCRIPTION_KEYS.error(key, "is null in the description; the key must be absent instead")
    try:
        description = parse_description(paths[0], document)
    except CheckpointError as error:
        yield Check.DESCRIPTION_KEYS.error("", str(error))
        return None
    yield from _check_form(paths[0], description)
    return description


def _check_form(path: Path, description: Description) -> Iterator[Finding]:
    quant_type, form = description.model_quant_type, form_of(path)
    if path.name != description_name(quant_type, form):
        yield Check.DESCRIPTION_FILE.error(
            "",
            f"{path.name} describes {quant_type}, wanted the name {description_name(quant_type, form)}",
        )
    if quant_type not in TYPES:
        yield Check.DESCRIPTION_KEYS.error("model_quant_type", f"is {quant_type}, wanted one of {', '.join(TYPES)}")
    wanted = None if form is Form.MINDIE else ASCEND_V1_VERSION
    if description.version != wanted:
        wording = "the MindIE form" if form is Form.MINDIE else "ascendV1"
        yield Check.DESCRIPTION_KEYS.error("version", f"is {description.version!r}, {wording} wants {wanted!r}")
    size = description.group_size
    has_groups = QuantType.W4A8_DYNAMIC.value in description.tensors.values()  # of any model, by a rule
    if not has_groups or form is Form.MINDIE:
        if size is not None:
            yield Check.GROUP_SIZE.error(
                "group_size",
                f"is {size}, wanted only in an ascendV1 description with W4A8_DYNAMIC linears",
            )
    elif size in _NOT_FOR_MINDIE:
        yield Check.GROUP_SIZE.warning("group_size", f"is {size}, which the MindIE engine refuses")
    elif size not in GROUP_SIZES:
        found = "missing or 0" if size is None else size
        yield Check.GROUP_SIZE.error("group_size", f"is {found}, wanted one of {', '.join(map(str, GROUP_SIZES))}")


def weights_stem(directory: Path, quant_type: str) -> str:
    """How the names of weight files of that type begin."""
    is_of_one_command = any(directory.glob(f"{_STEM_OF_ONE_COMMAND}*.safetensors"))
    return _STEM_OF_ONE_COMMAND if is_of_one_command else f"quant_model_weight_{quant_type.lower()}"


def check_weight_files(directory: Path, quant_type: str, stem: str) -> Generator[Finding, None, Checkpoint | None]:
    """Checks 4 and 5: the one file or all parts whose names begin with `stem`, no other, and no tensor in two of them.

    Returns:
        Those files, or whatever weight files are there if none has such a name; None if they are not complete.
    """
    present = {path.name for path in directory.glob("*.safetensors")}
    indexes = {path.name for path in directory.glob(f"*{INDEX_SUFFIX}")}
    wanted, index = _wanted_files(stem, present)
    for name in sorted((present - wanted) | (indexes - {index})):
        yield Check.WEIGHT_FILES.error(
            "",
            f"{name} does not belong to a {quant_type} checkpoint; engines take every weight file",
        )
    for name in sorted(wanted - present):
        yield Check.WEIGHT_FILES.error("", f"{name} is missing")
    used = wanted if wanted & present else present
    headers: dict[Path, Header] = {}
    places: dict[str, str] = {}
    for name in sorted(present):
        try:
            header = read_header(directory / name)
        except CheckpointError as error:
            yield Check.WEIGHT_FILES.error("", str(error))
            continue
        for tensor in header.tensors:
            if tensor in places:
                yield Check.DESCRIBED_TENSORS.error(tensor, f"is in {places[tensor]} and in {name}")
            places.setdefault(tensor, name)
        if name in used:
            headers[directory / name] = header
    if index is not None:
        yield from _check_index(directory / index, headers)
    if not headers or used - {path.name for path in headers}:
        return None
    try:
        return Checkpoint(directory, headers)
    except CheckpointError:  # a tensor in two parts, reported above
        return None


def _wanted_files(stem: str, present: set[str]) -> tuple[set[str], str | None]:
    """The names that the weight files should have, judged by those that are there, and that of their index."""
    single = f"{stem}.safetensors"
    numbered = (re.fullmatch(rf"{stem}-[0-9]{{5}}-of-([0-9]{{5}})\.safetensors", name) for name in sorted(present))
    counts = [int(found[1]) for found in numbered if found]
    if single in present or not counts:
        return {single}, None
    last = counts[-1]
    return {f"{stem}-{part:05d}-of-{last:05d}.safetensors" for part in range(1, last + 1)}, f"{stem}{INDEX_SUFFIX}"


def _check_index(path: Path, headers: Mapping[Path, Header]) -> Iterator[Finding]:
    try:
        index = read_json_object(path)
    except CheckpointError as error:
        yield Check.WEIGHT_FILES.error("", str(error))
        return
    infos = [(file.name, info) for file, header in headers.items() for info in header.tensors.values()]
    if index.get("weight_map") != {info.name: name for name, info in infos}:
        yield Check.WEIGHT_FILES.error(
            "",
            f"the weight_map of {path.name} does not list every tensor in the file that has it",
        )
    metadata = index.get("metadata")
    total, wanted = (
        metadata.get("total_size") if isinstance(metadata, Mapping) else None,
        sum(i.nbytes for _, i in infos),
    )
    if total != wanted:
        yield Check.WEIGHT_FILES.error("", f"total_size in {path.name} is {total}, the tensors have {wanted} bytes")


def check_config(
    directory: Path, description: Description | None, source: Checkpoint | None
) -> Generator[Finding, None, ModelConfig | None]:
    """Check 17: a GLM-4.1V's config.json, one dtype in it, the quantization keys of the form, and no other edit."""
    try:
        raw = read_json_object(directory / "config.json")
        config = parse_config(raw, str(directory / "config.json"))
    except (CheckpointError, ModelError) as error:
        yield Check.CONFIG.error("", str(error))
        return None
    yield from _check_dtypes(raw)
    if description is not None:
        yield from _check_quantization_keys(raw, description, form_by_name(directory))
    rope = _section(raw, "text_config").get("rope_scaling")
    if not isinstance(rope, Mapping) or "mrope_section" not in rope:
        yield Check.CONFIG.error("", f"text_config.rope_scaling is {rope!r}, the engine wants one with mrope_section")
    if source is not None:
        yield from check_config_kept(raw, source.directory)
    return config


def check_attention_bias(directory: Path, checkpoint: Checkpoint) -> Iterator[Finding]:
    """Check 17: that vLLM builds room for the biases of q, k and v where they are not part of quant_bias."""
    raw = read_json_object(directory / "config.json")
    found = _section(raw, "text_config").get("attention_bias")
    biases = [name for name in checkpoint if name.endswith(_QKV_BIASES) and f"{name[:-5]}.quant_bias" not in checkpoint]
    if biases and found is not True:
        at_root = ", and true at the root, where nothing reads it" if raw.get("attention_bias") is True else ""
        yield Check.CONFIG.warning(
            "",
            f"text_config.attention_bias is {found!r}{at_root}: vLLM leaves out {biases[0]} and {len(biases) - 1} more "
            "without a word; set it to true",
        )


def _section(raw: Mapping[str, JsonValue], key: str) -> Mapping[str, JsonValue]:
    value = raw.get(key)
    return value if isinstance(value, Mapping) else {}


def _check_dtypes(raw: JsonObject) -> Iterator[Finding]:
    sections = {"": raw, "text_config.": _section(raw, "text_config"), "vision_config.": _section(raw, "vision_config")}
    found = {f"{where}{key}": part[key] for where, part in sections.items() for key in _DTYPE_KEYS if key in part}
    wanted = [dtype.value for dtype in FloatDtype]
    for key in ("torch_dtype", "text_config.dtype"):
        if found.get(key) not in wanted:
            yield Check.CONFIG.error("", f"{key} is {found.get(key)!r} in config.json, wanted {' or '.join(wanted)}")
    if len({str(value) for value in found.values()}) > 1:
        listed = ", ".join(f"{key} {value}" for key, value in found.items())
        message = f"the dtypes in config.json differ: {listed}; write the dtype of the float tensors in all places"
        yield Check.CONFIG.error("", message)


def _check_quantization_keys(raw: JsonObject, description: Description, form: Form) -> Iterator[Finding]:
    if form is Form.ASCEND_V1:
        for key in ("quantize", "quantization_config"):
            if key in raw:
                yield Check.CONFIG.error("", f"config.json has {key}, which ascendV1 must not have")
        return
    tag = description.model_quant_type.lower()
    if raw.get("quantize") != tag:
        yield Check.CONFIG.error("", f"quantize is {raw.get('quantize')!r} in config.json, wanted {tag!r}")
    size = _section(raw, "quantization_config").get("group_size")
    if size not in (0, *GROUP_SIZES):
        yield Check.CONFIG.error("", f"quantization_config.group_size is {size!r}, wanted 0, 64, 128 or 256")


def check_config_kept(raw: JsonObject, source_dir: Path) -> Iterator[Finding]:
    """Check 17: what quantization does not set is as in the source's config.json, or as in its nested layout."""
    try:
        source = read_json_object(source_dir / "config.json")
        nested = parse_config(source, str(source_dir / "config.json")).nested
    except (CheckpointError, ModelError) as error:
        yield Check.CONFIG.warning("", f"cannot be compared with the source: {error}")
        return
    found, wanted = _flatten(raw), _flatten(nested)
    if found == _flatten(source):
        return
    for key in sorted(found.keys() | wanted.keys()):
        if key not in found or key not in wanted or found[key] != wanted[key]:
            sides = f"{found.get(key, 'absent')!r} in config.json, {wanted.get(key, 'absent')!r} in the source"
            yield Check.CONFIG.error("", f"{key} is {sides}")


def _flatten(raw: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Keys of the root and, dotted, of its sections, without those that quantization sets."""
    flat: dict[str, JsonValue] = {}
    for key, value in raw.items():
        if key in (*_DTYPE_KEYS, "quantize", "quantization_config"):
            continue
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": item for inner, item in value.items() if inner not in _DTYPE_KEYS}
        else:
            flat[key] = value
    return flat


def check_side_files(directory: Path, source_dir: Path | None) -> Iterator[Finding]:
    """Check 18: the tokenizer, processor and template files are there, as in the source or as the engines read them."""
    try:
        list_side_files(directory)
    except CheckpointError as error:
        yield Check.SIDE_FILES.error("", f"{error}")
    expected = [] if source_dir is None else list_side_files(source_dir)
    if source_dir is not None:
        changed = _changed_side_files(source_dir)
        for name in expected:
            if not (directory / name).is_file():
                yield Check.SIDE_FILES.error("", f"{name} is missing, the source has it")
                continue
            found = (directory / name).read_bytes()
            if found in ((source_dir / name).read_bytes(), changed.get(name)):
                continue
            if name == TEMPLATE and _is_as_written(directory, name, found):
                yield Check.SIDE_FILES.warning("", f"{name} is not the source's: `glmq quantize` was given another")
            else:
                yield Check.SIDE_FILES.error("", f"{name} differs from the source's")
    for name in PROCESSOR_FILES:
        if name not in expected and not (directory / name).is_file() and not _is_elsewhere(directory, name):
            yield Check.SIDE_FILES.error("", f"{name} is missing; the engine cannot build its processor without it")
    yield from check_tokens(directory)


def _is_elsewhere(directory: Path, name: str) -> bool:
    """Whether the image processor's settings lie where transformers 5 keeps them; MindIE's own look-ups are another check."""
    try:
        return name == PREPROCESSOR and bool(processor_settings(directory)[1])
    except InputError:
        return False


def _is_as_written(directory: Path, name: str, content: bytes) -> bool:
    """Whether a file has the bytes that glmq itself wrote, by its checksums."""
    try:
        return (directory / CHECKSUMS).is_file() and read_checksums(directory).files.get(name) == digest_of(content)
    except CheckpointError:
        return False


def _changed_side_files(source_dir: Path) -> Mapping[str, bytes]:
    """Those that `quantize` does not copy as they are; nothing where the source's cannot be read."""
    try:
        return engine_side_files(source_dir, FAMILY, for_mindie=True, chat_template=None)
    except InputError:
        return {}


def check_modes(directory: Path) -> Iterator[Finding]:
    """Check 19: modes and names that the engine's file checks accept."""
    whole = directory.resolve()
    if Engine.MINDIE.spec.refuses_path(str(whole)) or len(str(whole)) > _MAX_PATH:
        yield Check.FILE_MODES.warning(
            "",
            f"{whole}: the engine refuses such a path; use letters, digits, _ . / - only",
        )
    entries = sorted(directory.iterdir())
    if len(entries) > _MAX_ENTRIES:
        yield Check.FILE_MODES.error("", f"the folder has {len(entries)} entries, the engine stops at {_MAX_ENTRIES}")
    for path in (directory, *(entry for entry in entries if entry.name not in OF_FILE_SYSTEM)):
        mode = path.stat().st_mode
        if mode & stat.S_IWOTH:
            yield Check.FILE_MODES.error(
                "",
                f"{path.name} is writable by everyone (mode {mode & 0o777:o}); the engine refuses that",
            )
        if not mode & stat.S_IRUSR:
            yield Check.FILE_MODES.error("", f"{path.name} is not readable by its owner (mode {mode & 0o777:o})")
        if path != directory and Engine.MINDIE.spec.refuses_path(path.name):
            yield Check.FILE_MODES.error(
                "",
                f"{path.name!r}: the engine refuses such a name; use letters, digits, _ . - only",
            )


def read_report(directory: Path) -> JsonObject:
    """glmq_report.json, empty where there is none that can be read."""
    path = directory / f"{REPORT}.json"
    try:
        return read_json_object(path) if path.is_file() else {}
    except CheckpointError:
        return {}


def row_of(report: Mapping[str, JsonValue], linear: str) -> Mapping[str, JsonValue]:
    """What glmq_report.json says about a linear, empty where it says nothing."""
    linears = report.get("linears")
    rows = [row for row in linears if isinstance(row, Mapping)] if isinstance(linears, list) else []
    return next((row for row in rows if row.get("name") == linear), {})
