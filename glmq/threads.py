"""Calls in several threads, their results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

T = TypeVar("T")


def run_ahead(calls: Iterable[Callable[[], T]], workers: int, stop: Callable[[], None] | None = None) -> Iterator[T]:
    """The results of `calls` in their order; `workers` threads do the next few meanwhile.

    An exception of a call comes in its place. Calls that have not begun by then never do, and those that run are waited for.

    Args:
        calls: taken one by one, at most workers + 1 before they are wanted.
        workers: number of threads.
        stop: called on an exception, or when the caller wants no more, before the running calls are waited for.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            calls = iter(calls)
            begin = list(islice(calls, 2))
            if len(begin) == 1 and stop is None:  # what would a thread do meanwhile
                yield begin[0]()
                return
            for call in chain(begin, calls):
                waiting.append(pool.submit(call))
                if len(waiting) > workers + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            for future in waiting:
                future.cancel()
            if stop is not None:
                stop()
            raise
