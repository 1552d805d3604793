"""What Ceph's gateway does otherwise than Swift, against a real one: `make ceph`."""

from __future__ import annotations

import secrets
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from island_fast.errors import StoreError, StoreFullError, StoreRefusedError
from island_fast.stores.open import open_store
from island_fast.stores.retry import RetryPolicy
from island_fast.stores.swift import SwiftStore
from tests.conftest import OpenSwift
from tests.support.ceph_server import CephServer
from tests.support.swift_server import SwiftServer

pytestmark = pytest.mark.ceph_only

MANY = 3000
PATIENT = RetryPolicy(total=120.0, first=0.05, longest=1.0)


@pytest.fixture
def ceph(swift: SwiftServer) -> CephServer:
    assert isinstance(swift, CephServer)
    return swift


@pytest.fixture
def store(swift_store: OpenSwift) -> SwiftStore:
    return swift_store()


def container_of(store: SwiftStore) -> str:
    return store.location.split("/")[2]


def test_container_names_are_those_of_all_accounts(ceph: CephServer):
    name = f"theirs-{secrets.token_hex(4)}"
    ceph.create_other_container(name)
    with pytest.raises(StoreError, match=r"403.* another account's.*choose another name") as caught:
        open_store(f"swift://{name}/repository")
    assert caught.value.exit_code == 5


def test_a_user_that_is_not_there_is_answered_with_403(ceph: CephServer, monkeypatch: pytest.MonkeyPatch):
    ceph.create_container("signed-in")
    for user, key in ((ceph.user, "wrong"), ("test:nobody", ceph.key), ("nobody:at-all", ceph.key)):
        monkeypatch.setenv("ST_USER", user)
        monkeypatch.setenv("ST_KEY", key)
        with pytest.raises(StoreError, match="does not accept the credentials of ST_AUTH"):
            open_store("swift://signed-in/x")


def test_a_user_who_may_only_read(ceph: CephServer, store: SwiftStore, monkeypatch: pytest.MonkeyPatch):
    swift = ["--subuser", "test:reader", "--key-type", "swift", "--secret-key", "reading", "--access", "read"]
    ceph.admin("subuser", "create", "--uid", "test", *swift)
    store.put("object", [b"x"])
    monkeypatch.setenv("ST_USER", "test:reader")
    monkeypatch.setenv("ST_KEY", "reading")
    with SwiftStore.open(store.location.removeprefix("swift://")) as reader:
        assert reader.get("object") == b"x"
        for write in (lambda: reader.put("other", [b"x"]), lambda: reader.delete("object")):
            with pytest.raises(StoreRefusedError, match=r"403 Forbidden.*role"):
                write()
    assert [info.name for info in store.list("")] == ["object"]


def test_tokens_that_live_for_a_second(ceph: CephServer, swift_store: OpenSwift):
    ceph.set_option("rgw_swift_token_expiration", 1)
    try:
        store = swift_store(patience=PATIENT)
        for i in range(3):
            store.put(f"object-{i}", [b"x"])
            time.sleep(1.1)
            assert store.get_ranges(f"object-{i}", [(0, 1)]) == [b"x"]
            time.sleep(1.1)
            assert len(list(store.list(""))) == i + 1
            time.sleep(1.1)
        store.delete("object-0")
        assert store.head("object-0") is None
        assert ceph.count("GET", "/auth/") >= 6
    finally:
        ceph.set_option("rgw_swift_token_expiration", 86400)


def test_a_quota_of_the_container(ceph: CephServer, store: SwiftStore):
    store.put("one", [b"x" * 1000])
    ceph.fill_quota(container_of(store), 10)
    lacking = r"raise the quota by 700 bytes|1010 bytes and 1000 are used: raise it by 690 bytes"  # 20.2
    with pytest.raises(StoreFullError, match=rf"these 700 bytes .*({lacking})"):
        store.put("two", [b"x" * 700])
    store.delete("one")
    ceph.fill_quota(container_of(store), None)
    store.put("two", [b"x" * 700])


@pytest.mark.parametrize("scope", ["bucket", "user"])
def test_a_quota_of_the_administrator(ceph: CephServer, store: SwiftStore, scope: str):
    store.put("one", [b"x"])
    whose = ["--bucket", container_of(store)] if scope == "bucket" else ["--uid", "test"]
    ceph.admin("quota", "set", "--quota-scope", scope, *whose, "--max-objects", "1")
    ceph.admin("quota", "enable", "--quota-scope", scope, *whose)
    try:
        with pytest.raises(StoreFullError, match="413"):
            store.put("two", [b"x"])
        store.delete("one")
    finally:
        ceph.admin("quota", "disable", "--quota-scope", scope, *whose)
    store.put("two", [b"x"])


def test_a_limit_of_requests_each_minute(ceph: CephServer, swift_store: OpenSwift):
    if int(ceph.version().partition(".")[0]) < 18:
        pytest.skip(f"Ceph {ceph.version()} has no limits of rates")
    store = swift_store(patience=PATIENT)
    whose = ["--ratelimit-scope", "bucket", "--bucket", container_of(store)]
    ceph.admin("ratelimit", "set", *whose, "--max-write-ops", "4")
    ceph.admin("ratelimit", "enable", *whose)
    try:
        for i in range(6):
            store.put(f"object-{i}", [b"x"])
    finally:
        ceph.admin("ratelimit", "disable", *whose)
    assert len(list(store.list(""))) == 6
    assert ceph.count("PUT", "object-") > 6, "some were refused"


def test_thousands_of_objects_and_a_reshard_among_them(ceph: CephServer, swift_store: OpenSwift):
    store = swift_store(patience=PATIENT)
    names = [f"vol-{i % 7}/packs/{i:05}" for i in range(MANY)]
    bucket = ["--bucket", container_of(store), "--num-shards", "7", "--yes-i-really-mean-it"]
    with ThreadPoolExecutor(8) as pool:
        puts = [pool.submit(store.put, name, [name.encode()]) for name in names]
        puts[MANY // 4].result()
        ceph.admin("bucket", "reshard", *bucket)
        for put in puts:
            put.result()
    for page_size in (None, 1000, 10_000):
        store.page_size = page_size
        infos = list(store.list(""))
        assert [info.name for info in infos] == sorted(names)
        assert all(info.size == len(info.name) and info.age < 600 for info in infos)
    assert sorted(store.folders("")) == [f"vol-{i}" for i in range(7)]
