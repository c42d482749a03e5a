"""The small files beside the weights: config.json with the fewest edits, and copies of the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

import xxhash

from glmq.checkpoint.disk import make_directory, read_input, refuse_dangling
from glmq.checkpoint.json_file import JsonObject, JsonValue, write_whole
from glmq.errors import CheckpointError, DamagedError
from glmq.spec import Activation, FloatDtype, QuantType, assert_never

SIDE_FILES: Final = (
    "generation_config.json", "configuration.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.json", "chat_template.jinja",
    "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt",
    "configuration_*.py", "modeling_*.py", "processing_*.py", "tokenization_*.py",
    "image_processing_*.py", "video_processing_*.py",
)  # fmt: skip
"""What engines, transformers and ModelScope read beside the weights of this class, and licences. Nothing else is copied:
training leaves optimizer states, scripts and logs in the same folder."""
PROCESSOR_FILES: Final = ("tokenizer.json", "preprocessor_config.json")
"""Engines build their processor from them."""
_NEEDED_FILES: Final = (*PROCESSOR_FILES, "tokenizer_config.json")
"""No engine starts without them, so the cure for a damaged one is never to remove it."""
_MAX_SIDE_FILE_BYTES: Final = 100_000_000
"""The serving engine refuses larger JSON files, and no tokenizer comes near it."""

_sound: set[bytes] = set()
"""xxh3-128 of contents that were found to be JSON: a run asks several times, and a tokenizer has 20 MB."""


@dataclass(frozen=True, slots=True)
class MindieSettings:
    """What `quantization_config` of the MindIE form says beside the type: how the weights were made."""

    group_size: int
    """Input columns per second-stage scale; 0 unless some linear has two stages. All that the engine reads."""
    act_method: int
    """How activation ranges were chosen, in the numbers of the vendor's tool."""
    anti_method: str
    """How outlier input channels were smoothed, in the words of --anti_method; `smoothquant` for --do_smooth."""
    is_lowbit: bool
    """The weights have 4 bits by one of the low-bit rules, by row or by group."""
    open_outlier: bool
    """Weight outliers keep their value."""

    def document(self, quant_type: QuantType) -> JsonObject:
        """`quantization_config`, in the key order of the vendor's tool."""
        match quant_type.spec.activation:
            case Activation.STATIC | Activation.NONE:
                is_dynamic = False
            case Activation.PER_TOKEN:
                is_dynamic = True
            case other:
                assert_never(other)
        return {
            "group_size": self.group_size,
            "act_method": self.act_method,
            "anti_method": self.anti_method,
            "is_lowbit": self.is_lowbit,
            "mm_tensor": False,
            "w_sym": True,
            "open_outlier": self.open_outlier,
            "is_dynamic": is_dynamic,
            "w_bit": quant_type.spec.weight_bits,
            "a_bit": 8,
            "dev_type": "npu",
        }


def edit_config(
    source: Mapping[str, JsonValue], *, dtype: FloatDtype, quant_type: QuantType, settings: MindieSettings | None
) -> JsonObject:
    """The config.json of the quantized model: `source` with the dtypes set and the quantization keys put right.

    Sets `torch_dtype` and `text_config.dtype`, which the engines read, and every other dtype key that is there.
    `quantize` and `quantization_config` are removed in ascendV1 (one engine would read the latter as the whole
    description) and set in the MindIE form. Key order is kept; new keys come last.

    Args:
        source: contents of the float model's config.json, in a layout that has `text_config`.
        dtype: of the written model.
        quant_type: of the written model.
        settings: of the MindIE form; None for ascendV1, which has none.

    Raises:
        CheckpointError: `source` has no text_config.
    """
    text, vision = source.get("text_config"), source.get("vision_config")
    if not isinstance(text, Mapping):
        raise CheckpointError(
            "config.json: has no text_config, where the engine looks for the dtype; give the nested layout"
        )
    edited = _set_dtypes(source, dtype) | {"torch_dtype": dtype.value}
    edited["text_config"] = _set_dtypes(text, dtype) | {"dtype": dtype.value}
    if isinstance(vision, Mapping):
        edited["vision_config"] = _set_dtypes(vision, dtype)
    if settings is None:
        edited.pop("quantize", None)
        edited.pop("quantization_config", None)
    else:
        edited["quantize"] = quant_type.tag
        edited["quantization_config"] = settings.document(quant_type)
    return edited


def _set_dtypes(section: Mapping[str, JsonValue], dtype: FloatDtype) -> JsonObject:
    return {key: dtype.value if key in ("dtype", "torch_dtype") else value for key, value in section.items()}


def list_side_files(source_dir: Path) -> list[str]:
    """Names of the small files that belong into any checkpoint made from `source_dir`, sorted.

    Those of SIDE_FILES: settings of generation, processor and tokenizer, chat templates, the model's own code, licences. Not
    config.json (which is edited), not what belongs to other weights (index, description, checksums), nothing above 100 MB.

    Raises:
        CheckpointError: one of them is a link that leads nowhere or out of the folder, cannot be read, is a Git LFS pointer,
            or no JSON by whose name it should be.
    """
    names = [name for name in os.listdir(source_dir) if any(fnmatchcase(name, pattern) for pattern in SIDE_FILES)]
    found = sorted(name for name in names if _is_side_file(source_dir / name))
    for name in found:
        _check_readable(source_dir / name)
    return found


def _is_side_file(path: Path) -> bool:
    refuse_dangling(path)
    if path.is_symlink():
        check_link(path)
    return path.is_file() and path.stat().st_size <= _MAX_SIDE_FILE_BYTES


def _check_readable(path: Path) -> None:
    """Raise CheckpointError for a file that engines could not read either."""
    raw = read_input(path, _MAX_SIDE_FILE_BYTES)
    if path.suffix == ".json" and (digest := xxhash.xxh3_128_digest(raw)) not in _sound:
        try:
            json.loads(raw)
        except (ValueError, RecursionError) as error:
            removal = "" if path.name in _NEEDED_FILES else ", or remove it if nothing needs it"
            raise DamagedError(f"{path}: is not JSON ({f'{error}':.100}); download it again{removal}") from None
        _sound.add(digest)


def check_link(path: Path) -> None:
    """Raise CheckpointError if a link leads out of its folder, unless that is a snapshot of a hub cache and the link leads
    into the cache's own blobs: the contents of any other file of the machine would come into the output.
    """
    folder, place = path.parent.resolve(), path.resolve()
    blobs = folder.parent.parent / "blobs"
    if folder in place.parents or (folder.parent.name == "snapshots" and place.parent == blobs):
        return
    raise CheckpointError(
        f"{path}: is a link to {place}, outside of its folder, so its contents are not copied into the output; "
        "put a copy of the file in its place"
    )


def copy_side_files(source_dir: Path, out_dir: Path) -> list[str]:
    """Copy the side files of `source_dir` into `out_dir`: contents only, links resolved, mode 0640.

    Returns:
        Their names, sorted.

    Raises:
        CheckpointError: a file cannot be read, or is a link that leads out of the folder.
        SpaceError: the disk is full.
    """
    make_directory(out_dir)
    names = list_side_files(source_dir)
    for name in names:
        write_whole(out_dir / name, read_input(source_dir / name, _MAX_SIDE_FILE_BYTES))
    return names
