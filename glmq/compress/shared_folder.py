"""An output folder that all ranks fill together and that appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from types import TracebackType
from typing import Final

from glmq.checkpoint.folder import OutputFolder
from glmq.errors import GlmqError
from glmq.parallel import Group, LostRanksError

_STOP: Final = ".stop"
"""Lies in the hidden folder as soon as one rank has failed."""


class OtherRankError(GlmqError):
    """Another rank stopped; the sentence is its."""


class SharedFolder:
    """The hidden folder of an OutputFolder: made and named by rank 0, filled by all ranks, removed if one fails.

    A rank that fails tells the others: at their next `meet`, or sooner where they call `check_others`.

    Args:
        output: the folder to make; the same on every rank.
        group: the ranks.
    """

    def __init__(self, output: OutputFolder, group: Group) -> None:
        self._output = output
        self._group = group
        self._is_first = group.place.rank == 0
        self._is_told = False
        self.path: Final = output.path
        """Where to write until `finish`."""

    def __enter__(self) -> SharedFolder:
        failure: Exception | None = None
        if self._is_first:
            try:
                self._output.__enter__()
            except Exception as error:
                failure = error
        self._exchange("", failure)
        if not self.path.is_dir():
            raise GlmqError(
                f"{self.path}: rank {self._group.place.rank} does not see the folder that rank 0 made; "
                "all ranks must run on one machine or share the disk"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        with suppress(OSError):
            (self.path / _STOP).touch()
        # A signal leaves no time to tell, and of a failure that came from the others they have heard.
        is_news = not self._is_told and not isinstance(error, (OtherRankError, LostRanksError))
        if is_news and isinstance(error, Exception):
            with suppress(Exception):
                self._exchange("", error)
        shutil.rmtree(self.path, ignore_errors=True)

    def check_others(self) -> None:
        """Raise OtherRankError if another rank has failed."""
        if (self.path / _STOP).exists():
            self._exchange("", None)

    def meet(self, text: str) -> list[str]:
        """Give `text` to every rank and return those of all, by rank.

        Raises:
            OtherRankError: a rank failed instead of coming here.
            LostRanksError: a rank is gone.
        """
        return self._exchange(text, None)

    def finish(self) -> None:
        """Put the finished folder in the target's place; returns when that is done, on every rank."""
        failure: Exception | None = None
        if self._is_first:
            try:
                self._output.finish()
            except OSError as error:
                failure = error
        self._exchange("", failure)

    def _exchange(self, text: str, failure: Exception | None) -> list[str]:
        said = self._group.gather(json.dumps({"text": text, "failure": None if failure is None else str(failure)}))
        if failure is not None:
            self._is_told = True
            raise failure
        texts: list[str] = []
        for rank, words in enumerate(map(json.loads, said)):
            if words["failure"] is not None:
                raise OtherRankError(f"stopped because rank {rank} failed: {words['failure']}")
            texts.append(words["text"])
        return texts
