"""Greedy answers: which token comes next, and which parts of a model stay in memory from token to token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor

HEAD_ROWS: Final = 8192
"""Rows of lm_head that are in memory at one time."""


def likeliest_tokens(pieces: Iterable[tuple[int, Tensor]], image_token_id: int) -> Tensor:
    """The most likely token of each sequence, the lowest id of equals: int64 [S].

    The image placeholder is never one: an answer with it would want pixels.

    Args:
        pieces: logits of the vocabulary in pieces: the id of the first one's token, and float32 [S, ids]; changed.
        image_token_id: the placeholder.
    """
    best, chosen = torch.tensor(-torch.inf), torch.tensor(0)
    for start, logits in pieces:
        if start <= image_token_id < start + logits.shape[1]:
            logits[:, image_token_id - start] = -torch.inf
        highest, where = logits.max(1)
        chosen = torch.where(highest > best, where + start, chosen)
        best = torch.maximum(highest, best)
    return chosen


def fit_into(sizes: Mapping[str, int], room: int) -> frozenset[str]:
    """The parts that stay in memory: one after the other, each that still fits.

    Args:
        sizes: bytes of each, in the order in which a token runs through them.
        room: bytes that they may take together.
    """
    kept: set[str] = set()
    for name, nbytes in sizes.items():
        if nbytes <= room:
            kept.add(name)
            room -= nbytes
    return frozenset(kept)
