"""A checkpoint, float or quantized, answers a question token by token, its integer linears computing as the NPU does.

The answer is greedy: the most likely token each time, so the same question has the same answer. Blocks that fit into the memory
that may be used stay there, others are read again for every token; the answer is the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import TracebackType

import torch
from torch import Tensor

from glmq.checkpoint.reader import Checkpoint
from glmq.model.cache import TokenCache
from glmq.model.config import ModelConfig
from glmq.model.greedy import HEAD_ROWS, fit_into, likeliest_tokens
from glmq.model.inputs import ModelInputs
from glmq.model.streamed import BlockCall
from glmq.progress import StepPlan, resident_bytes
from glmq.records import BlockDone
from glmq.verification.int8_model import Int8Linear, open_model, placed
from glmq.verification.predictions import Head
from glmq.verification.trial import Load, guess_forward, time_of_token, try_forward


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """What one token of an answer takes, known before the first one."""

    token_bytes: int
    """Weights, as they lie in memory, that every token runs through: text layers and lm_head."""
    kept_bytes: int
    """Of these, those that stay in memory from token to token; the others are read again for each."""
    token_seconds: float
    """Estimate, from the time that the first text layer takes to be read and to be run on one token."""


class Answering:
    """One checkpoint that answers questions. A context manager: what it keeps in memory is dropped at the end.

        with Checkpoint.open(folder) as source, Answering(source, read_config(folder), memory_bytes=2**34) as model:
            ids = [step for step in model.steps(inputs, 64) if isinstance(step, int)]

    Args:
        source: un-compressed.
        config: of it.
        memory_bytes: what may be filled with weights that stay in memory.

    Raises:
        ModelError: transformers cannot build the model from the configuration.
        CheckpointError: compressed weights, or a tensor of the first text layer that is missing or not finite.
    """

    def __init__(self, source: Checkpoint, config: ModelConfig, *, memory_bytes: int) -> None:
        self._config, self._family = config, config.family
        self._model = open_model(source, config)
        self._layers = [block.name for block in self._family.text_blocks(config)]
        self._norm = f"{self._family.text}.norm"
        self._stack = ExitStack()
        self._held: set[str] = set()
        self._seen: tuple[Tensor, Tensor] | None = (
            None  # pixels of the last picture, and what the vision blocks made of them
        )
        self._kept, self.plan = self._planned(memory_bytes)
        self._head = Head(source, self._family.lm_head, keeps=self._family.lm_head in self._kept)

    def __enter__(self) -> Answering:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def prompt_blocks(self, inputs: ModelInputs) -> int:
        """Blocks that read the question before the first token: the text layers, with a new picture the vision tower too."""
        return len(self._layers) + (self._config.vision_depth if self._is_new(inputs) else 0)

    def expect(self, inputs: ModelInputs, *, tries: bool) -> tuple[StepPlan, ...]:
        """The blocks that will read the question, each with the seconds that it is expected to take.

        Args:
            inputs: the question, without an answer.
            tries: one block of each tower is run, for a large model; for a small one that would take as long as reading.

        Raises:
            CheckpointError: a tensor is missing, not finite, has another shape or contradicts others.
        """
        load = Load.of_one(inputs)
        steps = try_forward(self._model, load) if tries else guess_forward(self._config, load)
        vision, text = steps[: -len(self._layers)], steps[-len(self._layers) :]
        merger = vision[-1].seconds if vision else 0.0  # it is run just before the first layer
        text = (replace(text[0], seconds=text[0].seconds + merger), *text[1:])
        return (*vision[:-1], *text) if self._is_new(inputs) else text

    @torch.no_grad()
    def steps(self, inputs: ModelInputs, max_tokens: int) -> Iterator[BlockDone | int]:
        """Answer a question.

        Args:
            inputs: the question, without an answer.
            max_tokens: the longest answer, at least 1; it and the question must fit into the model's positions.

        Yields:
            A record after each block that has read the question; then the ids of the answer. An id that ends an answer
            comes last, and only where the model ends it by itself. The image placeholder is never generated.

        Raises:
            CheckpointError: a tensor is missing, has another shape, is not finite or contradicts others.
        """
        model, ends = self._model, self._config.eos_token_ids
        total, index = self.prompt_blocks(inputs), 0
        started = time.perf_counter()
        picture = self._vision_call(inputs)
        if picture is not None and self._is_new(inputs):
            assert inputs.pixel_values is not None
            for block in range(self._config.vision_depth):
                name = self._family.vision_block(self._config, block).name
                with placed(model, name):
                    picture.hidden = model.replay(name, picture)
                yield BlockDone(name, index, total, time.perf_counter() - started, resident_bytes())
                started, index = time.perf_counter(), index + 1
            self._seen = inputs.pixel_values, picture.hidden
        call, position = self._prompt_call(inputs, picture)
        cache = TokenCache(self._config, [inputs.tokens], max_tokens - 1, device=model.device, dtype=model.dtype)
        for name in self._layers:
            with self._placed(name):
                call.hidden = model.replay(name, model.cached(call, cache.prompt(0)))
            yield BlockDone(name, index, total, time.perf_counter() - started, resident_bytes())
            started, index = time.perf_counter(), index + 1
        last, positions = call.hidden[0, -1:], torch.tensor([position])
        del call, picture
        for made in range(1, max_tokens + 1):
            token = self._choose(last)
            yield token
            if token in ends or made == max_tokens:
                return
            call = model.token_call(torch.tensor([token]), positions, cache.visible())
            for name in self._layers:
                with self._placed(name):
                    call.hidden = model.replay(name, model.cached(call, cache))
            cache.advance()
            positions += 1
            last = call.hidden[:, 0]

    def _planned(self, memory_bytes: int) -> tuple[frozenset[str], AnswerPlan]:
        """Which modules stay in memory, and what one token takes by the time of the first text layer."""
        model, first = self._model, self._layers[0]
        sizes = self._sizes()
        kept = fit_into(sizes, memory_bytes)
        started = time.perf_counter()
        with placed(model, first):
            read = time.perf_counter() - started
            run = time_of_token(model, first)
        total, staying = sum(sizes.values()), sum(sizes[name] for name in kept)
        seconds = (run * total + read * (total - staying)) / sizes[first]
        return kept, AnswerPlan(total, staying, seconds)

    def _sizes(self) -> dict[str, int]:
        """Text layers and lm_head, each with its bytes in memory: four for a float, one for an integer weight."""
        integers = {
            linear.name: linear.rows * linear.cols
            for group in self._config.family.groups(self._config)
            for linear in group.linears
        }
        return {
            name: sum(
                integers[part.name]
                if isinstance(part, Int8Linear)
                else sum(p.numel() * p.element_size() for p in part.parameters(recurse=False))
                for part in self._model.module(name).modules()
            )
            for name in (*self._layers, self._family.lm_head)
        }

    def _is_new(self, inputs: ModelInputs) -> bool:
        """Whether there is a picture, and another one than that of the last question."""
        pixels = inputs.pixel_values
        return pixels is not None and (self._seen is None or not torch.equal(pixels, self._seen[0]))

    def _vision_call(self, inputs: ModelInputs) -> BlockCall | None:
        """The call of the first vision block; of a picture that has been looked at, what the last block made of it."""
        if inputs.pixel_values is None:
            return None
        if not self._is_new(inputs):
            assert self._seen is not None
            return BlockCall(self._seen[1], {})
        with placed(self._model, *self._family.vision_stem):
            return self._model.vision_call(inputs)

    def _prompt_call(self, inputs: ModelInputs, picture: BlockCall | None) -> tuple[BlockCall, int]:
        """The first text layer's call, and the position of the first token of the answer."""
        parts = () if picture is None else (*self._family.vision_stem, *self._family.vision_tail)
        with placed(self._model, *parts), self._model.embedding_rows(inputs.ids):
            return self._model.prompt_call(inputs, picture)

    @contextmanager
    def _placed(self, name: str) -> Iterator[None]:
        """Hold a module in memory; one that is kept stays until this object's end."""
        if name in self._kept or name == self._norm:
            if name not in self._held:
                self._stack.enter_context(placed(self._model, name))
                self._held.add(name)
            yield
        else:
            with placed(self._model, name):
                yield

    def _choose(self, hidden: Tensor) -> int:
        """The next token, after the last layer's float32 [1, width]."""
        with self._placed(self._norm):
            x = self._model.module(self._norm)(hidden)
        size = self._config.vocab_size
        cuts = ((start, min(start + HEAD_ROWS, size)) for start in range(0, size, HEAD_ROWS))
        pieces = ((start, self._head.logits(x, start, stop)) for start, stop in cuts)
        return int(likeliest_tokens(pieces, self._config.image_token_id))
