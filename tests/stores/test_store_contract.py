"""What every store keeps to; run on memory, on a directory and on a real Swift, and behind meters."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from island_fast.errors import (
    ConflictError,
    DamagedObjectError,
    NotFoundError,
    ObjectMissingError,
    UsageError,
)
from island_fast.stores.base import ObjectInfo, Store
from island_fast.stores.rate_limit import RateLimitedStore, RateLimiter, RateLimiters
from tests.support.memory_store import MemoryStore

KINDS = ("memory", "metered", "directory", "swift")
THREADS = 8


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest) -> Store:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "metered":
        return RateLimitedStore(MemoryStore(), RateLimiters(RateLimiter(1e12), RateLimiter(None)))
    made = request.getfixturevalue(f"{request.param}_store")
    opened = made() if request.param == "swift" else made
    if request.param == "swift":
        opened.known_to_refuse = None  # it holds for servers that nothing is known of
    return opened


def in_threads(work: Callable[[int], object]) -> list[object]:
    """What each of the threads returned or raised, all having started at once."""
    barrier = Barrier(THREADS)

    def run(number: int) -> object:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(run, number) for number in range(THREADS)]
    return [future.exception() or future.result() for future in futures]


# -- put


def test_bytes_come_back_from_all_kinds_of_buffers(store: Store):
    parts = [b"one", bytearray(b"two"), memoryview(b"xthreex")[1:-1], b"", memoryview(bytearray(b"4"))]
    store.put("a/b.c/D_e-9", parts)
    assert store.get("a/b.c/D_e-9") == b"onetwothree4"
    assert store.get("a/b.c/D_e-9", newest=True) == b"onetwothree4"


def test_a_view_of_wider_items_counts_in_bytes(store: Store):
    store.put("wide", [memoryview(bytes(range(16))).cast("Q"), b"end"])
    assert store.get("wide") == bytes(range(16)) + b"end"


def test_the_same_bytes_again_are_a_success_in_other_parts_too(store: Store):
    store.put("name", [b"content"])
    store.put("name", [b"con", b"tent"])
    assert store.get("name") == b"content"


@pytest.mark.parametrize("other", [b"contenT", b"conten", b"content.", b""])
def test_other_bytes_conflict_and_change_nothing(store: Store, other: bytes):
    store.put("name", [b"content"])
    with pytest.raises(ConflictError, match="name"):
        store.put("name", [other])
    assert store.get("name") == b"content"


def test_threads_that_put_the_same_bytes_all_succeed(store: Store):
    assert in_threads(lambda _: store.put("name", [b"same" * 1000])) == [None] * THREADS
    assert store.get("name") == b"same" * 1000


def test_threads_that_put_other_bytes_get_a_conflict_or_were_stored(store: Store):
    contents = [bytes([number]) * 5000 for number in range(THREADS)]
    outcomes = in_threads(lambda number: store.put("name", [contents[number]]))
    losers = [outcome for outcome in outcomes if outcome is not None]
    assert all(isinstance(loser, ConflictError) for loser in losers)
    winners = [contents[number] for number in range(THREADS) if outcomes[number] is None]
    assert bytes(store.get("name")) in winners
    # Swift may tell several that they have won: that is why nothing above relies on it as a lock.
    assert len(winners) == 1 or "swift" in store.location


def test_an_object_of_many_parts(store: Store):
    blocks = [random.Random(i).randbytes(1 << 16) for i in range(256)]
    parts = [block[at : at + 4096] for block in blocks for at in range(0, 1 << 16, 4096)]
    store.put("pack", parts)  # 16 MiB in 4096 parts, more than one writev(2) takes
    assert store.get("pack") == b"".join(blocks)
    store.put("pack", blocks)


def test_an_empty_object(store: Store):
    store.put("empty", [])
    store.put("empty", [b"", b""])
    assert store.get("empty") == b""
    info = store.head("empty")
    assert info is not None
    assert info.size == 0
    with pytest.raises(DamagedObjectError, match="empty"):
        store.get_ranges("empty", [(0, 1)])
    with pytest.raises(ConflictError):
        store.put("empty", [b"x"])


# -- get


@pytest.mark.parametrize("count", [0, 1, 2, 49, 50, 120])
def test_ranges(store: Store, count: int):
    content = random.Random(7).randbytes(100_000)
    store.put("object", [content])
    ranges = [(i * 800 + i % 3, 1 + 5 * i % 400) for i in range(count)]
    got = store.get_ranges("object", ranges)
    assert [bytes(view) for view in got] == [content[o : o + n] for o, n in ranges]


def test_ranges_that_touch_are_empty_or_end_with_the_object(store: Store):
    content = bytes(range(100))
    store.put("object", [content])
    ranges = [(0, 0), (0, 10), (10, 10), (20, 0), (20, 1), (50, 3), (90, 10), (100, 0)]
    got = store.get_ranges("object", ranges)
    assert [bytes(view) for view in got] == [content[o : o + n] for o, n in ranges]


@pytest.mark.parametrize("ranges", [[(95, 6)], [(0, 5), (95, 6)], [(0, 5), (100, 1)], [(200, 1)]])
def test_a_range_beyond_the_end_is_damage(store: Store, ranges: list[tuple[int, int]]):
    store.put("object", [bytes(100)])
    with pytest.raises(DamagedObjectError, match="object"):
        store.get_ranges("object", ranges)


@pytest.mark.parametrize("ranges", [[(5, 5), (0, 5)], [(0, 5), (4, 5)], [(-1, 1)], [(0, -1)]])
def test_ranges_out_of_order_are_a_mistake(store: Store, ranges: list[tuple[int, int]]):
    store.put("object", [bytes(100)])
    with pytest.raises(ValueError, match="range"):
        store.get_ranges("object", ranges)


def test_what_is_missing(store: Store):
    store.put("folder/object", [b"x"])
    for name in ("none", "folder", "folder/object/below", "folder/none"):
        assert store.head(name) is None
        with pytest.raises(ObjectMissingError, match=name):
            store.get(name)
    with pytest.raises(ObjectMissingError):
        store.get_ranges("none", [(0, 1)])
    assert issubclass(ObjectMissingError, NotFoundError)


def test_head(store: Store):
    store.put("a/object", [b"12345"])
    info = store.head("a/object")
    assert info is not None
    assert (info.name, info.size) == ("a/object", 5)
    assert 0 <= info.age < 60


# -- list, folders, delete


def test_list_and_folders_over_several_pages(store: Store):
    store.page_size = 3  # type: ignore[attr-defined]  # only Swift has pages
    names = [f"vol-{v}/packs/{i:02}" for v in "ab" for i in range(7)]
    names += ["vol-a/catalog/1-0", "vol-a.x", "vol-a-b/manifests/1", "repository"]
    for name in names:
        store.put(name, [name.encode()])
    infos = list(store.list(""))
    assert sorted(info.name for info in infos) == sorted(names)
    assert all(info.size == len(info.name) and 0 <= info.age < 60 for info in infos)
    listed = sorted(i.name for i in store.list("vol-a/packs/"))
    assert listed == [f"vol-a/packs/{i:02}" for i in range(7)]
    assert sorted(store.folders("")) == ["vol-a", "vol-a-b", "vol-b"]
    assert sorted(store.folders("vol-a/")) == ["catalog", "packs"]
    assert list(store.folders("vol-a/packs/")) == []


def test_an_empty_store_lists_nothing(store: Store):
    assert list(store.list("")) == []
    assert list(store.folders("")) == []
    assert list(store.list("none/")) == []


def test_delete(store: Store):
    store.put("a/b/one", [b"1"])
    store.put("a/b/two", [b"2"])
    store.delete("a/b/one")
    assert store.head("a/b/one") is None
    assert [info.name for info in store.list("")] == ["a/b/two"]
    store.delete("a/b/one")
    store.delete("never/was")
    store.delete("a/b/two")
    assert list(store.folders("")) == []
    store.put("a/b/three", [b"3"])
    assert store.get("a/b/three") == b"3"


BAD_NAMES = (
    "",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "a/.",
    "a b",
    "a\n",
    "a?b",
    "ä",
    "a\0",
    ".tmp~",
    "a" * 700,
)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused_by_every_verb(store: Store, name: str):
    for call in (
        lambda: store.put(name, [b"x"]),
        lambda: store.get(name),
        lambda: store.get_ranges(name, [(0, 1)]),
        lambda: store.head(name),
        lambda: store.delete(name),
    ):
        with pytest.raises(UsageError):
            call()


@pytest.mark.parametrize("prefix", ["a", "/", "../", "a/../", "a//", "a b/"])
def test_bad_prefixes_are_refused(store: Store, prefix: str):
    with pytest.raises(UsageError):
        store.list(prefix)
    with pytest.raises(UsageError):
        store.folders(prefix)


# -- threads


def test_threads_get_their_own_bytes(store: Store):
    def work(number: int) -> int:
        rng = random.Random(number)
        content = rng.randbytes(200_000)
        for i in range(4):
            name = f"thread-{number}/{i}"
            store.put(name, [content, bytes([i])])
            assert store.get(name) == content + bytes([i])
            ranges = [(at, 100) for at in range(0, 200_000, 20_000)]
            assert store.get_ranges(name, ranges) == [content[o : o + n] for o, n in ranges]
            info = store.head(name)
            assert info is not None
            assert info.size == len(content) + 1
        store.delete(f"thread-{number}/0")
        return number

    assert in_threads(work) == list(range(THREADS))
    assert len(list(store.list(""))) == 3 * THREADS


def test_putting_into_folders_that_others_empty(store: Store):
    def work(number: int) -> int:
        for i in range(30 if "swift" not in store.location else 3):
            store.put(f"a/b/{number}-{i}", [b"x"])
            store.delete(f"a/b/{number}-{i}")
        return number

    assert in_threads(work) == list(range(THREADS))
    assert list(store.folders("")) == []


def test_it_closes_as_a_context_and_shows_where_it_is(store: Store):
    with store as same:
        assert same is store
    assert store.location in repr(store)
    assert os.environ.get("ST_KEY", "no key") not in repr(store)


def test_the_facts_about_an_object_are_a_value():
    info = ObjectInfo("a", 1, 2.0)
    assert info == ObjectInfo("a", 1, 2.0)
    with pytest.raises(AttributeError):
        info.size = 2  # type: ignore[misc]
