"""Processes that torchrun started: the only file that uses torch.distributed.

They talk over gloo, which every machine has: statistics are summed in main memory whatever computes the forward pass.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from glmq.errors import GlmqError, UsageError

TIME_LIMIT: Final = timedelta(hours=2)
"""How long a rank waits for the others. A rank that dies is noticed at once; this is for one that hangs."""


class LostRanksError(GlmqError):
    """Another rank is gone or does not answer."""


class OtherRankError(GlmqError):
    """Another rank stopped; the sentence is its."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which process this is."""

    rank: int
    world: int
    local_rank: int = 0
    """Among the processes of this machine: the number of its NPU."""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes what all share, and talks."""
        return self.rank == 0


def read_place() -> Place:
    """This process's rank and the number of processes, from RANK and WORLD_SIZE; 0 of 1 if it was not started by torchrun.

    Raises:
        UsageError: values that torchrun does not set.
    """
    rank, world, local = (
        os.environ.get(name, no) for name, no in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    )
    if not rank.isdecimal() or not world.isdecimal() or not int(rank) < int(world) or not local.isdecimal():
        raise UsageError(
            f"RANK={rank}, WORLD_SIZE={world} and LOCAL_RANK={local}: are not what torchrun sets; unset them or use torchrun"
        )
    return Place(int(rank), int(world), int(local))


class Ranks:
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

    def __enter__(self) -> Ranks:
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

    def _all_gather_text(self, text: str) -> list[str]:
        """The texts of all ranks, by rank.

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

    def all_gather(self, text: str, failure: Exception | None = None) -> list[str]:
        """Give `text` to every rank and return those of all, by rank; waits until all have called it.

        A rank may bring its failure instead: whatever the others were about to exchange, they hear of it.

        Raises:
            OtherRankError: a rank failed instead of coming here.
            LostRanksError: a rank is gone.
            Exception: this rank's own failure, once the others know.
        """
        said = self._all_gather_text(json.dumps({"text": text, "failure": None if failure is None else str(failure)}))
        if failure is not None:
            raise failure
        texts: list[str] = []
        for rank, words in enumerate(map(json.loads, said)):
            if words["failure"] is not None:
                raise OtherRankError(f"stopped because rank {rank} failed: {words['failure']}")
            texts.append(words["text"])
        return texts

    def barrier(self) -> None:
        """Wait until every rank is here.

        Raises:
            OtherRankError, LostRanksError: as `all_gather`.
        """
        self.all_gather("")

    def all_gather_tensors(self, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Give tensors to every rank and return those of all, by rank.

        Args:
            tensors: contiguous, on the CPU; any number, of any shapes and dtypes, on each rank.

        Raises:
            OtherRankError, LostRanksError: as `all_gather`.
        """
        return self._exchange(tensors, to_first=False)

    def gather(self, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """As `all_gather_tensors`, but only rank 0 gets those of all; the other ranks get an empty list for each other rank."""
        return self._exchange(tensors, to_first=True)

    def _exchange(self, tensors: Sequence[Tensor], *, to_first: bool) -> list[Sequence[Tensor]]:
        if self.place.world == 1:
            return [tensors]
        specs = self.all_gather(json.dumps([[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]))
        every: list[Sequence[Tensor]] = []
        for rank, spec in enumerate(specs):
            if rank == self.place.rank:
                every.append(tensors)
            elif to_first and not self.place.is_first:
                every.append([])
            else:
                every.append([torch.empty(shape, dtype=getattr(torch, dtype)) for dtype, shape in json.loads(spec)])
        try:
            self._carry(every, to_first=to_first)
        except RuntimeError as error:
            raise self._lost(error) from error
        return every

    def _carry(self, every: Sequence[Sequence[Tensor]], *, to_first: bool) -> None:
        """Fill the tensors of the other ranks."""
        for rank, tensors in enumerate(every):
            for tensor in tensors:
                data = tensor.reshape(-1).view(torch.uint8)  # gloo does not know every dtype
                if not data.numel() or (to_first and rank == 0):
                    continue
                if not to_first:
                    dist.broadcast(data, rank)
                elif rank == self.place.rank:
                    dist.send(data, 0)
                else:
                    dist.recv(data, rank)

    def _all_gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        every = [torch.empty_like(own) for _ in range(self.place.world)]
        dist.all_gather(every, own)
        return every

    def _lost(self, error: Exception) -> LostRanksError:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return LostRanksError(
            f"rank {self.place.rank} of {self.place.world}: lost the other ranks ({reason}); see what they printed"
        )
