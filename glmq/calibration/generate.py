"""generate_answers(): the float model answers calibration samples that have no answer, streamed block by block.

Most of what a model that reasons computes is its own answer, which a picture and a prompt alone do not bring into the
statistics.
Answers are greedy and deterministic. Samples of one round advance together: for each new token every block is placed once
and run on one token of each sample, so weights are read once per token, not once per sample and token. Rounds depend on
the samples alone (`CACHE_BYTES`), never on the machine's memory: the last bits of a product may depend on its rows' number.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from glmq.calibration.encode import encode_sample
from glmq.calibration.resume import CalibrationJournal
from glmq.calibration.samples import GeneratedAnswer, Sample
from glmq.checkpoint.json_file import JsonValue
from glmq.device import free_bytes
from glmq.model.cache import TokenCache, cache_bytes
from glmq.model.greedy import HEAD_ROWS, fit_into, likeliest_tokens
from glmq.model.inputs import ModelInputs, Preprocessor
from glmq.model.streamed import BlockCall, StreamedModel
from glmq.progress import resident_bytes
from glmq.ranks import Ranks
from glmq.records import BlockDone

CACHE_BYTES: Final = 2 * 2**30
"""Keys and values of one round of samples take at most this, unless it is a single sample."""
KEPT_SHARE: Final = 0.5
"""Of the free memory that weights may fill which stay placed from token to token."""
RECORD_SECONDS: Final = 2.0
"""A record comes at most this often."""


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """What generating answers takes, known before it starts."""

    max_tokens: int
    rounds: tuple[tuple[int, ...], ...]
    """Indices of the samples that advance together."""
    token_bytes: int
    """Weights in memory that one token of a round runs through: text layers and lm_head."""
    kept: frozenset[str]
    """Names of those that stay placed from token to token."""
    kept_bytes: int
    read_seconds: float
    """What reading the others takes at most, from the time of one block: all answers as long as they may be."""


def plan_generation(
    model: StreamedModel, samples: Sequence[Sample], preprocessor: Preprocessor, max_tokens: int
) -> GenerationPlan:
    """Which samples are answered in which round, what stays in memory, how long the reading takes.

    Raises:
        SampleError: an image that the model cannot take.
        CheckpointError: a tensor of the first text layer is missing or not finite.
    """
    asked = [index for index, sample in enumerate(samples) if not sample.answer]
    lengths = {index: encode_sample(preprocessor, samples[index]).tokens for index in asked}

    def cached(members: Sequence[int]) -> int:
        places = max(lengths[index] for index in members) + max_tokens
        return cache_bytes(model.config, len(members), places, model.dtype)

    rounds: list[tuple[int, ...]] = []
    current: tuple[int, ...] = ()
    for index in asked:
        if current and cached((*current, index)) > CACHE_BYTES:
            rounds.append(current)
            current = ()
        current += (index,)
    rounds += [current] if current else []
    sizes = _weight_bytes(model)
    first = next(iter(sizes))
    started = time.perf_counter()
    with model.placed(first):
        seconds_per_byte = (time.perf_counter() - started) / sizes[first]
    room = int(KEPT_SHARE * free_bytes(model.device)) - max(map(cached, rounds), default=0)
    kept = fit_into(sizes, room)
    total, staying = sum(sizes.values()), sum(sizes[name] for name in kept)
    reading = len(rounds) * (max_tokens * (total - staying) + staying) * seconds_per_byte
    return GenerationPlan(max_tokens, tuple(rounds), total, kept, staying, reading)


def generate_answers(
    model: StreamedModel,
    samples: Sequence[Sample],
    preprocessor: Preprocessor,
    plan: GenerationPlan,
    journal: CalibrationJournal,
    ranks: Ranks,
) -> Iterator[BlockDone]:
    """Answer the samples of the plan; `with_answers` then takes the answers out of the journal.

    A round that an interrupted run has finished is not run again. Ranks take whole rounds, so the answers do not depend on
    their number. The image placeholder is never generated.

    Yields:
        A record now and then, whose index counts tokens.

    Raises:
        CheckpointError: a tensor that is missing or not finite.
        StatisticsError: a tensor that has changed since it was read first.
        SampleError: an image that the model cannot take.
        OtherRankError, LostRanksError: another rank stopped.
    """
    place = ranks.place
    left = [number for number in range(len(plan.rounds)) if journal.answers(number) is None]
    turns = -(-len(left) // place.world)
    clock = _Clock(turns * plan.max_tokens)
    for turn in range(turns):
        own = left[turn * place.world + place.rank : turn * place.world + place.rank + 1]
        answers: dict[str, JsonValue] = {}
        for number in own:
            members = plan.rounds[number]
            run = _Round(model, [samples[index] for index in members], preprocessor, plan)
            for done in run.steps():
                if done < plan.max_tokens and clock.elapsed() >= RECORD_SECONDS:  # the last is the round's
                    yield clock.record(f"token {done}", turn * plan.max_tokens + done)
            for index, ids in zip(members, run.answers, strict=True):
                answers[str(index)] = {"ids": list(ids), "text": preprocessor.decode(ids)}
        told = ranks.all_gather(json.dumps(answers))
        for number, text in zip(left[turn * place.world :], told):
            journal.record_answers(number, json.loads(text))
        yield clock.record(f"round {turn + 1}", (turn + 1) * plan.max_tokens)


def with_answers(samples: Sequence[Sample], plan: GenerationPlan, journal: CalibrationJournal) -> tuple[Sample, ...]:
    """The samples, those that the model has answered with what it said; an empty answer is none."""
    made: dict[int, GeneratedAnswer] = {}
    for number in range(len(plan.rounds)):
        made |= journal.answers(number) or {}
    return tuple(replace(sample, generated=_not_empty(made.get(index))) for index, sample in enumerate(samples))


def _not_empty(answer: GeneratedAnswer | None) -> GeneratedAnswer | None:
    return answer if answer is not None and answer.ids else None


class _Round:
    """Samples that advance together."""

    def __init__(
        self, model: StreamedModel, samples: Sequence[Sample], preprocessor: Preprocessor, plan: GenerationPlan
    ) -> None:
        self._model, self._samples, self._preprocessor, self._plan = model, samples, preprocessor, plan
        self._family = model.config.family
        self._blocks = [block.name for block in self._family.text_blocks(model.config)]
        self._head: dict[int, Tensor] = {}
        self.answers: list[list[int]] = [[] for _ in samples]

    @torch.no_grad()
    def steps(self) -> Iterator[int]:
        """Write the answers; yields the number of tokens after each."""
        model, ends = self._model, self._model.config.eos_token_ids
        with ExitStack() as stack:
            calls, positions = self._prompts()
            lengths = [call.hidden.shape[1] for call in calls]
            room = self._plan.max_tokens - 1
            cache = TokenCache(model.config, lengths, room, device=model.device, dtype=model.dtype)
            for name in self._blocks:
                with self._placed(name, stack):
                    for sequence, call in enumerate(calls):
                        call.hidden = model.replay(name, model.cached(call, cache.prompt(sequence)))
            stack.enter_context(model.placed(f"{self._family.text}.norm"))
            last = torch.cat([call.hidden[:, -1] for call in calls])  # [S, width]
            del calls
            open_ends = [True] * len(lengths)
            for made in range(1, self._plan.max_tokens + 1):
                tokens = self._choose(model.module(f"{self._family.text}.norm")(last))
                for sequence, token in enumerate(tokens.tolist()):
                    open_ends[sequence] = open_ends[sequence] and token not in ends
                    if open_ends[sequence]:
                        self.answers[sequence].append(token)
                yield made
                if not any(open_ends) or made == self._plan.max_tokens:
                    return
                # Samples that have ended stay in the call: with fewer rows the others' last bits could change.
                call = model.token_call(tokens, positions, cache.visible())
                for name, after in zip(self._blocks, (*self._blocks[1:], self._family.lm_head)):
                    with self._placed(name, stack):
                        self._prefetch(after)
                        call.hidden = model.replay(name, model.cached(call, cache))
                cache.advance()
                positions += 1
                last = call.hidden[:, 0]

    def _prompts(self) -> tuple[list[BlockCall], Tensor]:
        """The first text layer's call of every sample, and the position of its first answer token, int64 [S]."""
        model = self._model
        vision: dict[int, BlockCall] = {}
        read: dict[int, ModelInputs] = {}
        pictured = any(sample.image is not None for sample in self._samples)
        with model.placed(*(self._family.vision_stem if pictured else ())):
            for index, sample in enumerate(self._samples):
                if sample.image is not None:
                    inputs = encode_sample(self._preprocessor, sample)
                    vision[index], read[index] = model.vision_call(inputs), inputs.without_pixels()
        for block in range(model.config.vision_depth) if vision else ():
            name = f"{self._family.vision}.blocks.{block}"
            with model.placed(name):
                for call in vision.values():
                    call.hidden = model.replay(name, call)
        calls: list[BlockCall] = []
        positions: list[int] = []
        with model.placed(*((*self._family.vision_stem, *self._family.vision_tail) if vision else ())):
            for index, sample in enumerate(self._samples):
                inputs = read.pop(index) if index in read else encode_sample(self._preprocessor, sample)
                with model.embedding_rows(inputs.ids):
                    call, position = model.prompt_call(inputs, vision.pop(index, None))
                calls.append(call)
                positions.append(position)
        return calls, torch.tensor(positions)

    @contextmanager
    def _placed(self, name: str, stack: ExitStack) -> Iterator[None]:
        """Hold a text layer in memory; one that is kept stays until `stack` unwinds."""
        if name in self._plan.kept:
            if next(self._model.module(name).parameters()).device.type == "meta":
                stack.enter_context(self._model.placed(name))
            yield
        else:
            with self._model.placed(name):
                yield

    def _prefetch(self, name: str) -> None:
        """Have the weights of a text layer or of lm_head read ahead, unless they stay in memory."""
        if name not in self._plan.kept:
            source = self._model.source
            source.prefetch(tensor for tensor in source if tensor.startswith(f"{name}."))

    def _choose(self, x: Tensor) -> Tensor:
        """The next token of each row of the normed [S, width]: int64 [S], on the CPU."""
        starts = range(0, self._model.config.vocab_size, HEAD_ROWS)
        pieces = ((start, (x @ self._head_rows(start).T).float().cpu()) for start in starts)
        return likeliest_tokens(pieces, self._model.config.image_token_id)

    def _head_rows(self, start: int) -> Tensor:
        if start in self._head:
            return self._head[start]
        model, name = self._model, f"{self._family.lm_head}.weight"
        rows = model.source.read_rows(name, start, min(start + HEAD_ROWS, model.config.vocab_size))
        rows = model.source.check_finite(name, rows).to(device=model.device, dtype=model.dtype)
        if self._family.lm_head in self._plan.kept:
            self._head[start] = rows
        return rows


def _weight_bytes(model: StreamedModel) -> dict[str, int]:
    """Text layers and lm_head with their bytes when placed."""
    family = model.config.family
    names = [block.name for block in family.text_blocks(model.config)] + [family.lm_head]
    return {
        name: sum(parameter.numel() for parameter in model.module(name).parameters()) * model.dtype.itemsize
        for name in names
    }


class _Clock:
    """Makes records whose seconds are those of one token."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._started = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the last record."""
        return time.perf_counter() - self._started

    def record(self, name: str, done: int) -> BlockDone:
        """The record of the first `done` tokens."""
        seconds = self.elapsed() / (done - self._done)
        self._done, self._started = done, time.perf_counter()
        return BlockDone(name, done - 1, self._total, seconds, resident_bytes())
