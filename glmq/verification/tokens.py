"""Whether every token of the tokenizer has a row in the embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from glmq.checkpoint.disk import read_input
from glmq.errors import InputError
from glmq.model.config import read_config
from glmq.verification.findings import Check, Finding

TOKENIZER: Final = "tokenizer.json"
MAX_BYTES: Final = 100_000_000


def check_tokens(directory: Path) -> Iterator[Finding]:
    """Part of check 18: the largest token is one of the model's. More rows than tokens are usual; files that cannot be read,
    or no config.json, are findings of other checks."""
    try:
        largest, rows = largest_token(directory / TOKENIZER), read_config(directory).vocab_size
    except (InputError, ValueError, RecursionError):
        return
    if largest >= rows:
        yield Check.SIDE_FILES.warning(
            "",
            f"{TOKENIZER} has token {largest}, but the embeddings have {rows} rows (vocab_size of config.json): a text with "
            "such a token stops the engine; take tokenizer and weights from the same release",
        )


def largest_token(path: Path) -> int:
    """The largest number of a token, of the vocabulary or added; -1 without any.

    Raises:
        CheckpointError: it cannot be read.
        ValueError: it is no JSON.
    """
    document = json.loads(read_input(path, MAX_BYTES))
    if not isinstance(document, Mapping):
        return -1
    model, added = document.get("model"), document.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    numbers = vocabulary.values() if isinstance(vocabulary, Mapping) else range(len(vocabulary or ()))
    more = [token.get("id") for token in added or () if isinstance(token, Mapping)]
    return max((number for number in (*numbers, *more) if isinstance(number, int)), default=-1)
