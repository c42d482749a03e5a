"""Watching linear inputs while a block is replayed, here and on the other ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from glmq.model.blocks import StreamedModel
from glmq.model.glm4v import Block
from glmq.numerics.moments import InputAccumulator, InputStats
from glmq.parallel import Group
from glmq.stages import Stopwatch


class Watch:
    """Collects the inputs of one block's linears, sample by sample.

    All ranks take turns together: while one sees a sample, the others see theirs or stand by.

    Args:
        block: its groups are run in this order.
        accumulators: by site.
        group: the ranks that share the samples.
        clock: gets the time as stage `statistics`.
        keep_rows: tokens of each sample that the accumulators keep as they are.
    """

    def __init__(
        self,
        block: Block,
        accumulators: Mapping[str, InputAccumulator],
        group: Group,
        clock: Stopwatch,
        *,
        keep_rows: int,
    ) -> None:
        self._block, self._accumulators, self._group, self._keep_rows = block, accumulators, group, keep_rows
        self._clock = clock

    @contextmanager
    def hooked(self, model: StreamedModel) -> Iterator[None]:
        """See the inputs that the model computes while the context lasts."""
        handles = [
            model.module(group.site).register_forward_pre_hook(_Hook(self, group.site)) for group in self._block.groups
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def see(self, site: str, x: Tensor) -> None:
        """Take the input of one sample. x [..., K]."""
        with self._clock.stage("statistics"):
            self._add(site, self._accumulators[site].look(x.reshape(-1, x.shape[-1]), keep_rows=self._keep_rows))

    def stand_by(self) -> None:
        """This rank has no sample in this turn; another may have one."""
        for group in self._block.groups:
            self._add(group.site, [])

    def finish(self) -> list[InputStats]:
        """The statistics of the inputs that were seen, in the order of the groups; on rank 0, others return nothing.

        Raises:
            OtherRankError, LostRanksError: another rank stopped.
        """
        finished: list[InputStats] = []
        for accumulator in self._accumulators.values():
            parts = self._group.bring(accumulator.hand_over())
            if self._group.place.is_first:
                for part in parts[1:]:
                    accumulator.absorb(part)
                if accumulator.tokens:
                    finished.append(accumulator.finish())
        return finished

    def _add(self, site: str, look: list[Tensor]) -> None:
        for theirs in self._group.share(look):
            if theirs:
                self._clock.count("statistics", flops=self._accumulators[site].add(theirs))


class _Hook:
    """A forward pre-hook that hands a linear's input to a watch."""

    def __init__(self, watch: Watch, site: str) -> None:
        self._watch, self._site = watch, site

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._watch.see(self._site, args[0])
