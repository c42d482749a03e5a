"""Threads in which torch computes alone, for work that is cut into rows or channels.

Torch shares each product among all cores and lets them wait for each other at its end; where many products follow each other
and rows do not see each other, a thread that takes its own rows through all of them waits once. What a product of one thread
gives does not depend on how many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def lone_threads(count: int) -> Iterator[Executor]:
    """A pool of `count` threads, each with one thread of torch's; the caller's number stays.

    A caller with one thread of torch's that wants one is that thread itself: small matrices take less time than a start.
    """
    own = torch.get_num_threads()
    if own == count == 1:
        yield _Here()
        return
    started = Barrier(count + 1)

    def start() -> None:
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


class _Here(Executor):
    """Does what is submitted at once, in the caller's thread."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        done: Future[T] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:  # raised by whoever asks for the result, as from a thread
            done.set_exception(error)
        return done
