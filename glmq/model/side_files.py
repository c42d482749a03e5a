"""Tokenizer, processor and template files of other ages, brought into what the serving engines read.

MindIE runs transformers 4.53.0. Files that transformers 5 or a trainer saved may hold the same settings in other places, under
names of classes that it does not know, or the chat template where it does not look.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from glmq.checkpoint.disk import read_input
from glmq.checkpoint.json_file import JsonObject, JsonValue, json_bytes, read_json_object
from glmq.errors import SideFileError
from glmq.model.family import Family

TEMPLATE: Final = "chat_template.jinja"
NAMED_TEMPLATES: Final = "additional_chat_templates"
"""Folder of templates with a name each, as transformers saves several; the one called `default` counts."""
TOKENIZER: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
PROCESSOR: Final = "processor_config.json"
PREPROCESSOR: Final = "preprocessor_config.json"
VIDEO_PREPROCESSOR: Final = "video_preprocessor_config.json"
MAX_TEMPLATE_BYTES: Final = 1_000_000
_CLASS_KEYS: Final = ("processor_class", "image_processor_type", "video_processor_type")
_PARTS: Final[Mapping[str, str]] = {"image_processor": PREPROCESSOR, "video_processor": VIDEO_PREPROCESSOR}
"""Sections of processor_config.json since transformers 5 -> the files that held them before."""
_NEW_TOKENIZER: Final = "TokenizersBackend"
"""What transformers 5 calls PreTrainedTokenizerFast."""


def check_needed_files(directory: Path) -> None:
    """Check that a model folder has what every engine builds its processor from, be it that no model is run now.

    Raises:
        ModelError: no tokenizer.json, or no settings of the image processor.
        CheckpointError: a file cannot be read.
    """
    if not (directory / TOKENIZER).exists():
        raise SideFileError(
            f"{directory}: has no {TOKENIZER}, which is the tokenizer; copy it from the model's release"
        )
    processor_settings(directory)


def engine_side_files(
    directory: Path, family: Family, *, for_mindie: bool, chat_template: Path | None
) -> dict[str, bytes]:
    """The small files that a checkpoint made from `directory` gets otherwise than copied: name -> contents.

    Args:
        directory: the float model's folder.
        family: knows the processor classes by their older names.
        for_mindie: bring tokenizer and processor files into what transformers 4.53.0 reads.
        chat_template: file of the chat template; None: the folder's own, wherever it lies.

    Raises:
        CheckpointError: a file cannot be read.
        ModelError: several chat templates and none of them the usual one, or one that is no text.
    """
    found: dict[str, bytes] = {}
    template = None
    if chat_template is not None:
        template = read_template(chat_template)
    elif not (directory / TEMPLATE).exists():
        template = find_template(directory)
    if template is not None:
        found[TEMPLATE] = template.encode()
    if for_mindie:
        found |= {name: json_bytes(document, indent=2) for name, document in _documents(directory, family)}
    return found


def _documents(directory: Path, family: Family) -> Iterator[tuple[str, JsonObject]]:
    """The JSON files that transformers 4.53.0 would not read as they are, as it reads them."""
    whole = _read(directory / PROCESSOR)
    for section, name in _PARTS.items():
        own = _read(directory / name)
        inner = whole.get(section)
        if not own and isinstance(inner, dict):
            own = dict(inner)
            if isinstance(whole.get("processor_class"), str):
                own.setdefault("processor_class", whole["processor_class"])
            yield name, _known_classes(own, family)
        elif _known_classes(own, family) != own:
            yield name, _known_classes(own, family)
    if _known_classes(whole, family) != whole:
        yield PROCESSOR, _known_classes(whole, family)
    tokenizer = _read(directory / TOKENIZER_CONFIG)
    older = _known_classes(older_tokenizer(tokenizer), family)
    if older != tokenizer:
        yield TOKENIZER_CONFIG, older


def older_tokenizer(config: Mapping[str, JsonValue]) -> JsonObject:
    """A tokenizer_config.json as transformers before 5 has it: the class by its older name, extra tokens not as a list."""
    older = dict(config)
    if older.get("tokenizer_class") == _NEW_TOKENIZER:
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = older.get("extra_special_tokens")
    if isinstance(extra, list):
        del older["extra_special_tokens"]
        older.setdefault("additional_special_tokens", extra)
    return older


def find_template(directory: Path) -> str | None:
    """The chat template of a model folder, from any of the places in which transformers has kept it; None if it has none.

    Raises:
        CheckpointError: a file cannot be read.
        ModelError: several templates, none of them called `default`.
    """
    if (directory / TEMPLATE).exists():
        return read_template(directory / TEMPLATE)
    named = directory / NAMED_TEMPLATES
    if named.is_dir():
        texts: JsonObject = {path.stem: read_template(path) for path in sorted(named.glob("*.jinja"))}
        if texts:
            return _choose(texts, named)
    for name in (TOKENIZER_CONFIG, "chat_template.json", PROCESSOR):
        found = _read(directory / name).get("chat_template")
        if isinstance(found, str):
            return found
        if isinstance(found, list):
            entries = [entry for entry in found if isinstance(entry, dict)]
            return _choose({f"{e.get('name')}": e.get("template") for e in entries}, directory / name)
        if isinstance(found, dict):
            return _choose(found, directory / name)
    return None


def _choose(templates: Mapping[str, JsonValue], where: Path) -> str:
    only = next(iter(templates.values())) if len(templates) == 1 else templates.get("default")
    if not isinstance(only, str):
        raise SideFileError(
            f"{where}: has the chat templates {', '.join(sorted(templates))!a:.100}, none of them called default; "
            "choose one with --chat-template FILE"
        )
    return only


def read_template(path: Path) -> str:
    """The text of a chat template's file.

    Raises:
        CheckpointError: it cannot be read.
        ModelError: it is no text, or too large for a template.
    """
    raw = read_input(path, MAX_TEMPLATE_BYTES)
    if len(raw) > MAX_TEMPLATE_BYTES:
        raise SideFileError(
            f"{path}: is larger than {MAX_TEMPLATE_BYTES} bytes, which no chat template is; give another file"
        )
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise SideFileError(f"{path}: is no UTF-8 text, which a chat template is; give another file") from None


def processor_settings(directory: Path) -> tuple[Path, JsonObject]:
    """The image processor's settings and the file that has them.

    Raises:
        ModelError: no file has them.
        CheckpointError: a file cannot be read.
    """
    own = directory / PREPROCESSOR
    if own.is_file():
        return own, read_json_object(own)
    whole = directory / PROCESSOR
    inner = _read(whole).get("image_processor")
    if isinstance(inner, dict):
        return whole, inner
    raise SideFileError(f"{directory}: has no {PREPROCESSOR}; copy it from the model's release")


def _known_classes(document: Mapping[str, JsonValue], family: Family) -> JsonObject:
    """The document with the classes of processors by the names that transformers 4.53.0 has for them, in sections too."""
    known: JsonObject = {}
    for key, value in document.items():
        if key in _CLASS_KEYS and isinstance(value, str):
            known[key] = family.older_classes.get(value, value)
        elif key in _PARTS and isinstance(value, dict):
            known[key] = _known_classes(value, family)
        else:
            known[key] = value
    return known


def _read(path: Path) -> JsonObject:
    return read_json_object(path) if path.exists() else {}
