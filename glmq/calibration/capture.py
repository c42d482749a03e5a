"""Statistics of the linears' inputs, collected by hooks while a block is replayed, over all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from glmq.calibration.convergence import Convergence, Halfway
from glmq.model.family import Block
from glmq.model.streamed import StreamedModel
from glmq.numerics.moments import InputAccumulator, InputStats
from glmq.progress import Stopwatch
from glmq.ranks import Ranks


class Watch:
    """Collects the inputs of one block's linears, sample by sample.

    Every rank makes the same number of calls for a site: `observe` for each sample of its own, and `skip_turn` where it has
    no sample and another rank has one, because each call exchanges tensors between all ranks.

    Args:
        block: its groups are run in this order.
        accumulators: by site.
        ranks: the processes that share the samples.
        clock: gets the time as stage `statistics`.
        keep_rows: tokens of each sample that the accumulators keep as they are.
        own: how many samples are the user's, for the question whether the statistics have settled.
    """

    def __init__(
        self,
        block: Block,
        accumulators: Mapping[str, InputAccumulator],
        ranks: Ranks,
        clock: Stopwatch,
        *,
        keep_rows: int,
        own: int,
    ) -> None:
        self._block, self._accumulators, self._ranks, self._keep_rows = block, accumulators, ranks, keep_rows
        self._clock = clock
        self._halfway = {site: Halfway(accumulator, own) for site, accumulator in accumulators.items()}
        self._turn = dict.fromkeys(accumulators, 0)

    @contextmanager
    def hooked(self, model: StreamedModel) -> Iterator[None]:
        """Observe the inputs of the block's linears in every forward pass inside the context."""
        handles = [
            model.module(group.site).register_forward_pre_hook(_Hook(self, group.site)) for group in self._block.groups
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def observe(self, site: str, x: Tensor) -> None:
        """Add the input that the linears of `site` get for this rank's next sample: `x`, [..., K]."""
        with self._clock.stage("statistics"):
            x = x.reshape(-1, x.shape[-1])
            observed = self._accumulators[site].observe(x, keep_rows=self._keep_rows)
            self._halfway[site].observe(self._index(site, self._ranks.place.rank))
            self._accumulate(site, observed)

    def skip_turn(self) -> None:
        """Take part in a turn in which this rank has no sample."""
        for group in self._block.groups:
            self._accumulate(group.site, [])

    def finish(self) -> list[tuple[InputStats, Convergence | None]]:
        """The statistics of the inputs that were observed, and how far they have settled, in the order of the groups.

        Returns:
            On rank 0 one pair for each input that got a token; an empty list on the others.

        Raises:
            OtherRankError, LostRanksError: another rank stopped.
        """
        finished: list[tuple[InputStats, Convergence | None]] = []
        for site, accumulator in self._accumulators.items():
            halves = self._halfway[site].state()
            parts = self._ranks.gather([*halves, *accumulator.state()])
            if self._ranks.place.is_first:
                for part in parts[1:]:
                    accumulator.merge(part[len(halves) :])
                if accumulator.tokens:
                    settled = Halfway.merge([part[: len(halves)] for part in parts])
                    finished.append((accumulator.finish(), settled))
        return finished

    def _accumulate(self, site: str, observed: list[Tensor]) -> None:
        """Add what every rank observed in this turn, in the order of the ranks; an empty list is no sample."""
        for rank, theirs in enumerate(self._ranks.all_gather_tensors(observed)):
            self._halfway[site].accumulate(self._index(site, rank), theirs[0] if theirs else None)
            if theirs:
                self._clock.count("statistics", flops=self._accumulators[site].accumulate(theirs))
        self._turn[site] += 1

    def _index(self, site: str, rank: int) -> int:
        """Index of the sample that a rank has in this turn, in the order of `convergence_order`."""
        return self._turn[site] * self._ranks.place.world + rank


class _Hook:
    """A forward pre-hook that hands a linear's input to a watch."""

    def __init__(self, watch: Watch, site: str) -> None:
        self._watch, self._site = watch, site

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._watch.observe(self._site, args[0])
