"""Whose doing a distance from the float weights is: damage, another float model, or quantizing itself.

Errors of extreme weights (constant rows, inputs that are all alike) look like damage. Where checksums prove that the
integers are those that were written, and the float weight the one that they were made from, damage is ruled out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from glmq.checkpoint.checksums import Checksums
from glmq.checkpoint.contents import ContentDigests
from glmq.checkpoint.reader import Checkpoint

CHANGED: Final = "what it was when verify read it first; let nothing write into that folder meanwhile"


class Origin(Enum):
    """What checksums tell of a quantized linear and the float one beside it."""

    UNKNOWN = ""
    OWN = "quantize left it so: every byte is as it wrote it, and the float weight is the one it read"
    OTHER = "it was made from another float model than --reference"


@dataclass(frozen=True, slots=True)
class Origins:
    """What the float model was that an un-sharded checkpoint was made from."""

    made_from: Mapping[str, str]
    """xxh3-128 of its tensors by name; empty where the checkpoint's own bytes are not proven to be as written."""
    reference: Checkpoint | None
    """Its `contents` learn what is read."""

    def of(self, linear: str) -> Origin:
        """Of a linear whose float weight was read."""
        name = f"{linear}.weight"
        if name not in self.made_from or self.reference is None or self.reference.contents is None:
            return Origin.UNKNOWN
        found = self.reference.contents.known.get(name)
        if found is None:
            return Origin.UNKNOWN
        return Origin.OWN if found == self.made_from[name] else Origin.OTHER


def find_origins(checksums: Checksums | None, reference: Checkpoint | None) -> Origins:
    """Of a checkpoint that fits its checksums, None if it does not; `reference` learns the digests of what is read of it."""
    if checksums is None or reference is None:
        return Origins({}, None)
    reference.contents = ContentDigests({}, CHANGED)
    return Origins(checksums.source, reference)
