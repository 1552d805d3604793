"""The bounded loop that all streams are made of: results and errors in order, few jobs at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from island_fast.repository.workers import in_order, workers


def numbered(count: int, submitted: list[int], work: Callable[[int], int]) -> Iterator[Callable[[], int]]:
    for number in range(count):
        submitted.append(number)
        yield partial(work, number)


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_the_order_of_jobs(threads: int) -> None:
    slow = threading.Event()

    def work(number: int) -> int:
        if number == 0 and threads > 1:
            assert slow.wait(10)
        if number == 2:
            slow.set()
        return number

    with workers(threads, "test") as pool:
        assert list(in_order(pool, numbered(9, [], work), 4)) == list(range(9))


def test_a_job_is_submitted_only_when_the_result_limit_places_before_was_used() -> None:
    started: list[int] = []
    used = -1

    def work(number: int) -> int:
        started.append(number)
        assert number - used <= 3
        return number

    asked: list[int] = []
    with workers(3, "test") as pool:
        results = in_order(pool, numbered(10, asked, work), 3)
        assert not asked, "nothing runs before the first result is asked for"
        for result in results:
            assert len(asked) <= result + 4  # the next job is made, and not submitted
            used = result
    assert sorted(started) == list(range(10))


def test_an_error_comes_in_its_place_and_ends_the_rest() -> None:
    started: list[int] = []

    def work(number: int) -> int:
        started.append(number)
        if number == 2:
            raise ValueError(number)
        return number

    with workers(1, "test") as pool:
        results = in_order(pool, numbered(100, [], work), 2)
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ValueError, match="2"):
            next(results)
    assert len(started) <= 4


def test_no_jobs_give_no_results() -> None:
    with workers(2, "test") as pool:
        assert list(in_order(pool, iter([]), 2)) == []


def test_leaving_early_drops_what_was_not_begun() -> None:
    gate, started = threading.Event(), []

    def work(number: int) -> int:
        started.append(number)
        if number == 1:
            gate.wait(10)
        return number

    with workers(1, "test") as pool:
        assert next(in_order(pool, numbered(9, [], work), 4)) == 0
        threading.Timer(0.05, gate.set).start()
    assert started in ([0], [0, 1])
