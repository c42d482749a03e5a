"""Propagation: the calibration samples run through the float text layers and the quantized ones, side by side.

What a linear gets once the linears before it are integers is not what it got in the float model. Rounding each group for the
inputs that it will really have makes up for part of the difference (glmq/numerics/drift.py). So the groups go one after the
other, and one process does them all.

    .streams-NNN        the hidden states of both models after block NNN, in the work folder: a resumed run goes on from them
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from safetensors import safe_open
from torch import Tensor

from glmq.calibration.manifest import parse_digests
from glmq.calibration.stats import Statistics
from glmq.checkpoint.checksums import is_as_written
from glmq.checkpoint.journal import Journal
from glmq.checkpoint.json_file import JsonObject
from glmq.checkpoint.writer import write_tensors
from glmq.model.family import Block, InputGroup
from glmq.model.streamed import BlockCall, StreamedModel
from glmq.numerics.drift import Drift, DriftAccumulator
from glmq.progress import Stopwatch
from glmq.quantization.layer import GroupResult
from glmq.quantization.linear_report import steps_of
from glmq.wording import counted

STREAMS: Final = ".streams-"


class Propagation:
    """The hidden states of all samples in the float model and in the one quantized so far, at the same text layer.

    Args:
        model: the float model.
        statistics: those that hold what enters the text layers.
        strength: how much of the drift rounding makes up for, 0 to 1.
        work: folder for the hidden states.
        journal: of the run; blocks that it cannot go on from are dropped.

    Raises:
        StatisticsError: the statistics lack what enters the text layers, or it is not as it was written.
    """

    def __init__(
        self, model: StreamedModel, statistics: Statistics, strength: float, work: Path, journal: Journal
    ) -> None:
        self._model, self._work = model, work
        self._strength = strength
        self._layers = [block.name for block in model.config.family.text_blocks(model.config)]
        self._float = {i: model.text_call_at(*inputs) for i, inputs in enumerate(statistics.text_inputs())}
        self._quantized = {i: replace(call) for i, call in self._float.items()}
        self._weights: dict[str, Tensor] = {}
        """Of the block's linears that are integers by now, as the float inputs meet them, by name within the block."""
        self.note = ""
        """What of an interrupted run is lost, as a sentence for the user; empty if nothing is."""
        done = [name for name in self._layers if journal.has(name)]
        if done and done[-1] != self._layers[-1]:
            self._load(parse_digests(journal.finished[done[-1]].get("streams")) or {}, done, journal)

    def drift(self, block: Block, group: InputGroup, clock: Stopwatch) -> Drift | None:
        """How the input of a group has moved; None outside of the text layers."""
        if block.name not in self._layers:
            return None
        sums = DriftAccumulator(group.width)
        with self._placed(block, clock, until=group):
            for index, call in self._float.items():
                with clock.stage("forward"):
                    x = self._model.input_of(group.site, block.name, call, {})
                    moved = self._model.input_of(group.site, block.name, self._quantized[index], self._weights)
                with clock.stage("statistics"):
                    sums.observe(x.float().cpu(), moved.float().cpu())
        with clock.stage("statistics"):
            return sums.finish(group.site, self._strength)

    def take(self, block: Block, group: InputGroup, result: GroupResult, divisors: Mapping[str, Tensor]) -> None:
        """A group of the block is integers from now on.

        Args:
            divisors: float32 [N, 1], by linear: what its rows were divided by for a later input.
        """
        if block.name not in self._layers:
            return
        for linear, made in zip(group.linears, result.linears, strict=True):
            weight = made.weight.float() * steps_of(made, slice(None))
            if linear.name in divisors:
                weight *= divisors[linear.name]
            if result.scales is not None:
                weight /= result.scales
            name = f"{linear.name.removeprefix(f'{block.name}.')}.weight"
            self._weights[name] = weight.to(self._model.device, self._model.dtype)

    def finish(self, block: Block, clock: Stopwatch) -> JsonObject:
        """Carry both streams through a text layer, all of whose groups are integers, and keep them whole or not at all.

        Those of the layer before stay: until this one is journalled a resume needs them.

        Returns:
            Name and xxh3-128 of their file; nothing behind the last layer, and outside of the text layers.
        """
        if block.name not in self._layers:
            return {}
        with self._placed(block, clock), clock.stage("forward"):
            for index, call in self._float.items():
                moved = self._quantized[index]
                moved.hidden = self._model.replay(block.name, moved, self._weights)
                call.hidden = self._model.replay(block.name, call)
        self._weights = {}
        if block.name == self._layers[-1]:
            return {}
        with clock.stage("write"):
            return self._save(block)

    @contextmanager
    def _placed(self, block: Block, clock: Stopwatch, until: InputGroup | None = None) -> Iterator[None]:
        """Hold a layer's float weights; with `until` without those of that group and the ones after it.

        They lie there only while samples run: a group that is being rounded needs the memory.
        """
        order = [group.site for group in block.groups]
        left = block.groups[order.index(until.site) :] if until is not None else ()
        without = {linear.name for group in left for linear in group.linears}
        modules = self._model.module(block.name).named_modules(prefix=block.name)
        wanted = [name for name, module in modules if name not in without and list(module.parameters(recurse=False))]
        with self._model.placed_in_time(clock, *wanted):
            yield

    def _save(self, block: Block) -> JsonObject:
        number = self._layers.index(block.name)
        states = {
            f"{kind}.{index}": call.hidden.contiguous()
            for kind, calls in self._streams().items()
            for index, call in calls.items()
        }
        self._clear(keep=_file_of(number - 1))
        name = _file_of(number)
        return {name: write_tensors(self._work / name, states)}

    def _streams(self) -> Mapping[str, dict[int, BlockCall]]:
        return {"float": self._float, "quantized": self._quantized}

    def _load(self, files: Mapping[str, str], done: list[str], journal: Journal) -> None:
        for name, digest in files.items():
            path = self._work / name
            if is_as_written(path, digest):
                with safe_open(path, "pt") as stored:
                    for kind, calls in self._streams().items():
                        for index, call in calls.items():
                            call.hidden = stored.get_tensor(f"{kind}.{index}").to(self._model.device)
                return
        self.note = (
            f"{next(iter(files), 'the hidden states')} of the unfinished run is missing or altered, so its "
            f"{counted(len(done), 'finished text layer is', 'finished text layers are')} done again"
        )
        journal.drop(done)

    def _clear(self, keep: str) -> None:
        for path in self._work.glob(f"{STREAMS}*"):
            if path.name != keep:
                path.unlink()


def _file_of(number: int) -> str:
    return f"{STREAMS}{number:03d}"
