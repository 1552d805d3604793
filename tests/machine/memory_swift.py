"""A Swift account in memory, as eventually consistent as the real one, behind the real SwiftStore.

Three nodes hold a copy of every object or its tombstone, with time stamps; the newest wins. What a request
sees is what the measured Swift shows: writes reach the nodes that are up, a plain read asks one node after
another, X-Newest asks all of them, listings lag. Faults are planted per process (`Process`), and counted.
Simplifications, all on the harmless side: a node fails only when replication has caught up, and one at a
time, unless a fault takes two away for the rest of an operation.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any, TypeVar

import requests
from swiftclient.exceptions import ClientException

T = TypeVar("T")

NODES = (0, 1, 2)
DAY = 86400.0
RECLAIM = 7 * DAY  # how long a tombstone is kept

# Kinds of faults. Those of HARD outlast every patience: the operation must fail, its outcome unknown.
CRASH_BEFORE, CRASH_AFTER = "crash before the effect", "crash before the answer"
LOST, FAILED, EXPIRED = "answer lost", "failed without effect", "token expired"
LATE, DUPLICATE = "late PUT", "duplicate PUT"
STALE, CUT, LISTING = "stale 404", "short body", "partial listing"
OUTAGE, LOST_OUTAGE, LATE_OUTAGE = "outage", "answer lost, then outage", "late PUT, then outage"
INTRUSION, RACE = "another process", "two PUTs at the same moment"
HARD = (OUTAGE, LOST_OUTAGE, LATE_OUTAGE)


class Crash(BaseException):
    """The process is dead: this and every later request of it ends here."""


@dataclass(slots=True)
class Fault:
    """`kind` happens to `times` requests that `where` fits, after `skip` of them went well.

    `where`: any, put, get, head, delete, list; record (PUT of a catalog object), plain (GET without
    X-Newest), change (PUT or DELETE). `what` names an intrusion.
    """

    kind: str
    where: str = "any"
    skip: int = 0
    times: int = 1
    what: str = ""


@dataclass(frozen=True, slots=True)
class Copy:
    """An object on a node: its bytes, None for a tombstone. The higher stamp is the newer."""

    stamp: float
    at: float
    data: bytes | None


@dataclass(frozen=True, slots=True)
class Late:
    """A PUT under way. With a `stamp` it was admitted before; without, If-None-Match is still to be asked."""

    name: str
    data: bytes
    stamp: float | None


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
        self.version = 0  # counts everything that may change what a reader sees
        self.random = random.Random(seed)
        self.counts = counts
        self.acting: list[Process] = []

    # What connections and the retry loop are given.

    def connect(self, **_: Any) -> Connection:
        return Connection(self, self.acting[-1])

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
        if won:
            self._row(name, (len(data), self.now))
        if len(up) < 2:
            raise refusal(503, "Service Unavailable")

    def delete(self, name: str, away: set[int]) -> None:
        up = self._up(away)
        found = any((c := self.nodes[n].get(name)) and c.data is not None for n in up)
        copy = Copy(self.next_stamp(), self.now, None)
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
        self.version += 1
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

    def objects(self) -> dict[str, bytes]:
        """What all nodes together hold, by full name."""
        found = {}
        for name in sorted({name for node in self.nodes for name in node}):
            newest = max((c for node in self.nodes if (c := node.get(name))), key=lambda copy: copy.stamp)
            if newest.data is not None:
                found[name] = newest.data
        return found


@dataclass
class Process:
    """One run of a command: the faults planted in it, and what came of them.

    `died` is called at the moment of a crash; `intrude(what)` runs another process's command in between and
    says whether it could. Of two PUTs of one name at the same moment both are answered 201, and the
    intruder's is the one that stays.
    """

    account: Account
    faults: list[Fault] = field(default_factory=list)
    died: Callable[[], None] = lambda: None
    intrude: Callable[[str], bool] = lambda what: True
    dead: bool = False
    hard: bool = False
    intruded: bool = False
    renewed: bool = False
    racing: Late | None = None  # a PUT that was admitted and is not stored yet, while another process runs
    rival: Late | None = None  # the same, of the process that this one intrudes on
    waited: float = 0.0
    away: set[int] = field(default_factory=set)

    def perform(self, tags: set[str], effect: Callable[[Fault | None], T], late: Late | None = None) -> T:
        """Make one request, whatever is planted in its way. `late` is what a PUT would store."""
        if self.dead:
            raise Crash
        self.account.now += 0.02
        fault = self._due(tags | {"any"})
        kind = fault.kind if fault else ""
        if kind == CRASH_BEFORE:
            self._die()
        if kind == EXPIRED:
            raise refusal(401, "Unauthorized")
        if kind == FAILED:
            raise self._trouble()
        if kind == RACE and late is not None:
            self.racing = late
            self.intruded |= self.intrude(fault.what if fault else "")
            if self.racing is None:
                return None  # type: ignore[return-value]
        if kind in (LATE, LATE_OUTAGE) and late is not None:
            self.account.late.append(self._maybe_admitted(late))
        if kind in (OUTAGE, LATE_OUTAGE):
            self._outage()
        if kind == LATE:
            raise self._trouble()
        try:
            answer = effect(fault)
        except ClientException:
            if kind == CRASH_AFTER:
                self._die()
            raise
        if kind == CRASH_AFTER:
            self._die()
        if kind == LOST_OUTAGE:
            self._outage()
        if kind in (LOST, LOST_OUTAGE):
            raise self._trouble()
        if kind == DUPLICATE and late is not None:
            self.account.late.append(late)
        return answer

    def _due(self, tags: set[str]) -> Fault | None:
        """The fault that this request meets, if any; intrusions happen here."""
        for fault in self.faults:
            if fault.where not in tags or fault.times <= 0:
                continue
            if fault.skip > 0:
                fault.skip -= 1
                continue
            if fault.kind == EXPIRED and self.renewed:  # a fresh token is not refused
                continue
            self.renewed |= fault.kind == EXPIRED
            if fault.kind == INTRUSION:
                if self.intrude(fault.what):
                    fault.times = 0
                    self.intruded = True
                    self.account.counts[f"{INTRUSION}: {fault.what}"] += 1
                continue
            fault.times -= 1
            self.account.counts[fault.kind] += 1
            return fault
        return None

    def _die(self) -> None:
        self.dead = True
        self.died()
        raise Crash

    def _outage(self) -> None:
        self.hard = True
        self.away = set(self.account.random.sample(NODES, 2))

    def _trouble(self) -> Exception:
        if self.account.random.random() < 0.5:
            return requests.ConnectionError("broken")
        return refusal(503, "Service Unavailable", **{"Retry-After": "1"})

    def _maybe_admitted(self, late: Late) -> Late:
        """Some late PUTs were admitted before they were held up, with the stamp of that moment."""
        if self.account.random.random() < 0.5:
            return late
        return Late(late.name, late.data, self.account.next_stamp())


class Connection:
    """What swiftclient's Connection is to stores/wire.py."""

    def __init__(self, account: Account, process: Process) -> None:
        self.url = ""
        self.token = ""
        self.http_conn = object()
        self._account = account
        self._process = process

    def close(self) -> None:
        pass

    def head_container(self, container: str, headers: Mapping[str, str]) -> dict[str, str]:
        return self._process.perform({"container"}, lambda fault: {})

    def get_container(
        self, container: str, marker: str, limit: int | None, prefix: str, delimiter: str | None
    ) -> tuple[dict[str, str], list[dict[str, Any]]]:
        def effect(fault: Fault | None) -> tuple[dict[str, str], list[dict[str, Any]]]:
            partial = fault is not None and fault.kind == LISTING
            rows = self._account.listing(prefix, marker, partial)
            return {"date": _date(self._account.now)}, _rows(rows, prefix, delimiter, marker)

        return self._process.perform({"list"}, effect)

    def put_object(
        self,
        container: str,
        name: str,
        body: Any,
        *,
        content_length: int,
        content_type: str,
        headers: Mapping[str, str],
        response_dict: dict[str, Any],
    ) -> None:
        pieces = []
        while content_length and (piece := body.read(65536)):
            pieces.append(bytes(piece))
        data = b"".join(pieces)
        assert headers["If-None-Match"] == "*"
        assert len(data) == content_length
        tags = {"put", "change"} | ({"record"} if "/catalog/" in name else set())
        self._process.perform(tags, lambda fault: self._store(name, data), Late(name, data, None))
        response_dict["status"] = 201

    def _store(self, name: str, data: bytes) -> None:
        rival = self._process.rival
        if rival is not None and rival.name == name and rival.data != data:
            self._process.rival = None
            self._account.put(name, rival.data, set())
            self._account.put(name, data, set(), self._account.next_stamp())
        else:
            self._account.put(name, data, self._process.away)

    def delete_object(self, container: str, name: str) -> None:
        self._process.perform(
            {"delete", "change"}, lambda fault: self._account.delete(name, self._process.away)
        )

    def head_object(self, container: str, name: str, headers: Mapping[str, str]) -> dict[str, str]:
        newest = "X-Newest" in headers

        def effect(fault: Fault | None) -> dict[str, str]:
            return self._described(self._account.find(name, newest, self._process.away))

        return self._process.perform({"head"}, effect)

    def get_object(
        self,
        container: str,
        name: str,
        *,
        resp_chunk_size: int,
        response_dict: dict[str, Any],
        headers: Mapping[str, str],
    ) -> tuple[dict[str, str], _Body]:
        newest = "X-Newest" in headers

        def effect(fault: Fault | None) -> tuple[dict[str, str], _Body]:
            if fault is not None and fault.kind == STALE:
                raise refusal(404, "Not Found")
            copy = self._account.find(name, newest, self._process.away)
            response_dict["status"], extra, data = _ranged(copy.data or b"", headers.get("Range", ""))
            described = self._described(copy) | extra | {"content-length": str(len(data))}
            response_dict["headers"] = described
            return described, _Body(data[: len(data) // 2] if fault and fault.kind == CUT else data)

        return self._process.perform({"get"} | (set() if newest else {"plain"}), effect)

    def _described(self, copy: Copy) -> dict[str, str]:
        data = copy.data or b""
        return {
            "content-length": str(len(data)),
            "etag": hashlib.md5(data, usedforsecurity=False).hexdigest(),
            "last-modified": _date(copy.at),
            "date": _date(self._account.now),
        }


class _Body:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self) -> bytes:
        return self._data


def _ranged(data: bytes, wanted: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a GET; several ranges are answered by the whole object, as servers may."""
    if not wanted or "," in wanted:
        return 200, {}, data
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start, stop = int(first), min(int(last) + 1, len(data))
    if start >= len(data):
        raise refusal(416, "Requested Range Not Satisfiable")
    return 206, {"content-range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop]


def _rows(
    rows: Mapping[str, tuple[int, float]], prefix: str, delimiter: str | None, marker: str
) -> list[dict[str, Any]]:
    answer: dict[str, dict[str, Any]] = {}
    for name, (size, at) in rows.items():
        below, slash, _ = name[len(prefix) :].partition(delimiter or "\0")
        if slash and prefix + below + slash > marker:
            answer[prefix + below + slash] = {"subdir": prefix + below + slash}
        elif not slash:
            answer[name] = {"name": name, "bytes": size, "last_modified": _iso(at)}
    return list(answer.values())


def _date(seconds: float) -> str:
    return formatdate(seconds, usegmt=True)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")
