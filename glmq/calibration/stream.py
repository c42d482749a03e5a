"""calibrate_checkpoint(): stream a float checkpoint block by block over the samples and write their statistics."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from glmq.calibration.capture import Watch
from glmq.calibration.convergence import convergence_order
from glmq.calibration.encode import encode_sample
from glmq.calibration.layer_watch import LayerWatch
from glmq.calibration.resume import CalibrationJournal, Calls
from glmq.calibration.samples import Sample
from glmq.calibration.stats import Settings
from glmq.calibration.stats_writer import SAMPLE_ROWS, StatsWriter, StoredBlock, has_moment
from glmq.device import has_float16_alone, release
from glmq.errors import NonFiniteError
from glmq.model.family import Block
from glmq.model.inputs import ModelInputs, Preprocessor
from glmq.model.streamed import StreamedModel
from glmq.numerics.moments import FP16_END, InputAccumulator, is_cut_off
from glmq.progress import BlockStep, Step, Stopwatch, no_step, resident_bytes
from glmq.ranks import Ranks
from glmq.records import BlockDone

log = logging.getLogger(__name__)

NOTHING: Final = StoredBlock({}, {})
NO_SENSITIVITIES: Final[Mapping[str, Tensor]] = {}


def calibrate_checkpoint(
    model: StreamedModel,
    samples: Sequence[Sample],
    preprocessor: Preprocessor,
    sink: StatsWriter,
    settings: Settings,
    journal: CalibrationJournal,
    ranks: Ranks,
    step: Step = no_step,
) -> Iterator[BlockDone]:
    """Run the samples through the model, one block in memory at a time, and write the statistics of every linear input.

    The vision tower runs over all images first, block by block, then the text layers. One copy of the hidden states
    is kept per sample. Sums run in the order of `convergence_order`. Each finished block is journalled with the hidden states
    that it left, so that an interrupted run continues after it with the same bits.

    Several ranks take turns: rank r of n runs samples r, r + n, r + 2n, ... of that order, and rank 0 writes the
    statistics, which have the bytes of a run by one process.

    Args:
        model: the streamed float model.
        samples: the calibration samples.
        preprocessor: of the same model folder.
        sink: where the statistics go.
        settings: of this run.
        journal: of the same checkpoint; finished blocks of an interrupted run are in it.
        ranks: the processes that share the samples.
        step: is told when a block begins, and how many of this rank's samples have gone through it.

    Yields:
        A record after each block.

    Raises:
        CheckpointError: a tensor that is missing or not finite.
        StatisticsError: a tensor that has changed since it was read first.
        SampleError: an image that the model cannot take, or a sample whose hidden states overflow.
        OtherRankError, LostRanksError: another rank stopped.
    """
    clock = Stopwatch()
    run = _Run(model, convergence_order(samples), preprocessor, sink, settings, ranks, clock)
    run.step = step
    for block in journal.finished:
        sink.restore(block.stored)
    first = len(journal.finished)
    if first:
        log.info("resumed: %d blocks are in the journal", first)
    total = len(model.config.family.blocks(model.config))
    started = time.perf_counter()
    for index, (name, stored, calls) in enumerate(_steps(run, journal), first):
        with clock.stage("write"):
            journal.record_block(name, stored, calls)
        clock.count("write", nbytes=sum(call.hidden.nbytes for call in calls.values()))
        release(model.device)
        now = time.perf_counter()
        yield BlockDone(name, index, total, now - started, resident_bytes(), clock.take())
        started = time.perf_counter()
    weights = journal.all_weights()
    if ranks.place.is_first:
        journal.finish(sink.finish(weights))


def _steps(run: _Run, journal: CalibrationJournal) -> Iterator[tuple[str, StoredBlock, Calls]]:
    """Do the work after the finished blocks; yields each block's name, stored statistics and calls when it is done."""
    config, first = run.model.config, len(journal.finished)
    family = config.family
    calls = run.start_vision()
    depth = config.vision_depth
    if 0 < first <= depth:
        journal.load_states(calls)
    for index in range(first, depth):
        block, run.index = family.vision_block(config, index), index
        run.prefetch(family.vision_block(config, index + 1) if index + 1 < depth else family.merger_block(config))
        stored = run.replay_block(block, calls)
        yield block.name, stored, calls
    run.index = depth
    # On a resume past this point the text calls are made anew, but for their hidden states, which come from the folder.
    stored, calls = run.start_text(calls, watch=first <= depth)
    if first <= depth:
        yield family.merger_block(config).name, stored, calls
    elif first <= depth + 1 + config.layers:
        journal.load_states(calls)
    blocks = family.text_blocks(config)[max(0, first - depth - 1) :]
    for block, after in zip(blocks, (*blocks[1:], None)):
        run.index = depth + 1 + config.layers - len(blocks) + blocks.index(block)
        if after is not None:
            run.prefetch(after)
        stored = run.replay_block(block, calls)
        yield block.name, stored, calls
    if first <= depth + 1 + config.layers:
        yield family.lm_head, run.finish_text(calls), {}


class _Run:
    """The state of one calibration: the calls in flight, nothing else."""

    def __init__(
        self,
        model: StreamedModel,
        samples: Sequence[Sample],
        preprocessor: Preprocessor,
        sink: StatsWriter,
        settings: Settings,
        ranks: Ranks,
        clock: Stopwatch,
    ) -> None:
        self.model, self.sink, self._clock = model, sink, clock
        self._family = model.config.family
        self._samples, self._preprocessor, self._settings, self._ranks = samples, preprocessor, settings, ranks
        place = ranks.place
        self._own = range(place.rank, len(samples), place.world)
        """Indices of this rank's samples."""
        rounds = -(-len(samples) // place.world)
        self._turns = range(place.rank, place.rank + rounds * place.world, place.world)
        """The same, and one past the end where other ranks have one sample more."""
        self._read: dict[int, ModelInputs] = {}
        """By sample with an image: its inputs, without pixels, from the vision tower to the text layers."""
        self._keep_rows = max(1, SAMPLE_ROWS // len(samples))
        self.step: Step = no_step
        """Is told how far the block is that is under way."""
        self.index = 0
        """Of that block."""

    def start_vision(self) -> Calls:
        """The first vision block's call of every sample with an image."""
        calls: Calls = {}
        with self.model.placed_in_time(self._clock, *self._family.vision_stem):
            for index in self._own:
                if self._samples[index].image is not None:
                    inputs = self._inputs(self._samples[index])
                    self._read[index] = inputs.without_pixels()
                    with self._clock.stage("vision"):
                        calls[index] = self.model.vision_call(inputs)
        return calls

    def start_text(self, vision_calls: Calls, *, watch: bool) -> tuple[StoredBlock, Calls]:
        """The first text layer's call of every sample; with `watch` the merger's inputs are collected on the way."""
        model, block = self.model, self._family.merger_block(self.model.config)
        watched = self._watch(block)
        calls: Calls = {}
        tokens: dict[int, int] = {}
        kept: dict[str, str] = {}
        parts = self._family.vision_tail if vision_calls else ()
        with model.placed_in_time(self._clock, *parts), watched.hooked(model) if watch else nullcontext():
            for done, index in enumerate(self._turns):
                if watch:
                    self._tell(block, done, len(self._turns), done / len(self._turns))
                if watch and index not in vision_calls:
                    watched.skip_turn()
                if index in self._own:
                    sample = self._samples[index]
                    inputs = self._read.pop(index) if index in self._read else self._inputs(sample)
                    tokens[index] = inputs.tokens
                    vision = vision_calls.pop(index, None)
                    with self._clock.stage("vision"), model.embedding_rows(inputs.ids), self._blaming(sample):
                        calls[index], positions = model.positioned_call(inputs, vision)
                        _check_finite(calls[index].hidden, block.name)
                    if watch and self._settings.text_inputs:
                        with self._clock.stage("write"):
                            kept |= self.sink.write_text_inputs(index, calls[index].hidden, positions)
                    if vision is not None:
                        self._clock.count("vision", flops=_flops(block, vision.tokens // model.config.merge_size**2))
        every: dict[str, str] = {}
        for text in self._ranks.all_gather(json.dumps([tokens, kept])):
            counts, theirs = json.loads(text)
            every |= theirs
            for key, count in counts.items():
                self.sink.set_tokens(self._samples[int(key)], count)
        if not watch:
            return NOTHING, calls
        stored = self._write(block, watched)
        stored = replace(stored, files={**stored.files, **dict(sorted(every.items()))})
        self.sink.restore(stored)
        return stored, calls

    def replay_block(self, block: Block, calls: Calls) -> StoredBlock:
        """Run one block over all calls, replace their hidden states, write the block's statistics."""
        model, watched = self.model, self._watch(block)
        layer = LayerWatch(block, model.config, self._ranks, self._clock)
        stage = "forward" if block.name.startswith(self._family.text) else "vision"
        tokens, passed, done = sum(call.tokens for call in calls.values()), 0, 0
        with (
            self.model.placed_in_time(self._clock, *([block.name] if calls else [])),
            watched.hooked(model),
            layer.hooked(model),
        ):
            for index in self._turns:
                if index in calls:
                    self._tell(block, done, len(calls), passed / tokens)
                    with self._clock.stage(stage), self._blaming(self._samples[index]):
                        calls[index].hidden = model.replay(block.name, calls[index])
                        _check_finite(calls[index].hidden, block.name)
                    self._clock.count(stage, flops=_flops(block, calls[index].tokens))
                    passed, done = passed + calls[index].tokens, done + 1
                else:
                    watched.skip_turn()
                layer.take_turn()
            sensitivities = layer.finish(model)
        return self._write(block, watched, sensitivities)

    def finish_text(self, calls: Calls) -> StoredBlock:
        """The statistics of lm_head's input; the head itself is not run."""
        model, block = self.model, self._family.head_block(self.model.config)
        watched = self._watch(block)
        with model.placed_in_time(self._clock, f"{self._family.text}.norm"), torch.no_grad():
            for index in self._turns:
                if index in calls:
                    hidden = model.module(f"{self._family.text}.norm")(calls[index].hidden)
                    with self._blaming(self._samples[index]):
                        watched.observe(block.name, hidden)
                else:
                    watched.skip_turn()
        return self._write(block, watched)

    def _tell(self, block: Block, done: int, parts: int, share: float) -> None:
        self.step(BlockStep(block.name, self.index, done, parts, "samples", share))

    def prefetch(self, block: Block) -> None:
        """Have the block's weights read ahead."""
        source = self.model.source
        source.prefetch(name for name in source if name.startswith(f"{block.name}."))

    def _inputs(self, sample: Sample) -> ModelInputs:
        with self._clock.stage("images"):
            return encode_sample(self._preprocessor, sample)

    @contextmanager
    def _blaming(self, sample: Sample) -> Iterator[None]:
        """Name the sample in what goes wrong with it."""
        try:
            yield
        except FloatingPointError as error:
            advice = "leave this sample out"
            if self.model.dtype is not torch.float32:
                wider = "--device-type cpu" if has_float16_alone(self.model.device) else "--compute-dtype fp32"
                advice = f"use {wider}, or {advice}"
            raise NonFiniteError(f"{sample.name}: {error} in {self.model.dtype}; {advice}") from error

    def _watch(self, block: Block) -> Watch:
        place = self._ranks.place
        accumulators = {
            group.site: InputAccumulator(
                group.site,
                group.width,
                with_moment=has_moment(group, self.model.config, wide_moments=self._settings.wide_moments),
                rank=place.rank,
                world=place.world,
            )
            for group in block.groups
        }
        own = sum(not sample.is_builtin for sample in self._samples)
        return Watch(block, accumulators, self._ranks, self._clock, keep_rows=self._keep_rows, own=own)

    def _write(
        self, block: Block, watched: Watch, sensitivities: Mapping[str, Tensor] = NO_SENSITIVITIES
    ) -> StoredBlock:
        with self._clock.stage("statistics"):
            finished = [
                (replace(stats, sensitivity=sensitivities.get(stats.name)), settled)
                for stats, settled in watched.finish()
            ]
        with self._clock.stage("write"):
            stored = self.sink.write(block.name, finished) if finished else NOTHING
        self._clock.count("write", nbytes=sum(stats.nbytes for stats, _ in finished))
        return stored


def _flops(block: Block, tokens: int) -> int:
    """Operations of the block's matrix products over one sequence: its linears, and attention of every token to all."""
    linears = 2 * tokens * sum(linear.rows * linear.cols for group in block.groups for linear in group.linears)
    return linears + 4 * tokens**2 * block.attention_width


def _check_finite(hidden: Tensor, block: str) -> None:
    """Raise FloatingPointError for NaN, infinity, or the largest float16, at which the 300I Duo leaves what overflows."""
    there = hidden.cpu()  # the 300I Duo has no isfinite
    if not torch.isfinite(there).all():
        raise FloatingPointError(f"the hidden states after {block} hold NaN or infinity")
    if is_cut_off(there.dtype, float(there.abs().max())):
        raise FloatingPointError(f"the hidden states after {block} reach {FP16_END:g}, where float16 ends,")
