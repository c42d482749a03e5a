"""Checksums of what is read: so that all that one run uses comes from the same tensors and files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import xxhash

from glmq.errors import OtherStatisticsError

HASH_BYTES: Final = 4 * 2**20
"""Of a tensor, read and hashed at a time."""


class ContentDigests:
    """The xxh3-128 of tensors, taken while they are read and compared with what is known of them.

    A tensor counts as read when all its bytes were, in order: at once, or in pieces from its first byte on.

    Args:
        known: by tensor name, in hexadecimal.
        wanted: ends the sentence "tensor 'x' is not ...": which tensor was expected, and what to do.
    """

    def __init__(self, known: Mapping[str, str], wanted: str) -> None:
        self.known = dict(known)
        """Of every tensor that was read whole, and of those that are known from before."""
        self._wanted = wanted
        self._fresh: dict[str, str] = {}
        self._running: dict[str, tuple[xxhash.xxh3_128, int]] = {}

    def observe(self, path: Path, name: str, nbytes: int, start: int, data: memoryview) -> None:
        """Take in `data`, which was read from `path` `start` bytes after the first of the tensor's `nbytes`.

        Raises:
            StatisticsError: the tensor is whole now, and is not the known one.
        """
        state, done = (xxhash.xxh3_128(), 0) if start == 0 else self._running.pop(name, (None, 0))
        if state is None or done != start:
            return  # rows picked here and there
        state.update(data)
        if start + len(data) < nbytes:
            self._running[name] = state, start + len(data)
        else:
            self.learn(path, {name: state.hexdigest()})

    def learn(self, path: Path, digests: Mapping[str, str]) -> None:
        """Add what was read from `path`. Raises StatisticsError where another digest is known."""
        for name, digest in digests.items():
            if name not in self.known:
                self.known[name] = self._fresh[name] = digest
            elif self.known[name] != digest:
                raise OtherStatisticsError(f"{path}: tensor {name!r} is not {self._wanted}")

    def take_fresh(self) -> dict[str, str]:
        """Digests that were not known when this was last asked."""
        fresh, self._fresh = self._fresh, {}
        return fresh
