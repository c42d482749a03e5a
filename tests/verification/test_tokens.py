"""Tokens that the model has no row for."""

import json
from pathlib import Path

import pytest

from glmq.model.tiny import TINY_CHECKPOINT
from glmq.verification.tokens import check_tokens, largest_token


@pytest.mark.parametrize(
    ("document", "largest"),
    [
        ({"model": {"vocab": {"a": 0, "b": 7}}, "added_tokens": [{"id": 5}]}, 7),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 9}, {}, "x"]}, 9),
        ({"model": {"vocab": [["a", 0.0], ["b", 0.0]]}}, 1),  # a vocabulary without numbers
        ({"model": None}, -1),
        ([], -1),
    ],
)
def test_the_largest_token_is_found(document: object, largest: int, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert largest_token(tmp_path / "tokenizer.json") == largest


def test_a_token_beyond_the_embeddings_is_a_warning(tmp_path: Path) -> None:
    assert list(check_tokens(tmp_path)) == []  # no files: other checks' business
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((TINY_CHECKPOINT / name).read_bytes())
    assert list(check_tokens(tmp_path)) == []
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["added_tokens"].append({"id": 1536, "content": "<new>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    [finding] = check_tokens(tmp_path)
    assert (finding.severity, finding.message) == (
        "warning",
        "tokenizer.json has token 1536, but the embeddings have 1536 rows (vocab_size of config.json): a text with such a "
        "token stops the engine; take tokenizer and weights from the same release",
    )
    (tmp_path / "tokenizer.json").write_text("{")
    assert list(check_tokens(tmp_path)) == []
