"""A store that counts requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from island_fast.arrays import Buffer
from island_fast.stores.base import MAX_OBJECT, ObjectInfo, Range, Store, Views

__all__ = ["CountingStore"]


class CountingStore(Store):
    """Forwards every call to `store`, which it owns, and counts the requests.

    `requests` can be set to 0 at any time.
    With `late`, listings show nothing, as those of Swift can for a while.
    """

    def __init__(self, store: Store, *, late: bool = False) -> None:
        self.requests = 0
        self.location = store.location
        self.grace = store.grace
        self.range_gap = store.range_gap
        self.uploads, self.downloads, self.readers = store.uploads, store.downloads, store.readers
        self.request_cost = store.request_cost
        self.known_to_refuse = store.refuses_overwrites()
        self._store = store
        self._late = late

    @property
    def place(self) -> str:
        """See Store.place."""
        return self._store.place

    @property
    def ranges_at_once(self) -> int | None:
        """See Store.ranges_at_once."""
        return self._store.ranges_at_once

    @property
    def keeps_deleted(self) -> bool:
        """See Store.keeps_deleted."""
        return self._store.keeps_deleted

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """See Store.put."""
        self.requests += 1
        self._store.put(name, parts)

    def get(self, name: str, *, newest: bool = False, limit: int = MAX_OBJECT) -> memoryview:
        """See Store.get."""
        self.requests += 1
        return self._store.get(name, newest=newest, limit=limit)

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> Views:
        """See Store.get_ranges. Count the requests that `store` needs for so many ranges."""
        self.requests += -(-len(ranges) // (self.ranges_at_once or len(ranges)))
        return self._store.get_ranges(name, ranges)

    def head(self, name: str) -> ObjectInfo | None:
        """See Store.head."""
        self.requests += 1
        return self._store.head(name)

    def peek(self, name: str) -> ObjectInfo | None:
        """See Store.peek."""
        self.requests += 1
        return self._store.peek(name)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See Store.list."""
        self.requests += 1
        return iter(()) if self._late else self._store.list(prefix)

    def folders(self, prefix: str) -> Iterator[str]:
        """See Store.folders."""
        self.requests += 1
        return self._store.folders(prefix)

    def delete(self, name: str) -> None:
        """See Store.delete."""
        self.requests += 1
        self._store.delete(name)

    def count_bytes(self) -> int | None:
        """See Store.count_bytes."""
        return self._store.count_bytes()

    def use_reserve(self) -> AbstractContextManager[None]:
        """See Store.use_reserve."""
        return self._store.use_reserve()

    def release_reserve(self) -> bool:
        """See Store.release_reserve."""
        return self._store.release_reserve()

    def hurry(self) -> AbstractContextManager[None]:
        """See Store.hurry."""
        return self._store.hurry()

    def close(self) -> None:
        """See Store.close."""
        self._store.close()
