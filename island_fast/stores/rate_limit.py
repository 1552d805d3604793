"""How fast bytes may go to stores and come from them, on the whole: by one meter for each direction.

A meter is shared by all threads, and by all stores of a verb. An object goes at the speed of the wire, for a
server may take a body that trickles for a dead one; those after it wait until the rate is kept again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from island_fast.arrays import Buffer
from island_fast.stores.base import ObjectInfo, Range, Store, Views, views

__all__ = ["Meter", "MeteredStore", "Meters"]


class Meter:
    """Lets `rate` bytes pass in a second, None for any number. Thread-safe.

    Whoever comes waits until all that came before has had its time; time that nobody used is gone. `clock`
    tells seconds, `wait` waits for some, and may raise whatever ends the work.
    """

    def __init__(
        self,
        rate: float | None,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        if rate is not None and rate <= 0:
            raise ValueError("a rate is more than nothing")
        self._rate = rate
        self._clock = clock
        self._wait = wait
        self._lock = threading.Lock()
        self._free = clock()  # when the next may pass

    def wait(self, size: int = 0) -> None:
        """Wait for the turn of `size` bytes, which begin to pass on return; 0 where that is not known yet."""
        wait = self._reserved(size)
        if wait > 0:
            self._wait(wait)

    def count(self, size: int) -> None:
        """Bytes have passed whose number was not known before: the next wait for them."""
        self._reserved(size)

    def _reserved(self, size: int) -> float:
        """Take the next free time for `size` bytes; the seconds until it begins."""
        if self._rate is None:
            return 0.0
        with self._lock:
            now = self._clock()
            begin = max(self._free, now)
            self._free = begin + size / self._rate
            return begin - now


@dataclass(frozen=True, slots=True)
class Meters:
    """What passes to stores, and what comes from them."""

    up: Meter
    down: Meter


class MeteredStore(Store):
    """A store whose objects pass `meters`. Owns `store`; what is asked beside objects is not metered."""

    def __init__(self, store: Store, meters: Meters) -> None:
        self._store = store
        self._up = meters.up
        self._down = meters.down
        self.location = store.location
        self.grace = store.grace
        self.range_gap = store.range_gap
        self.ranges_at_once = store.ranges_at_once
        self.uploads = store.uploads
        self.downloads = store.downloads
        self.readers = store.readers

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """See Store.put."""
        self._up.wait(sum(view.nbytes for view in views(parts)))
        self._store.put(name, parts)

    def get(self, name: str, *, newest: bool = False) -> memoryview:
        """See Store.get."""
        self._down.wait()
        data = self._store.get(name, newest=newest)
        self._down.count(data.nbytes)
        return data

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> Views:
        """See Store.get_ranges."""
        self._down.wait(sum(length for _, length in ranges))
        return self._store.get_ranges(name, ranges)

    def head(self, name: str) -> ObjectInfo | None:
        """See Store.head."""
        return self._store.head(name)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See Store.list."""
        return self._store.list(prefix)

    def folders(self, prefix: str) -> Iterator[str]:
        """See Store.folders."""
        return self._store.folders(prefix)

    def delete(self, name: str) -> None:
        """See Store.delete."""
        self._store.delete(name)

    def close(self) -> None:
        """See Store.close."""
        self._store.close()
