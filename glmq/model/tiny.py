"""The embedded tiny GLM-4.1V: a really trained 3.8 M-parameter checkpoint with pictures, and where it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Final

TINY_CHECKPOINT: Final = Path(__file__).parent / "tiny_glm4v"
"""A float checkpoint folder as a user would have it: two bf16 shards, config.json, tokenizer and processor files."""

TINY_PICTURES: Final = TINY_CHECKPOINT / "pictures"
"""Calibration pictures; `answers.jsonl` beside them has their true descriptions."""

TINY_CASES: Final = TINY_CHECKPOINT / "cases"
"""Held-out pictures and texts, never calibrated on."""
