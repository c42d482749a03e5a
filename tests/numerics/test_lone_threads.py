"""Threads in which torch computes alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from glmq.numerics.lone_threads import map_alone


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    own = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        assert torch.get_num_threads() == count
        torch.set_num_threads(own)


def test_each_thread_computes_alone_and_the_caller_as_before() -> None:
    meeting = threading.Barrier(3)

    def ask(_: int) -> tuple[int, int]:
        meeting.wait()  # so that no thread answers twice
        return threading.get_ident(), torch.get_num_threads()

    with torch_threads(3):
        answers = map_alone(ask, range(3))
        born_later: list[int] = []
        later = threading.Thread(target=lambda: born_later.append(torch.get_num_threads()))
        later.start()
        later.join()
    assert [threads for _, threads in answers] == [1, 1, 1]
    assert len({thread for thread, _ in answers}) == 3
    assert born_later == [3]


@pytest.mark.parametrize(("threads", "items"), [(1, 7), (3, 2), (3, 7)])
def test_results_come_in_order_and_an_exception_is_raised(threads: int, items: int) -> None:
    with torch_threads(threads):
        assert map_alone(str, range(items)) == [str(number) for number in range(items)]
        with pytest.raises(ValueError, match="invalid literal"):
            map_alone(int, ["1", "x"])


def test_a_caller_that_computes_alone_needs_no_other_thread() -> None:
    with torch_threads(1):
        assert map_alone(lambda _: threading.get_ident(), range(2)) == [threading.get_ident()] * 2


def test_a_thread_that_cannot_be_started_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    own, begin, begun = torch.get_num_threads(), threading.Thread.start, list[threading.Thread]()

    def start(thread: threading.Thread) -> None:
        if len(begun) == 2:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"), torch_threads(3):
        map_alone(abs, range(3))
    assert [thread.is_alive() for thread in begun] == [False, False]
    assert torch.get_num_threads() == own
