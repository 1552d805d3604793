"""The directory store under watch: every call is numbered, and something may happen at any of its moments.

So are the changes that a process makes to files outside the store.

Calls come from several threads (uploads, downloads). They are carried out one at a time, so a process that
ends at call k has done calls 1 to k - 1 wholly and nothing of the later ones. Their order may differ from run
to run and their number does not: each pack is put once, and read by one thread.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from island_fast.arrays import Buffer
from island_fast.stores import directory
from island_fast.stores.base import MAX_OBJECT, ObjectInfo, Range, Store, Views

T = TypeVar("T")

ELSEWHERE = "elsewhere"
"""The moment before a change of files outside the store."""

BEFORE, UNNAMED, AFTER = "before", "unnamed", "after"
"""The moments of a call: it has had no effect; its bytes are in the file system and have no name yet (put
only); it has had its effect and nobody saw the answer."""


@dataclass(frozen=True)
class Call:
    """One call of the store, counted from 1; `at` are seconds of the clock that all processes share."""

    number: int
    verb: str
    name: str
    at: float


class WatchedStore(Store):
    """`inner`, telling `step(call, moment)` of every moment of every call.

    A listing is read to its end in the call that asks for it. Every object seems `older` seconds older than
    it is.
    """

    def __init__(
        self, inner: Store, step: Callable[[Call, str], None] = lambda *_: None, older: float = 0.0
    ) -> None:
        self.location, self.grace, self.range_gap = inner.location, inner.grace, inner.range_gap
        self.uploads = inner.uploads
        self.calls: list[Call] = []
        self._inner = inner
        self._step = step
        self._older = older
        self._one_at_a_time = threading.Lock()

    def _do(self, verb: str, name: str, act: Callable[[], T]) -> T:
        with self._one_at_a_time:
            self.calls.append(Call(len(self.calls) + 1, verb, name, time.monotonic()))
            self._step(self.calls[-1], BEFORE)
            try:
                return act()
            finally:  # an error is an answer, too
                self._step(self.calls[-1], AFTER)

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        def act() -> None:
            with self._unnamed():
                self._inner.put(name, parts)

        self._do("put", name, act)

    @contextlib.contextmanager
    def _unnamed(self) -> Iterator[None]:
        """Tell of the moment when the directory store's file is written and has no name yet."""
        really = directory.link_new

        def link_new(scratch: str, target: str) -> bool:
            self._step(self.calls[-1], UNNAMED)
            return really(scratch, target)

        directory.link_new = link_new
        try:
            yield
        finally:
            directory.link_new = really

    def get(self, name: str, *, newest: bool = False, limit: int = MAX_OBJECT) -> memoryview:
        return self._do("get", name, lambda: self._inner.get(name, newest=newest, limit=limit))

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> Views:
        return self._do("get_ranges", name, lambda: self._inner.get_ranges(name, ranges))

    def head(self, name: str) -> ObjectInfo | None:
        info = self._do("head", name, lambda: self._inner.head(name))
        return info and self._aged(info)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        found = self._do("list", prefix, lambda: tuple(self._inner.list(prefix)))
        return (self._aged(info) for info in found)

    def folders(self, prefix: str) -> Iterator[str]:
        return iter(self._do("folders", prefix, lambda: tuple(self._inner.folders(prefix))))

    def delete(self, name: str) -> None:
        self._do("delete", name, lambda: self._inner.delete(name))

    def close(self) -> None:
        self._inner.close()

    def _aged(self, info: ObjectInfo) -> ObjectInfo:
        return replace(info, age=info.age + self._older)


class Elsewhere:
    """Counts what a process does to its files outside the store: names that come and go, programs started.

    `step(number)` is called before each. It sees local state, images and targets: all that is in the
    repository's folder and not in the repository.
    """

    # Not os.mkdir: how often folders are tried to be made depends on which thread comes first.
    _EVENTS = ("os.rename", "os.remove", "os.link", "subprocess.Popen")

    def __init__(self, repository: str, step: Callable[[int], None]) -> None:
        self.count = 0
        self._repository = repository
        self._folder = os.path.dirname(repository)
        self._step = step
        self._one_at_a_time = threading.Lock()
        sys.addaudithook(self._happens)

    def _happens(self, event: str, details: tuple[Any, ...]) -> None:
        if event in self._EVENTS and (event == "subprocess.Popen" or self._ours(os.fspath(details[0]))):
            with self._one_at_a_time:
                self.count += 1
                self._step(self.count)

    def _ours(self, path: str | bytes) -> bool:
        name = os.fsdecode(path)
        return name.startswith(self._folder) and not name.startswith(self._repository)
