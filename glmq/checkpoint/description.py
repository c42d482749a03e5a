"""quant_model_description.json: which quantization type each tensor has. Read and written.

Two forms: ascendV1 (`quant_model_description.json`, with `version`) and the older MindIE one
(`quant_model_description_{type}.json`, without).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glmq.checkpoint.json_file import Fields, JsonObject, read_json_object, write_json
from glmq.errors import CheckpointError
from glmq.spec import Form, QuantType

ASCEND_V1: Final = "quant_model_description.json"
ASCEND_V1_VERSION: Final = "1.0.0"

FOREIGN_KEYS: Final = ("fa_quant_type", "kv_cache_type", "kv_quant_type", "indexer_quant_type", "reduce_quant_type")
"""Model-wide keys of other features. We never write them: an engine takes even a null `fa_quant_type` as "enabled"."""

_OWN_KEYS: Final = ("version", "model_quant_type", "group_size")
_NOTES: Final = ("metadata", "optional")
"""Model-wide keys of the vendor's one-command flow, which no engine reads."""


@dataclass(frozen=True, slots=True)
class Description:
    """The contents of a description file."""

    model_quant_type: str
    """Upper case, e.g. W8A8S."""
    version: str | None
    """None in the MindIE form."""
    group_size: int | None
    """Input columns per second-stage scale; None unless some linear is W4A8_DYNAMIC."""
    tensors: dict[str, str]
    """Tensor name -> quantization type or FLOAT, aliases included."""

    @property
    def form(self) -> Form:
        """Only ascendV1 has a version."""
        return Form.MINDIE if self.version is None else Form.ASCEND_V1


def description_name(model_quant_type: str, form: Form) -> str:
    """The file's name, e.g. `quant_model_description_w8a8s.json` in the MindIE form."""
    return f"quant_model_description_{model_quant_type.lower()}.json" if form is Form.MINDIE else ASCEND_V1


def form_of(path: Path) -> Form:
    """The form that a description file's name says."""
    return Form.ASCEND_V1 if path.name == ASCEND_V1 else Form.MINDIE


def find_descriptions(directory: Path) -> list[Path]:
    """Every description file in `directory`, of either form, sorted."""
    return sorted(directory.glob("quant_model_description*.json"))


def tensor_types(
    names: Iterable[str], linears: Mapping[str, QuantType], *, model_quant_type: QuantType, form: Form
) -> dict[str, str]:
    """The description's entry of each tensor.

    Args:
        names: every tensor of the checkpoint.
        linears: quantized linear -> its type. All its tensors have that type, but its float `.bias` is FLOAT.
        model_quant_type: given to the `.module.*` norm tensors of the MindIE form, although they are float.
        form: of the checkpoint.
    """
    types: dict[str, str] = {}
    for name in names:
        base, _, suffix = name.rpartition(".")
        if base in linears and suffix != "bias":
            types[name] = linears[base].value
        elif form is Form.MINDIE and base.endswith(".module"):
            types[name] = model_quant_type.value
        else:
            types[name] = QuantType.FLOAT.value
    return types


def write_description(directory: Path, description: Description) -> Path:
    """Write the description under the name that its form asks for; keys in the order of `tensors`."""
    document: JsonObject = {}
    if description.version is not None:
        document["version"] = description.version
    document["model_quant_type"] = description.model_quant_type
    if description.group_size is not None:
        document["group_size"] = description.group_size
    document.update(description.tensors)
    path = directory / description_name(description.model_quant_type, description.form)
    write_json(path, document, indent=2)
    return path


def read_description(directory: Path) -> Description | None:
    """The description in `directory`, of either form; None if there is none.

    Raises:
        CheckpointError: several files, or one that is malformed.
    """
    paths = find_descriptions(directory)
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise CheckpointError(
            f"{directory}: has {len(paths)} descriptions ({names}); remove those of other checkpoints"
        )
    return parse_description(paths[0], read_json_object(paths[0])) if paths else None


def parse_description(path: Path, document: JsonObject) -> Description:
    """Check the contents of the description file `path`.

    Raises:
        CheckpointError: no model_quant_type, or a version, group_size or tensor type of the wrong kind.
    """
    fields = Fields(document, str(path), lambda sentence: CheckpointError(f"{sentence}; write the file again"))
    quant_type = fields.text("model_quant_type")
    version = None if document.get("version") is None else fields.text("version")
    if version is not None and not re.fullmatch(r"[1-9]\d*\.\d+\.\d+", version):
        raise CheckpointError(f"{path}: version is {version!a:.60}, wanted one like '1.0.0'; write the file again")
    # No groups is 0 in the one-command flow.
    size = 0 if document.get("group_size") is None else fields.count("group_size")
    tensors = {name: fields.text(name) for name in fields if name not in (*_OWN_KEYS, *_NOTES, *FOREIGN_KEYS)}
    return Description(quant_type, version, size or None, tensors)
