"""Threads in which torch computes alone, for work that is cut into rows or channels.

Torch shares each product among all cores and lets them wait for each other at its end; where many products follow each other
and rows do not see each other, a thread that takes its own rows through all of them waits once. What a product of one thread
gives does not depend on how many threads there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import torch


@contextmanager
def lone_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of `count` threads, each with one thread of torch's; the caller's number stays."""
    own, started = torch.get_num_threads(), Barrier(count + 1)

    def start() -> None:
        torch.set_num_threads(1)
        started.wait()

    with ThreadPoolExecutor(count) as pool:
        ready = [pool.submit(start) for _ in range(count)]
        started.wait()
        torch.set_num_threads(own)  # set_num_threads also changes what threads not yet born begin with
        for future in ready:
            future.result()
        yield pool
