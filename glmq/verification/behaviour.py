"""What a checkpoint does: float against candidate block by block, and captions of a small model.

Both models run side by side through the same inputs, one block of each in memory. The candidate's int8 linears compute in
the NPU's own arithmetic. Sums run in float64 in the order of the samples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from glmq.checkpoint.linears import integer_linears
from glmq.checkpoint.reader import Checkpoint
from glmq.inspection.scaling import Scaling, find_scalings
from glmq.model.config import ModelConfig, read_config
from glmq.model.family import Block
from glmq.model.inputs import ModelInputs
from glmq.model.streamed import BlockCall, StreamedModel
from glmq.numerics.affine import covered_range
from glmq.progress import BlockStep, Step, no_step, resident_bytes
from glmq.records import BlockDone, QuantizedLinear
from glmq.verification.cases import Case, count_blocks
from glmq.verification.int8_model import Int8Linear, open_model, placed
from glmq.verification.last_states import compare_states, last_states
from glmq.verification.predictions import Predictions


@dataclass(frozen=True, slots=True)
class LinearBehaviour:
    """One int8 linear on the given inputs."""

    name: str
    error: float
    """||y_q - y|| / ||y||; both are fed the float model's hidden states, the candidate through its own norm or scaled as its
    earlier linears would, and its outputs scaled back."""
    covered_low: float
    covered_high: float
    """What the int8 activation represents; both 0 for dynamic types."""
    seen_low: float
    seen_high: float
    """Of the candidate's own input, while it runs on its own hidden states."""
    clipped_share: float
    """Share of those input values that lie more than half a step outside what is covered."""
    excess: float
    """How far the farthest value lies outside, as a share of the covered width; 0 where nothing clips."""
    excess_sample: str
    """The sample of that value; empty where nothing clips."""
    largest_output: float
    """Largest |y| of the candidate on its own hidden states."""

    @property
    def wasted_bits(self) -> float:
        """How many times what is covered could be halved and still hold every value seen, and zero; 0 for dynamic types."""
        covered = self.covered_high - self.covered_low
        needed = max(self.seen_high, 0.0) - min(self.seen_low, 0.0)
        return math.log2(covered / needed) if covered > 0 and needed > 0 else 0.0


@dataclass(frozen=True, slots=True)
class BlockBehaviour:
    """One block on the given inputs, each model on its own hidden states."""

    done: BlockDone
    error: float
    """||h_q - h|| / ||h|| of the hidden states after the block: what has built up so far."""
    linears: tuple[LinearBehaviour, ...]


def compare_behaviour(
    reference: Checkpoint, candidate: Checkpoint, config: ModelConfig, cases: Sequence[Case], step: Step = no_step
) -> Iterator[BlockBehaviour | Predictions]:
    """Run the cases through both checkpoints.

    Args:
        reference: float.
        candidate: float or quantized, not compressed.
        config: of both.
        cases: at least one.
        step: is told how far the block is that is under way.

    Yields:
        One record after each block of the vision tower (if there are images), the merger and each text layer,
        and at the end the predictions.

    Raises:
        CheckpointError: a tensor of either is missing, not finite, has another shape or contradicts others.
    """
    pair = _Pair(open_model(reference, config), open_model(candidate, config))
    groups = config.family.groups(config)
    scalings = find_scalings(reference, candidate, groups)
    run = _Run(pair, config, cases, {name: scalings[name] for name in integer_linears(candidate)}, step)
    has_images = any(case.has_image for case in cases)
    total = count_blocks(config, has_images)
    started = time.perf_counter()
    for index, (name, error, linears) in enumerate(run.steps(has_images=has_images)):
        now = time.perf_counter()
        done = BlockDone(name, index, total, now - started, resident_bytes())
        yield BlockBehaviour(done, error, linears)
        started = time.perf_counter()
    yield run.predictions()


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
        model = open_model(source, read_config(directory))
        with placed(model, "model", model.config.family.lm_head):
            yield model


def caption(
    checkpoint: Checkpoint, config: ModelConfig, questions: Sequence[ModelInputs], max_tokens: int
) -> Iterator[list[int]]:
    """The greedy answer to each question by a small checkpoint, float or quantized, wholly in memory.

    Raises:
        CheckpointError: as `whole_model`.
    """
    model = open_model(checkpoint, config)
    with placed(model, "model", model.config.family.lm_head):
        for question in questions:
            yield generate(model, question, max_tokens)


@torch.no_grad()
def generate(model: StreamedModel, inputs: ModelInputs, max_tokens: int) -> list[int]:
    """The greedy continuation of `inputs` by a wholly placed model: at most `max_tokens` ids, without the end token."""
    ends = model.config.eos_token_ids
    output = model.model.generate(  # type: ignore[operator]
        **(model.arguments(inputs) | {"use_cache": True}),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
    )
    made: list[int] = output[0, inputs.tokens :].tolist()
    return made[:-1] if made and made[-1] in ends else made


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two models."""

    reference: StreamedModel
    candidate: StreamedModel

    @contextmanager
    def placed(self, *names: str) -> Iterator[None]:
        with placed(self.reference, *names), placed(self.candidate, *names):
            yield


@dataclass(slots=True)
class _Calls:
    """One sample's call of the next block in each model."""

    reference: BlockCall
    candidate: BlockCall


class _LinearSums:
    """What is added up for one int8 linear over the samples."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._noise = self._signal = 0.0
        self._covered = (0.0, 0.0)
        self._low, self._high = math.inf, -math.inf
        self._values = self._clipped = 0
        self._excess, self._excess_sample = 0.0, ""
        self._largest = 0.0

    def add_error(self, y_candidate: Tensor, y: Tensor) -> None:
        self._noise += (y_candidate - y).double().square().sum().item()
        self._signal += y.double().square().sum().item()

    def add_input(self, x: Tensor, linear: QuantizedLinear, sample: str) -> None:
        low, high = (float(v) for v in torch.aminmax(x))
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._values += x.numel()
        if linear.activation is None:
            return
        self._covered = bottom, top = covered_range(linear.activation)
        half = linear.activation.scale / 2  # rounding brings these back inside
        self._clipped += int(((x < bottom - half) | (x > top + half)).sum())
        excess = max(bottom - half - low, high - top - half) / (top - bottom)
        if excess > self._excess:
            self._excess, self._excess_sample = excess, sample

    def add_output(self, y: Tensor) -> None:
        self._largest = max(self._largest, float(y.abs().max()))

    def finish(self) -> LinearBehaviour:
        return LinearBehaviour(
            name=self._name,
            error=_ratio(self._noise, self._signal),
            covered_low=self._covered[0],
            covered_high=self._covered[1],
            seen_low=self._low,
            seen_high=self._high,
            clipped_share=self._clipped / max(1, self._values),
            excess=self._excess,
            excess_sample=self._excess_sample,
            largest_output=self._largest,
        )


class _Run:
    """One comparison: the calls in flight, nothing else."""

    def __init__(
        self, pair: _Pair, config: ModelConfig, cases: Sequence[Case], int8: Mapping[str, Scaling], step: Step
    ) -> None:
        self._pair, self._config, self._cases, self._int8, self._step = pair, config, cases, int8, step
        self._family = config.family
        self._calls: dict[int, _Calls] = {}
        self._inputs: dict[int, ModelInputs] = {}
        """By case, without pixels."""
        self._sample = ""
        self._index = 0
        """Of the block that comes next."""

    def steps(self, *, has_images: bool) -> Iterator[tuple[str, float, tuple[LinearBehaviour, ...]]]:
        """Do the work; yields name, built-up error and linears of each block when it is done."""
        if has_images:
            self._start_vision()
            for index in range(self._config.vision_depth):
                yield self._replay(self._family.vision_block(self._config, index))
        merged = self._start_text()
        if has_images:
            yield merged
        for block in self._family.text_blocks(self._config):
            yield self._replay(block)

    def predictions(self) -> Predictions:
        """The predicted tokens; needs all steps done."""
        pair, order = self._pair, range(len(self._cases))
        inputs, calls = [self._inputs[i] for i in order], [self._calls[i] for i in order]
        reference = last_states(pair.reference, [call.reference.hidden for call in calls], inputs)
        candidate = last_states(pair.candidate, [call.candidate.hidden for call in calls], inputs)
        return compare_states(
            (pair.reference.source, reference), (pair.candidate.source, candidate), self._config, self._cases
        )

    def _start_vision(self) -> None:
        pair = self._pair
        with pair.placed(*self._family.vision_stem):
            for index, case in enumerate(self._cases):
                if case.has_image:
                    inputs = case.encode()
                    self._inputs[index] = inputs.without_pixels()
                    self._calls[index] = _Calls(pair.reference.vision_call(inputs), pair.candidate.vision_call(inputs))

    def _start_text(self) -> tuple[str, float, tuple[LinearBehaviour, ...]]:
        block, pair = self._family.merger_block(self._config), self._pair
        parts = self._family.vision_tail if self._calls else ()
        sums = self._sums(block)
        with pair.placed(*parts), self._watching(block, sums):
            for index, case in enumerate(self._cases):
                self._sample = case.name
                inputs = self._inputs[index] if case.has_image else self._inputs.setdefault(index, case.encode())
                vision = self._calls.get(index)
                with pair.reference.embedding_rows(inputs.ids), pair.candidate.embedding_rows(inputs.ids):
                    self._calls[index] = _Calls(
                        pair.reference.text_call(inputs, None if vision is None else vision.reference),
                        pair.candidate.text_call(inputs, None if vision is None else vision.candidate),
                    )
        self._index += bool(parts)
        return block.name, self._built_up(), tuple(s.finish() for s in sums.values())

    def _replay(self, block: Block) -> tuple[str, float, tuple[LinearBehaviour, ...]]:
        pair, sums = self._pair, self._sums(block)
        tokens, passed = sum(calls.reference.tokens for calls in self._calls.values()), 0
        with pair.placed(block.name), self._watching(block, sums):
            for done, (index, calls) in enumerate(self._calls.items()):
                self._step(BlockStep(block.name, self._index, done, len(self._calls), "samples", passed / tokens))
                self._sample = self._cases[index].name
                calls.reference.hidden = pair.reference.replay(block.name, calls.reference)
                calls.candidate.hidden = pair.candidate.replay(block.name, calls.candidate)
                passed += calls.reference.tokens
        self._index += 1
        return block.name, self._built_up(), tuple(s.finish() for s in sums.values())

    def _built_up(self) -> float:
        noise = signal = 0.0
        for calls in self._calls.values():
            reference = calls.reference.hidden.double()
            noise += (calls.candidate.hidden.double() - reference).square().sum().item()
            signal += reference.square().sum().item()
        return _ratio(noise, signal)

    def _sums(self, block: Block) -> dict[str, _LinearSums]:
        return {
            linear.name: _LinearSums(linear.name)
            for group in block.groups
            for linear in group.linears
            if linear.name in self._int8
        }

    @contextmanager
    def _watching(self, block: Block, sums: Mapping[str, _LinearSums]) -> Iterator[None]:
        """While the context lasts, feed both models' int8 linears to their sums."""
        pair = self._pair
        before_norm: dict[str, Tensor] = {}

        def remember(norm: str) -> object:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                before_norm[norm] = args[0]

            return pair.reference.module(norm).register_forward_pre_hook(hook)

        def measure_error(name: str, norm: str | None) -> object:
            scaling = self._int8[name]

            def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
                if norm is not None:
                    x = pair.candidate.module(norm)(before_norm[norm])
                else:
                    x = args[0] if scaling.columns is None else args[0] / scaling.columns
                # forward, not a call: the candidate's own hooks see its own inputs only
                found = pair.candidate.module(name).forward(x)
                sums[name].add_error(found if scaling.rows is None else found / scaling.rows, y)

            return pair.reference.module(name).register_forward_hook(hook)

        def measure_use(name: str) -> object:
            def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
                assert isinstance(module, Int8Linear)
                sums[name].add_input(args[0], module.linear, self._sample)
                sums[name].add_output(y)

            return pair.candidate.module(name).register_forward_hook(hook)

        handles: list[object] = []
        for group in block.groups:
            watched = [linear.name for linear in group.linears if linear.name in sums]
            if watched and group.norm is not None:
                handles.append(remember(group.norm))
            for name in watched:
                handles += [measure_error(name, group.norm), measure_use(name)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()  # type: ignore[attr-defined]


def _ratio(noise: float, signal: float) -> float:
    """sqrt(noise / signal); 0 where both vanish, infinite where only the signal does."""
    if signal == 0:
        return 0.0 if noise == 0 else math.inf
    return math.sqrt(noise / signal)
