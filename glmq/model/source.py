"""Whether a float checkpoint holds what its config.json promises, from headers alone."""

from __future__ import annotations

from glmq.checkpoint.header import FLOAT_CODES
from glmq.checkpoint.reader import Checkpoint
from glmq.errors import CheckpointError
from glmq.model.config import ModelConfig


def check_source(source: Checkpoint, config: ModelConfig) -> None:
    """Check that every tensor of the model is there, float, with the shape that config.json asks for.

    Other tensors may lie beside them, but none of the model's own modules may have more than its own.

    Raises:
        CheckpointError: a tensor is missing, has another shape, is not float, or belongs to no model of this family.
    """
    expected = config.family.shapes(config)
    missing = [name for name in expected if name not in source]
    if missing:
        raise CheckpointError(
            f"{source.directory}: {len(missing)} of the model's {len(expected)} tensors are missing, "
            f"the first is {missing[0]!r}; download the checkpoint again"
        )
    for name, shape in expected.items():
        if source[name].shape != shape:
            raise CheckpointError(
                f"{source.file_of(name).name}: tensor {name!r} has shape {source[name].shape}, "
                f"config.json asks for {shape}; take both from the same release"
            )
        if source[name].dtype not in FLOAT_CODES:
            raise CheckpointError(
                f"{source.file_of(name).name}: tensor {name!r} is {source[name].dtype}, one of {', '.join(FLOAT_CODES)} "
                "is needed; give the float weights, not a quantized checkpoint"
            )
    owners = {name.rpartition(".")[0] for name in expected}
    for name in source:
        if name not in expected and name.rpartition(".")[0] in owners:
            raise CheckpointError(
                f"{source.file_of(name).name}: tensor {name!r} is no part of a {config.family.title}; "
                "give the float release's weights"
            )
