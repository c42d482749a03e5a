"""Processes that torchrun started: the only file that uses torch.distributed.

They talk over gloo, which every machine has: statistics are summed in main memory whatever computes the forward pass.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from glmq.errors import LaunchError, LostRanksError, MeetingError, OtherRankError

log = logging.getLogger(__name__)

TIME_LIMIT: Final = timedelta(hours=2)
"""How long a rank waits for the others during the work. A rank that dies is noticed at once; this is for one that hangs."""
MEETING_LIMIT: Final = timedelta(minutes=5)
"""How long a rank waits for the others to start."""
LAST_PORT: Final = 65535
_PATIENCE: Final = 2.0
"""Seconds of waiting after which the user is told of it."""
_TURN: Final = 0.1
"""Seconds between two looks at who is there."""

_meetings = itertools.count()
"""How often this process has met the others: each meeting has names of its own in the store that torchrun keeps."""


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
        os.environ.get(name) or no for name, no in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    )
    if not rank.isdecimal() or not world.isdecimal() or not int(rank) < int(world) or not local.isdecimal():
        raise LaunchError(
            f"RANK={rank}, WORLD_SIZE={world} and LOCAL_RANK={local}: are not what torchrun sets; unset them or use torchrun"
        )
    return Place(int(rank), int(world), int(local))


class Ranks:
    """The processes of one torchrun call, as a context manager. One process alone needs nobody and opens no connection.

    Args:
        place: of this process.
        time_limit: how long to wait for the others once all have met.
        meeting_limit: how long to wait until all have met.
        note: is told whom this rank waits for, if that takes longer than a moment.

    Raises:
        UsageError: the environment does not say where the ranks meet.
        MeetingError: the others did not come, or the place to meet cannot be reached.
        LostRanksError: the others met, but cannot be reached now.
    """

    def __init__(
        self,
        place: Place,
        time_limit: timedelta = TIME_LIMIT,
        *,
        meeting_limit: timedelta = MEETING_LIMIT,
        note: Callable[[str], None] = log.warning,
    ) -> None:
        self.place: Final = place
        self._time_limit, self._meeting_limit, self._note = time_limit, meeting_limit, note
        # All of them, until the group is gone. torch 2.4 waits for the group's threads without giving up the interpreter lock,
        # which a thread that is not done with tensors takes where Python has let them go; on a busy machine one is late by
        # several exchanges.
        self._exchanged: list[Tensor] = []

    def __enter__(self) -> Ranks:
        if self.place.world > 1:
            store = _Meeting(self.place, self._meeting_limit, self._note).hold()
            try:
                dist.init_process_group(
                    "gloo",
                    store=store,
                    rank=self.place.rank,
                    world_size=self.place.world,
                    timeout=self._time_limit,
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

    def check_same(self, settings: Mapping[str, str]) -> None:
        """Check that every rank has the settings of rank 0: what the output's bytes, or how often the ranks meet, depend on.

        Raises:
            UsageError: on every rank; names the first setting that differs, and both values.
            OtherRankError, LostRanksError: as `all_gather`.
        """
        first, *others = [json.loads(text) for text in self.all_gather(json.dumps(dict(settings)))]
        for rank, other in enumerate(others, 1):
            for name in sorted({*first, *other}):
                if first.get(name) != other.get(name):
                    raise LaunchError(
                        f"rank {rank} has {name} {other.get(name)!r}, rank 0 has {first.get(name)!r}; start all ranks alike"
                    )

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
        self._exchanged += [own, *every]
        dist.all_gather(every, own)
        return every

    def _lost(self, error: Exception) -> LostRanksError:
        return LostRanksError(
            f"rank {self.place.rank} of {self.place.world}: lost the other ranks ({_first_line(error)}); "
            "see what they printed"
        )


class _Meeting:
    """Where the ranks wait for each other before they talk: the store that torchrun, or rank 0, keeps at MASTER_ADDR.

    It waits in short turns, so that Ctrl-C and SIGTERM are heard.
    """

    def __init__(self, place: Place, limit: timedelta, note: Callable[[str], None]) -> None:
        self._place, self._limit, self._note = place, limit, note
        address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        if not address or not port.isdecimal() or not 0 < int(port) <= LAST_PORT:
            raise LaunchError(
                f"WORLD_SIZE={place.world} and RANK={place.rank} are set, but MASTER_ADDR={address} and MASTER_PORT={port} are "
                f"not what torchrun sets; {self._advice()}"
            )
        self._address, self._port = address, int(port)
        self._started = time.monotonic()
        self._is_told = False

    def hold(self) -> dist.Store:
        """Wait until every rank is here. Returns the store through which they can reach each other."""
        store = dist.PrefixStore(f"glmq/{next(_meetings)}", self._reach())
        store.set(f"here {self._place.rank}", "")
        while True:
            try:
                missing = [rank for rank in range(self._place.world) if not store.check([f"here {rank}"])]
            except RuntimeError as error:
                raise self._failed(f"was lost ({_first_line(error)})") from error
            if not missing:
                return store
            named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            self._wait(f"rank{'s' if len(missing) > 1 else ''} {named}")

    def _reach(self) -> dist.Store:
        """The store, as torch's own `env://` makes it."""
        try:
            socket.getaddrinfo(self._address, self._port)
        except (OSError, UnicodeError) as error:  # the second where it can be no name at all
            raise self._failed(f"cannot be resolved ({getattr(error, 'strerror', None) or error})") from None
        keeps_it = self._place.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
        while not keeps_it and not self._answers():
            self._wait("rank 0")
        try:
            return dist.TCPStore(
                self._address, self._port, None, keeps_it, self._limit, wait_for_workers=False, multi_tenant=True
            )
        except RuntimeError as error:
            is_taken = "EADDRINUSE" in str(error)
            what = "is taken by another program" if is_taken else f"cannot be used ({_first_line(error)})"
            raise self._failed(what) from error

    def _answers(self) -> bool:
        """Whether somebody listens there. Asked here first: torch waits for it without hearing signals, and prints stacks."""
        try:
            socket.create_connection((self._address, self._port), timeout=1).close()
        except OSError:
            return False
        return True

    def _wait(self, whom: str) -> None:
        """Wait a turn. Tell once whom this rank waits for; raise MeetingError if it has waited long enough."""
        waited = time.monotonic() - self._started
        if waited > self._limit.total_seconds():
            raise self._failed(f"was not reached by {whom} within {_minutes(self._limit)}")
        # Of several that wait for the others, rank 0 speaks for all; where it is missing itself, each one does.
        speaks = self._place.is_first or whom.startswith(("rank 0", "ranks 0"))
        if waited > _PATIENCE and speaks and not self._is_told:
            self._is_told = True
            self._note(
                f"rank {self._place.rank} of {self._place.world} waits for {whom} at {self._address}:{self._port}, "
                f"for at most {_minutes(self._limit)}; {self._advice()}"
            )
        time.sleep(_TURN)

    def _failed(self, what: str) -> MeetingError:
        return MeetingError(
            f"MASTER_ADDR={self._address} MASTER_PORT={self._port}, where the {self._place.world} ranks of WORLD_SIZE meet, "
            f"{what}; {self._advice()}"
        )

    def _advice(self) -> str:
        return f"start all {self._place.world} with torchrun, or for one process alone: unset {' '.join(_VARIABLES)}"


_VARIABLES: Final = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells its processes."""


def _minutes(limit: timedelta) -> str:
    seconds = round(limit.total_seconds())
    return f"{seconds // 60} minutes" if seconds >= 120 and seconds % 60 == 0 else f"{seconds} seconds"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
