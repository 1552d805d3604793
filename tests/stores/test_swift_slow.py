"""A Swift that answers, or takes what it is sent, so slowly that nobody should wait for it.

Without a limit each of these tests would take minutes; none looks at a clock of its own.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest

from island_fast.errors import StoreError
from island_fast.stores import swift_connection
from island_fast.stores.retry import RetryPolicy
from island_fast.stores.swift import SwiftStore
from island_fast.stores.swift_pace import Pace
from tests.conftest import OpenSwift
from tests.support.swift_faults import Fault
from tests.support.swift_server import SwiftServer

HURRIED = RetryPolicy(total=60.0, first=0.01, longest=0.1, allowance=1.0, rate=1 << 20)
WHOLE = bytes(range(256)) * 8192  # 2 MiB
BIG = os.urandom(1 << 20) * 24  # more than the buffers of a connection hold
DRIP = Fault("drip", 0.2, method="GET")  # 200 s


@pytest.fixture
def store(swift_store: OpenSwift) -> SwiftStore:
    return swift_store(patience=HURRIED)


@pytest.mark.parametrize(
    "read",
    [
        lambda store: bytes(store.get("object")) == WHOLE,
        lambda store: bytes(store.get("object", newest=True)) == WHOLE,
        lambda store: store.get_ranges("object", [(5, 2000)]) == [WHOLE[5:2005]],
        lambda store: store.get_ranges("object", [(5, 2000), (9000, 9)]) == [WHOLE[5:2005], WHOLE[9000:9009]],
        lambda store: [info.size for info in store.list("")] == [len(WHOLE)],
    ],
    ids=["whole", "newest", "range", "ranges", "listing"],
)
def test_a_body_that_drips_is_left_and_fetched_again(
    swift: SwiftServer, store: SwiftStore, read: Callable[[SwiftStore], bool]
):
    store.put("object", [WHOLE])
    assert read(store)
    silence_logger = swift.count("GET")
    swift.calm()
    swift.inject(DRIP)
    assert read(store)
    assert swift.count("GET") > silence_logger


@pytest.mark.parametrize("bounded", [True, False])
def test_a_put_that_must_end_in_time_is_no_slower_for_its_size(
    swift: SwiftServer, swift_store: OpenSwift, monkeypatch: pytest.MonkeyPatch, bounded: bool
):
    """The server reads so slowly that the whole takes seconds, which the rate allows."""
    monkeypatch.setattr(swift_connection, "_BODY", 0.3)
    store = swift_store(patience=RetryPolicy(total=0.5, first=0.01, longest=0.1, allowance=60.0))
    swift.inject(Fault("sip", 0.01, method="PUT", times=1000))
    with store.bound_puts() if bounded else nullcontext():
        if bounded:
            with pytest.raises(StoreError, match=r"sent too slowly.*outcome is unknown"):
                store.put("object", [BIG])
        else:
            store.put("object", [BIG])
    swift.calm()
    assert (store.head("object") is None) is bounded
    assert store._pool.policy.allowance == 60.0


def test_a_store_that_only_drips_is_told_as_such(swift: SwiftServer, swift_store: OpenSwift):
    store = swift_store(patience=RetryPolicy(total=2.0, first=0.01, longest=0.1, allowance=1.0, rate=1 << 20))
    store.put("object", [WHOLE])
    swift.inject(Fault("drip", 0.2, method="GET", times=99))
    with pytest.raises(StoreError, match="last: a body that came too slowly"):
        store.get("object")


def test_a_slow_body_that_keeps_up_is_left_in_peace(swift: SwiftServer, swift_store: OpenSwift):
    """It takes longer than the allowance, and comes faster than the rate."""
    patience = RetryPolicy(total=60.0, first=0.01, longest=0.1, allowance=0.5, rate=20)
    store = swift_store(patience=patience)
    store.put("object", [WHOLE])
    swift.inject(Fault("drip", 0.002, method="GET"))
    assert store.get("object") == WHOLE
    assert swift.count("GET") == 1


def test_a_server_that_stops_reading_is_left(
    swift: SwiftServer, swift_store: OpenSwift, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(swift_connection, "TIMEOUT", 1.0)
    store = swift_store(patience=RetryPolicy(total=60.0, first=0.01, longest=0.1))
    swift.inject(Fault("delay", 200, method="PUT"))
    store.put("object", [BIG])
    assert swift.count("PUT") >= 2
    assert store.get("object") == BIG


def test_a_server_that_sips_is_left(swift: SwiftServer, swift_store: OpenSwift):
    store = swift_store(patience=replace(HURRIED, rate=16 << 20))
    swift.inject(Fault("sip", 0.5, method="PUT"))  # 384 pieces
    store.put("object", [BIG])
    assert swift.count("PUT") >= 2
    assert store.get("object") == BIG


@pytest.fixture
def dripping() -> Iterator[str]:
    """The address of a server that sends one byte of a header after the other, and has no end of them."""
    listening = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                try:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Never: ")
                    while not stop.wait(0.05):
                        connection.sendall(b"a")
                except OSError:
                    pass  # left by the other side

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1/AUTH_test"
    stop.set()
    with socket.create_connection(listening.getsockname()):
        thread.join()
    listening.close()


def test_headers_that_drip_are_no_better(dripping: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ST_AUTH", raising=False)
    monkeypatch.setenv("OS_STORAGE_URL", dripping)
    monkeypatch.setenv("OS_AUTH_TOKEN", "token")
    patience = RetryPolicy(total=1.0, first=0.01, longest=0.1, allowance=0.5, rate=1 << 20)
    with pytest.raises(StoreError, match="too slowly"):
        SwiftStore.open("box", patience)


def test_a_pace_is_an_allowance_and_a_rate():
    now = [100.0]
    pace = Pace(RetryPolicy(allowance=60.0, rate=1024.0), lambda: now[0])
    assert pace.seconds_left() == 60
    now[0] += 50
    assert pace.seconds_left() == 10
    pace.bytes += 4096
    assert pace.seconds_left() == 14
    now[0] += 15
    assert pace.seconds_left() == -1
