"""Threads in which torch computes alone."""

from __future__ import annotations

import threading

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
