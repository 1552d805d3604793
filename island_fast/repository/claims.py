"""Who may use names that the store would overwrite: whoever claimed them, and saw no other claim.

Some stores refuse no PUT (Ceph's gateway, by its Swift API), and one that was held up overwrites whatever the
name holds by then. So where it matters who is first, nobody PUTs before all others are known to stay away:
a writer puts a claim, an object of a name of its own, lists the claims, and has won if it sees none of
another writer. If it does, it removes its own, waits, and tries again. Of two winners, the one whose claim
arrived later would have seen the other's: so there is one. A winner removes its claim when what it claimed is
there for everybody to see, or when it is certain that it never sent it. A claim that is left over counts for
90 minutes of the store's clock, and its maker uses it for 10 only: what it sent then has arrived an hour
later, or never will. Proof, and what is relied on: docs/reliability.md, "Where nothing is refused".
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import time
from collections.abc import Callable, Iterator

from island_fast.errors import (
    UNREADABLE,
    ConflictError,
    IslandError,
    ObjectMissingError,
    RefusedError,
    StoreError,
)
from island_fast.formats.frame import LIMITS, Kind, Section, json_bytes, open_frame, seal
from island_fast.formats.names import claim_name, parse_claim
from island_fast.repository.clock import read_clock
from island_fast.stores.base import PUTS_END, ObjectInfo, Store
from island_fast.stores.checked_read import get_checked

__all__ = ["Claim"]

EXPIRES = 5400.0
"""Seconds after which a claim counts no more."""

_LATE = 3600.0  # seconds after which a PUT that was given up has arrived, or never will
_USED = EXPIRES - _LATE - PUTS_END  # seconds; later than this its maker sends nothing that it has claimed
_PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds, before further tries


class Claim:
    """A claim of this host on the names that begin with `stem`. One process has it at a time.

    `stem` is that of an epoch of a lineage, or "repository". `doing` says what its winner does, such as
    "adopting volume v". Earlier claims of `writer` are no rivals: whoever makes one holds a lock that keeps
    away others with that id, and what they may have sent is in local state, to be sent again as it was. It is
    the writer id of this host, or for "repository" the id that is to be in it.
    """

    def __init__(self, store: Store, stem: str, writer: str, doing: str) -> None:
        self._store = store
        self._stem = stem
        self._writer = writer
        self._doing = doing
        self._folder = stem[: stem.rfind("/") + 1]
        self._leftovers: list[str] = []
        self._name = ""

    def _make(self) -> None:
        """Put a claim under a new name."""
        self._name = claim_name(self._stem, self._writer, os.urandom(16).hex())
        meta = {"writer": self._writer, "host": os.uname().nodename, "time": read_clock()}
        parts, _ = seal(Kind.CLAIM, self._name, [Section(1, [json_bytes(meta)])])
        self._store.put(self._name, parts)

    def win(self, is_taken: Callable[[], bool]) -> bool:
        """Return True once the claim stands alone; False if what it is about is there, as `is_taken` says.

        RefusedError if another writer's claim stays in the way: it says whose, and how long it counts.
        """
        for pause in (*_PAUSES, None):
            self._make()
            try:
                rivals = self._find_rivals()
                taken = not rivals and is_taken()  # by one whose claim is gone, because all is done
            except BaseException:
                self.withdraw()
                raise
            if not rivals and not taken:
                return True
            self.withdraw()
            if taken:
                return False
            if pause is not None:
                time.sleep(random.uniform(pause / 2, pause))
            if is_taken():
                return False
        raise self._rival_error(rivals[0])

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Let the body send what the claim is for, by puts that end in time.

        ConflictError, and nothing is sent, unless the claim is there and young enough.
        """
        info = self._store.head(self._name)
        if info is None or info.age > _USED:
            raise ConflictError(
                f"{self._doing} took too long on {self._store.location}, and another host can do it by now; "
                "nothing was changed, run the command again"
            )
        with self._store.bound_puts():
            yield

    def withdraw(self) -> None:
        """Remove the claim: what it was for was not sent, for certain, and will not be."""
        self._remove([self._name])

    def fulfil(self) -> None:
        """Remove the claim, and what is left of earlier ones: what it was for can be seen by everybody."""
        self._remove([self._name, *self._leftovers])

    def _remove(self, names: list[str]) -> None:
        """Remove objects; one that stays counts no more in the end."""
        with contextlib.suppress(IslandError), self._store.hurry():
            for name in names:
                self._store.delete(name)

    def _find_rivals(self) -> list[ObjectInfo]:
        """Return the claims of others in a listing, which must show this one.

        A claim is old only if the store says so twice: in the listing, and when it is asked by name.
        """
        self._leftovers = []
        seen, rivals = False, []
        for info in self._store.list(self._folder):
            stem, writer, _ = parse_claim(info.name) or ("", "", "")
            if info.name == self._name:
                seen = True
            elif stem and stem[: stem.rfind("/") + 1] == self._folder and stem < self._stem:
                self._leftovers.append(info.name)  # on an earlier epoch
            elif stem == self._stem:
                if writer == self._writer or (info.age >= EXPIRES and self._is_over(info.name)):
                    self._leftovers.append(info.name)
                else:
                    rivals.append(info)
        if not seen:
            raise StoreError(
                f"{self._store.location} refuses no PUT on a name that is taken, and does not list what was "
                "just written: hosts cannot be kept apart there; make its gateway consistent, or use another"
            )
        return rivals

    def _is_over(self, name: str) -> bool:
        info = self._store.head(name)
        return info is None or info.age >= EXPIRES

    def _read(self, name: str) -> bytes:
        def check(data: memoryview) -> bytes:
            open_frame(Kind.CLAIM, name, data)
            return bytes(data)

        return get_checked(self._store, name, check, limit=LIMITS[Kind.CLAIM].size, newest=True)

    def _rival_error(self, rival: ObjectInfo) -> RefusedError:
        host = "another host"
        with contextlib.suppress(ObjectMissingError, StoreError, *UNREADABLE):
            meta = open_frame(Kind.CLAIM, rival.name, self._read(rival.name)).json()
            host = f"host {meta.get('host')}"
        minutes = math.ceil(max(0.0, EXPIRES - rival.age) / 60)
        return RefusedError(
            f"{host} is {self._doing}, or was when it was interrupted; run the command again when that is "
            f"done, or in {minutes} min, when its claim counts no more; if that host has been off for an "
            f"hour, and stays off, remove the object {rival.name} from {self._store.location}"
        )
