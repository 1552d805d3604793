"""Swift, and a gateway that ignores If-None-Match as Ceph's does: what is asked, and what a PUT costs."""

from __future__ import annotations

import pytest
from swiftclient.client import Connection

from island_fast.errors import ConflictError, StoreError, StoreRefusedError
from island_fast.stores.rate_limit import RateLimitedStore, RateLimiter, RateLimiters
from island_fast.stores.retry import RetryPolicy
from island_fast.stores.swift import SwiftStore
from tests.conftest import OpenSwift
from tests.support.swift_server import Fault, SwiftServer

BRIEF = RetryPolicy(total=1.0, first=0.05, longest=0.1)


@pytest.fixture
def store(swift_store: OpenSwift) -> SwiftStore:
    opened = swift_store("", BRIEF)
    opened.known_to_refuse = None
    return opened


@pytest.fixture
def ignoring(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server does not see If-None-Match."""
    put = Connection.put_object

    def put_object(self: Connection, *args: object, headers: dict[str, str], **others: object) -> object:
        return put(self, *args, headers={}, **others)

    monkeypatch.setattr(Connection, "put_object", put_object)


def requests(swift: SwiftServer) -> list[str]:
    return [one["method"] for one in swift.list_requests()]


@pytest.mark.swift_only("it is about a server that refuses")
def test_swift_refuses_and_is_asked_once(swift: SwiftServer, store: SwiftStore) -> None:
    assert store.refuses_overwrites()
    assert requests(swift) == ["PUT", "PUT", "PUT", "DELETE"]
    assert list(store.list("")) == []
    store.put("name", [b"content"])
    assert store.refuses_overwrites()
    assert requests(swift)[4:] == ["GET", "PUT"], "what is known to be refused costs nothing more"


@pytest.mark.usefixtures("ignoring")
def test_what_is_not_refused_is_found_out_by_one_put(swift: SwiftServer, store: SwiftStore) -> None:
    metered = RateLimitedStore(store, RateLimiters(RateLimiter(None), RateLimiter(None)))
    answers: list[bool] = []
    metered.on_answer = answers.append
    assert not metered.refuses_overwrites()
    assert not metered.refuses_overwrites()
    assert answers == [False]
    assert store.known_to_refuse is False
    assert requests(swift) == ["PUT", "PUT", "DELETE"]


@pytest.mark.usefixtures("ignoring")
@pytest.mark.parametrize("known", [False, None])
def test_each_put_begins_with_a_look(swift: SwiftServer, store: SwiftStore, known: bool | None) -> None:
    store.known_to_refuse = known
    store.put("name", [b"content"])
    assert requests(swift) == ["HEAD", "PUT"]
    with pytest.raises(ConflictError, match="other bytes"):
        store.put("name", [b"contenT"])
    assert store.get("name") == b"content"
    store.put("name", [b"con", b"tent"])


@pytest.mark.usefixtures("ignoring")
@pytest.mark.parametrize("status", [403, 409, 413])
def test_what_is_there_was_not_refused(swift: SwiftServer, store: SwiftStore, status: int) -> None:
    """Our bytes are seen before the PUT, which is refused then: the outcome of the call is unknown."""
    store.put("name", [b"mine"])
    swift.inject(Fault("answer", status, method="PUT", path="name", times=1000))
    with pytest.raises(StoreError, match="unknown") as raised:
        store.put("name", [b"mine"])
    assert not isinstance(raised.value, StoreRefusedError)


@pytest.mark.swift_only("it is about a server that refuses")
def test_an_outage_is_no_answer(swift: SwiftServer, store: SwiftStore) -> None:
    swift.inject(Fault("answer", 503, method="PUT", times=100))
    with pytest.raises(StoreError):
        store.refuses_overwrites()
    assert store.known_to_refuse is None
    swift.calm()
    assert store.refuses_overwrites()


@pytest.mark.swift_only("it is about a server that refuses")
@pytest.mark.parametrize("kind", ["lose", "lie"])
def test_answers_that_are_lost_do_not_mislead(swift: SwiftServer, store: SwiftStore, kind: str) -> None:
    swift.inject(Fault(kind, 503, method="PUT", times=1))
    assert store.refuses_overwrites()


@pytest.mark.usefixtures("ignoring")
def test_one_refusal_that_is_not_true_is_not_believed(swift: SwiftServer, store: SwiftStore) -> None:
    swift.inject(Fault("answer", 412, method="PUT", path="/probe-", skip=1))
    assert not store.refuses_overwrites()
