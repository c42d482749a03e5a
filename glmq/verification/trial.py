"""How long cases will take to go through a checkpoint: one of them through one block of each tower, scaled to all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final, TypeVar

import torch
from torch import Tensor

from glmq.model.cache import TokenCache
from glmq.model.config import ModelConfig
from glmq.model.inputs import ModelInputs
from glmq.model.streamed import BlockCall, StreamedModel
from glmq.progress import StepPlan
from glmq.verification.cases import Case
from glmq.verification.int8_model import placed

Result = TypeVar("Result")
USUAL_RATE: Final = 1e10
"""Weights times tokens a second, of a small machine."""
TOKENS_TRIED: Final = 5
EVICTING_BYTES: Final = 2**26
"""What is written between two of them."""
COLD_SECONDS: Final = 0.5
"""A run that takes longer is hardly slower for being the first."""


@dataclass(frozen=True, slots=True)
class Load:
    """What goes through a model."""

    tokens: int
    """Of all cases together."""
    patches: int
    """Of all their pictures."""
    largest: ModelInputs
    """The case with the most tokens among those with a picture, or among all where none has one."""
    encoding_seconds: float
    """That encoding all of them takes."""

    @classmethod
    def of_one(cls, inputs: ModelInputs) -> Load:
        """A single case, which is encoded already."""
        return cls(inputs.tokens, _patches(inputs), inputs, 0.0)


def weigh_cases(cases: Sequence[Case]) -> Load:
    """Encode every case, of which one at a time is held, beside the largest.

    Args:
        cases: at least one.

    Raises:
        SampleError: a case that the model cannot take.
    """
    started, tokens, patches = time.perf_counter(), 0, 0
    largest: ModelInputs | None = None
    for case in cases:
        inputs = case.encode()
        tokens, patches = tokens + inputs.tokens, patches + _patches(inputs)
        if largest is None or _rank(inputs) > _rank(largest):
            largest = inputs
    assert largest is not None
    return Load(tokens, patches, largest, time.perf_counter() - started)


def try_forward(model: StreamedModel, load: Load) -> tuple[StepPlan, ...]:
    """Run the largest case through one block of each tower.

    Time is taken to grow with the tokens, and in the vision tower with the patches.

    Returns:
        The seconds that all cases need in each block of the vision tower (if there are pictures), in the merger and in each
        text layer; the first has the encoding too.

    Raises:
        CheckpointError: a tensor is missing, not finite, has another shape or contradicts others.
    """
    config, family, inputs = model.config, model.config.family, load.largest
    by_patch, by_token = load.patches / max(_patches(inputs), 1), load.tokens / inputs.tokens
    start, block, vision = load.encoding_seconds, 0.0, None
    if inputs.pixel_values is not None:
        seconds, vision = _time(model, family.vision_stem, lambda: model.vision_call(inputs), by_patch)
        start += seconds
        block = _time_block(model, family.vision_block(config, 0).name, vision, by_patch)
    with model.embedding_rows(inputs.ids):
        tail = () if vision is None else family.vision_tail
        merger, call = _time(model, tail, lambda: model.text_call(inputs, vision), by_token)
    layer = _time_block(model, family.text_block(config, 0).name, call, by_token)
    return _steps(config, load, lambda kind: {"vision": block, "merger": merger, "text": layer}[kind], start)


def time_of_token(model: StreamedModel, layer: str) -> float:
    """Seconds that a text layer, which must be placed, takes for one token: the median of several, the first being slow.

    In an answer the other layers come between two tokens, so its weights come from memory, not from the processor's cache.
    """
    others = torch.ones(EVICTING_BYTES // 4)
    cache = TokenCache(model.config, [1], TOKENS_TRIED, device=model.device, dtype=model.dtype)
    taken = []
    for _ in range(TOKENS_TRIED):
        others.add_(1)
        call = model.token_call(torch.tensor([0]), torch.tensor([1]), cache.visible())
        started = time.perf_counter()
        model.replay(layer, model.cached(call, cache))
        taken.append(time.perf_counter() - started)
        cache.advance()
    return median(taken)


def guess_forward(config: ModelConfig, load: Load) -> tuple[StepPlan, ...]:
    """The same without a trial, for small models: by the size of the blocks and the rate of a small machine."""
    family = config.family
    parts = {"vision": family.vision_block(config, 0), "merger": family.merger_block(config)}
    parts["text"] = family.text_block(config, 0)
    weights = {
        kind: sum(linear.rows * linear.cols for group in part.groups for linear in group.linears)
        for kind, part in parts.items()
    }
    rows = {"vision": load.patches, "merger": load.tokens, "text": load.tokens}
    return _steps(config, load, lambda kind: weights[kind] * rows[kind] / USUAL_RATE, load.encoding_seconds)


def _steps(config: ModelConfig, load: Load, seconds: Callable[[str], float], start: float) -> tuple[StepPlan, ...]:
    """One for each block, with what its kind takes; the first of them with what comes before it."""
    family = config.family
    blocks = (*(family.vision_blocks(config) if load.patches else ()), *family.text_blocks(config))
    kinds = [(block.name, family.kind_of(block.name)) for block in blocks]
    steps = [StepPlan(name, kind, seconds(kind)) for name, kind in kinds]
    steps[0] = replace(steps[0], seconds=steps[0].seconds + start)
    return tuple(steps)


def _time_block(model: StreamedModel, name: str, call: BlockCall, share: float) -> float:
    """Seconds of a block, which `call` is then behind."""

    def run() -> Tensor:
        return model.replay(name, call)

    seconds, call.hidden = _time(model, (name,), run, share)
    return seconds


def _time(model: StreamedModel, names: Sequence[str], run: Callable[[], Result], share: float) -> tuple[float, Result]:
    """Seconds to read the named modules and to run over `share` times as much as `run` does; and what that gives."""
    started = time.perf_counter()
    with placed(model, *names):
        read, started = time.perf_counter() - started, time.perf_counter()
        result = run()
        taken = time.perf_counter() - started
        if taken < COLD_SECONDS:
            started = time.perf_counter()
            result = run()
            taken = time.perf_counter() - started
    return read + share * taken, result


def _patches(inputs: ModelInputs) -> int:
    return 0 if inputs.grid is None else int(inputs.grid.prod())


def _rank(inputs: ModelInputs) -> tuple[bool, int]:
    return inputs.pixel_values is not None, inputs.tokens
