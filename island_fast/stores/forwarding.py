"""A store in front of another one, which passes on whatever a subclass does not do otherwise.

What a store in front did not pass on, the base class would answer: `peek`, for instance, with three looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from island_fast.arrays import Buffer
from island_fast.stores.base import MAX_OBJECT, ObjectInfo, Range, Store, Views

__all__ = ["ForwardingStore"]


class ForwardingStore(Store):
    """Forwards every call to `store`, which it owns."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.location = store.location
        self.grace = store.grace
        self.range_gap = store.range_gap
        self.request_cost = store.request_cost
        self.uploads = store.uploads
        self.downloads = store.downloads
        self.readers = store.readers

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

    @property
    def known_to_refuse(self) -> bool | None:
        """See Store.known_to_refuse."""
        return self._store.known_to_refuse

    @known_to_refuse.setter
    def known_to_refuse(self, known: bool | None) -> None:
        self._store.known_to_refuse = known

    @property
    def seems_to_overwrite(self) -> bool:
        """See Store.seems_to_overwrite."""
        return self._store.seems_to_overwrite

    def _try_to_overwrite(self) -> bool:
        return self._store.refuses_overwrites()

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """See Store.put."""
        self._store.put(name, parts)

    def get(self, name: str, *, newest: bool = False, limit: int = MAX_OBJECT) -> memoryview:
        """See Store.get."""
        return self._store.get(name, newest=newest, limit=limit)

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> Views:
        """See Store.get_ranges."""
        return self._store.get_ranges(name, ranges)

    def head(self, name: str) -> ObjectInfo | None:
        """See Store.head."""
        return self._store.head(name)

    def peek(self, name: str) -> ObjectInfo | None:
        """See Store.peek."""
        return self._store.peek(name)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See Store.list."""
        return self._store.list(prefix)

    def folders(self, prefix: str) -> Iterator[str]:
        """See Store.folders."""
        return self._store.folders(prefix)

    def delete(self, name: str) -> None:
        """See Store.delete."""
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

    def bound_puts(self) -> AbstractContextManager[None]:
        """See Store.bound_puts."""
        return self._store.bound_puts()

    def close(self) -> None:
        """See Store.close."""
        self._store.close()
