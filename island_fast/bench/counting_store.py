"""A store that counts requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from island_fast.arrays import Buffer
from island_fast.stores.base import MAX_OBJECT, ObjectInfo, Range, Store, Views
from island_fast.stores.forwarding import ForwardingStore

__all__ = ["CountingStore"]


class CountingStore(ForwardingStore):
    """Forwards every call to `store`, which it owns, and counts the requests.

    `requests` can be set to 0 at any time.
    With `late`, listings show nothing, as those of Swift can for a while.
    """

    def __init__(self, store: Store, *, late: bool = False) -> None:
        super().__init__(store)
        self.requests = 0
        store.refuses_overwrites()  # asked now, so that no count contains it
        self._late = late

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """See Store.put."""
        self.requests += 1
        super().put(name, parts)

    def get(self, name: str, *, newest: bool = False, limit: int = MAX_OBJECT) -> memoryview:
        """See Store.get."""
        self.requests += 1
        return super().get(name, newest=newest, limit=limit)

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> Views:
        """See Store.get_ranges. Count the requests that `store` needs for so many ranges."""
        self.requests += -(-len(ranges) // (self.ranges_at_once or len(ranges)))
        return super().get_ranges(name, ranges)

    def head(self, name: str) -> ObjectInfo | None:
        """See Store.head."""
        self.requests += 1
        return super().head(name)

    def peek(self, name: str) -> ObjectInfo | None:
        """See Store.peek."""
        self.requests += 1
        return super().peek(name)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See Store.list."""
        self.requests += 1
        return iter(()) if self._late else super().list(prefix)

    def folders(self, prefix: str) -> Iterator[str]:
        """See Store.folders."""
        self.requests += 1
        return super().folders(prefix)

    def delete(self, name: str) -> None:
        """See Store.delete."""
        self.requests += 1
        super().delete(name)
