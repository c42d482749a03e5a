"""The last hidden states of one checkpoint, float or quantized, over samples: what lm_head is given, block by block in memory.

The same numbers as in `behaviour`, which runs two checkpoints side by side and measures every linear on the way. Here each runs
alone, so that one float model stands against many candidates and runs once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from glmq.checkpoint.reader import Checkpoint
from glmq.model.config import ModelConfig
from glmq.model.inputs import ModelInputs
from glmq.model.streamed import BlockCall, StreamedModel
from glmq.progress import BlockStep, Step, resident_bytes
from glmq.records import BlockDone
from glmq.verification.cases import Case, count_blocks
from glmq.verification.int8_model import open_model, placed
from glmq.verification.predictions import Head, Predictions, compare_predictions, scored_places, target_ids


@dataclass(frozen=True, slots=True)
class LastStates:
    """What the last norm gives at every position whose prediction counts."""

    hidden: Tensor
    """float32 [T, width]."""
    targets: Tensor
    """int64 [T]: the answer's token that each position should predict; -1 without an answer."""
    counts: tuple[int, ...]
    """Positions of each sample, in their order."""


def run_forward(
    source: Checkpoint, config: ModelConfig, cases: Sequence[Case], step: Step
) -> Iterator[BlockDone | LastStates]:
    """Run the cases through a checkpoint; its int8 linears compute in the NPU's arithmetic.

    Args:
        source: float or quantized, not compressed.
        config: its configuration.
        cases: at least one.
        step: is told how far the block is that is under way.

    Yields:
        A record after each block of the vision tower (if there are images), the merger and each text layer; the last is the
        states.

    Raises:
        CheckpointError: a tensor is missing, not finite, has another shape or contradicts others.
        SampleError: a case that the model cannot take.
    """
    run = _Forward(open_model(source, config), cases, step)
    started = time.perf_counter()
    for index, name in enumerate(run.blocks()):
        now = time.perf_counter()
        yield BlockDone(name, index, run.total, now - started, resident_bytes())
        started = time.perf_counter()
    yield run.last_states()


def last_states(model: StreamedModel, hidden: Sequence[Tensor], inputs: Sequence[ModelInputs]) -> LastStates:
    """What the last norm gives, from what the last text layer gives.

    Args:
        model: whose norm it is.
        hidden: float [1, tokens, width] of each case.
        inputs: of each case; pixels are not looked at.
    """
    name, places = f"{model.config.family.text}.norm", [scored_places(one) for one in inputs]
    with placed(model, name), torch.no_grad():
        norm = model.module(name)
        rows = [norm(states)[0, place] for states, place in zip(hidden, places, strict=True)]
    targets = [target_ids(one, place) for one, place in zip(inputs, places, strict=True)]
    return LastStates(torch.cat(rows).float(), torch.cat(targets), tuple(place.numel() for place in places))


def compare_states(
    reference: tuple[Checkpoint, LastStates],
    candidate: tuple[Checkpoint, LastStates],
    config: ModelConfig,
    cases: Sequence[Case],
) -> Predictions:
    """The tokens that two checkpoints predict, from the last states of both over the same cases."""
    first, second = (Head(source, config.family.lm_head) for source, _ in (reference, candidate))
    states = reference[1]
    samples = [(case.name, count) for case, count in zip(cases, states.counts, strict=True)]
    return compare_predictions(
        (first, second), (states.hidden, candidate[1].hidden), states.targets, samples, config.vocab_size
    )


class _Forward:
    """One run: the calls in flight, nothing else."""

    def __init__(self, model: StreamedModel, cases: Sequence[Case], step: Step) -> None:
        self._model, self._cases, self._step = model, cases, step
        self._config, self._family = model.config, model.config.family
        self._calls: dict[int, BlockCall] = {}
        self._inputs: dict[int, ModelInputs] = {}
        """By case, without pixels."""
        self._index = 0
        self._has_images = any(case.has_image for case in cases)
        self.total = count_blocks(model.config, self._has_images)

    def blocks(self) -> Iterator[str]:
        """Do the work; yields the name of each block when it is done."""
        if self._has_images:
            self._start_vision()
            for block, after in pairwise(self._family.vision_blocks(self._config)):  # the last is the merger
                yield self._replay(block.name, after.name)
        self._start_text()
        if self._has_images:
            yield self._done(self._family.merger_block(self._config).name)
        for block, after in pairwise((*self._family.text_blocks(self._config), self._family.head_block(self._config))):
            yield self._replay(block.name, after.name)

    def last_states(self) -> LastStates:
        """What the last norm gives; needs all blocks done."""
        order = range(len(self._cases))
        return last_states(self._model, [self._calls[i].hidden for i in order], [self._inputs[i] for i in order])

    def _start_vision(self) -> None:
        with placed(self._model, *self._family.vision_stem):
            for index, case in enumerate(self._cases):
                if case.has_image:
                    inputs = case.encode()
                    self._inputs[index] = inputs.without_pixels()
                    self._calls[index] = self._model.vision_call(inputs)

    def _start_text(self) -> None:
        model, vision = self._model, self._calls
        self._calls = {}
        with placed(model, *(self._family.vision_tail if vision else ())):
            for index, case in enumerate(self._cases):
                inputs = self._inputs[index] if case.has_image else self._inputs.setdefault(index, case.encode())
                with model.embedding_rows(inputs.ids):
                    self._calls[index] = model.text_call(inputs, vision.pop(index, None))

    def _replay(self, name: str, after: str) -> str:
        """Run a block, while the one after it is read ahead."""
        model, tokens, passed = self._model, sum(call.tokens for call in self._calls.values()), 0
        with placed(model, name):
            model.source.prefetch(one for one in model.source if one.startswith(f"{after}."))
            for done, call in enumerate(self._calls.values()):
                self._step(BlockStep(name, self._index, done, len(self._calls), "samples", passed / tokens))
                call.hidden = model.replay(name, call)
                passed += call.tokens
        return self._done(name)

    def _done(self, name: str) -> str:
        self._index += 1
        return name
