"""The Swift store against a real Swift whose answers are lost, late, cut, false or refused."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from swiftclient import client

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
from island_fast.stores.open import open_store
from island_fast.stores.retry import RetryPolicy
from island_fast.stores.swift import SwiftStore
from tests.conftest import OpenSwift
from tests.support.swift_faults import Fault
from tests.support.swift_server import SwiftServer

CONTENT = [bytes([i]) * 65536 for i in range(40)]
WHOLE = b"".join(CONTENT)
BRIEF = RetryPolicy(total=0.3, first=0.02, longest=0.1)
one_request = pytest.mark.swift_only("it counts requests for several ranges, and Ceph answers with the first")


@pytest.fixture
def store(swift_store: OpenSwift) -> SwiftStore:
    return swift_store()


@pytest.fixture
def refusing(store: SwiftStore) -> SwiftStore:
    """One that is taken for a store that refuses, whatever it is: then a PUT is one request."""
    store.known_to_refuse = True
    return store


# -- answers that leave the outcome open


@pytest.mark.parametrize("status", [408, 409, 425, 429, 498, 499, 500, 502, 503, 504, 507])
def test_every_verb_goes_on_after_a_refusal_that_may_pass(
    swift: SwiftServer, refusing: SwiftStore, status: int
):
    swift.inject(*(Fault("answer", status, method=m, path="/v1/") for m in ("PUT", "GET", "HEAD", "DELETE")))
    refusing.put("a/object", CONTENT)
    assert refusing.get("a/object") == WHOLE
    assert refusing.head("a/object") is not None
    assert [info.name for info in refusing.list("")] == ["a/object"]
    refusing.delete("a/object")
    assert swift.count("PUT", "a/object") == 2
    assert swift.count("DELETE", "a/object") == 2
    assert swift.count("HEAD", "a/object") == 2


@pytest.mark.parametrize("kind", ["drop", "lose"])
def test_every_verb_goes_on_after_a_broken_connection(swift: SwiftServer, store: SwiftStore, kind: str):
    swift.inject(*(Fault(kind, method=m, path="object") for m in ("PUT", "GET", "HEAD", "DELETE")))
    store.put("object", CONTENT)
    assert store.get("object") == WHOLE
    assert store.get_ranges("object", [(5, 5)]) == [WHOLE[5:10]]
    assert store.head("object") is not None
    store.delete("object")
    assert store.head("object") is None


def test_ranges_and_listings_go_on_too(swift: SwiftServer, store: SwiftStore):
    store.put("object", CONTENT)
    swift.inject(Fault("answer", 503, method="GET", times=2))
    assert store.get_ranges("object", [(1, 2), (9, 3)]) == [WHOLE[1:3], WHOLE[9:12]]
    swift.inject(Fault("drop", method="GET", path="repository$|/box-[0-9a-f]*$"))
    assert [info.size for info in store.list("")] == [len(WHOLE)]


@pytest.mark.swift_only("it is about a server that refuses")
@pytest.mark.parametrize(
    "fault, asked",
    [
        (Fault("lose", method="PUT"), [("PUT", "*"), ("HEAD", None), ("PUT", None)]),
        (Fault("lie", 503, method="PUT"), [("PUT", "*"), ("PUT", "*"), ("HEAD", None), ("PUT", None)]),
    ],
)
def test_only_201_is_success(
    swift: SwiftServer, store: SwiftStore, fault: Fault, asked: list[tuple[str, str | None]]
):
    """What is found after a failure may be on one disk only."""
    swift.inject(fault)
    store.put("object", CONTENT)
    seen = [
        (r["method"], r.get("IF_NONE_MATCH")) for r in swift.list_requests() if r["path"].endswith("object")
    ]
    assert seen == asked
    assert store.get("object") == WHOLE
    swift.calm()
    store.put("other", CONTENT)
    assert [(r["method"], r.get("IF_NONE_MATCH")) for r in swift.list_requests()] == [("PUT", "*")]
    with pytest.raises(ConflictError, match="other bytes"):
        store.put("object", [b"else"])
    assert store.get("object") == WHOLE


def test_only_a_call_that_writes_leaves_its_outcome_unknown(swift: SwiftServer, swift_store: OpenSwift):
    store = swift_store(patience=BRIEF)
    store.put("object", CONTENT)
    swift.inject(Fault("answer", 503, times=1000))
    failed = r"Swift at 127.0.0.1:\d+ has not answered for 0 s \(last: 503 Injected\)"
    reading: list[Callable[[], object]] = [
        lambda: store.get("object"),
        lambda: store.get_ranges("object", [(0, 1)]),
        lambda: store.head("object"),
        lambda: [*store.list("")],
        lambda: [*store.folders("")],
    ]
    for call in reading:
        with pytest.raises(StoreError, match=failed + "; run the command again when it does$"):
            call()
    writing: list[Callable[[], object]] = [
        lambda: store.put("object", CONTENT),
        lambda: store.delete("object"),
    ]
    for call in writing:
        with pytest.raises(StoreError, match=failed + ", so the outcome is unknown; run the command again"):
            call()


def test_an_opening_that_fails_has_changed_nothing(swift: SwiftServer, swift_store: OpenSwift):
    container = swift_store().location.removeprefix("swift://").partition("/")[0]
    swift.inject(Fault("answer", 503, method="HEAD", times=1000))
    with pytest.raises(StoreError) as caught:
        SwiftStore.open(container, BRIEF)
    assert re.fullmatch(
        r"cannot reach Swift at 127.0.0.1:\d+ \(503 Injected, tried for 0 s\); nothing was changed",
        str(caught.value),
    )


def test_202_is_not_stored(swift: SwiftServer, store: SwiftStore):
    swift.inject(Fault("answer", 202, method="PUT"))
    store.put("object", CONTENT)
    assert swift.count("PUT", "object") == 2
    assert store.get("object") == WHOLE


def test_behind_a_lost_answer_other_bytes_are_a_conflict(swift: SwiftServer, store: SwiftStore):
    store.put("object", [b"theirs"])
    for fault in (Fault("lie", 503, method="PUT"), Fault("drop", method="PUT"), Fault("lose", method="PUT")):
        swift.inject(fault)
        with pytest.raises(ConflictError, match="other bytes"):
            store.put("object", [b"mine"])
    assert store.get("object") == b"theirs"


def test_412_for_an_object_that_is_not_there_is_tried_again(swift: SwiftServer, store: SwiftStore):
    swift.inject(Fault("answer", 412, method="PUT"))
    store.put("object", [b"mine"])
    assert store.get("object") == b"mine"


@pytest.mark.swift_only("it is about a server that refuses")
@pytest.mark.parametrize("status", [403, 409, 413])
def test_an_object_that_is_there_was_not_refused(swift: SwiftServer, swift_store: OpenSwift, status: int):
    """Something on the way sends a PUT twice: our bytes are there, and the second copy finds no room."""
    store = swift_store(patience=BRIEF)
    store.put("object", [b"mine"])
    swift.inject(Fault("answer", status, method="PUT", path="object", skip=1, times=1000))
    with pytest.raises(StoreError, match="unknown") as raised:
        store.put("object", [b"mine"])
    assert not isinstance(raised.value, StoreRefusedError)


def test_it_gives_up_in_the_end_and_says_that_the_outcome_is_unknown(
    swift: SwiftServer, swift_store: OpenSwift
):
    store = swift_store(patience=BRIEF)
    swift.inject(Fault("lie", 503, method="PUT", times=1000))
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"put object: .*503 Injected.*unknown"):
        store.put("object", [b"mine"])
    assert time.monotonic() - began < 10 * BRIEF.total
    assert swift.count("PUT", "object") > 2
    swift.calm()
    store.put("object", [b"mine"])
    assert store.get("object") == b"mine"


def test_a_server_that_asks_for_time_gets_it(swift: SwiftServer, store: SwiftStore):
    """As much as the longest pause, which is ten times the first here."""
    store.put("object", [b"x"])
    swift.inject(Fault("answer", 429, method="GET", headers={"Retry-After": "1"}))
    began = time.monotonic()
    store.get("object")
    assert time.monotonic() - began >= 0.1


# -- 401


def test_an_expired_token_is_renewed_in_mid_run(swift: SwiftServer, refusing: SwiftStore):
    refusing.put("one", CONTENT)
    swift.revoke_tokens()
    refusing.put("two", CONTENT)
    assert refusing.get("two") == WHOLE
    assert swift.count("GET", "/auth/") == 1
    assert swift.count("PUT", "two") == 2


def test_threads_whose_tokens_expire_together_sign_in_once(swift: SwiftServer, store: SwiftStore):
    store.put("object", [b"x"])
    swift.revoke_tokens()
    swift.inject(Fault("delay", 0.3, path="/auth/"))
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda _: bytes(store.get("object")), range(6)))
    assert got == [b"x"] * 6
    assert swift.count("GET", "/auth/") == 1


def test_a_new_token_that_is_refused_too_ends_it(swift: SwiftServer, store: SwiftStore):
    swift.inject(Fault("answer", 401, path="/v1/", times=2))
    with pytest.raises(StoreError, match="ST_AUTH, ST_USER and ST_KEY"):
        store.get("object")
    assert swift.count("GET", "/auth/") == 1


# -- bodies


@pytest.mark.parametrize("at", [0, 1, 1000, len(WHOLE) - 1])
def test_a_body_that_is_cut_is_fetched_again(swift: SwiftServer, store: SwiftStore, at: int):
    store.put("object", CONTENT)
    swift.inject(Fault("truncate", at, method="GET"))
    assert store.get("object") == WHOLE
    assert swift.count("GET", "object") == 2


def test_a_client_library_that_swallows_the_cut_is_not_believed(
    swift: SwiftServer, store: SwiftStore, monkeypatch: pytest.MonkeyPatch
):
    """As urllib3 before version 2 does."""
    store.put("object", CONTENT)
    read = client._ObjectBody.read
    cuts = iter([1000, 0])

    def cut(body: client._ObjectBody, length: int | None = None) -> bytes:
        return read(body, length)[next(cuts) :]

    monkeypatch.setattr(client._ObjectBody, "read", cut)
    assert store.get("object") == WHOLE
    assert swift.count("GET", "object") == 2


@one_request
def test_ranges_that_are_cut_are_fetched_again(swift: SwiftServer, store: SwiftStore):
    store.put("object", CONTENT)
    ranges = [(i * 50_000, 40_000) for i in range(50)]
    swift.inject(Fault("truncate", 70_000, method="GET"))
    assert store.get_ranges("object", ranges) == [WHOLE[o : o + n] for o, n in ranges]
    assert swift.count("GET", "object") == 3


def test_a_spoilt_body_is_the_callers_to_notice(swift: SwiftServer, store: SwiftStore):
    store.put("object", CONTENT)
    swift.inject(Fault("corrupt", 70_000, method="GET"))
    spoilt = bytes(store.get("object"))
    assert len(spoilt) == len(WHOLE)
    assert [i for i in range(len(WHOLE)) if spoilt[i] != WHOLE[i]] == [70_000]
    assert store.get("object", newest=True) == WHOLE


@one_request
def test_a_spoilt_multipart_frame_is_asked_for_again_and_then_refused(swift: SwiftServer, store: SwiftStore):
    store.put("object", CONTENT)
    swift.inject(Fault("corrupt", 0, method="GET", times=2))
    assert store.get_ranges("object", [(0, 10), (20, 10)]) == [WHOLE[0:10], WHOLE[20:30]]
    assert swift.count("GET", "object") == 3
    swift.inject(Fault("corrupt", 0, method="GET", times=3))
    with pytest.raises(StoreError, match="is invalid"):
        store.get_ranges("object", [(0, 10), (20, 10)])
    assert swift.count("GET", "object") == 6


def test_a_spoilt_listing_is_asked_for_again(swift: SwiftServer, store: SwiftStore):
    store.put("object", CONTENT)
    swift.inject(Fault("corrupt", 0, method="GET"))
    assert [info.name for info in store.list("")] == ["object"]


# -- how it asks


def test_absence_is_confirmed_by_every_replica(swift: SwiftServer, store: SwiftStore):
    with pytest.raises(ObjectMissingError):
        store.get("object")
    assert [r.get("X_NEWEST") for r in swift.list_requests()] == [None, "true", "true"]
    swift.calm()
    assert store.head("object") is None
    assert [(r["method"], r.get("X_NEWEST")) for r in swift.list_requests()] == [("HEAD", "true")] * 3
    swift.calm()
    assert store.peek("object") is None
    assert [(r["method"], r.get("X_NEWEST")) for r in swift.list_requests()] == [("HEAD", "true")]
    swift.calm()
    with pytest.raises(ObjectMissingError):
        store.get("object", newest=True)
    assert [r.get("X_NEWEST") for r in swift.list_requests()] == ["true"] * 3


@pytest.mark.parametrize("times", [1, 2])
def test_a_passing_404_to_head_is_not_believed(swift: SwiftServer, refusing: SwiftStore, times: int):
    refusing.put("object", CONTENT)
    swift.inject(Fault("answer", 404, method="HEAD", times=times))
    info = refusing.head("object")
    assert info is not None
    assert info.size == len(WHOLE)
    assert swift.count("HEAD", "object") == times + 1
    swift.inject(Fault("answer", 404, method="HEAD"))
    assert refusing.peek("object") is None, "one look, for names that are expected to be free"


@pytest.mark.parametrize("etag", ['W/"{}"', '"{}-gzip"', '"{}-1"', "", '"0123456789abcdef0123456789abcdef"'])
def test_our_own_bytes_are_recognised_whatever_a_proxy_makes_of_the_etag(
    swift: SwiftServer, store: SwiftStore, monkeypatch: pytest.MonkeyPatch, etag: str
):
    """An answer to a PUT is lost, so what is stored is compared with what was sent."""
    real = client.Connection.head_object

    def head_object(self: client.Connection, *args: object, **kwargs: object) -> dict[str, str]:
        head = dict(real(self, *args, **kwargs))
        return head | {"etag": etag.format(head["etag"].strip('"'))}

    monkeypatch.setattr(client.Connection, "head_object", head_object)
    swift.inject(Fault("lose", method="PUT"))
    store.put("object", CONTENT)
    assert store.get("object") == WHOLE
    with pytest.raises(ConflictError, match="other bytes"):
        store.put("object", [bytes(len(WHOLE))])
    assert store.get("object") == WHOLE


@pytest.mark.parametrize("answered", ["", "repository/b/"])
def test_a_listing_of_another_prefix_is_no_listing(
    swift: SwiftServer, store: SwiftStore, monkeypatch: pytest.MonkeyPatch, answered: str
):
    for name in ("a/one", "b/two"):
        store.put(name, [b"x"])
    real = client.Connection.get_container

    def get_container(self: client.Connection, *args: object, **kwargs: object) -> object:
        return real(self, *args, **kwargs | {"prefix": answered})

    assert [info.name for info in store.list("a/")] == ["a/one"]
    monkeypatch.setattr(client.Connection, "get_container", get_container)
    for listing in (store.list, store.folders):
        with pytest.raises(StoreError, match="the answer to another request"):
            list(listing("a/"))


def test_a_passing_404_is_not_believed(swift: SwiftServer, store: SwiftStore):
    store.put("object", CONTENT)
    swift.inject(Fault("answer", 404, method="GET"))
    assert store.get("object") == WHOLE
    swift.inject(Fault("answer", 404, method="PUT"))
    store.put("other", CONTENT)
    assert store.get("other") == WHOLE


@one_request
def test_49_ranges_are_one_request(swift: SwiftServer, store: SwiftStore):
    store.put("object", CONTENT)
    for count, requests in ((1, 1), (49, 1), (50, 2), (98, 2), (99, 3)):
        swift.calm()
        store.get_ranges("object", [(i * 10, 9) for i in range(count)])
        assert swift.count("GET") == requests
    swift.calm()
    store.get_ranges("object", [(i * 10, 10) for i in range(300)])
    assert [r["RANGE"] for r in swift.list_requests()] == ["bytes=0-2999"]
    swift.calm()
    store.get_ranges("object", [(7, 0)])
    assert swift.list_requests() == []


def test_a_server_that_ignores_ranges_is_understood(swift: SwiftServer, store: SwiftStore):
    store.put("object", CONTENT)
    swift.inject(Fault("whole", method="GET", times=2))
    ranges = [(i * 1000, 10) for i in range(60)]
    assert store.get_ranges("object", ranges) == [WHOLE[o : o + n] for o, n in ranges]
    assert swift.count("GET", "object") == 1


def test_a_server_that_sends_the_first_range_only_is_asked_for_one_at_a_time(
    swift: SwiftServer, store: SwiftStore
):
    store.put("object", CONTENT)
    ranges = [(i * 1000, 10) for i in range(60)]
    content = [WHOLE[o : o + n] for o, n in ranges]
    swift.inject(Fault("first", method="GET", times=1000))
    assert (store.get_ranges("object", ranges[:1]), store.ranges_at_once) == (content[:1], 49)
    swift.calm()
    swift.inject(Fault("first", method="GET", times=1000))
    assert (store.get_ranges("object", ranges), store.ranges_at_once) == (content, 1)
    asked = swift.list_requests()
    singles = [f"bytes={o}-{o + n - 1}" for o, n in ranges]
    assert asked[0]["RANGE"].count(",") == 48
    assert sorted(request["RANGE"] for request in asked[1:]) == sorted(singles[1:])
    assert len({request["port"] for request in asked}) <= 5
    swift.calm()  # a server that could do better is not tried again
    assert store.get_ranges("object", ranges) == content
    assert sorted(request["RANGE"] for request in swift.list_requests()) == sorted(singles)
    with pytest.raises(DamagedObjectError, match="object"):
        store.get_ranges("object", [*ranges, (len(WHOLE) - 5, 6)])


def test_failures_of_single_ranges_are_repeated_or_told(swift: SwiftServer, swift_store: OpenSwift):
    store = swift_store(patience=BRIEF)
    store.put("object", CONTENT)
    ranges = [(i * 1000, 10) for i in range(60)]
    broken = Fault("drop", method="GET", skip=7, times=3)
    swift.inject(
        broken, Fault("answer", 503, method="GET", skip=17), Fault("first", method="GET", times=1000)
    )
    assert store.get_ranges("object", ranges) == [WHOLE[o : o + n] for o, n in ranges]
    assert store.ranges_at_once == 1
    swift.calm()
    swift.inject(Fault("answer", 503, method="GET", skip=20, times=1000))
    with pytest.raises(StoreError, match="has not answered"):
        store.get_ranges("object", ranges)
    assert swift.count("GET") < 60 + 60


def test_a_put_refuses_to_overwrite_from_its_first_try_on(swift: SwiftServer, refusing: SwiftStore):
    refusing.put("object", CONTENT)
    (asked,) = swift.list_requests()
    assert (asked["IF_NONE_MATCH"], asked["method"]) == ("*", "PUT")
    assert "TRANSFER_ENCODING" not in asked


def test_one_connection_serves_one_thread_after_another(swift: SwiftServer, store: SwiftStore):
    for i in range(5):
        store.put(f"object-{i}", [b"x"])
        store.head(f"object-{i}")
    assert len({r["port"] for r in swift.list_requests()}) == 1


# -- doors that stay shut


def test_what_cannot_pass_is_told_at_once(swift: SwiftServer, store: SwiftStore):
    for status, hint in ((403, "role"), (413, "quota"), (400, "administrator"), (301, "redirects")):
        swift.calm()
        swift.inject(Fault("answer", status, method="PUT", headers={"Location": "/elsewhere"}, times=9))
        with pytest.raises(StoreError, match=hint):
            store.put("object", [b"x"])
        assert swift.count("PUT") == 1


def test_a_refused_write_is_certain(swift: SwiftServer, store: SwiftStore):
    """Of reading there is nothing to be certain of."""
    for status in (400, 403, 411, 413, 422):
        swift.calm()
        swift.inject(Fault("answer", status, times=9, path="object"))
        for write in (lambda: store.put("object", [b"x"]), lambda: store.delete("object")):
            with pytest.raises(StoreRefusedError):
                write()
        with pytest.raises(StoreError) as caught:
            store.get("object")
        assert not isinstance(caught.value, StoreRefusedError)


@pytest.mark.parametrize(
    "earlier",
    [Fault("lose", method="PUT"), Fault("lie", 503, method="PUT"), Fault("answer", 408, method="PUT")],
    ids=["lost", "half stored", "timeout"],
)
def test_a_refusal_after_a_try_of_unknown_outcome_is_not_certain(
    swift: SwiftServer, store: SwiftStore, earlier: Fault
):
    looks = 0 if store.known_to_refuse else 1
    swift.inject(earlier, Fault("answer", 403, path="object", times=9, skip=looks))
    with pytest.raises(StoreError, match="outcome is unknown") as caught:
        store.put("object", [b"x"])
    assert not isinstance(caught.value, StoreRefusedError)


def test_a_try_that_reached_nobody_is_certain(swift_store: OpenSwift):
    """The proxy is away; so it was before and after the container was asked for."""
    with SwiftServer() as other, pytest.MonkeyPatch.context() as patch:
        for key, value in other.environment().items():
            patch.setenv(key, value)
        other.create_container("box")
        with SwiftStore.open("box", BRIEF) as store:
            store.put("one", [b"x"])
            other.stop_server("proxy")
            with pytest.raises(StoreRefusedError, match="has not answered"):
                store.put("two", [b"x"])
            with pytest.raises(StoreError) as caught:
                store.head("one")
            assert not isinstance(caught.value, StoreRefusedError)


@pytest.mark.swift_only("the gateway does not say what the quota is")
def test_a_quota_says_what_it_lacks(swift: SwiftServer, store: SwiftStore):
    container = store.location.split("/")[2]
    store.put("one", [b"x" * 1000])
    swift.fill_quota(container, 10)
    store.put("two", [b"x" * 10])
    swift.fill_quota(container, 0)
    with pytest.raises(StoreFullError, match=r"these 700 bytes .*is 1010 bytes and 1010 are used.* by 700"):
        store.put("three", [b"x" * 700])
    store.delete("one")
    swift.fill_quota(container, None)
    store.put("three", [b"x" * 700])


@pytest.mark.parametrize(
    ("header", "value", "keeps"),
    [
        ("x-versions-enabled", "True", True),
        ("x-versions-enabled", "False", False),
        ("x-history-location", "older", True),
        (
            "x-versions-location",
            "older",
            False,
        ),  # of what is never overwritten, a delete leaves nothing there
    ],
)
def test_a_container_that_keeps_versions_says_so(
    swift: SwiftServer, monkeypatch: pytest.MonkeyPatch, header: str, value: str, keeps: bool
):
    swift.create_container("plain")
    real = client.Connection.head_container

    def head_container(self: client.Connection, *args: object, **kwargs: object) -> dict[str, str]:
        return {**real(self, *args, **kwargs), header: value}

    with SwiftStore.open("plain") as store:
        assert not store.keeps_deleted
    monkeypatch.setattr(client.Connection, "head_container", head_container)
    with SwiftStore.open("plain") as store:
        assert store.keeps_deleted is keeps


def test_a_server_that_asks_for_hours_is_left(swift: SwiftServer, store: SwiftStore):
    """The user comes back then, and is not kept waiting for minutes first."""
    store.put("object", [b"x"])
    for value, says in (("14400", "4 h"), ("900", "15 min")):
        swift.calm()
        swift.inject(Fault("answer", 429, method="GET", headers={"Retry-After": value}, times=99))
        with pytest.raises(StoreError, match=f"come back in {says} .*then"):
            store.get("object")
        assert swift.count("GET") == 2


def test_a_container_that_goes_away(swift: SwiftServer, store: SwiftStore):
    faults = [Fault("answer", 404, method=m, times=9) for m in ("PUT", "GET", "HEAD")]
    swift.inject(*faults)
    for call in (lambda: store.put("object", [b"x"]), lambda: list(store.list(""))):
        with pytest.raises(NotFoundError, match="swift post box-"):
            call()


def test_opening_a_container_that_is_not_there(swift: SwiftServer):
    with pytest.raises(NotFoundError, match=r"no container nowhere.*swift post nowhere"):
        open_store("swift://nowhere/repository", create_ok=True)
    for url in (
        "swift://",
        "swift:///x",
        "swift://../x",
        "swift://a?b/x",
        "swift://box/a b",
        "swift://box/../x",
    ):
        with pytest.raises(UsageError) as caught:
            open_store(url)
        assert url in str(caught.value)
        assert "listed" not in str(caught.value)


def test_opening_needs_neither_prefix_nor_tidy_slashes(swift: SwiftServer):
    swift.create_container("tidy")
    with open_store("swift://tidy") as top, open_store("swift://tidy/a/b/") as below:
        assert (top.location, below.location) == ("swift://tidy", "swift://tidy/a/b")
        below.put("object", [b"x"])
        assert top.get("a/b/object") == b"x"
        assert list(below.folders("")) == []
        assert list(top.folders("a/")) == ["b"]


def test_objects_that_are_not_ours_are_passed_over(swift: SwiftServer, swift_store: OpenSwift):
    store = swift_store(prefix="")
    container = store.location.removeprefix("swift://")
    for name in ("odd%20name/x", "../x", "fine/x"):
        swift.put_raw(f"{container}/{name}", b"x")
    assert [info.name for info in store.list("")] == ["fine/x"]
    assert list(store.folders("")) == ["fine"]


def test_its_failures_are_not_logged_by_the_libraries(
    swift: SwiftServer,
    swift_store: OpenSwift,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    store = swift_store(patience=BRIEF)
    caplog.set_level(logging.INFO)
    swift.inject(Fault("answer", 503, times=99))
    with pytest.raises(StoreError) as caught:
        store.get("object")
    shown = caplog.text + "".join(capfd.readouterr()) + str(caught.value) + repr(store)
    assert "Traceback" not in shown
    assert swift.key not in shown
    assert "AUTH_" not in shown
    assert "ftk" not in shown  # tokens contain it


# -- three replicas


@pytest.fixture(scope="module")
def replicated() -> Iterator[SwiftServer]:
    with SwiftServer(nodes=3, replicas=3) as server:
        yield server


def test_a_late_delete_is_seen_through_by_asking_everyone(
    replicated: SwiftServer, monkeypatch: pytest.MonkeyPatch
):
    """With one object server away, a deletion leaves its copy behind: plain reads then differ."""
    for key, value in replicated.environment().items():
        monkeypatch.setenv(key, value)
    replicated.create_container("box")
    with SwiftStore.open("box", RetryPolicy(total=20.0, first=0.05, longest=0.5)) as store:
        store.put("object", [b"x"])
        replicated.stop_server("object-2")
        store.put("new", [b"written while one was away"])
        store.delete("object")
        replicated.restart_server("object-2")
        time.sleep(0.2)  # the proxy shuns a server that failed for this long
        assert [store.head("object") for _ in range(10)] == [None] * 10
        assert [bytes(store.get("new")) for _ in range(10)] == [b"written while one was away"] * 10
        with pytest.raises(ObjectMissingError):
            store.get("object", newest=True)
        with pytest.raises(DamagedObjectError):
            store.get_ranges("new", [(20, 10)])
