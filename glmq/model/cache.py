"""Keys and values of several sequences in every text layer, for generation that streams blocks.

Sequences end at the same place, so that all of them grow there and one token of each is a single call of a layer. transformers'
attention (4.53 to 5.x) asks nothing of a cache but `update`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glmq.model.config import ModelConfig


class TokenCache:
    """The cache of S sequences; as the argument of a layer it takes one token of each.

    Args:
        config: of the model.
        lengths: tokens of each prompt.
        room: tokens that may follow.
        device: where the layers run.
        dtype: of keys and values.
    """

    def __init__(
        self, config: ModelConfig, lengths: Sequence[int], room: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._end = max(lengths)
        self._starts = torch.tensor([self._end - length for length in lengths])
        shape = (2, len(lengths), config.kv_heads, self._end + room, config.head_dim)
        self._layers = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]

    def prompt(self, sequence: int) -> PromptCache:
        """The argument of a layer that is given the prompt of one sequence."""
        return PromptCache([layer[:, sequence] for layer in self._layers], int(self._starts[sequence]), self._end)

    def visible(self) -> Tensor:
        """The mask of the next token of each sequence, its own place included: bool [S, places], True where it attends."""
        return torch.arange(self._end + 1)[None, :] >= self._starts[:, None]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Keep the [S, heads, 1, head_dim] of one token each; returns all so far, [S, heads, places, head_dim]."""
        kept = self._layers[layer]
        kept[0, :, :, self._end : self._end + 1] = keys
        kept[1, :, :, self._end : self._end + 1] = values
        return kept[0, :, :, : self._end + 1], kept[1, :, :, : self._end + 1]

    def advance(self) -> None:
        """Move on to the place of the next token; call it once all layers have kept this one."""
        self._end += 1


class PromptCache:
    """Keeps the keys and values of one prompt; made by `TokenCache.prompt`."""

    def __init__(self, layers: Sequence[Tensor], start: int, end: int) -> None:
        self._layers, self._places = layers, slice(start, end)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Keep the [1, heads, tokens, head_dim] of the prompt and return them: a prompt attends to nothing else."""
        self._layers[layer][0, :, self._places] = keys[0]
        self._layers[layer][1, :, self._places] = values[0]
        return keys, values


def cache_bytes(config: ModelConfig, sequences: int, places: int, dtype: torch.dtype) -> int:
    """Memory of a TokenCache for that many sequences, the longest of that many tokens with its answer."""
    return 2 * config.layers * sequences * config.kv_heads * places * config.head_dim * dtype.itemsize
