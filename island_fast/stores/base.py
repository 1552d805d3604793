"""The contract of a store: a few operations on write-once objects, the same for a directory and for Swift.

A store does not know what its objects mean. Names are relative to the store's own prefix. Every object is
written once and never changed. Listings can be late or incomplete, and prove nothing.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Self

from island_fast.arrays import Buffer
from island_fast.errors import DamagedObjectError, UsageError

__all__ = [
    "MAX_OBJECT",
    "PROBE",
    "PUTS_END",
    "ObjectInfo",
    "Range",
    "Store",
    "Views",
    "check_name",
    "check_prefix",
    "check_ranges",
    "check_size",
    "flat_views",
    "is_name",
]

Range = tuple[int, int]
"""Offset and length of a part of an object, in bytes."""
Views = list[memoryview]
"""Buffers, in order. (In the body of a store class `list` is the method, hence this alias.)"""

MAX_OBJECT = 1 << 30
"""Largest size of an object of any kind, in bytes. A larger one is refused, not read."""

PROBE = "probe-"
"""With 32 hex digits after it: the name that a store is asked with whether it `refuses_overwrites`."""

PUTS_END = 1200.0
"""Seconds after which a put with `bound_puts` has ended, with all of its attempts."""

_MAX_NAME = 600  # Swift allows 1024 bytes for prefix and name together
_COMPONENT = r"(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]{1,200}"
_NAME = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as the store describes it.

    `size` is in bytes. `age` is the number of seconds since it was stored, by the store's own clock: never
    negative, and 0.0 if the store does not say.
    """

    name: str
    size: int
    age: float


def is_name(name: str) -> bool:
    """Return whether `name` can be an object's name: components of [A-Za-z0-9._-], never '.' or '..'."""
    return len(name) <= _MAX_NAME and _NAME.fullmatch(name) is not None


def check_name(name: str) -> str:
    """Return `name`; UsageError if it cannot be an object's name."""
    if not is_name(name):
        raise UsageError(
            f"{name!r} cannot name an object; use letters, digits, '.', '_' and '-', in parts joined by '/'"
        )
    return name


def check_prefix(prefix: str) -> str:
    """Return `prefix`; UsageError unless it is '' or a name followed by '/'."""
    if prefix and not (prefix.endswith("/") and is_name(prefix[:-1])):
        raise UsageError(f"{prefix!r} cannot be listed; name a folder and end it with '/'")
    return prefix


def check_ranges(ranges: Sequence[Range]) -> None:
    """Raise ValueError unless `ranges` are ascending, disjoint and without negative numbers."""
    end = 0
    for offset, length in ranges:
        if offset < end or length < 0:
            raise ValueError(f"range {offset}+{length} is not after the one before it")
        end = offset + length


def check_size(name: str, size: int, needed: int = 0, limit: int = MAX_OBJECT) -> int:
    """Return `size`, an object's; DamagedObjectError if it is below `needed` or above `limit`.

    No limit is above MAX_OBJECT.
    """
    limit = min(limit, MAX_OBJECT)
    if size < needed:
        raise DamagedObjectError(
            f"object {name} has {size} bytes instead of at least {needed}; it is damaged"
        )
    if size > limit:
        raise DamagedObjectError(
            f"object {name} has {size} bytes, more than the {limit} that it can have; it is damaged"
        )
    return size


def flat_views(parts: Sequence[Buffer]) -> Views:
    """Return `parts` as flat views of bytes, without the empty ones. Nothing is copied."""
    whole = (memoryview(part) for part in parts)
    return [view.cast("B") for view in whole if view.nbytes]


class Store(ABC):
    """Where objects are kept. Every method can be called from several threads at once.

    A name that `is_name` rejects is a UsageError. StoreError if the store does not answer, or if its answers
    leave the outcome unknown after all retries.
    """

    location: str
    """What the user calls this store, for messages. It contains no secret."""

    @property
    def place(self) -> str:
        """Where the store is, in full and the same from everywhere, for local state. It contains no secret.

        A store has one place as long as nothing is mounted elsewhere, and no other store has that one.
        """
        return self.location

    grace: float
    """The least age, in seconds, at which an unreferenced object can be treated as garbage."""

    range_gap: int
    """The largest gap, in bytes, between two ranges that is cheaper to fetch than to split a request at."""

    request_cost: int = 512 << 10
    """How many bytes arrive in the time that one more request takes: gaps that add up to less are fetched."""

    uploads: int
    """How many large objects to send at the same time. More gain little, and each takes a pack's memory."""

    downloads: int = 3
    """How many large objects to fetch at the same time."""

    known_to_refuse: bool | None = True
    """What `refuses_overwrites` returns, as far as it is known; None: the store was not asked yet."""

    @property
    def seems_to_overwrite(self) -> bool:
        """Whether the store looks like one that refuses no PUT.

        Then it is asked again, although it is known to refuse: it can have taken the place of another one.
        """
        return False

    on_answer: Callable[[bool], None] = staticmethod(lambda refuses: None)
    """Called with what `refuses_overwrites` found out."""

    readers: int = os.cpu_count() or 1
    """How many threads hash and compress what is sent to this store, or compare what is stored in it."""

    @property
    def ranges_at_once(self) -> int | None:
        """The most ranges of an object that one request can ask for; None: any number.

        It can become less when the store's answers show that it takes fewer.
        """
        return None

    @property
    def keeps_deleted(self) -> bool:
        """Whether the store says that it keeps what is deleted, as versions; it can do so without a word."""
        return False

    def use_workers(self, most: int) -> None:
        """Limit `readers`, `uploads` and `downloads` to `most` each, which is at least 1."""
        self.readers, self.uploads, self.downloads = (
            min(most, count) for count in (self.readers, self.uploads, self.downloads)
        )

    def refuses_overwrites(self) -> bool:
        """Return whether the store itself refuses a PUT on a name that is taken. It is asked once.

        Where it does not, `put` looks before it stores, which leaves a moment open, and a PUT that was held
        up overwrites whatever is there by then: no two writers may use one name. StoreError if the store
        does not answer.
        """
        if self.known_to_refuse is None:
            self.known_to_refuse = self._try_to_overwrite()
            self.on_answer(self.known_to_refuse)
        return self.known_to_refuse

    def _try_to_overwrite(self) -> bool:
        """Find out what `refuses_overwrites` returns, for a store that does not know it."""
        raise NotImplementedError

    @abstractmethod
    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Store the concatenation of `parts` under `name`; durable on return.

        The buffers must not change during the call and are not kept after it. If the name already has the
        same bytes the call succeeds; if it has others, it is a ConflictError. (For certain only where the
        store `refuses_overwrites`: elsewhere another writer can come between the look and the PUT.) After a
        StoreError the object may exist, or appear later: only the same bytes may be sent to that name again.
        After a StoreRefusedError (StoreFullError for want of room), and any other error of `put`, this call
        has stored nothing, and nothing of it appears later.
        """

    @abstractmethod
    def get(self, name: str, *, newest: bool = False, limit: int = MAX_OBJECT) -> memoryview:
        """Return all bytes of an object, in a buffer that the caller owns. Only their number is verified.

        `newest` asks every replica. ObjectMissingError only if the object is confirmed to be absent. An
        object of more than `limit` bytes is not read, but a DamagedObjectError; MemoryBudgetError for one
        that this host has no memory for.
        """

    @abstractmethod
    def get_ranges(self, name: str, ranges: Sequence[Range]) -> Views:
        """Return the bytes of each range, in order; ValueError unless ranges are ascending and disjoint.

        Views can share one buffer. DamagedObjectError if a range ends past the end of the object,
        ObjectMissingError if there is no object.
        """

    @abstractmethod
    def head(self, name: str) -> ObjectInfo | None:
        """Describe the object `name`, asking every replica; None only if it is confirmed to be absent."""

    def peek(self, name: str) -> ObjectInfo | None:
        """Do the same, but believe the first answer that says that the object is absent.

        It is for names that are expected to be free, where something else shows that the answer was false: a
        `put` that is refused, or a second object that says the same.
        """
        return self.head(name)

    @abstractmethod
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Iterate over objects below `prefix` ('' or 'a/b/') in any order; late or incomplete.

        They are listed as they are asked for: memory does not grow with their number.
        """

    @abstractmethod
    def folders(self, prefix: str) -> Iterator[str]:
        """Iterate over the names of folders directly below `prefix`, once each; late or incomplete."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove an object; succeed if it is absent."""

    def count_bytes(self) -> int | None:
        """Return how many bytes the store holds by its own count, with what it keeps of deleted objects.

        It may be the count of more than this store's prefix. None if the store has none that follows at once.
        """
        return None

    def use_reserve(self) -> AbstractContextManager[None]:
        """Let puts of the body use the room that the store keeps for what frees room, if it keeps any."""
        return nullcontext()

    def release_reserve(self) -> bool:
        """Give up the room that the store keeps for what frees room; return whether there was any."""
        return False

    def hurry(self) -> AbstractContextManager[None]:
        """Give up requests of the body within seconds: they may as well be made later. Not thread-safe."""
        return nullcontext()

    def bound_puts(self) -> AbstractContextManager[None]:
        """Have each put of the body end within PUTS_END seconds, however large its object is.

        It is for what must not arrive later than others wait for. Not thread-safe.
        """
        return nullcontext()

    def close(self) -> None:  # noqa: B027 - a store without connections has nothing to do here
        """Close connections. No other call may be running, or follow."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.location}>"
