"""An output folder that all ranks fill together and that appears whole or not at all."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import Final

from glmq.checkpoint.folder import OutputFolder
from glmq.errors import GlmqError
from glmq.ranks import LostRanksError, OtherRankError, Ranks

_STOP: Final = ".stop"
"""Lies in the hidden folder as soon as one rank has failed."""


class SharedFolder:
    """The hidden folder of an OutputFolder: made and named by rank 0, filled by all ranks, left by all if one fails.

    A rank that fails tells the others: at their next `all_gather`, or sooner where they call `check_others`.

    Args:
        output: the folder to make; the same on every rank.
        ranks: the processes.
    """

    def __init__(self, output: OutputFolder, ranks: Ranks) -> None:
        self._output = output
        self._ranks = ranks
        self._is_told = False
        self.path: Final = output.path
        """Where to write until `finish`."""

    def __enter__(self) -> SharedFolder:
        failure: Exception | None = None
        if self._ranks.place.is_first:
            try:
                self._output.__enter__()
                (self.path / _STOP).unlink(missing_ok=True)  # of the interrupted run
            except Exception as error:
                failure = error
        self._exchange("", failure)
        if not self.path.is_dir():
            raise GlmqError(
                f"{self.path}: rank {self._ranks.place.rank} does not see the folder that rank 0 made; "
                "all ranks must run on one machine or share the disk"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        if not isinstance(error, OtherRankError):
            with suppress(OSError):
                (self.path / _STOP).touch()
        # A signal leaves no time to tell, and of a failure that came from the others they have heard.
        is_news = not self._is_told and not isinstance(error, (OtherRankError, LostRanksError))
        if is_news and isinstance(error, Exception):
            with suppress(Exception):
                self._exchange("", error)
        self._output.__exit__(kind, error, trace)

    def check_others(self) -> None:
        """Raise OtherRankError if another rank has failed."""
        if (self.path / _STOP).exists():
            self._exchange("", None)

    def all_gather(self, text: str) -> list[str]:
        """Give `text` to every rank and return those of all, by rank.

        Raises:
            OtherRankError: a rank failed instead of coming here.
            LostRanksError: a rank is gone.
        """
        return self._exchange(text, None)

    def finish(self) -> None:
        """Put the finished folder in the target's place; returns when that is done, on every rank."""
        failure: Exception | None = None
        if self._ranks.place.is_first:
            try:
                self._output.finish()
            except OSError as error:
                failure = error
        self._exchange("", failure)

    def _exchange(self, text: str, failure: Exception | None) -> list[str]:
        self._is_told = failure is not None
        return self._ranks.all_gather(text, failure)
