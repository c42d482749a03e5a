"""Watching linear inputs while a block is replayed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from glmq.model.blocks import StreamedModel
from glmq.model.glm4v import Block
from glmq.numerics.moments import InputAccumulator


@contextmanager
def watching(
    model: StreamedModel, block: Block, accumulators: Mapping[str, InputAccumulator], *, keep_rows: int
) -> Iterator[None]:
    """Feed the input of each group of `block` to the accumulator of its site while the context lasts.

    Args:
        keep_rows: tokens of each call that the accumulators keep as they are.
    """
    handles = [
        model.module(group.site).register_forward_pre_hook(_Feed(accumulators[group.site], keep_rows))
        for group in block.groups
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Feed:
    """A forward pre-hook that hands a linear's input to an accumulator."""

    def __init__(self, accumulator: InputAccumulator, keep_rows: int) -> None:
        self._accumulator, self._keep_rows = accumulator, keep_rows

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        self._accumulator.update(x.reshape(-1, x.shape[-1]), keep_rows=self._keep_rows)
