"""Threads in which torch computes alone, for work that is cut into rows or channels.

Torch shares each product among all cores and lets them wait for each other at its end; where many products follow each other
and rows do not see each other, a thread that takes its own rows through all of them waits once. What a product of one thread
gives does not depend on how many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")
T = TypeVar("T")


def map_alone(work: Callable[[Item], T], items: Sequence[Item]) -> list[T]:
    """The results of `work` on each item, in their order; as many at a time as torch has threads, each computing alone.

    A caller with one thread of torch's does them itself: small matrices take less time than a thread's start. An exception
    of the first item that has one is raised; items that have not begun by then never do, and those that run are waited for.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [work(item) for item in items]
    with _lone_threads(min(threads, len(items))) as pool:
        return list(pool.map(work, items))


@contextmanager
def _lone_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of `count` threads, each with one thread of torch's; the caller's number stays."""
    own, started = torch.get_num_threads(), Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # a thread's first such call gives it the process's number, whatever it had set before
        torch.set_num_threads(1)
        started.wait()

    with ThreadPoolExecutor(count) as pool:
        try:
            ready = [pool.submit(start) for _ in range(count)]
            started.wait()
        except BaseException:
            started.abort()  # or the threads that have begun would wait for the others for ever
            raise
        finally:
            torch.set_num_threads(own)  # the threads' calls also changed what those not yet born begin with
        for future in ready:
            future.result()
        yield pool
