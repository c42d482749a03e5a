"""`glmq demo`: the whole pipeline on the embedded tiny model."""

from __future__ import annotations


def demo() -> None:
    """Run everything on the embedded tiny GLM-4.1V."""
