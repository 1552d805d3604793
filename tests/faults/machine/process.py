"""One run of a command, the faults planted in it, and its connections: behind the real SwiftStore.

A fault fires at requests of a kind, and is counted when it does. A crash is a request that never returns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any, TypeVar

import requests
from swiftclient.exceptions import ClientException

from tests.faults.machine.memory_swift import DAY, NODES, Account, Copy, Late, refusal

T = TypeVar("T")

# Kinds of faults. Those of HARD outlast every patience: the operation must fail, its outcome unknown.
CRASH_BEFORE, CRASH_AFTER = "crash before the effect", "crash before the answer"
LOST, FAILED, EXPIRED = "answer lost", "failed without effect", "token expired"
LATE, DUPLICATE = "late PUT", "duplicate PUT"
STALE, CUT, LISTING = "stale 404", "short body", "partial listing"
DENIED, SWAPPED, AGED = "false 404 by HEAD", "listing of another prefix", "listing of wrong ages"
OUTAGE, LOST_OUTAGE, LATE_OUTAGE = "outage", "answer lost, then outage", "late PUT, then outage"
INTRUSION, RACE = "another process", "two PUTs at the same moment"
REFUSED = "refused append"  # for certain: by a quota, or for want of rights
HARD = (OUTAGE, LOST_OUTAGE, LATE_OUTAGE)


class Crash(BaseException):
    """The process is dead: this and every later request of it ends here."""


@dataclass(slots=True)
class Fault:
    """`kind` happens to `times` requests that `where` fits, after `skip` of them went well.

    `where`: any, put, get, head, delete, list; record (PUT of a catalog object), plain (GET without
    X-Newest), change (PUT or DELETE). `what` names an intrusion, and the object that false 404s are about.
    """

    kind: str
    where: str = "any"
    skip: int = 0
    times: int = 1
    what: str = ""


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
    misled: bool = False  # an object was denied, or a listing was another one: that explains a refusal
    refused: bool = False
    renewed: bool = False
    racing: Late | None = None  # a PUT that was admitted and is not stored yet, while another process runs
    rival: Late | None = None  # the same, of the process that this one intrudes on
    waited: float = 0.0
    away: set[int] = field(default_factory=set)
    back_in: int = 0  # requests until the nodes that an outage took away are back

    def perform(self, tags: set[str], effect: Callable[[Fault | None], T], late: Late | None = None) -> T:
        """Make one request, whatever is planted in its way. `late` is what a PUT would store."""
        if self.dead:
            raise Crash
        self.account.now += 0.02
        self.account.land_due(self.account.now)
        self.back_in -= 1
        if self.back_in <= 0:
            self.away.clear()
        fault = self._due(tags | {"any"})
        kind = fault.kind if fault else ""
        if kind == CRASH_BEFORE:
            self._die()
        if kind == EXPIRED:
            raise refusal(401, "Unauthorized")
        if kind == FAILED:
            raise self._trouble()
        if kind == REFUSED:
            self.refused = True
            raise refusal(self.account.random.choice((403, 413)))
        if kind == RACE and late is not None:
            self.racing = late
            self.intruded |= self.intrude(fault.what if fault else "")
            if self.racing is None:
                return None  # type: ignore[return-value]
        if kind in (LATE, LATE_OUTAGE) and late is not None:
            self.account.hold(self._maybe_admitted(late))
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
            self.account.hold(late)
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
            if fault.kind != DENIED:  # counted where an object is denied that exists
                self.account.counts[fault.kind] += 1
            return fault
        return None

    def _die(self) -> None:
        self.dead = True
        self.died()
        raise Crash

    def _outage(self) -> None:
        self.hard = True
        # With one node up, a PUT that is tried again and again is stored there sooner or later.
        self.away = set(self.account.random.sample(NODES, self.account.random.choice((2, len(NODES)))))
        self.back_in = self.account.random.choice((10, 40, 1000))  # some patience is longer than the first

    def _trouble(self) -> Exception:
        if self.account.random.random() < 0.5:
            return requests.ConnectionError("broken")
        return refusal(503, "Service Unavailable", **{"Retry-After": "1"})

    def _maybe_admitted(self, late: Late) -> Late:
        """Some late PUTs were admitted before they were held up, with the stamp of that moment.

        One that If-None-Match refuses now is not among them.
        """
        if self.account.random.random() < 0.5 or (late.stamp is None and self.account.holds(late.name)):
            return late
        return Late(late.name, late.data, self.account.next_stamp())


class Connection:
    """What swiftclient's Connection is to stores/swift_connection.py."""

    def __init__(self, account: Account, process: Process) -> None:
        self.url = ""
        self.token = ""
        self.http_conn = object()
        self._account = account
        self._process = process

    def close(self) -> None:
        pass

    def head_container(self, container: str, headers: Mapping[str, str] | None = None) -> dict[str, str]:
        return self._process.perform({"container"}, lambda fault: {})

    def head_account(self) -> dict[str, str]:
        return self._process.perform({"account"}, lambda fault: {})

    def get_container(
        self, container: str, marker: str, limit: int | None, prefix: str, delimiter: str | None
    ) -> tuple[dict[str, str], list[dict[str, Any]]]:
        def effect(fault: Fault | None) -> tuple[dict[str, str], list[dict[str, Any]]]:
            kind = fault.kind if fault else ""
            if kind == SWAPPED and prefix.count("/") == 3:
                self._process.misled = self._process.hard = True
                first, lineage, rest = prefix.split("/", 2)
                other = "/".join([first, "beta" if lineage == "alpha" else "alpha", rest])
                rows = self._account.listing(other, marker, False)
                return {"date": _date(self._account.now)}, _rows(rows, other, delimiter, marker)
            rows = self._account.listing(prefix, marker, kind == LISTING)
            if kind == AGED:
                rows = {name: (size, at - 1000 * DAY) for name, (size, at) in rows.items()}
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
        sole = headers.get("If-None-Match") == "*"
        assert len(data) == content_length
        tags = {"put", "change"} | ({"record"} if "/catalog/" in name else set())
        late = Late(name, data, None if sole else self._account.next_stamp())
        self._process.perform(tags, lambda fault: self._store(name, data, sole), late)
        response_dict["status"] = 201

    def _store(self, name: str, data: bytes, sole: bool) -> None:
        rival = self._process.rival
        if rival is not None and rival.name == name and rival.data != data:
            self._process.rival = None
            self._account.put(name, rival.data, set())
            self._account.put(name, data, set(), self._account.next_stamp())
        else:
            stamp = None if sole else self._account.next_stamp()
            self._account.put(name, data, self._process.away, stamp)

    def delete_object(self, container: str, name: str) -> None:
        # Packs that a sweep has just written again go at once if its record is refused: nobody knows them.
        unknown = self._process.refused and "." in name.rpartition("/")[2]
        self._process.perform(
            {"delete", "change"}, lambda fault: self._account.delete(name, self._process.away, unknown)
        )

    def head_object(self, container: str, name: str, headers: Mapping[str, str]) -> dict[str, str]:
        newest = "X-Newest" in headers

        def effect(fault: Fault | None) -> dict[str, str]:
            denies = fault is not None and fault.kind == DENIED
            try:
                found = self._account.find(name, newest, self._process.away)
            except ClientException:
                if fault is not None and denies:
                    fault.times += 1  # there is nothing to deny
                raise
            if fault is not None and denies and fault.what in ("", name):
                fault.what = name  # at a second time the same one is denied
                self._process.misled = True
                self._account.counts[DENIED] += 1
                raise refusal(404, "Not Found")
            if fault is not None and denies:
                fault.times += 1
            return self._described(found)

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

    def read(self, size: int) -> bytes:
        return self._data[:size]


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
