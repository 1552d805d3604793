"""The retry loop, on a clock that sleeping moves."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest

from island_fast.stores.retry import RetryableError, RetryPolicy, parse_retry_after, retry


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.pauses: list[float] = []

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


class Attempt:
    """Fails so often, then succeeds; takes `cost` seconds each time."""

    def __init__(self, clock: Clock, failures: int, *, cost: float = 0.0, wait: float = 0.0) -> None:
        self.clock = clock
        self.failures = failures
        self.cost = cost
        self.wait = wait
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        self.clock.now += self.cost
        if self.calls <= self.failures:
            raise RetryableError(f"failure {self.calls}", self.wait)
        return "done"


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run(clock: Clock, attempt: Attempt, patience: RetryPolicy) -> str:
    return retry(attempt, patience, clock=clock.time, sleep=clock.sleep)


def test_a_success_is_not_repeated(clock: Clock):
    attempt = Attempt(clock, 0)
    assert run(clock, attempt, RetryPolicy()) == "done"
    assert (attempt.calls, clock.pauses) == (1, [])


def test_pauses_double_up_to_the_longest_and_vary_by_half(clock: Clock):
    assert run(clock, Attempt(clock, 8), RetryPolicy(total=1000, first=1, longest=20)) == "done"
    steps = [1, 2, 4, 8, 16, 20, 20, 20]
    assert all(s / 2 <= p <= s for p, s in zip(clock.pauses, steps, strict=True))
    assert len({p / s for p, s in zip(clock.pauses, steps, strict=True)}) > 1


def test_it_gives_up_before_a_pause_that_would_end_too_late(clock: Clock):
    attempt = Attempt(clock, 10**6)
    with pytest.raises(RetryableError, match=r"failure \d+"):
        run(clock, attempt, RetryPolicy(total=30, first=1, longest=5))
    assert 30 - 5 <= sum(clock.pauses) <= 30
    assert attempt.calls == len(clock.pauses) + 1


def test_attempts_that_take_long_count_too(clock: Clock):
    attempt = Attempt(clock, 10**6, cost=60)
    with pytest.raises(RetryableError):
        run(clock, attempt, RetryPolicy(total=300, first=0.1, longest=1))
    assert attempt.calls == 5


def test_a_server_may_ask_for_more_time_within_bounds(clock: Clock):
    run(clock, Attempt(clock, 1, wait=7), RetryPolicy(total=300, first=1, longest=20))
    run(clock, Attempt(clock, 1, wait=3600), RetryPolicy(total=300, first=1, longest=20))
    assert clock.pauses == [7, 20]


def test_a_server_that_twice_asks_for_longer_than_that_is_left(clock: Clock):
    attempt = Attempt(clock, 10**6, wait=3600)
    with pytest.raises(RetryableError, match="failure 2"):
        run(clock, attempt, RetryPolicy(total=300, first=1, longest=20))
    assert clock.pauses == [20]


@pytest.mark.parametrize(
    "value, seconds", [("", 0), ("7", 7), ("14400", 14400), ("soon", 0), ("-3", 0), ("9" * 40, 0), ("²", 0)]
)
def test_what_retry_after_asks_for(value: str, seconds: float):
    assert parse_retry_after(value) == seconds


def test_retry_after_can_be_a_date():
    assert 3590 < parse_retry_after(formatdate(time.time() + 3600, usegmt=True)) <= 3600
    assert parse_retry_after(formatdate(0, usegmt=True)) == 0


def test_any_other_error_ends_it(clock: Clock):
    def attempt() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        retry(attempt, RetryPolicy(), clock=clock.time, sleep=clock.sleep)
    assert clock.pauses == []
