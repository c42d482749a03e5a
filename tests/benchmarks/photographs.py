"""The eight photographs that the documented figures were measured with: those that came with glmq before there were thirty."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from glmq.calibration.samples import default_images

NAMES: Final = ("astronaut", "cat", "clock", "coffee", "deep_field", "flower", "rocket", "temple")


def photographs() -> list[Path]:
    """Their files, by name."""
    return [default_images().resolve() / f"{name}.jpg" for name in NAMES]


def link_photographs(folder: Path) -> Path:
    """A new folder that holds them."""
    folder.mkdir()
    for path in photographs():
        (folder / path.name).symlink_to(path)
    return folder
