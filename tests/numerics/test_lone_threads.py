"""Threads in which torch computes alone."""

from __future__ import annotations

import threading

import pytest
import torch

from glmq.numerics.lone_threads import lone_threads


def test_each_thread_computes_alone_and_the_caller_as_before() -> None:
    own, meeting = torch.get_num_threads(), threading.Barrier(3)

    def ask(_: int) -> tuple[int, int]:
        meeting.wait()  # so that no thread answers twice
        return threading.get_ident(), torch.get_num_threads()

    with lone_threads(3) as pool:
        answers = list(pool.map(ask, range(3)))
        assert torch.get_num_threads() == own
    assert [threads for _, threads in answers] == [1, 1, 1]
    assert len({thread for thread, _ in answers}) == 3
    born_later: list[int] = []
    later = threading.Thread(target=lambda: born_later.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert born_later == [own]


def test_a_caller_that_computes_alone_needs_no_other_thread() -> None:
    own = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with lone_threads(1) as pool:
            assert list(pool.map(lambda _: threading.get_ident(), range(2))) == [threading.get_ident()] * 2
            with pytest.raises(ValueError, match="invalid literal"):
                list(pool.map(int, ["x"]))
    finally:
        torch.set_num_threads(own)


def test_a_thread_that_cannot_be_started_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    own, begin, begun = torch.get_num_threads(), threading.Thread.start, list[threading.Thread]()

    def start(thread: threading.Thread) -> None:
        if len(begun) == 2:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"), lone_threads(3):
        pass
    assert [thread.is_alive() for thread in begun] == [False, False]
    assert torch.get_num_threads() == own
