"""Tensor and file names in the order that people count in. Standard library only: listings do not wait for torch."""

from __future__ import annotations

import re


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key that compares runs of the digits 0 to 9 as numbers: layers.2 comes before layers.10.

    Any string has one: a run of digits is not turned into an int, which may not have more than 4,300 of them, and digits
    of other scripts are letters.
    """
    parts = re.split(r"([0-9]+)", name)
    # A number is its length and its digits.
    keyed = [(len(part.lstrip("0")), part.lstrip("0")) if odd % 2 else (0, part) for odd, part in enumerate(parts)]
    return keyed, name
