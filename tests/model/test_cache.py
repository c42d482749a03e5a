"""Keys and values of sequences of different length, which end at the same place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from glmq.model.cache import TokenCache, cache_bytes
from glmq.model.config import ModelConfig, read_config


@pytest.fixture
def config(small: Path) -> ModelConfig:
    return read_config(small)


def numbered(config: ModelConfig, sequences: int, tokens: int, first: int) -> Tensor:
    """[sequences, heads, tokens, head_dim], each token's values its number."""
    numbers = torch.arange(first, first + tokens, dtype=torch.float32)
    return numbers[None, None, :, None].expand(sequences, config.kv_heads, tokens, config.head_dim)


def test_a_token_sees_its_own_prompt_and_answer_and_nothing_else(config: ModelConfig) -> None:
    cache = TokenCache(config, (2, 4), 2, device=torch.device("cpu"), dtype=torch.float32)
    for layer in range(config.layers):
        for sequence, tokens in enumerate((2, 4)):
            keys, values = numbered(config, 1, tokens, 10), numbered(config, 1, tokens, 20)
            found = cache.prompt(sequence).update(keys, values, layer, {"cache_position": None})
            assert found[0] is keys
            assert found[1] is values
    assert cache.visible().tolist() == [[False, False, True, True, True], [True] * 5]
    for made, wanted in enumerate(([[10, 11, 1], [10, 11, 12, 13, 1]], [[10, 11, 1, 2], [10, 11, 12, 13, 1, 2]])):
        for layer in range(config.layers):
            token = numbered(config, 2, 1, made + 1)
            keys, values = cache.update(token, token + 10, layer, kwargs={})
            visible = cache.visible()
            for sequence, numbers in enumerate(wanted):
                assert keys[sequence, -1, visible[sequence], 0].tolist() == numbers
                assert values[sequence, 0, visible[sequence], -1].tolist() == [n + 10 for n in numbers]
        cache.advance()


def test_the_size_is_that_of_the_tensors(config: ModelConfig) -> None:
    cache = TokenCache(config, (2, 4), 2, device=torch.device("cpu"), dtype=torch.bfloat16)
    keys, values = cache.update(*[numbered(config, 2, 1, 0).bfloat16()] * 2, 0)
    assert keys.dtype is values.dtype is torch.bfloat16
    held = keys.untyped_storage().nbytes()  # keys and values of one layer share it
    assert values.untyped_storage().nbytes() == held
    assert cache_bytes(config, 2, 6, torch.bfloat16) == config.layers * held
