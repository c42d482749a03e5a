"""What `glmq compress` takes: an un-sharded W8A8S checkpoint of a GLM-4.1V. Everything else is refused by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glmq.checkpoint.ascend import decode_deq_scale, linear_specs
from glmq.checkpoint.description import Description, read_description
from glmq.checkpoint.json_file import JsonObject
from glmq.checkpoint.reader import Checkpoint
from glmq.checkpoint.sidecar import check_link
from glmq.compression.manifest import MANIFEST, read_manifest
from glmq.engines import NOT_COMPRESSED
from glmq.errors import CheckpointError, WrongFolderError
from glmq.model.config import FAMILY, ModelConfig, read_config
from glmq.spec import FloatDtype, Form, QuantType

_COMPRESSIBLE: Final = re.compile(
    rf"{re.escape(FAMILY.text)}\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate_up|down)_proj)"
)
_HOW: Final = (
    "make one from the float weights with `glmq quantize --w_bit 4 --is_lowbit True --use_sigma True "
    "--torch_dtype fp16`"
)


@dataclass(frozen=True, slots=True)
class Source:
    """A W8A8S checkpoint whose tensors are all there, described, and shaped as config.json says."""

    checkpoint: Checkpoint
    config: ModelConfig
    description: Description
    linears: tuple[str, ...]
    """The quantized linears, in natural order."""


def open_source(directory: Path) -> Source:
    """Open and check the checkpoint in `directory`: headers, JSON files and the small tensors; no weight is read.

    Raises:
        CheckpointError: not a W8A8S checkpoint (the sentence says what it is), or one that contradicts itself.
        ModelError: not a GLM-4.1V.
    """
    if not directory.is_dir():
        raise WrongFolderError(f"{directory}: is not a folder; give the folder of the W8A8S weights")
    if (directory / MANIFEST).exists():
        manifest = read_manifest(directory)
        raise WrongFolderError(
            f"{directory}: is compressed already ({manifest.codec.value}, world size {manifest.world}); "
            "give the W8A8S folder it was made from, or restore that with --decompress"
        )
    if any(directory.glob("part*-of-*")):
        raise WrongFolderError(
            f"{directory}: holds the parts of single ranks; give the un-sharded W8A8S folder they were made from"
        )
    for path in directory.iterdir():  # all of them are kept in the compressed folder
        if path.is_symlink() and path.suffix != ".safetensors":
            check_link(path)
    config = read_config(directory)
    description = _read_description(directory, config.nested)
    checkpoint = Checkpoint.open(directory)
    try:
        linears = _check_tensors(checkpoint, config, description)
    except BaseException:
        checkpoint.close()
        raise
    return Source(checkpoint, config, description, linears)


def _read_description(directory: Path, config: JsonObject) -> Description:
    description = read_description(directory)
    if description is None:
        dtype = config.get("torch_dtype", config.get("dtype", "dtype unknown"))
        raise WrongFolderError(
            f"{directory}: holds float weights ({dtype}), it has no "
            f"quant_model_description.json; W8A8S weights are needed: {_HOW}"
        )
    quant_type = description.model_quant_type
    if quant_type == QuantType.W8A8SC.value:
        raise WrongFolderError(
            f"{directory}: is W8A8SC, which is compressed already; give the W8A8S folder it was made from"
        )
    if quant_type != QuantType.W8A8S.value:
        raise WrongFolderError(f"{directory}: is {quant_type}, but only W8A8S can be compressed; {_HOW}")
    if description.form is Form.MINDIE:
        raise WrongFolderError(f"{directory}: is W8A8S in the older MindIE form; {NOT_COMPRESSED}")
    if config.get("torch_dtype") != FloatDtype.FP16.value:
        raise WrongFolderError(
            f"{directory}: config.json says {config.get('torch_dtype')!r}, but W8A8S exists in float16 only, as the engine "
            f"needs it; {_HOW}"
        )
    return description


def _check_tensors(checkpoint: Checkpoint, config: ModelConfig, description: Description) -> tuple[str, ...]:
    """The quantized linears; every tensor is described, present and shaped as it must be."""
    directory = checkpoint.directory
    for name in checkpoint:
        if not checkpoint[name].shape or 0 in checkpoint[name].shape:
            raise CheckpointError(
                f"{directory}: tensor {name!r} has shape {checkpoint[name].shape}, which no engine takes"
            )
        if name not in description.tensors:
            raise CheckpointError(
                f"{directory}: tensor {name!r} is not in quant_model_description.json; take both from the same release"
            )
    for name, shape in config.family.shapes(config).items():
        if checkpoint.info(name).shape != shape:
            raise CheckpointError(
                f"{directory}: tensor {name!r} has shape {checkpoint[name].shape}, config.json asks for {shape}; "
                "take both from the same release"
            )
    linears = []
    for name in checkpoint:
        base, _, suffix = name.rpartition(".")
        if suffix != "weight":
            continue
        is_int8, quant_type = checkpoint[name].dtype == "I8", description.tensors[name]
        if is_int8 != (quant_type == QuantType.W8A8S.value):
            raise CheckpointError(
                f"{directory}: tensor {name!r} is {checkpoint[name].dtype} but described as {quant_type}; "
                "take both from the same release"
            )
        if is_int8:
            _check_linear(checkpoint, base)
            linears.append(base)
    if not linears:
        raise CheckpointError(f"{directory}: is described as W8A8S, but no linear is quantized; {_HOW}")
    return tuple(linears)


def _check_linear(checkpoint: Checkpoint, name: str) -> None:
    if not _COMPRESSIBLE.fullmatch(name):
        raise CheckpointError(
            f"{checkpoint.directory}: {name} is quantized, but the engine takes compressed weights only for q, k, v, o, "
            "gate_up and down of the text layers; keep it float"
        )
    rows, cols = checkpoint[f"{name}.weight"].shape
    wanted = linear_specs(
        name,
        QuantType.W8A8S,
        (rows, cols),
        has_bias=False,
        dtype=FloatDtype.FP16,
        group_size=0,
        form=Form.ASCEND_V1,
        row_parallel=False,
    )
    for spec in wanted:
        if checkpoint.info(spec.name).shape != spec.shape:
            raise CheckpointError(
                f"{checkpoint.directory}: tensor {spec.name!r} has shape {checkpoint[spec.name].shape}, wanted {spec.shape}"
            )
    decode_deq_scale(f"{name}.deq_scale", checkpoint.read(f"{name}.deq_scale"))
