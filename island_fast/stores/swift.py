"""A store in one container of OpenStack Swift, below a prefix; only Swift's core verbs are used."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self

from island_fast.arrays import Buffer
from island_fast.errors import (
    ConflictError,
    DamagedObjectError,
    NotFoundError,
    ObjectMissingError,
    StoreError,
    UsageError,
)
from island_fast.stores import swift_ranges
from island_fast.stores.base import (
    ObjectInfo,
    Range,
    Store,
    Views,
    check_name,
    check_prefix,
    check_ranges,
    check_size,
    is_name,
    views,
)
from island_fast.stores.retry import Again, Patience
from island_fast.stores.swift_auth import Keyring, from_environment
from island_fast.stores.swift_connection import Connection, Refusal, Wire, unless
from island_fast.stores.swift_pace import PacedBody

__all__ = ["SwiftStore"]

_NEWEST = {"X-Newest": "true"}  # asks every replica
_LOOKS = 3  # at a missing object (all but the first with X-Newest), or at nonsense, before it is believed
_STREAMED = 1 << 20  # any size: it keeps swiftclient from reading a body by itself
_OPENING = 20.0  # seconds: nobody should wait minutes to be told of a wrong host name
_CONTAINER = re.compile(r"(?!\.{1,2}\Z)[^/?#\x00-\x1f\x7f]{1,256}")


@dataclass(frozen=True, slots=True)
class _Answer:
    """What came back for a GET; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: memoryview


class SwiftStore(Store):
    """The objects below `prefix` in one container.

    A listing lags behind, so the grace is a day; nothing else here relies on listings. `page_size`
    bounds their pages; None leaves that to the server (10 000, mostly).
    """

    grace = 86400.0
    range_gap = 64 << 10
    ranges_at_once = swift_ranges.RANGES_PER_REQUEST
    uploads = 2
    page_size: int | None = None

    def __init__(self, container: str, prefix: str, keyring: Keyring, patience: Patience) -> None:
        self._container = container
        self._prefix = check_prefix(f"{prefix}/" if prefix else "")
        self._wire = Wire(keyring, patience)
        self.location = f"swift://{container}/{prefix}".rstrip("/")

    @classmethod
    def open(cls, path: str, patience: Patience | None = None, *, variables: str = "") -> Self:
        """The store at CONTAINER[/PREFIX], with the credentials of the environment: see `from_environment`.

        Signs in and looks at the container: StoreError when that fails, NotFoundError when there is
        none.
        """
        container, _, prefix = path.partition("/")
        if not _CONTAINER.fullmatch(container):
            raise UsageError(f"swift://{path} names no container; write swift://CONTAINER/PREFIX")
        patience = patience or Patience()
        opening = replace(patience, total=min(patience.total, _OPENING))
        store = cls(container, prefix.strip("/"), from_environment(prefix=variables), patience)
        try:
            if not store._wire.ask(f"open {store.location}", store._has_container, opening):
                raise store._no_container()
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """See Store.close."""
        self._wire.close()

    def _full(self, name: str) -> str:
        return self._prefix + check_name(name)

    def _has_container(self, connection: Connection) -> bool:
        """Whether the container is there; only every replica's denial counts as one."""
        for headers in ({}, _NEWEST):
            try:
                connection.head_container(self._container, headers=headers)
                return True
            except Refusal as error:
                if error.http_status != 404:
                    raise
        return False

    def _no_container(self) -> NotFoundError:
        return NotFoundError(
            f"Swift has no container {self._container} in this account; check the name, or make it "
            f"with: swift post {self._container}"
        )

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """See Store.put. Only 201 is success, for that alone says that most replicas have it.

        If-None-Match keeps other bytes from being overwritten; it is no lock: of several writers at the same
        moment all may be told that they succeeded. A 503 may have left our bytes on one replica, which
        If-None-Match finds from then on: then they are sent without it.

        An attempt has an end, whatever the server does: n bytes must be gone within the patience's allowance
        + n / rate; a server that stops reading is left TIMEOUT seconds after the 256 KiB then under way
        (with TLS, after each 16 KiB of them); and its answer may be TIMEOUT seconds away.
        """
        content = views(parts)
        unsure = False

        def send(connection: Connection) -> None:
            nonlocal unsure
            # A broken connection may mean: stored; or refused so early that our sending broke it.
            there = unsure and self._holds(connection, name, content)
            unsure = True
            try:
                self._send(connection, name, content, sole=not there)
            except Refusal as error:
                unsure = False  # If-None-Match of the next attempt tells
                if error.http_status != 412:
                    raise
                if not self._holds(connection, name, content):
                    raise Again("412 for an object that is not there") from error
                self._send(connection, name, content, sole=False)

        self._wire.ask(f"put {name}", send)

    def _send(self, connection: Connection, name: str, content: Views, *, sole: bool) -> None:
        """PUT once, if `sole` only where nothing is yet.

        201 alone means stored; 202 that our time stamp lost to some newer one.
        """
        size = sum(view.nbytes for view in content)
        answer: dict[str, Any] = {}
        try:
            connection.put_object(
                self._container,
                self._full(name),
                PacedBody(content, self._wire.patience) if size else b"",
                content_length=size,
                content_type="application/octet-stream",
                headers={"If-None-Match": "*"} if sole else {},
                response_dict=answer,
            )
        except Refusal as error:
            if error.http_status != 404:
                raise
            if not self._has_container(connection):
                raise self._no_container() from None
            raise Again("404 Not Found") from error
        if answer["status"] != 201:
            raise Again(f"{answer['status']} instead of 201")

    def _holds(self, connection: Connection, name: str, content: Views) -> bool:
        """Whether the object is there, with these very bytes; ConflictError if it has others."""
        full = self._full(name)
        head = unless(404, lambda: connection.head_object(self._container, full, headers=_NEWEST))
        if head is None:
            return False
        md5 = hashlib.md5(usedforsecurity=False)  # what Swift calls the ETag
        for view in content:
            md5.update(view)
        size = sum(view.nbytes for view in content)
        if head.get("etag", "").strip('"') != md5.hexdigest() or _number(head, "content-length") != size:
            raise ConflictError(
                f"object {name} in {self.location} already holds other bytes, and none is ever "
                "overwritten; look for another writer of this repository"
            )
        return True

    def delete(self, name: str) -> None:
        """See Store.delete. A replica that was away may bring the object back later."""
        full = self._full(name)
        self._wire.ask(
            f"delete {name}",
            lambda connection: unless(404, lambda: connection.delete_object(self._container, full)),
        )

    # -- reading

    def get(self, name: str, *, newest: bool = False) -> memoryview:
        """See Store.get. The length is checked against what Swift announced."""
        return self._fetch(name, None, 0, newest=newest).body

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> Views:
        """See Store.get_ranges; one request for 49 ranges that do not touch each other."""
        check_ranges(ranges)
        found: list[swift_ranges.Piece] = []
        for few in swift_ranges.split_ranges(ranges):
            whole, got = self._some(name, few)
            if whole:
                found = got
                break
            found += got
        return swift_ranges.pick(found, ranges)

    def _some(self, name: str, few: Sequence[Range]) -> tuple[bool, list[swift_ranges.Piece]]:
        """The pieces that hold `few` ranges, and whether they are the whole object.

        An answer that makes no sense may have been spoilt on its way: it is asked for again, twice.
        """
        for looks_left in reversed(range(_LOOKS)):
            answer = self._fetch(name, swift_ranges.range_header(few), swift_ranges.room(few))
            try:
                got = self._pieces(name, answer, sum(few[-1]))
                swift_ranges.pick(got, few)
            except ValueError as error:
                if not looks_left:
                    raise StoreError(
                        f"get {name}: the answer to a range request makes no sense ({error}); look at what "
                        "stands between Swift and this host"
                    ) from error
            else:
                break
        return answer.status == 200, got

    def _pieces(self, name: str, answer: _Answer, needed: int) -> list[swift_ranges.Piece]:
        """An answer to a request for ranges, the last of which ends at `needed`; ValueError for nonsense."""
        if answer.status == 416:
            raise DamagedObjectError(
                f"object {name} is shorter than the {needed} bytes that it should have; it is damaged"
            )
        if answer.status == 200:
            found = [swift_ranges.Piece(0, answer.body, answer.body.nbytes)]
        else:
            found = swift_ranges.pieces(answer.headers, answer.body)
        if found and found[0].total is not None:
            check_size(name, found[0].total, needed)
        return found

    def _fetch(self, name: str, wanted: str | None, limit: int, newest: bool = False) -> _Answer:
        """GET until the answer is 200, or 206 of at most `limit` bytes, or 416, or absence is confirmed.

        `wanted` is the Range header.
        """
        full = self._full(name)
        misses = 0

        def look(connection: Connection) -> _Answer:
            nonlocal misses
            headers = dict(_NEWEST) if newest or misses else {}
            if wanted:
                headers["Range"] = wanted
            try:
                return self._read(connection, name, full, headers, limit)
            except Refusal as error:
                if error.http_status == 416 and wanted:
                    return _Answer(416, {}, memoryview(b""))
                if error.http_status != 404:
                    raise
                misses += 1
                if misses < _LOOKS:
                    raise Again("404 Not Found") from error
            raise ObjectMissingError(
                f"object {name} is not in {self.location}; it was deleted or never written"
            )

        return self._wire.ask(f"get {name}", look)

    def _read(
        self, connection: Connection, name: str, full: str, headers: dict[str, str], limit: int
    ) -> _Answer:
        """One GET, its body whole; nothing is read of a body that is larger than it may be."""
        answer: dict[str, Any] = {}
        _, body = connection.get_object(
            self._container, full, resp_chunk_size=_STREAMED, response_dict=answer, headers=headers
        )
        status, got = answer["status"], dict(answer["headers"].items())
        size = _number(got, "content-length")
        if size is None or status not in (200, 206 if "Range" in headers else 200):
            raise Again(f"{status} with {size} bytes")
        check_size(name, size)
        if status == 206 and size > limit:
            raise StoreError(
                f"get {name}: Swift sends {size} bytes where at most {limit} were asked for; look at "
                "what stands between it and this host"
            )
        data = body.read()
        if len(data) != size:
            raise Again(f"{len(data)} of {size} bytes")
        return _Answer(status, got, memoryview(data))

    def head(self, name: str) -> ObjectInfo | None:
        """See Store.head."""
        full = self._full(name)

        def look(connection: Connection) -> ObjectInfo | None:
            head = unless(404, lambda: connection.head_object(self._container, full, headers=_NEWEST))
            if head is None:
                return None
            size = _number(head, "content-length")
            if size is None:
                raise Again("a HEAD without a length")
            return ObjectInfo(name, size, _age(_http_date(head, "date"), _http_date(head, "last-modified")))

        return self._wire.ask(f"look for {name}", look)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See Store.list. Objects with names that are not ours are passed over."""
        return self._objects(check_prefix(prefix))

    def _objects(self, prefix: str) -> Iterator[ObjectInfo]:
        for now, row in self._rows(prefix, None):
            name, size = row.get("name"), row.get("bytes")
            if isinstance(name, str) and name.startswith(self._prefix) and isinstance(size, int):
                name = name[len(self._prefix) :]
                if is_name(name):
                    yield ObjectInfo(name, size, _age(now, _iso_date(row.get("last_modified"))))

    def folders(self, prefix: str) -> Iterator[str]:
        """See Store.folders."""
        return self._subfolders(check_prefix(prefix))

    def _subfolders(self, prefix: str) -> Iterator[str]:
        for _, row in self._rows(prefix, "/"):
            path = row.get("subdir")
            if isinstance(path, str) and path.startswith(self._prefix + prefix):
                folder = path[len(self._prefix + prefix) : -1]
                if is_name(folder):
                    yield folder

    def _rows(
        self, prefix: str, delimiter: str | None
    ) -> Iterator[tuple[datetime | None, Mapping[str, Any]]]:
        """Every row of a listing, and the store's time when it was made."""
        marker = ""
        while True:
            now, rows = self._page(self._prefix + prefix, delimiter, marker)
            if not rows:
                return
            for row in rows:
                yield now, row
            last = rows[-1].get("name", rows[-1].get("subdir"))
            if not isinstance(last, str) or last.encode() <= marker.encode():
                raise StoreError(
                    f"list {self.location}: Swift repeats itself; look at what stands between it and "
                    "this host"
                )
            marker = last

    def _page(
        self, prefix: str, delimiter: str | None, marker: str
    ) -> tuple[datetime | None, Sequence[Mapping[str, Any]]]:
        """The next rows after `marker`, at most `page_size`; none at the end."""

        def look(connection: Connection) -> tuple[Mapping[str, str], Any]:
            try:
                return connection.get_container(  # type: ignore[no-any-return]
                    self._container,
                    marker=marker,
                    limit=self.page_size,
                    prefix=prefix,
                    delimiter=delimiter,
                )
            except (json.JSONDecodeError, UnicodeError) as error:
                raise Again("an unreadable listing") from error
            except Refusal as error:
                if error.http_status != 404:
                    raise
                if self._has_container(connection):
                    raise Again("404 Not Found") from error
            raise self._no_container()

        head, rows = self._wire.ask(f"list {self.location}", look)
        if not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) for row in rows):
            raise StoreError(f"list {self.location}: Swift's answer is no listing; check its address")
        return _http_date(head, "date"), rows


def _number(headers: Mapping[str, str], key: str) -> int | None:
    value = headers.get(key, "")
    return int(value) if value.isdecimal() and len(value) < 20 else None


def _http_date(headers: Mapping[str, str], key: str) -> datetime | None:
    try:
        return parsedate_to_datetime(headers.get(key, ""))
    except ValueError:
        return None


def _iso_date(value: object) -> datetime | None:
    """A listing's last_modified: UTC without saying so."""
    try:
        return datetime.fromisoformat(str(value)).replace(tzinfo=UTC)
    except ValueError:
        return None


def _age(now: datetime | None, then: datetime | None) -> float:
    """Seconds between the store's own two times; 0.0, which is never garbage, where one is lacking."""
    return max(0.0, (now - then).total_seconds()) if now and then else 0.0
