"""What two checkpoints are run on to compare what they do: inputs by name, and how many blocks a run goes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from glmq.model.config import ModelConfig
from glmq.model.inputs import ModelInputs


@dataclass(frozen=True, slots=True)
class Case:
    """One input that both models are given."""

    name: str
    has_image: bool
    encode: Callable[[], ModelInputs]
    """Makes the input; called once in a run, just before its pixels go into the vision tower, so that those of many images need
    not be held."""


def count_blocks(config: ModelConfig, has_images: bool) -> int:
    """Blocks that a run goes through: the text layers, and with images the vision tower and the merger."""
    return config.layers + (config.vision_depth + 1 if has_images else 0)
