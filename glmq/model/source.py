"""A float checkpoint as people have it -> the tensors of the model that its config.json promises, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glmq.checkpoint.dequantized import DequantizedCheckpoint, Scales, read_scales
from glmq.checkpoint.foreign import (
    COMPANIONS,
    SCALE_SUFFIXES,
    ForeignMethod,
    block_size,
    find_method,
    said_method,
    scale_of,
)
from glmq.checkpoint.header import FLOAT_CODES
from glmq.checkpoint.json_file import JsonObject, read_json_object
from glmq.checkpoint.reader import STORED_CODES, Checkpoint
from glmq.checkpoint.weight_files import left_beside
from glmq.errors import CheckpointError, ForeignError
from glmq.model.config import ModelConfig, read_config
from glmq.model.naming import find_naming
from glmq.wording import counted

SHOWN_NAMES: Final = 3


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """How a float checkpoint is read where it is not as it was released."""

    dequantize: bool = False
    """Take FP8 weights with scales as the float numbers that they stand for."""
    keep_extra: bool = False
    """Keep tensors that are no part of the model."""


@dataclass(frozen=True, slots=True)
class FloatSource:
    """A float checkpoint under the model's own names."""

    checkpoint: Checkpoint
    config: ModelConfig
    notes: tuple[str, ...]
    """What was not as released, and what was made of it: a sentence each."""


def open_source(directory: Path, options: SourceOptions = SourceOptions()) -> FloatSource:
    """Open the float checkpoint in `directory`: every tensor of the model is there, float, and shaped as config.json says.

    Names of trainers are brought into the model's own; `lm_head.weight` of a model that ties it to the embeddings is the
    embeddings'; tensors that are no part of the model are left out unless they are to be kept.

    Raises:
        ModelError: no model folder, or not one of the family.
        CheckpointError: a tensor is missing, has another shape or is not float; an adapter; a checkpoint that another tool
            has quantized.
    """
    config = read_config(directory)
    with Checkpoint.open(directory) as stored:
        opening = _Opening(stored, config, read_json_object(directory / "config.json"), options)
        checkpoint = opening.checkpoint()
    return FloatSource(checkpoint, config, tuple(opening.notes))


class _Opening:
    """One checkpoint while it is looked through; `notes` grow with what is found."""

    def __init__(self, stored: Checkpoint, config: ModelConfig, raw: JsonObject, options: SourceOptions) -> None:
        self._stored, self._config, self._raw, self._options = stored, config, raw, options
        self.notes = [
            f"{name} lies beside the weights and is not read: {what}"
            for name, what in left_beside(stored.directory).items()
        ]

    def checkpoint(self) -> Checkpoint:
        """The tensors that are used, under the model's names."""
        stored, config = self._stored, self._config
        method = self._method()
        names = self._names()
        self._tie(names)
        expected = config.family.shapes(config)
        scales = {} if method is None else self._scales(names, method)
        spent = {
            f"{name.removesuffix('weight')}{suffix}" for name in scales for suffix in (*SCALE_SUFFIXES, *COMPANIONS)
        }
        extra = [name for name in names if name not in expected and name not in spent]
        _refuse_other_layers(stored.directory, extra, config)
        if extra and not self._options.keep_extra:
            self.notes.append(
                f"{counted(len(extra), 'tensor is', 'tensors are')} no part of the model and left out: {_listed(extra)}; "
                "--keep-extra keeps what no engine reads"
            )
        left_out = spent if self._options.keep_extra else {*spent, *extra}
        selected = stored.selected({name: own for name, own in names.items() if name not in left_out})
        found = DequantizedCheckpoint(selected, scales) if scales else selected
        check_source(found, config, [names[name] for name in extra])
        for name in extra if self._options.keep_extra else ():
            if stored[names[name]].dtype not in STORED_CODES:
                raise CheckpointError(
                    f"{stored.file_of(names[name]).name}: tensor {names[name]!r} is {stored[names[name]].dtype}, which glmq "
                    "does not write; leave out what is no part of the model, without --keep-extra"
                )
        _refuse_parts_of_modules(stored, {name: names[name] for name in extra}, config)
        return found

    def _method(self) -> ForeignMethod | None:
        """The method that the checkpoint is quantized with, if glmq can undo it. Raises CheckpointError for the others."""
        method = find_method(self._stored, self._raw)
        if method is None:
            said = said_method(self._raw)
            if said is not None:
                self.notes.append(
                    f"config.json has a quantization_config ({said}), but the weights are float: it is left out"
                )
            return None
        if not method.is_fp8:
            raise ForeignError(
                f"{self._stored.directory}: is quantized with {method.title} (tensor {method.tensor!r}), float weights are "
                "needed; give the float release"
            )
        if scale_of(method.tensor, self._stored) is None:
            raise self._without_scales(method.tensor)
        if not self._options.dequantize:
            raise ForeignError(
                f"{self._stored.directory}: is quantized with {method.title} (tensor {method.tensor!r}); pass --dequantize "
                "to take its weights as the float numbers that they stand for, or give the float release"
            )
        return method

    def _names(self) -> dict[str, str]:
        try:
            naming = find_naming(self._stored.names(), self._config.family, self._config.family.shapes(self._config))
        except CheckpointError as error:
            raise CheckpointError(f"{self._stored.directory}: {error}") from None
        if naming.changed is not None:
            theirs, own = naming.changed
            self.notes.append(
                f"tensors are named as trainers leave them: {theirs} is read and written as {own}, and so on"
            )
        return dict(naming.names)

    def _tie(self, names: dict[str, str]) -> None:
        """Let lm_head's weight be the embeddings' where config.json says so and it is not stored."""
        family = self._config.family
        head, embedding = f"{family.lm_head}.weight", f"{family.text}.embed_tokens.weight"
        if not self._config.ties_embeddings:
            return
        if head in names:
            self.notes.append(
                f"config.json says tie_word_embeddings, but {head} is stored: it is used, and the output says false"
            )
        elif embedding in names:
            names[head] = names[embedding]
            self.notes.append(
                f"{head} is tied to the embeddings: the output has it as a tensor of its own, and tie_word_embeddings false"
            )

    def _without_scales(self, stored: str) -> CheckpointError:
        """The sentence for a tensor, by its name in the files, whose integers or FP8 numbers nothing gives a size."""
        return ForeignError(
            f"{self._stored.file_of(stored)}: tensor {stored!r} is {self._stored[stored].dtype}, but its scales "
            f"({' or '.join(SCALE_SUFFIXES)}) are not there, without which its values mean nothing; "
            "download the checkpoint again, or give the float release"
        )

    def _scales(self, names: Mapping[str, str], method: ForeignMethod) -> dict[str, Scales]:
        """The scales of every FP8 weight, by the model's name for it."""
        stored, block = self._stored, block_size(self._raw)
        found: dict[str, Scales] = {}
        for name, own in names.items():
            info = stored[own]
            if info.dtype in FLOAT_CODES or not own.endswith(".weight") or len(info.shape) != 2:
                continue
            scale = scale_of(own, stored)
            if scale is None:
                raise self._without_scales(own)
            found[name] = read_scales(stored, own, scale, block)
        self.notes.append(f"{len(found)} weights are {method.title}: they are multiplied by their scales, in float32")
        return found


def check_source(source: Checkpoint, config: ModelConfig, others: Sequence[str]) -> None:
    """Check that every tensor of the model is there, float, with the shape that config.json asks for.

    Args:
        source: of the tensors that are used.
        config: of the model.
        others: names of the tensors that the model does not have.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is not float.
    """
    expected = config.family.shapes(config)
    missing = [name for name in expected if name not in source]
    if missing == [f"{config.family.lm_head}.weight"]:
        raise CheckpointError(
            f"{source.directory}: has no {missing[0]!r}, and config.json does not tie it to the embeddings; set "
            "tie_word_embeddings to true there, beside hidden_size, if the model does, or save the model with its head"
        )
    if missing:
        found = ""
        if others:
            count = counted(len(others), "that is", "that are")
            found = f" (it has {count} no part of a {config.family.title}, {_listed(others)})"
        raise CheckpointError(
            f"{source.directory}: {len(missing)} of the model's {len(expected)} tensors are missing, "
            f"the first is {missing[0]!r}{found}; "
            + ("give the checkpoint with the names of the release" if found else "download the checkpoint again")
        )
    _check_vocabulary(source, config)
    for name, shape in expected.items():
        if source[name].shape != shape:
            raise CheckpointError(
                f"{source.file_of(name).name}: tensor {name!r} has shape {source[name].shape}, "
                f"config.json asks for {shape}; take both from the same release"
            )
        if source.dtype_read(name) not in FLOAT_CODES:
            raise ForeignError(
                f"{source.file_of(name).name}: tensor {name!r} is {source[name].dtype}, one of {', '.join(FLOAT_CODES)} "
                "is needed; give the float weights, not a quantized checkpoint"
            )


def _check_vocabulary(source: Checkpoint, config: ModelConfig) -> None:
    """Raise CheckpointError where the embeddings were resized and config.json was not, or only one of the two was."""
    family = config.family
    rows = {name: source[f"{name}.weight"].shape[:1] for name in (f"{family.text}.embed_tokens", family.lm_head)}
    sizes = {size for (size,) in rows.values()} if all(rows.values()) else {config.vocab_size}
    if sizes == {config.vocab_size}:
        return
    if len(sizes) == 1:
        raise CheckpointError(
            f"{source.directory}: embeddings and lm_head have {sizes.pop()} rows, config.json says vocab_size "
            f"{config.vocab_size}: the weights were resized, and both agree; set vocab_size to their number"
        )
    listed = ", ".join(f"{name} {size}" for name, (size,) in rows.items())
    raise CheckpointError(
        f"{source.directory}: of embeddings and lm_head only one was resized ({listed} rows, vocab_size {config.vocab_size} "
        "in config.json); save the model again with resize_token_embeddings"
    )


def _refuse_other_layers(directory: Path, extra: Sequence[str], config: ModelConfig) -> None:
    """Raise CheckpointError where the weights have whole layers that config.json does not count.

    A layer with tensors of its own beside them predicts further tokens; like any other extra tensor it is left out.
    """
    family, expected = config.family, config.family.shapes(config)
    for prefix, key, count in (
        (f"{family.text}.layers.", "num_hidden_layers", config.layers),
        (f"{family.vision}.blocks.", "vision_config.depth", config.vision_depth),
    ):
        wanted = {name.removeprefix(f"{prefix}0.") for name in expected if name.startswith(f"{prefix}0.")}
        layers: dict[str, set[str]] = {}
        for name in extra:
            if name.startswith(prefix):
                number, _, rest = name.removeprefix(prefix).partition(".")
                layers.setdefault(number, set()).add(rest)
        more = sum(found == wanted for found in layers.values())
        if more:
            raise CheckpointError(
                f"{directory}: the weights have {count + more} whole {prefix.rstrip('.')}, config.json says {key} {count}; "
                "take both from the same release"
            )


def _refuse_parts_of_modules(stored: Checkpoint, extra: Mapping[str, str], config: ModelConfig) -> None:
    """Raise CheckpointError if one of the model's own modules has more than its own: what it does cannot be left out."""
    owners = {name.rpartition(".")[0] for name in config.family.shapes(config)}
    for name, own in extra.items():
        if name.rpartition(".")[0] in owners:
            raise CheckpointError(
                f"{stored.file_of(own).name}: tensor {own!r} is no part of a {config.family.title}; "
                "give the float release's weights"
            )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
