"""The vision tower of transformers, computed faster and in less memory: the same products, without what surrounds them."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

SCORES_AT_ONCE = 2**28
"""Scores of queries against keys, 1 GiB of float32. An NPU without a fused attention, the 300I Duo, holds the scores twice and
more: for all queries of a photo of 24,128 patches at once that would be 60 GiB."""


def quicken_vision(model: nn.Module) -> None:
    """Change how the vision tower inside `model` computes; what it computes stays, up to float32's last bits.

    Its convolutions, whose kernel covers each whole input, become the matrix products that they are: as a convolution in
    float32, merging the patches of a picture takes 13 times as long on a processor without AMX. Its attention reads each
    picture by itself: transformers 4 makes a mask over all pairs of patches, 3 GB of it for a photo of 24,128 patches.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.forward = partial(_convolve_whole, module)  # type: ignore[method-assign]
        elif isinstance(getattr(module, "qkv", None), nn.Linear):
            module.forward = partial(_attend, module)


def _convolve_whole(convolution: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """[N, rows, 1, ...] from [N, channels, *kernel]."""
    assert x.shape[2:] == convolution.kernel_size
    y = nn.functional.linear(x.flatten(1), convolution.weight.flatten(1), convolution.bias)
    return y.reshape(*y.shape, *(1 for _ in convolution.kernel_size))


def _attend(
    attention: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **_: object,
) -> Tensor:
    """As transformers' vision attention computes it, each picture by itself.

    Args:
        attention: with its linears `qkv` and `proj`.
        hidden_states: [patches, width], of all pictures.
        cu_seqlens: int [pictures + 1]: where each picture's patches begin, and where the last ones end.
        position_embeddings: cosines and sines, each [patches, head size].
    """
    q, k, v = _heads(attention, hidden_states, position_embeddings)
    pictures = [slice(*ends) for ends in pairwise(cu_seqlens.tolist())]
    scale = q.shape[-1] ** -0.5
    at_once = queries_at_once(q.device, heads=q.shape[1], patches=q.shape[2])
    seen = [attend_to_all(q[:, :, p], k[:, :, p], v[:, :, p], scale=scale, at_once=at_once) for p in pictures]
    projected: Tensor = attention.proj(torch.cat(seen, 2)[0].transpose(0, 1).flatten(1))
    return projected


def queries_at_once(device: torch.device, *, heads: int, patches: int) -> int:
    """How many queries attend to all keys in one turn: all of them on a CPU, whose attention keeps no scores."""
    return patches if device.type == "cpu" else max(1, SCORES_AT_ONCE // (heads * patches))


def attend_to_all(q: Tensor, k: Tensor, v: Tensor, *, scale: float, at_once: int) -> Tensor:
    """Attention of `at_once` queries at a time to all keys: each [1, heads, patches, head size]."""
    attend = nn.functional.scaled_dot_product_attention
    turns = [attend(part, k, v, scale=scale) for part in q.split(at_once, 2)]
    return turns[0] if len(turns) == 1 else torch.cat(turns, 2)


def _heads(attention: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Queries and keys, rotated, and values: each [1, heads, patches, head size]."""
    rotate = import_module(type(attention).__module__).apply_rotary_pos_emb_vision
    q, k, v = attention.qkv(hidden_states).unflatten(1, (3, attention.num_heads, -1)).unbind(1)
    q, k = rotate(q, k, *position_embeddings)
    return [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]
