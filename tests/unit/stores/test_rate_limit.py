"""Rate limiters: what passes in a time, by a clock of the test's own."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from island_fast.api import Repository
from island_fast.repository.local_state import LocalState
from island_fast.stores.rate_limit import RateLimitedStore, RateLimiter, RateLimiters
from tests.support.memory_store import MemoryStore

MIB = 1 << 20


class Clock:
    """Time passes only where somebody waits, or a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waited: list[float] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.waited.append(seconds)
        self.now += seconds


def meters(clock: Clock, up: float | None, down: float | None) -> RateLimiters:
    return RateLimiters(RateLimiter(up, clock, clock.wait), RateLimiter(down, clock, clock.wait))


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 1000)), max_size=20))
def test_each_begins_when_all_before_had_their_time_and_not_later(calls: list[tuple[float, int]]) -> None:
    clock = Clock()
    meter = RateLimiter(100.0, clock, clock.wait)
    free = clock.now
    for pause, size in calls:
        clock.now += pause
        due = max(clock.now, free)
        meter.wait(size)
        assert clock.now == pytest.approx(due)
        free = due + size / 100.0


def test_time_that_nobody_used_is_gone() -> None:
    clock = Clock()
    meter = RateLimiter(100.0, clock, clock.wait)
    clock.now += 3600
    meter.wait(50)
    meter.wait(50)
    assert clock.waited == [0.5]


def test_what_is_counted_afterwards_holds_up_the_next() -> None:
    clock = Clock()
    meter = RateLimiter(100.0, clock, clock.wait)
    meter.wait()
    meter.count(200)
    meter.count(100)
    meter.wait()
    assert clock.waited == [3.0]


def test_threads_share_one_rate() -> None:
    """The clock stands still: each of 64 has to wait for another number of those before it."""
    waited: list[float] = []
    meter = RateLimiter(100.0, lambda: 0.0, waited.append)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(meter.wait, itertools.repeat(50, 64)))
    assert sorted(waited) == [0.5 * number for number in range(1, 64)]


def test_no_rate_is_no_wait_and_nothing_is_no_rate() -> None:
    clock = Clock()
    meter = RateLimiter(None, clock, clock.wait)
    meter.wait(1 << 60)
    meter.wait(1 << 60)
    assert clock.waited == []
    for rate in (0.0, -1.0):
        with pytest.raises(ValueError, match="above 0"):
            RateLimiter(rate)


def test_each_way_has_its_own_meter() -> None:
    clock = Clock()
    store = RateLimitedStore(MemoryStore(), meters(clock, 100.0, 10.0))
    store.put("one", [b"x" * 300, b"y" * 100])
    store.get("one")
    assert clock.waited == []
    store.get_ranges("one", [(0, 10), (50, 20)])
    assert clock.waited == [40.0]
    store.get("one")
    assert clock.waited == [40.0, 3.0]
    store.put("two", [b"z"])
    assert clock.waited == [40.0, 3.0], "its 4 s have long passed"


def test_verbs_keep_the_rates_together(tmp_path: Path) -> None:
    """A snapshot, and a copy whose two stores share one pair of meters, take the time of all their bytes."""
    clock = Clock()
    shared = meters(clock, MIB, 2 * MIB)
    near, far = MemoryStore(), MemoryStore(location="far")
    image = tmp_path / "vol"
    image.write_bytes(random.Random(1).randbytes(40 * MIB))
    state = LocalState(tmp_path / "state")
    repository = Repository(RateLimitedStore(near, shared), state, create=True)
    other = Repository(RateLimitedStore(far, shared), state, create=True)
    began = clock.now
    repository.snapshot(image, image_format="raw")
    assert near.sent > 40 * MIB
    biggest = max(len(stored.data) for stored in near.objects.values())
    assert clock.now - began >= (near.sent - biggest) / MIB
    clock.now += 3600
    began, before = clock.now, near.received + far.received
    repository.copy(other)
    came = near.received + far.received - before
    assert came > 40 * MIB
    assert clock.now - began >= max((far.sent - biggest) / MIB, (came - 3 * biggest) / (2 * MIB))
