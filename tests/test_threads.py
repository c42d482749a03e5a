import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from glmq.threads import run_ahead


def test_results_come_in_the_order_of_the_calls() -> None:
    def slow_first(number: int) -> int:
        time.sleep(0.02 if number == 0 else 0)
        return number

    assert list(run_ahead((partial(slow_first, number) for number in range(20)), 3)) == list(range(20))


def test_few_calls_are_taken_before_they_are_wanted() -> None:
    taken = 0

    def calls() -> Iterator[Callable[[], int]]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield partial(int, number)

    results = run_ahead(calls(), 2)
    assert [next(results), next(results)] == [0, 1]
    assert taken <= 5
    results.close()


def test_a_failure_comes_in_its_place_and_stops_what_runs_before_it_is_waited_for() -> None:
    released, begun = threading.Event(), list[int]()

    def call(number: int) -> int:
        begun.append(number)
        if number == 1:
            raise ValueError("one")
        if number > 1 and not released.wait(10):
            raise AssertionError("was never stopped")
        return number

    results = run_ahead((partial(call, number) for number in range(9)), 2, stop=released.set)
    assert next(results) == 0
    with pytest.raises(ValueError, match=r"^one$"):
        next(results)
    assert released.is_set()
    assert len(begun) <= 5


def test_a_caller_that_wants_no_more_stops_what_runs() -> None:
    released = threading.Event()

    def wait() -> bool:
        return released.wait(10)

    results = run_ahead([lambda: True, lambda: True, lambda: True, wait], 1, stop=released.set)
    assert next(results)
    results.close()
    assert released.is_set()
