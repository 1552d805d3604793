"""A store in one container of OpenStack Swift, below a prefix. Only Swift's core requests are used."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
    StoreFullError,
    StoreRefusedError,
    UsageError,
)
from island_fast.memory import require_memory
from island_fast.stores import swift_ranges
from island_fast.stores.base import (
    MAX_OBJECT,
    PROBE,
    ObjectInfo,
    Range,
    Store,
    Views,
    check_name,
    check_prefix,
    check_ranges,
    check_size,
    flat_views,
    is_name,
)
from island_fast.stores.retry import RetryableError, RetryPolicy
from island_fast.stores.swift_auth import SwiftAuth, auth_from_environment
from island_fast.stores.swift_connection import (
    BROKEN,
    Connection,
    HttpError,
    SwiftConnectionPool,
    is_refusal,
    none_if_status,
)
from island_fast.stores.swift_pace import PacedBody

__all__ = ["SwiftStore"]

_NEWEST = {"X-Newest": "true"}  # asks every replica
# Requests before a missing object (GET: with X-Newest from the second on) or an invalid answer is believed.
_LOOKS = 3
_SINGLE_RANGES = 4  # requests at a time of one caller, where a request can ask for one range only
_STREAMED = 1 << 20  # any size will do: it keeps swiftclient from reading the body itself
_CONTAINER = re.compile(r"(?!\.{1,2}\Z)[^/?#\x00-\x1f\x7f]{1,256}")


@dataclass(frozen=True, slots=True)
class _Answer:
    """The answer to a GET. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: memoryview


class SwiftStore(Store):
    """The objects below `prefix` in one container.

    Listings lag, so the grace is a day; nothing else here relies on them. `page_size` limits the pages of
    listings; None leaves that to the server (usually 10 000 rows).
    """

    grace = 86400.0
    range_gap = 64 << 10
    uploads = 2
    page_size: int | None = None
    known_to_refuse = None

    def __init__(self, container: str, prefix: str, auth: SwiftAuth, policy: RetryPolicy) -> None:
        self._container = container
        self._prefix = check_prefix(f"{prefix}/" if prefix else "")
        self._pool = SwiftConnectionPool(auth, policy)
        self._ranges_at_once = swift_ranges.RANGES_PER_REQUEST
        self._container_head: Mapping[str, str] = {}
        self.location = f"swift://{container}/{prefix}".rstrip("/")

    @classmethod
    def open(cls, path: str, policy: RetryPolicy | None = None, *, variables: str = "") -> Self:
        """Open the store at CONTAINER[/PREFIX].

        Signs in with the credentials of the environment (see `auth_from_environment`) and asks for the
        container: StoreError if that fails, NotFoundError if there is none.
        """
        container, _, prefix = path.partition("/")
        if not _CONTAINER.fullmatch(container):
            raise UsageError(f"swift://{path} does not name a container; write swift://CONTAINER/PREFIX")
        if prefix.strip("/") and not is_name(prefix.strip("/")):
            raise UsageError(
                f"swift://{path} has a prefix that cannot be used; use letters, digits, '.', '_' and '-', in "
                "parts joined by '/'"
            )
        auth = auth_from_environment(prefix=variables)
        store = cls(container, prefix.strip("/"), auth, policy or RetryPolicy())
        try:
            if not store._pool.call_first(f"open {store.location}", store._has_container):
                raise store._no_container_error()
        except BaseException:
            store.close()
            raise
        return store

    def hurry(self) -> contextlib.AbstractContextManager[None]:
        """See Store.hurry."""
        return self._pool.hurry()

    def bound_puts(self) -> contextlib.AbstractContextManager[None]:
        """See Store.bound_puts."""
        return self._pool.bound_bodies()

    @property
    def place(self) -> str:
        """See Store.place. Other accounts, and other clouds, can have a container of the same name."""
        return f"{self._pool.account_url()}/{self._container}/{self._prefix}".rstrip("/")

    @property
    def ranges_at_once(self) -> int:
        """See Store.ranges_at_once. 49; 1 once a server has answered several with the first of them only."""
        return self._ranges_at_once

    @property
    def keeps_deleted(self) -> bool:
        """See Store.keeps_deleted. Of versions that were switched on over S3, Ceph's gateway says nothing."""
        head = self._container_head
        return head.get("x-versions-enabled", "").lower() == "true" or "x-history-location" in head

    @property
    def seems_to_overwrite(self) -> bool:
        """See Store.seems_to_overwrite. A second count of the container's bytes shows Ceph's gateway."""
        return "x-container-bytes-used-actual" in self._container_head

    def count_bytes(self) -> int | None:
        """See Store.count_bytes. Ceph's gateway counts at once."""
        if not self.seems_to_overwrite:
            return None
        try:
            head = self._pool.call(
                f"count {self.location}", lambda connection: connection.head_container(self._container)
            )
        except StoreError:  # it is only asked to be reported
            return None
        return _parse_number(head, "x-container-bytes-used")

    def close(self) -> None:
        """See Store.close."""
        self._pool.close()

    def _full_name(self, name: str) -> str:
        return self._prefix + check_name(name)

    def _has_container(self, connection: Connection) -> bool:
        """Return whether the container exists; it does not only if every replica says so."""
        for headers in ({}, _NEWEST):
            try:
                self._container_head = connection.head_container(self._container, headers=headers)
                return True
            except HttpError as error:
                if error.http_status == 403:
                    raise StoreRefusedError(
                        f"container {self._container}: Swift refuses (403 {error.http_reason}); it is "
                        "another account's, or this one has no role for it: choose another name, or ask for "
                        "a role that can write to the container"
                    ) from error
                if error.http_status != 404:
                    raise
        return False

    def _no_container_error(self) -> NotFoundError:
        return NotFoundError(
            f"Swift has no container {self._container} in this account; check the name, or create it "
            f"with: swift post {self._container}"
        )

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """See Store.put. Only 201 is success: it alone says that most replicas have the object.

        If-None-Match keeps other bytes from being overwritten. It is not a lock: if several writers put the
        same name at the same moment, each can get a 201. A 503 can leave our bytes on one replica, where
        If-None-Match finds them in later attempts; then they are sent without it. Ceph's gateway ignores
        If-None-Match: unless the server is known to heed it, what the name holds is asked before each PUT.

        An attempt ends, whatever the server does. n bytes must be sent within the policy's allowance + n /
        rate. A server that stops reading is given up TIMEOUT seconds after the 256 KiB that are then under
        way (with TLS, after each 16 KiB of them), and one that does not answer after TIMEOUT seconds.
        """
        self._send(name, flat_views(parts), looks=not self.known_to_refuse)

    def _send(self, name: str, content: Views, *, looks: bool) -> None:
        """Do what `put` does; with `looks`, ask before each PUT what the name holds."""
        unsure = False

        def send(connection: Connection) -> None:
            nonlocal unsure
            # A broken connection can mean: stored, or refused so early that our sending broke it.
            stored = (unsure or looks) and self._holds(connection, name, content)
            if stored and not unsure:
                self._put_again(connection, name, content)
                return
            unsure = True
            try:
                self._put_once(connection, name, content, only_if_absent=not stored)
            except HttpError as error:
                unsure = False  # If-None-Match of the next attempt shows it
                if error.http_status == 413:
                    size = sum(view.nbytes for view in content)
                    raise StoreFullError(self._explain_full(connection, name, size, error)) from error
                if error.http_status != 412:
                    raise
                if not self._holds(connection, name, content):
                    raise RetryableError("412 for an object that does not exist") from error
                self._put_again(connection, name, content)

        self._pool.call(f"put {name}", send, writes=True)

    def _put_once(self, connection: Connection, name: str, content: Views, *, only_if_absent: bool) -> None:
        """Send one PUT; with `only_if_absent` Swift stores it only if the name has no object yet.

        Only 201 means stored. 202 means that a newer time stamp won over ours.
        """
        size = sum(view.nbytes for view in content)
        answer: dict[str, Any] = {}
        try:
            connection.put_object(
                self._container,
                self._full_name(name),
                PacedBody(content, self._pool.policy) if size else b"",
                content_length=size,
                content_type="application/octet-stream",
                headers={"If-None-Match": "*"} if only_if_absent else {},
                response_dict=answer,
            )
        except HttpError as error:
            if error.http_status != 404:
                raise
            if not self._has_container(connection):
                raise self._no_container_error() from None
            raise RetryableError("404 Not Found") from error
        if answer["status"] != 201:
            raise RetryableError(f"{answer['status']} instead of 201")

    def _put_again(self, connection: Connection, name: str, content: Views) -> None:
        """Send a PUT for an object that is there, and may be on one replica only; see `_put_once`.

        If Swift refuses it, the object is there all the same: the outcome is unknown.
        """
        try:
            self._put_once(connection, name, content, only_if_absent=False)
        except HttpError as error:
            if is_refusal(error.http_status):
                raise StoreError(
                    f"put {name}: Swift has the object and refuses to store it on all its disks "
                    f"({error.http_status} {error.http_reason}), so the outcome is unknown; run it again "
                    "when it does"
                ) from error
            raise

    def _try_to_overwrite(self) -> bool:
        """PUT other bytes on a new name that is taken. Two refusals are believed, and one success is."""
        name = f"{PROBE}{os.urandom(16).hex()}"

        def overwrite(connection: Connection) -> bool:
            try:
                self._put_once(connection, name, [memoryview(b"other")], only_if_absent=True)
            except HttpError as error:
                if error.http_status == 412:
                    return False
                raise
            return True

        self._send(name, [memoryview(b"first")], looks=False)
        try:
            return not any(self._pool.call(f"put {name}", overwrite, writes=True) for _ in range(2))
        finally:
            with contextlib.suppress(StoreError):  # no reader minds it
                self.delete(name)

    def _explain_full(self, connection: Connection, name: str, size: int, error: HttpError) -> str:
        """Return why an object of `size` bytes has no room, and what it needs, as far as Swift says."""
        asked = {
            f"container {self._container}": lambda: connection.head_container(self._container),
            "the account": connection.head_account,
        }
        quotas = []
        for what, ask in asked.items():
            with contextlib.suppress(HttpError, *BROKEN):  # not everybody may ask
                head = ask()
                kind = "account" if what == "the account" else "container"
                quota = _parse_number(head, f"x-{kind}-meta-quota-bytes")
                used = _parse_number(head, f"x-{kind}-bytes-used")
                if quota is not None and used is not None and used + size > quota:
                    more = used + size - quota
                    quotas.append(
                        f"the quota of {what} is {quota} bytes and {used} are used: raise it by {more} bytes"
                    )
        need = " and ".join(quotas) or f"raise the quota by {size} bytes"
        return (
            f"put {name}: Swift has no room for these {size} bytes ({error.http_status} "
            f"{error.http_reason}); {need}, or free some: a delete and a sweep need room for one record "
            "each, usually a few KB"
        )

    def _holds(self, connection: Connection, name: str, content: Views) -> bool:
        """Return whether the object exists with exactly these bytes; ConflictError if it has others.

        Proxies and gateways rewrite ETags (a weak one, a suffix of their own) and lengths, so an answer that
        does not fit says nothing yet: then the bytes are read.
        """
        full = self._full_name(name)
        head = none_if_status(404, lambda: connection.head_object(self._container, full, headers=_NEWEST))
        if head is None:
            return False
        md5 = hashlib.md5(usedforsecurity=False)  # what Swift calls the ETag
        for view in content:
            md5.update(view)
        size = sum(view.nbytes for view in content)
        etag = head.get("etag", "").strip('"')
        if etag == md5.hexdigest() and _parse_number(head, "content-length") == size:
            return True
        try:
            answer = none_if_status(404, lambda: self._get_once(connection, name, full, dict(_NEWEST), size))
        except DamagedObjectError:  # it is longer than what was sent
            same = False
        else:
            if answer is None:
                return False
            same = _is_concatenation(answer.body, content)
        if not same:
            raise ConflictError(
                f"object {name} in {self.location} already holds other bytes, and none is ever "
                "overwritten; look for another writer of this repository"
            )
        return True

    def delete(self, name: str) -> None:
        """See Store.delete. A replica that was offline can bring the object back later."""
        full = self._full_name(name)
        self._pool.call(
            f"delete {name}",
            lambda connection: none_if_status(404, lambda: connection.delete_object(self._container, full)),
            writes=True,
        )

    # -- reading

    def get(self, name: str, *, newest: bool = False, limit: int = MAX_OBJECT) -> memoryview:
        """See Store.get. The length is compared with what Swift announced."""
        return self._fetch(name, None, limit, newest=newest).body

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> Views:
        """See Store.get_ranges. One request asks for up to 49 ranges that do not touch each other.

        A server that answers with the first of them only, as Ceph's gateway does, is asked for one range at a
        time from then on, over several connections.
        """
        check_ranges(ranges)
        left = swift_ranges.join_ranges(ranges)
        needed = sum(left[-1]) if left else 0
        found: list[swift_ranges.Piece] = []
        while left:
            at_once = self._ranges_at_once
            if at_once == 1 and len(left) > 1:
                got = self._fetch_singly(name, left, needed)
            else:
                got = self._fetch_ranges(name, left[:at_once], needed)
            whole = [piece for piece in got if piece.start == 0 and piece.stop >= needed]
            found = whole[:1] or found + got
            left = [one for one in left if sum(one) > found[-1].stop]
        return swift_ranges.select_ranges(found, ranges)

    def _fetch_singly(self, name: str, ranges: Sequence[Range], needed: int) -> list[swift_ranges.Piece]:
        """Get `ranges`, each by a request of its own, some at a time."""
        pool = ThreadPoolExecutor(min(len(ranges), _SINGLE_RANGES), thread_name_prefix="island-ranges")
        try:
            got = pool.map(lambda one: self._fetch_ranges(name, [one], needed), ranges)
            return [piece for pieces in got for piece in pieces]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _fetch_ranges(self, name: str, few: Sequence[Range], needed: int) -> list[swift_ranges.Piece]:
        """Get `few` ranges, or only the first of them if the server sends no more, or the whole object.

        The object has at least `needed` bytes. An invalid answer can have been damaged on its way, so the
        request is repeated twice.
        """
        for tries_left in reversed(range(_LOOKS)):
            answer = self._fetch(name, swift_ranges.range_header(few), swift_ranges.max_body_size(few))
            try:
                got = self._parse_answer(name, answer, needed)
                if answer.status == 206 and swift_ranges.is_first_alone(answer.headers, got, few):
                    self._ranges_at_once = 1
                    return got
                views = swift_ranges.select_ranges(got, few)
            except ValueError as error:
                if not tries_left:
                    raise StoreError(
                        f"get {name}: the answer to a range request is invalid ({error}); check the proxies "
                        "between Swift and this host"
                    ) from error
            else:
                break
        if answer.status == 200:
            return got
        return [swift_ranges.Piece(one[0], view, None) for one, view in zip(few, views, strict=True)]

    def _parse_answer(self, name: str, answer: _Answer, needed: int) -> list[swift_ranges.Piece]:
        """Return the pieces of a range request's answer; ValueError if it is invalid.

        DamagedObjectError if the answer shows that the object has less than `needed` bytes.
        """
        if answer.status == 416:
            raise DamagedObjectError(
                f"object {name} is shorter than the {needed} bytes that it should have; it is damaged"
            )
        if answer.status == 200:
            found = [swift_ranges.Piece(0, answer.body, answer.body.nbytes)]
        else:
            found = swift_ranges.parse_pieces(answer.headers, answer.body)
        if found and found[0].total is not None:
            check_size(name, found[0].total, needed)
        return found

    def _fetch(self, name: str, wanted: str | None, limit: int, newest: bool = False) -> _Answer:
        """GET an object until the answer is 200, 206 or 416, with at most `limit` bytes.

        ObjectMissingError once its absence is confirmed. `wanted` is the Range header; if Swift sends the
        whole object all the same, `limit` does not hold for it.
        """
        full = self._full_name(name)
        misses = 0

        def request(connection: Connection) -> _Answer:
            nonlocal misses
            headers = dict(_NEWEST) if newest or misses else {}
            if wanted:
                headers["Range"] = wanted
            try:
                return self._get_once(connection, name, full, headers, limit)
            except HttpError as error:
                if error.http_status == 416 and wanted:
                    return _Answer(416, {}, memoryview(b""))
                if error.http_status != 404:
                    raise
                misses += 1
                if misses < _LOOKS:
                    raise RetryableError("404 Not Found") from error
            raise ObjectMissingError(
                f"object {name} is not in {self.location}; it was deleted or never written"
            )

        return self._pool.call(f"get {name}", request)

    def _get_once(
        self, connection: Connection, name: str, full: str, headers: dict[str, str], limit: int
    ) -> _Answer:
        """Send one GET and read the whole body; a body that is larger than allowed is not read."""
        answer: dict[str, Any] = {}
        _, body = connection.get_object(
            self._container, full, resp_chunk_size=_STREAMED, response_dict=answer, headers=headers
        )
        status, got = answer["status"], dict(answer["headers"].items())
        size = _parse_number(got, "content-length")
        if size is None or status not in (200, 206 if "Range" in headers else 200):
            raise RetryableError(f"{status} with {size} bytes")
        check_size(name, size, limit=MAX_OBJECT if "Range" in headers else limit)
        require_memory(f"object {name}", size)
        if status == 206 and size > limit:
            raise StoreError(
                f"get {name}: Swift sends {size} bytes although at most {limit} were asked for; check the "
                "proxies between it and this host"
            )
        data = body.read(size + 1)  # not more, whatever the server sends
        if len(data) != size:
            raise RetryableError(f"{len(data)} of {size} bytes")
        return _Answer(status, got, memoryview(data))

    def head(self, name: str) -> ObjectInfo | None:
        """See Store.head. A 404 is believed after as many looks, with pauses, as one to a GET."""
        return self._head(name, _LOOKS)

    def peek(self, name: str) -> ObjectInfo | None:
        """See Store.peek."""
        return self._head(name, 1)

    def _head(self, name: str, looks: int) -> ObjectInfo | None:
        """Ask for an object until it is there, or was not there at so many `looks`."""
        full = self._full_name(name)
        misses = 0

        def request(connection: Connection) -> ObjectInfo | None:
            nonlocal misses
            head = none_if_status(404, lambda: connection.head_object(self._container, full, headers=_NEWEST))
            if head is None:
                misses += 1
                if misses < looks:
                    raise RetryableError("404 Not Found")
                return None
            size = _parse_number(head, "content-length")
            if size is None:
                raise RetryableError("a HEAD without a length")
            return ObjectInfo(
                name, size, _age(_parse_http_date(head, "date"), _parse_http_date(head, "last-modified"))
            )

        return self._pool.call(f"head {name}", request)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See Store.list. Objects whose names no object of a repository can have are skipped."""
        return self._list_objects(check_prefix(prefix))

    def _list_objects(self, prefix: str) -> Iterator[ObjectInfo]:
        for now, row in self._list_rows(prefix, None):
            name, size = row.get("name"), row.get("bytes")
            if isinstance(name, str) and isinstance(size, int):
                name = name[len(self._prefix) :]
                if is_name(name):
                    yield ObjectInfo(name, size, _age(now, _parse_iso_date(row.get("last_modified"))))

    def folders(self, prefix: str) -> Iterator[str]:
        """See Store.folders."""
        return self._list_folders(check_prefix(prefix))

    def _list_folders(self, prefix: str) -> Iterator[str]:
        for _, row in self._list_rows(prefix, "/"):
            path = row.get("subdir")
            if isinstance(path, str):
                folder = path[len(self._prefix + prefix) : -1]
                if is_name(folder):
                    yield folder

    def _list_rows(
        self, prefix: str, delimiter: str | None
    ) -> Iterator[tuple[datetime | None, Mapping[str, Any]]]:
        """Iterate over all rows of a listing, each with Swift's time when its page was made.

        StoreError if a row is not below `prefix`: it is the answer to another request, and so is the rest.
        """
        marker = ""
        while True:
            now, rows = self._list_page(self._prefix + prefix, delimiter, marker)
            if not rows:
                return
            for row in rows:
                path = row.get("name", row.get("subdir"))
                if isinstance(path, str) and not path.startswith(self._prefix + prefix):
                    raise StoreError(
                        f"list {self.location}: Swift lists {path[:200]!r} for the prefix "
                        f"{self._prefix + prefix!r}, which is the answer to another request; check the "
                        "proxies and caches between it and this host"
                    )
                yield now, row
            last = rows[-1].get("name", rows[-1].get("subdir"))
            if not isinstance(last, str) or last.encode() <= marker.encode():
                raise StoreError(
                    f"list {self.location}: Swift sends the same page again; check the proxies between it "
                    "and this host"
                )
            marker = last

    def _list_page(
        self, prefix: str, delimiter: str | None, marker: str
    ) -> tuple[datetime | None, Sequence[Mapping[str, Any]]]:
        """Get the next rows after `marker`, at most `page_size`, and Swift's time; no rows at the end."""

        def request(connection: Connection) -> tuple[Mapping[str, str], Any]:
            try:
                return connection.get_container(  # type: ignore[no-any-return]
                    self._container,
                    marker=marker,
                    limit=self.page_size,
                    prefix=prefix,
                    delimiter=delimiter,
                )
            except (json.JSONDecodeError, UnicodeError) as error:
                raise RetryableError("an unreadable listing") from error
            except HttpError as error:
                if error.http_status != 404:
                    raise
                if self._has_container(connection):
                    raise RetryableError("404 Not Found") from error
            raise self._no_container_error()

        head, rows = self._pool.call(f"list {self.location}", request)
        if not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) for row in rows):
            raise StoreError(f"list {self.location}: Swift's answer is not a listing; check its address")
        return _parse_http_date(head, "date"), rows


def _is_concatenation(data: memoryview, parts: Views) -> bool:
    """Return whether `data` is what `parts` are one after another. Nothing is copied."""
    at = 0
    for part in parts:
        if data[at : at + part.nbytes] != part:
            return False
        at += part.nbytes
    return at == data.nbytes


def _parse_number(headers: Mapping[str, str], key: str) -> int | None:
    value = headers.get(key, "")
    return int(value) if value.isdecimal() and len(value) < 20 else None


def _parse_http_date(headers: Mapping[str, str], key: str) -> datetime | None:
    try:
        return parsedate_to_datetime(headers.get(key, ""))
    except ValueError:
        return None


def _parse_iso_date(value: object) -> datetime | None:
    """Parse a listing's last_modified, which is in UTC without a time zone."""
    try:
        return datetime.fromisoformat(str(value)).replace(tzinfo=UTC)
    except ValueError:
        return None


def _age(now: datetime | None, then: datetime | None) -> float:
    """Return the seconds between two times of Swift's; 0.0, which is never garbage, if one is unknown."""
    return max(0.0, (now - then).total_seconds()) if now and then else 0.0
