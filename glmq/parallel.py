"""Processes that torchrun started: the only file that knows torch.distributed. They talk over gloo, which every machine has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Final

import torch
import torch.distributed as dist

from glmq.errors import GlmqError, UsageError

TIME_LIMIT: Final = timedelta(hours=2)
"""How long a rank waits for the others. A rank that dies is noticed at once; this is for one that hangs."""


class LostRanksError(GlmqError):
    """Another rank is gone or does not answer."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which process this is."""

    rank: int
    world: int


def read_place() -> Place:
    """This process's rank and the number of processes, from RANK and WORLD_SIZE; 0 of 1 if it was not started by torchrun.

    Raises:
        UsageError: values that torchrun does not set.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not rank.isdecimal() or not world.isdecimal() or not int(rank) < int(world):
        raise UsageError(f"RANK={rank} and WORLD_SIZE={world}: are not what torchrun sets; unset them or use torchrun")
    return Place(int(rank), int(world))


class Group:
    """The processes of one torchrun call, as a context manager. One process alone needs nobody and opens no connection.

    Args:
        place: of this process.
        time_limit: how long to wait for the others.

    Raises:
        LostRanksError: the others cannot be reached.
    """

    def __init__(self, place: Place, time_limit: timedelta = TIME_LIMIT) -> None:
        self.place: Final = place
        self._time_limit = time_limit

    def __enter__(self) -> Group:
        if self.place.world > 1:
            try:
                dist.init_process_group(
                    "gloo", rank=self.place.rank, world_size=self.place.world, timeout=self._time_limit
                )
            except (RuntimeError, ValueError, OSError) as error:
                raise self._lost(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.place.world > 1:
            dist.destroy_process_group()

    def gather(self, text: str) -> list[str]:
        """Give `text` to every rank and return those of all, by rank; waits until all have called it.

        Raises:
            LostRanksError: a rank is gone, or did not come within the time limit.
        """
        if self.place.world == 1:
            return [text]
        own = torch.frombuffer(bytearray(f"{text}\n".encode()), dtype=torch.uint8)  # never empty
        try:
            sizes = self._all_gather(torch.tensor([own.numel()]))
            longest = max(int(size) for size in sizes)
            padded = self._all_gather(torch.nn.functional.pad(own, (0, longest - own.numel())))
        except RuntimeError as error:
            raise self._lost(error) from error
        return [bytes(row[: int(size)].numpy()).decode().removesuffix("\n") for row, size in zip(padded, sizes)]

    def _all_gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        every = [torch.empty_like(own) for _ in range(self.place.world)]
        dist.all_gather(every, own)
        return every

    def _lost(self, error: Exception) -> LostRanksError:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return LostRanksError(
            f"rank {self.place.rank} of {self.place.world}: lost the other ranks ({reason}); see what they printed"
        )
