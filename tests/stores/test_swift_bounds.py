"""A Swift that lies about sizes, or never ends an answer: what is read of it is bounded."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from island_fast.errors import DamagedObjectError, ObjectMissingError, StoreError
from island_fast.stores.retry import RetryPolicy
from island_fast.stores.swift import SwiftStore

MIB = 1 << 20
HURRIED = RetryPolicy(total=1.0, first=0.01, longest=0.1, allowance=30.0)


class Liar(BaseHTTPRequestHandler):
    """Answers a GET as `answer` says, counts what it could send, and gives every name to a HEAD."""

    protocol_version = "HTTP/1.1"
    answer: Callable[[Liar], None]
    sent = 0

    def do_HEAD(self) -> None:
        self.begin(204, "0")

    def do_GET(self) -> None:
        type(self).answer(self)

    def begin(self, status: int, length: str | None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if length is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", length)
        self.end_headers()

    def send_pieces(self, most: int, *, framed: bool, piece: bytes = b" " * MIB) -> None:
        try:
            for _ in range(most // len(piece)):
                data = b"%x\r\n%b\r\n" % (len(piece), piece) if framed else piece
                self.wfile.write(data)
                type(self).sent += len(piece)
        except OSError:
            pass
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Liar]]:
    handler = type("OneLiar", (Liar,), {"sent": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OS_STORAGE_URL", f"http://127.0.0.1:{server.server_address[1]}/v1/AUTH_x")
    monkeypatch.setenv("OS_AUTH_TOKEN", "t")
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def store(liar: type[Liar]) -> Iterator[SwiftStore]:
    with SwiftStore.open("c/p", HURRIED) as store:
        yield store


def endless(status: int, start: bytes) -> Callable[[Liar], None]:
    def answer(self: Liar) -> None:
        self.begin(status, None)
        self.wfile.write(b"%x\r\n%b\r\n" % (len(start), start))
        self.send_pieces(200 * MIB, framed=True)

    return answer


def announced(status: int, size: int) -> Callable[[Liar], None]:
    def answer(self: Liar) -> None:
        self.begin(status, str(size), ETag="x")
        self.send_pieces(size, framed=False)

    return answer


@pytest.mark.parametrize("answer", [endless(200, b"["), announced(200, 200 * MIB)], ids=["endless", "huge"])
def test_a_listing_is_read_up_to_a_limit(
    liar: type[Liar], store: SwiftStore, answer: Callable[[Liar], None]
) -> None:
    liar.answer = answer
    for listing in (store.list(""), store.folders("")):
        liar.sent = 0
        with pytest.raises(StoreError, match="answer has more than 16 MiB; check its address"):
            list(listing)
        assert liar.sent < 40 * MIB  # the limit, and what is on its way


@pytest.mark.parametrize("answer", [endless(500, b"x"), announced(500, 200 * MIB)], ids=["endless", "huge"])
def test_an_error_is_read_up_to_a_limit(
    liar: type[Liar], store: SwiftStore, answer: Callable[[Liar], None]
) -> None:
    attempts = 0

    def counted(self: Liar) -> None:
        nonlocal attempts
        attempts += 1
        answer(self)

    liar.answer = counted
    with pytest.raises(StoreError, match="last: 500 Internal Server Error"):
        store.get("object")
    assert liar.sent < attempts * 16 * MIB


def test_an_error_of_some_length_leaves_the_connection_usable(liar: type[Liar], store: SwiftStore) -> None:
    liar.answer = lambda self: (self.begin(404, "1000"), self.wfile.write(bytes(1000)))[0]
    with pytest.raises(ObjectMissingError):
        store.get("object")
    body = b"content"
    liar.answer = lambda self: (self.begin(200, "7", ETag="x"), self.wfile.write(body))[0]
    assert store.get("object") == body


def test_an_object_larger_than_its_limit_is_not_read(liar: type[Liar], store: SwiftStore) -> None:
    liar.answer = announced(200, 200 * MIB)
    with pytest.raises(DamagedObjectError, match="has 209715200 bytes, more than the 1000 that it can have"):
        store.get("object", limit=1000)
    assert liar.sent < 16 * MIB


def test_an_object_that_never_ends_is_read_up_to_its_length(liar: type[Liar], store: SwiftStore) -> None:
    """The server announces a length and sends pieces without end: pieces win in HTTP."""

    def answer(self: Liar) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.begin_pieces()

    def begin_pieces(self: Liar) -> None:
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.send_pieces(200 * MIB, framed=True)

    liar.begin_pieces = begin_pieces  # type: ignore[attr-defined]
    liar.answer = answer
    with pytest.raises(StoreError, match="last: 101 of 100 bytes"):
        store.get("object")


def test_a_full_page_of_long_names_is_read(liar: type[Liar], store: SwiftStore) -> None:
    """10 000 rows, each with a name as long as Swift takes them."""
    rows = [
        {"name": f"p/{i:05}".ljust(1024, "x"), "bytes": 1, "hash": hashlib.md5(b"").hexdigest(),
         "content_type": "application/octet-stream", "last_modified": "2026-01-01T00:00:00.000000"}
        for i in range(10_000)
    ]  # fmt: skip
    page = json.dumps(rows).encode()

    def answer(self: Liar) -> None:
        body = b"[]" if "marker=" in self.path else page
        self.begin(200, str(len(body)), Content_Type="application/json")
        self.wfile.write(body)

    liar.answer = answer
    assert list(store.list("")) == []  # no object of a repository has so long a name
