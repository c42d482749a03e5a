"""Which token comes next, and what stays in memory."""

from __future__ import annotations

import pytest
import torch

from glmq.model.greedy import fit_into, likeliest_tokens


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_likeliest_token_is_the_same_in_pieces_of_any_size(rows: int) -> None:
    logits = torch.tensor([[1.0, 4.0, 9.0, 4.0, 0.0], [3.0, 3.0, 9.0, -1.0, 3.0], [-5.0, -7.0, 9.0, -6.0, -4.0]])
    pieces = [(start, logits[:, start : start + rows].clone()) for start in range(0, 5, rows)]
    assert likeliest_tokens(pieces, image_token_id=2).tolist() == [1, 0, 4]


@pytest.mark.parametrize(
    ("room", "kept"), [(0, set()), (4, {"b"}), (9, {"a", "b"}), (12, {"a", "b"}), (16, {"a", "b", "c"})]
)
def test_parts_stay_in_memory_while_they_fit(room: int, kept: set[str]) -> None:
    assert fit_into({"a": 5, "b": 4, "c": 7}, room) == kept
