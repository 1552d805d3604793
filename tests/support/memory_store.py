"""A store in memory, for tests of the rooms above stores. It counts its calls; a test sets its clock."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from island_fast.arrays import Buffer
from island_fast.errors import ConflictError, DamagedObjectError, ObjectMissingError
from island_fast.stores.base import (
    MAX_OBJECT,
    ObjectInfo,
    Range,
    Store,
    Views,
    check_name,
    check_prefix,
    check_ranges,
    check_size,
    flat_views,
)


@dataclass(frozen=True, slots=True)
class Stored:
    """An object's bytes, and the store's time when they were put."""

    data: bytes
    at: float


class MemoryStore(Store):
    """Keeps `objects` by name; a test can read and damage them.

    `calls` counts calls by method, including refused ones; `sent` and `received` are bytes of objects. The
    store's clock is `now`, in seconds; it changes only when the test sets it. One that `refuses` nothing
    looks before it stores, and calls `before_put(name, data)` in between; `asked` counts how often it was
    asked what it refuses.
    """

    def __init__(self, *, grace: float = 0.0, location: str = "memory", refuses: bool = True) -> None:
        self.location = location
        self.grace = grace
        self.range_gap = 0
        self.uploads = 2
        self.objects: dict[str, Stored] = {}
        self.calls: Counter[str] = Counter()
        self.sent = 0
        self.received = 0
        self.now = 0.0
        self.asked = 0
        self.before_put: Callable[[str, bytes], None] = lambda name, data: None
        self._refuses = refuses
        self.known_to_refuse = True if refuses else None
        self._lock = threading.Lock()

    def _try_to_overwrite(self) -> bool:
        self.asked += 1
        return self._refuses

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        data = b"".join(flat_views(parts))
        with self._lock:
            self.calls["put"] += 1
            self.sent += len(data)
            stored = self.objects.get(check_name(name))
        if stored is not None and stored.data != data:
            raise ConflictError(f"object {name} already holds other bytes; find the other writer")
        if not self._refuses:
            self.before_put(name, data)
            self.overwrite(name, data)
            return
        with self._lock:
            stored = self.objects.setdefault(name, Stored(data, self.now))
        if stored.data != data:
            raise ConflictError(f"object {name} already holds other bytes; find the other writer")

    def overwrite(self, name: str, data: bytes) -> None:
        """Store an object whatever is there, as a PUT does that arrives where nothing is refused."""
        with self._lock:
            self.objects[name] = Stored(data, self.now)

    def get(self, name: str, *, newest: bool = False, limit: int = MAX_OBJECT) -> memoryview:
        data = self._read("get", name)
        check_size(name, data.nbytes, limit=limit)
        return data

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> Views:
        check_ranges(ranges)
        data = self._read("get_ranges", name, sum(length for _, length in ranges))
        if ranges and sum(ranges[-1]) > data.nbytes:
            raise DamagedObjectError(f"object {name} has no bytes up to {sum(ranges[-1])}; it is damaged")
        return [data[offset : offset + length] for offset, length in ranges]

    def _read(self, verb: str, name: str, most: int | None = None) -> memoryview:
        with self._lock:
            self.calls[verb] += 1
            stored = self.objects.get(check_name(name))
            if stored is None:
                raise ObjectMissingError(f"object {name} does not exist; it was deleted or never written")
            self.received += len(stored.data) if most is None else min(most, len(stored.data))
        return memoryview(stored.data)

    def head(self, name: str) -> ObjectInfo | None:
        with self._lock:
            self.calls["head"] += 1
            stored = self.objects.get(check_name(name))
        return self._describe(name, stored) if stored else None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        with self._lock:
            self.calls["list"] += 1
            found = [item for item in self.objects.items() if item[0].startswith(prefix)]
        return (self._describe(name, stored) for name, stored in sorted(found))

    def folders(self, prefix: str) -> Iterator[str]:
        check_prefix(prefix)
        with self._lock:
            self.calls["folders"] += 1
            names = [name for name in self.objects if name.startswith(prefix)]
        below = (name[len(prefix) :].partition("/") for name in names)
        return iter(sorted({folder for folder, slash, _ in below if slash}))

    def delete(self, name: str) -> None:
        with self._lock:
            self.calls["delete"] += 1
            self.objects.pop(check_name(name), None)

    def _describe(self, name: str, stored: Stored) -> ObjectInfo:
        return ObjectInfo(name, len(stored.data), max(0.0, self.now - stored.at))
