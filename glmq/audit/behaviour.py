"""What a checkpoint does: captions of a small model, and float against quantized block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from glmq.audit.int8_model import open_model, placed
from glmq.checkpoint.reader import Checkpoint
from glmq.model.blocks import StreamedModel
from glmq.model.glm4v import LM_HEAD
from glmq.model.inputs import ModelInputs


@contextmanager
def whole_model(directory: Path) -> Iterator[StreamedModel]:
    """A checkpoint folder, float or quantized, wholly in memory: float32, int8 linears in the NPU's own arithmetic.

    For small models, such as the embedded one: nothing is streamed.

        with whole_model(folder) as model:
            print(preprocessor.decode(generate(model, preprocessor.encode(image, prompt, None), 60)))

    Raises:
        ModelError: config.json is not a GLM-4.1V's.
        CheckpointError: a tensor is missing, has another shape, is not finite, or is compressed.
    """
    with Checkpoint.open(directory) as source:
        model = open_model(source)
        with placed(model, "model", LM_HEAD):
            yield model


@torch.no_grad()
def generate(model: StreamedModel, inputs: ModelInputs, max_tokens: int) -> list[int]:
    """The greedy continuation of `inputs` by a wholly placed model: at most `max_tokens` ids, the end token left out."""
    ends = model.config.eos_token_ids
    output = model.model.generate(  # type: ignore[operator]
        **(inputs.model_kwargs(model) | {"use_cache": True}),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
    )
    made: list[int] = output[0, inputs.tokens :].tolist()
    return made[:-1] if made and made[-1] in ends else made
