"""calibrate_checkpoint(): stream a float checkpoint block by block over the samples and write their statistics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import psutil
import torch
from torch import Tensor

from glmq.calibrate.capture import watching
from glmq.calibrate.samples import Sample, open_image
from glmq.calibrate.stats import SAMPLE_ROWS, Settings, StatsWriter, has_moment
from glmq.device import release
from glmq.errors import SampleError
from glmq.model.blocks import VISION_STEM, VISION_TAIL, BlockCall, StreamedModel
from glmq.model.glm4v import LM_HEAD, TEXT, Block, head_block, merger_block, text_blocks, vision_block
from glmq.model.inputs import ModelInputs, Preprocessor
from glmq.numerics.moments import InputAccumulator, InputStats
from glmq.records import BlockDone


def calibrate_checkpoint(
    model: StreamedModel,
    samples: Sequence[Sample],
    preprocessor: Preprocessor,
    sink: StatsWriter,
    settings: Settings,
) -> Iterator[BlockDone]:
    """Run the samples through the model, one block in memory at a time, and write the statistics of every linear input.

    The vision tower runs over all images first, block by block, then the text layers. One copy of the hidden states
    is kept per sample. Sums run in the order of the samples.

    Yields:
        A record after each block.

    Raises:
        CheckpointError: a tensor that is missing or not finite.
        SampleError: an image that the model cannot take, or a sample whose hidden states overflow.
    """
    run = _Run(model, samples, preprocessor, sink, settings)
    config = model.config
    total = config.vision_depth + 1 + config.layers + 1
    steps = _steps(run)
    started = time.perf_counter()
    for index, name in enumerate(steps):
        release(model.device)
        now = time.perf_counter()
        yield BlockDone(name, index, total, now - started, psutil.Process().memory_info().rss)
        started = time.perf_counter()
    sink.finish()


def _steps(run: _Run) -> Iterator[str]:
    """Do the work; yields the name of each block when it is done."""
    config = run.model.config
    vision_calls = run.start_vision()
    for index in range(config.vision_depth):
        block = vision_block(config, index)
        run.replay_block(block, vision_calls)
        yield block.name
    text_calls = run.start_text(vision_calls)
    vision_calls.clear()
    yield merger_block(config).name
    for block in text_blocks(config):
        run.replay_block(block, text_calls)
        yield block.name
    run.finish_text(text_calls)
    yield LM_HEAD


class _Run:
    """The state of one calibration: the calls in flight, nothing else."""

    def __init__(
        self,
        model: StreamedModel,
        samples: Sequence[Sample],
        preprocessor: Preprocessor,
        sink: StatsWriter,
        settings: Settings,
    ) -> None:
        self.model, self.sink = model, sink
        self._samples, self._preprocessor, self._settings = samples, preprocessor, settings
        self._keep_rows = max(1, SAMPLE_ROWS // len(samples))

    def start_vision(self) -> dict[int, BlockCall]:
        """The first vision block's call of every sample with an image."""
        calls: dict[int, BlockCall] = {}
        with self.model.placed(*VISION_STEM):
            for index, sample in enumerate(self._samples):
                if sample.image is not None:
                    calls[index] = self.model.vision_call(self._inputs(sample))
        return calls

    def start_text(self, vision_calls: dict[int, BlockCall]) -> dict[int, BlockCall]:
        """The first text layer's call of every sample; the merger's inputs are watched on the way."""
        model, block = self.model, merger_block(self.model.config)
        accumulators = self._accumulators(block)
        calls: dict[int, BlockCall] = {}
        parts = (*VISION_STEM, *VISION_TAIL) if vision_calls else ()
        with model.placed(*parts), watching(model, block, accumulators, keep_rows=self._keep_rows):
            for index, sample in enumerate(self._samples):
                inputs = self._inputs(sample)
                self.sink.set_tokens(sample, inputs.tokens)
                with model.embedding_rows(inputs.ids):
                    calls[index] = model.text_call(inputs, vision_calls.pop(index, None))
                self._check(calls[index].hidden, sample, block.name)
        self._write(block, accumulators)
        return calls

    def replay_block(self, block: Block, calls: dict[int, BlockCall]) -> None:
        """Run one block over all calls, replace their hidden states, write the block's statistics."""
        model = self.model
        accumulators = self._accumulators(block)
        watch = watching(model, block, accumulators, keep_rows=self._keep_rows)
        with model.placed(block.name) if calls else nullcontext(), watch:
            for index, call in calls.items():
                call.hidden = model.replay(block.name, call)
                self._check(call.hidden, self._samples[index], block.name)
        self._write(block, accumulators)

    def finish_text(self, calls: dict[int, BlockCall]) -> None:
        """The statistics of lm_head's input; the head itself is not run."""
        model, block = self.model, head_block(self.model.config)
        accumulators = self._accumulators(block)
        with model.placed(f"{TEXT}.norm"), torch.no_grad():
            for call in calls.values():
                hidden = model.module(f"{TEXT}.norm")(call.hidden)
                accumulators[LM_HEAD].update(hidden.reshape(-1, hidden.shape[-1]), keep_rows=self._keep_rows)
        self._write(block, accumulators)

    def _inputs(self, sample: Sample) -> ModelInputs:
        try:
            return self._preprocessor.encode(open_image(sample), sample.prompt, sample.answer)
        except SampleError as error:
            raise SampleError(f"{sample.name}: {error}") from error

    def _accumulators(self, block: Block) -> dict[str, InputAccumulator]:
        config, wide = self.model.config, self._settings.wide_moments
        return {
            group.site: InputAccumulator(
                group.site, group.width, with_moment=has_moment(group, config, wide_moments=wide)
            )
            for group in block.groups
        }

    def _write(self, block: Block, accumulators: dict[str, InputAccumulator]) -> None:
        finished: list[InputStats] = [a.finish() for a in accumulators.values() if a.tokens]
        if finished:
            self.sink.write(block.name, finished)

    def _check(self, hidden: Tensor, sample: Sample, block: str) -> None:
        if not torch.isfinite(hidden).all():
            raise SampleError(
                f"{sample.name}: the hidden states after {block} hold NaN or infinity in {self.model.dtype}; "
                "use --compute-dtype fp32, or leave this sample out"
            )
