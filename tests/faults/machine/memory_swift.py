"""A Swift account in memory, as eventually consistent as the real one.

Three nodes hold a copy of every object or its tombstone, with time stamps; the newest wins. What a request
sees is what the measured Swift shows: writes reach the nodes that are up, a plain read asks one node after
another, X-Newest asks all of them, listings lag. Simplifications, all on the harmless side: a node fails only
when replication has caught up, and one at a time, unless a fault takes two away for some requests.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swiftclient.exceptions import ClientException

if TYPE_CHECKING:
    from tests.faults.machine.process import Process

NODES = (0, 1, 2)
DAY = 86400.0
RECLAIM = 7 * DAY  # how long a tombstone is kept


@dataclass(frozen=True, slots=True)
class Copy:
    """An object on a node: its bytes, None for a tombstone. The higher stamp is the newer."""

    stamp: float
    at: float
    data: bytes | None


@dataclass(frozen=True, slots=True)
class Late:
    """A PUT under way. With a `stamp` it was admitted before; without, If-None-Match is still to be asked.

    `at`: since when, if that matters.
    """

    name: str
    data: bytes
    stamp: float | None
    at: float = 0.0


def refusal(status: int, reason: str = "", **headers: str) -> ClientException:
    return ClientException(
        "no", http_status=status, http_reason=reason or str(status), http_response_headers=headers
    )


class Account:
    """The nodes, one container's listing, what is under way, and the clock (seconds since 1970)."""

    def __init__(self, seed: int, counts: Counter[str]) -> None:
        self.nodes: list[dict[str, Copy]] = [{} for _ in NODES]
        self.down: set[int] = set()
        self.rows: dict[str, tuple[int, float]] = {}
        self.lagging: list[tuple[str, tuple[int, float] | None]] = []
        self.ghosts: dict[str, tuple[int, float]] = {}
        self.late: list[Late] = []
        self.now = 1.7e9
        self.stamp = 0.0
        self.changes: Counter[str] = Counter()  # by lineage, of what may change what a reader sees
        self.random = random.Random(seed)
        self.counts = counts
        self.acting: list[Process] = []
        self.first: dict[str, float] = {}  # when a name was stored for the first time
        self.youngest = math.inf  # seconds that a deleted object had been there, at the least

    # What the retry loop is given, and who makes requests.

    def clock(self) -> float:
        """The time that the running process spent waiting: its patience is not for another's work."""
        return self.acting[-1].waited

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.acting[-1].waited += seconds

    @contextmanager
    def by(self, process: Process) -> Iterator[Process]:
        self.acting.append(process)
        try:
            yield process
        finally:
            self.acting.pop()

    # Requests. `away` are nodes that do not answer besides those that are down.

    def _up(self, away: set[int]) -> list[int]:
        return [node for node in NODES if node not in self.down | away]

    def next_stamp(self) -> float:
        self.stamp += 1.0
        return self.stamp

    def put(self, name: str, data: bytes, away: set[int], late: float | None = None) -> None:
        up = self._up(away)
        if late is None and any((c := self.nodes[n].get(name)) and c.data is not None for n in up):
            raise refusal(412, "Precondition Failed")
        if len(up) < 2 and self.random.random() < 0.5:
            up = []
        copy = Copy(self.next_stamp() if late is None else late, self.now, data)
        won = [node for node in up if self._keep(node, name, copy)]
        self.first.setdefault(name, self.now)
        if won:
            self._row(name, (len(data), self.now))
        if len(up) < 2:
            raise refusal(503, "Service Unavailable")

    def delete(self, name: str, away: set[int], unknown: bool) -> None:
        """Leave tombstones. An object that is `unknown` to all but its writer needs no grace."""
        up = self._up(away)
        found = any((c := self.nodes[n].get(name)) and c.data is not None for n in up)
        copy = Copy(self.next_stamp(), self.now, None)
        if not unknown:
            self.youngest = min(self.youngest, self.now - self.first.get(name, 0.0))
        for node in up:
            self._keep(node, name, copy)
        self._row(name, None)
        if len(up) < 2:
            raise refusal(503, "Service Unavailable")
        if not found:
            raise refusal(404, "Not Found")

    def _keep(self, node: int, name: str, copy: Copy) -> bool:
        old = self.nodes[node].get(name)
        if old is not None and old.stamp >= copy.stamp:
            return False
        self.nodes[node][name] = copy
        self.changes[name.split("/")[1]] += 1
        return True

    def _row(self, name: str, row: tuple[int, float] | None) -> None:
        if row is None and name in self.rows:
            self.ghosts[name] = self.rows[name]
        self.lagging.append((name, row))
        if self.random.random() < 0.7:
            self.catch_up()

    def find(self, name: str, newest: bool, away: set[int]) -> Copy:
        up = self._up(away)
        if len(up) < 2:
            raise refusal(503, "Service Unavailable")
        copies = [c for c in (self.nodes[n].get(name) for n in up) if c is not None]
        if newest:
            copies.sort(key=lambda copy: -copy.stamp)
        else:
            self.random.shuffle(copies)
        denied = -1.0
        for copy in copies:
            if copy.data is None:
                denied = max(denied, copy.stamp)
            elif copy.stamp > denied:
                return copy
        raise refusal(404, "Not Found")

    def listing(self, prefix: str, marker: str, partial: bool) -> dict[str, tuple[int, float]]:
        rows = dict(self.rows)
        if partial:
            rows = {name: row for name, row in rows.items() if self.random.random() < 0.6} | self.ghosts
        return {n: rows[n] for n in sorted(rows) if n.startswith(prefix) and n > marker}

    # What happens to the store as a whole.

    def keep(self) -> tuple[list[dict[str, Copy]], dict[str, tuple[int, float]], list[Any]]:
        """What the nodes and the listing hold, for `put_back`."""
        return [dict(node) for node in self.nodes], dict(self.rows), list(self.lagging)

    def put_back(self, kept: tuple[list[dict[str, Copy]], dict[str, tuple[int, float]], list[Any]]) -> None:
        nodes, rows, lagging = kept
        self.nodes, self.rows, self.lagging = [dict(node) for node in nodes], dict(rows), list(lagging)

    def lose(self, name: str) -> None:
        """An object is gone, without a trace of its having been there."""
        for node in self.nodes:
            node.pop(name, None)
        self.rows.pop(name, None)
        self.lagging = [one for one in self.lagging if one[0] != name]

    def plant(self, folder: str) -> str:
        """Somebody else stores something below `folder`; its name."""
        name = f"{folder}/{self.random.randbytes(16).hex()}/0-00000000"
        copy = Copy(self.next_stamp(), self.now, b"of somebody else")
        for node in self.nodes:
            node[name] = copy
        self.rows[name] = (len(b"of somebody else"), self.now)
        self.first[name] = self.now
        return name

    # What happens by itself.

    def catch_up(self) -> None:
        """The container learns what the objects' nodes had to tell."""
        for name, row in self.lagging:
            self.rows.pop(name, None)
            if row:
                self.rows[name] = row
        self.lagging.clear()

    def replicate(self) -> None:
        """All nodes that are up get the newest of what they have; old tombstones go."""
        up = self._up(set())
        for name in sorted({name for n in up for name in self.nodes[n]}):
            newest = max((c for n in up if (c := self.nodes[n].get(name))), key=lambda copy: copy.stamp)
            for node in up:
                self._keep(node, name, newest)
                if newest.data is None and newest.at < self.now - RECLAIM:
                    del self.nodes[node][name]
            if newest.data is not None and name not in self.rows:
                self.rows[name] = (len(newest.data), newest.at)
        self.catch_up()

    def thin(self) -> bool:
        """Whether the newest of something is on one node only."""
        for name in {name for node in self.nodes for name in node}:
            stamps = [c.stamp for node in self.nodes if (c := node.get(name))]
            if stamps.count(max(stamps)) < 2:
                return True
        return False

    def hold(self, late: Late) -> None:
        """Keep a PUT under way."""
        self.late.append(late)

    def land_due(self, by: float) -> None:
        """Let arrive what cannot be under way any longer at the time `by`. Here there is no such limit."""

    def land(self, how_many: int) -> int:
        """The first PUTs under way arrive: those that were refused by now have no effect."""
        landing, self.late = self.late[:how_many], self.late[how_many:]
        for late in landing:
            try:
                self.put(late.name, late.data, set(), late.stamp)
            except ClientException:
                continue
        return len(landing)

    def settled(self) -> None:
        """Everything late lands, every node is back, and all agree."""
        self.down.clear()
        self.land(len(self.late))
        self.replicate()

    def holds(self, name: str) -> bool:
        """Whether a reader that asks every node finds the object."""
        try:
            return self.find(name, True, set()).data is not None
        except ClientException:
            return False

    def objects(self) -> dict[str, bytes]:
        """What all nodes together hold, by full name."""
        found = {}
        for name in sorted({name for node in self.nodes for name in node}):
            newest = max((c for node in self.nodes if (c := node.get(name))), key=lambda copy: copy.stamp)
            if newest.data is not None:
                found[name] = newest.data
        return found
