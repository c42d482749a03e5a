"""An output folder that all ranks fill together and that appears whole or not at all."""

from __future__ import annotations

import secrets
from contextlib import suppress
from types import TracebackType
from typing import Final

from glmq.checkpoint.folder import OutputFolder
from glmq.errors import LostRanksError, OtherRankError, SharedDiskError
from glmq.ranks import Ranks

_STOP: Final = ".stop-"
"""Begins the name of what lies in the work folder as soon as one rank has failed; a number of the run's own follows."""


class SharedFolder:
    """The folder of an OutputFolder: made, locked and named by rank 0, filled by all ranks, left by all if one fails.

    A rank that fails tells the others: at their next `all_gather`, or sooner where they call `check_others`.

    Args:
        output: the folder to make; the same on every rank.
        ranks: the processes.
    """

    def __init__(self, output: OutputFolder, ranks: Ranks) -> None:
        self._output = output
        self._ranks = ranks
        self._is_told = False
        self._is_entered = False
        self._stop = output.work / _STOP
        self.path: Final = output.path
        """Where to write the output until `finish`."""
        self.work: Final = output.work
        """For what is needed on the way."""

    def __enter__(self) -> SharedFolder:
        failure: Exception | None = None
        if self._ranks.place.is_first:
            try:
                self._output.__enter__()
                self._is_entered = True
                for stop in self.work.glob(f"{_STOP}*"):  # of the interrupted run
                    stop.unlink()
            except Exception as error:
                failure = error
        try:
            # With a name that no other run knows, nothing that a late rank leaves can stop the next run.
            self._stop = self.work / (_STOP + self._exchange(secrets.token_hex(4), failure)[0])
        except BaseException as error:
            self._leave(type(error), error, error.__traceback__)
            raise
        if not self.path.is_dir():
            raise SharedDiskError(
                f"{self.path}: rank {self._ranks.place.rank} does not see the folder that rank 0 made; "
                "all ranks must run on one machine or share the disk"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._leave(None, None, None)
            return
        if not isinstance(error, OtherRankError):
            with suppress(OSError):
                self._stop.touch()
        # A signal leaves no time to tell, and of a failure that came from the others they have heard.
        is_news = not self._is_told and not isinstance(error, (OtherRankError, LostRanksError))
        if is_news and isinstance(error, Exception):
            with suppress(Exception):
                self._exchange("", error)
        self._leave(kind, error, trace)

    def _leave(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tidy up, which is for rank 0: it has the lock."""
        if self._is_entered:
            self._is_entered = False
            self._output.__exit__(kind, error, trace)

    def check_others(self) -> None:
        """Raise OtherRankError if another rank has failed."""
        if self._stop.exists():
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
            except Exception as error:
                failure = error
        self._exchange("", failure)

    def _exchange(self, text: str, failure: Exception | None) -> list[str]:
        self._is_told = failure is not None
        return self._ranks.all_gather(text, failure)
