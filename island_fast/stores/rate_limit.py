"""Limits on the bytes per second that go to stores and come from them.

One limiter for each direction is shared by all threads, and by all stores of a command. One object is
transferred at full speed, because a server may drop a request whose body trickles; the objects after it wait
until the average rate is kept again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from island_fast.arrays import Buffer
from island_fast.stores.base import MAX_OBJECT, Range, Store, Views, flat_views
from island_fast.stores.forwarding import ForwardingStore

__all__ = ["RateLimitedStore", "RateLimiter", "RateLimiters"]


class RateLimiter:
    """Lets `rate` bytes per second pass; None for no limit. Thread-safe.

    First come, first served; unused time is not saved up. `clock` returns seconds. `wait` waits for a number
    of seconds, and can raise an exception to end the work.
    """

    def __init__(
        self,
        rate: float | None,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        if rate is not None and rate <= 0:
            raise ValueError("a rate must be above 0")
        self._rate = rate
        self._clock = clock
        self._wait = wait
        self._lock = threading.Lock()
        self._free = clock()  # the time from which on the next bytes can pass

    def wait(self, size: int = 0) -> None:
        """Wait until `size` bytes can pass; 0 if their number is not known yet: `count` them later."""
        pause = self._reserve(size)
        if pause > 0:
            self._wait(pause)

    def count(self, size: int) -> None:
        """Count bytes that have passed already; later calls of `wait` make up for them."""
        self._reserve(size)

    def _reserve(self, size: int) -> float:
        """Reserve the next free time for `size` bytes; return the seconds until it begins."""
        if self._rate is None:
            return 0.0
        with self._lock:
            now = self._clock()
            begin = max(self._free, now)
            self._free = begin + size / self._rate
            return begin - now


@dataclass(frozen=True, slots=True)
class RateLimiters:
    """The limiter of what goes to stores, and of what comes from them."""

    up: RateLimiter
    down: RateLimiter


class RateLimitedStore(ForwardingStore):
    """A store that transfers objects at the rate of `limiters`. Owns `store`.

    Only the bytes of objects count: `head`, `peek`, `list`, `folders` and `delete` are not limited.
    """

    def __init__(self, store: Store, limiters: RateLimiters) -> None:
        super().__init__(store)
        self._up = limiters.up
        self._down = limiters.down

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """See Store.put."""
        self._up.wait(sum(view.nbytes for view in flat_views(parts)))
        super().put(name, parts)

    def get(self, name: str, *, newest: bool = False, limit: int = MAX_OBJECT) -> memoryview:
        """See Store.get."""
        self._down.wait()
        data = super().get(name, newest=newest, limit=limit)
        self._down.count(data.nbytes)
        return data

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> Views:
        """See Store.get_ranges."""
        self._down.wait(sum(length for _, length in ranges))
        return super().get_ranges(name, ranges)
