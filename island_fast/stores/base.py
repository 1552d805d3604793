"""What a store is: a few verbs on write-once objects, the same for a directory and for Swift.

A store knows nothing of what its objects mean. Names are relative to the store's own prefix; every
object is written once and never changed; listings may be late or partial and prove nothing.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from island_fast.arrays import Buffer
from island_fast.errors import DamagedObjectError, UsageError

__all__ = [
    "MAX_OBJECT",
    "ObjectInfo",
    "Range",
    "Store",
    "Views",
    "check_name",
    "check_prefix",
    "check_ranges",
    "check_size",
    "is_name",
    "views",
]

Range = tuple[int, int]
"""Offset and length of some bytes of an object."""
Views = list[memoryview]
"""Buffers in order. (Inside a store `list` is the verb, hence this name.)"""

MAX_OBJECT = 4 << 30
"""No object is larger, in bytes (Swift's own limit is 5 GiB); a larger one is refused unread."""

_MAX_NAME = 600  # Swift allows 1024 bytes for prefix and name together
_COMPONENT = r"(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]{1,200}"
_NAME = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as the store describes it.

    `size` is in bytes; `age` is the seconds since it was stored, by the store's own clock, never
    negative, and 0.0 where the store does not say.
    """

    name: str
    size: int
    age: float


def is_name(name: str) -> bool:
    """Whether `name` can be an object's name: components of [A-Za-z0-9._-], never '.' or '..'."""
    return len(name) <= _MAX_NAME and _NAME.fullmatch(name) is not None


def check_name(name: str) -> str:
    """`name` itself, or UsageError when it cannot be an object's name."""
    if not is_name(name):
        raise UsageError(
            f"{name!r} cannot name an object; use letters, digits, '.', '_' and '-', in parts joined by '/'"
        )
    return name


def check_prefix(prefix: str) -> str:
    """`prefix` itself: '' or a name that ends with '/'. Anything else is a UsageError."""
    if prefix and not (prefix.endswith("/") and is_name(prefix[:-1])):
        raise UsageError(f"{prefix!r} cannot be listed; name a folder and end it with '/'")
    return prefix


def check_ranges(ranges: Sequence[Range]) -> None:
    """ValueError unless `ranges` are ascending, disjoint and without negative numbers."""
    end = 0
    for offset, length in ranges:
        if offset < end or length < 0:
            raise ValueError(f"range {offset}+{length} is not after the one before it")
        end = offset + length


def check_size(name: str, size: int, needed: int = 0) -> int:
    """`size` of an object, or DamagedObjectError if it is less than `needed` or more than MAX_OBJECT."""
    if size < needed:
        raise DamagedObjectError(
            f"object {name} is {size} bytes and bytes up to {needed} were asked for; it is damaged"
        )
    if size > MAX_OBJECT:
        raise DamagedObjectError(f"object {name} is {size} bytes, which no object of ours can be")
    return size


def views(parts: Sequence[Buffer]) -> Views:
    """`parts` as flat views of bytes, the empty ones left out; nothing is copied."""
    whole = (memoryview(part) for part in parts)
    return [view.cast("B") for view in whole if view.nbytes]


class Store(ABC):
    """Where objects go. Every method may be called from several threads at once.

    A name outside the rules of `is_name` is a UsageError. A store that does not answer, or whose
    answer leaves the outcome unknown after all retries, is a StoreError.
    """

    location: str
    """What the user calls this store, for messages; never holds a secret."""

    grace: float
    """Seconds that an object must have been there before it may be taken for garbage."""

    range_gap: int
    """Bytes between two ranges of one object that cost less to fetch than another range does."""

    ranges_at_once: int | None = None
    """Ranges of one object that one request can ask for; None: any number."""

    uploads: int
    """How many large objects are sent at the same time: more gain little, and take a pack's memory each."""

    downloads: int = 3
    """The same for those that are fetched."""

    readers: int = os.cpu_count() or 1
    """How many threads at the same time hash and compress what is sent here, or compare what is here."""

    def use_workers(self, most: int) -> None:
        """Work with no more threads of each kind than `most`, at least 1: those that read, send and fetch."""
        self.readers, self.uploads, self.downloads = (
            min(most, count) for count in (self.readers, self.uploads, self.downloads)
        )

    @abstractmethod
    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Store the concatenation of `parts` under `name`; durable on return.

        The buffers must not change during the call and are not kept after it. If the name already
        holds the same bytes, that is success; other bytes are a ConflictError. After a StoreError
        the object may exist or come to exist: only the same bytes may be sent to that name again.
        """

    @abstractmethod
    def get(self, name: str, *, newest: bool = False) -> memoryview:
        """All bytes of an object, in a buffer of their own; not checked against anything but their length.

        `newest` asks every replica. ObjectMissingError only where absence is confirmed.
        """

    @abstractmethod
    def get_ranges(self, name: str, ranges: Sequence[Range]) -> Views:
        """The bytes of each range, in order; ranges are ascending and disjoint, else ValueError.

        Views may share one buffer. A range that ends beyond the object is a DamagedObjectError, a
        missing object an ObjectMissingError.
        """

    @abstractmethod
    def head(self, name: str) -> ObjectInfo | None:
        """What is stored under `name`, asked of every replica; None when all of them lack it."""

    @abstractmethod
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects below `prefix` ('' or 'a/b/'), ascending by name. May be late or partial."""

    @abstractmethod
    def folders(self, prefix: str) -> Iterator[str]:
        """The next component of names that go on below it, once each. May be late or partial."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove an object; an absent one counts as removed."""

    def close(self) -> None:  # noqa: B027 - a store without connections has nothing to do here
        """Release connections. No other call may be under way or follow."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.location}>"
