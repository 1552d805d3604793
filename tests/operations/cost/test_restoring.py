"""A long history makes a restore no more expensive: it reads what a restore of one full snapshot reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from island_fast.api import Repository
from island_fast.arrays import Int64s
from island_fast.dirtymap import BLOCK_SIZE
from island_fast.repository.local_state import LocalState
from island_fast.repository.pack_reader import _range_starts
from island_fast.stores.base import MAX_OBJECT, Range, Store, Views
from island_fast.stores.directory import DirectoryStore
from island_fast.stores.swift import SwiftStore
from tests.conftest import OpenSwift
from tests.operations.cost.conftest import INCREMENTS, History, select_kind
from tests.support.ceph_server import CephServer
from tests.support.memory_store import MemoryStore
from tests.support.swift_faults import Fault
from tests.support.swift_server import SwiftServer


class WatchedDirectory(DirectoryStore):
    """Records the names of objects that are read."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), create_ok=True)
        self.read: list[str] = []

    def get(self, name: str, *, newest: bool = False, limit: int = MAX_OBJECT) -> memoryview:
        self.read.append(name)
        return super().get(name, newest=newest, limit=limit)

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> Views:
        self.read.append(name)
        return super().get_ranges(name, ranges)


def test_in_a_directory_it_moves_the_bytes_that_are_needed(history: History, tmp_path: Path) -> None:
    """Nothing is cached, because the restore is on another host."""
    targets = []
    results = []
    for flat in (False, True):
        store = WatchedDirectory(tmp_path / f"flat-{flat}")
        history.copy_into(store, flat=flat)
        repository = Repository(store, LocalState(tmp_path / f"state-{flat}"))
        store.read.clear()
        targets.append(tmp_path / f"{flat}.raw")
        results.append(repository.restore("vol@latest", targets[-1], image_format="raw"))
        assert len(select_kind(store.read, "manifests")) == 1
        # The index of a pack can be read before its blocks.
        assert set(Counter(select_kind(store.read, "packs")).values()) <= {1, 2}
    assert results[0].bytes_read <= 1.05 * results[1].bytes_read
    assert results[0].objects_read <= 2 * history.live_packs + 1
    assert targets[0].read_bytes() == targets[1].read_bytes()


@pytest.mark.swift_only("it counts requests for several ranges")
def test_in_swift_each_live_pack_is_one_request(
    history: History, swift: SwiftServer, swift_store: OpenSwift, tmp_path: Path
) -> None:
    store = history.copy_into(swift_store())
    repository = Repository(store, LocalState(history.state))
    swift.calm()
    deep = repository.restore("vol@latest", tmp_path / "deep.raw", image_format="raw")
    asked = swift.list_requests()
    packs = [request for request in asked if "/packs/" in request["path"]]
    assert len({request["path"] for request in packs}) == len(packs) == history.live_packs
    assert {request["method"] for request in packs} == {"GET"}
    assert len(asked) <= history.live_packs + 3
    ranges = [request["RANGE"].count(",") + 1 for request in packs if "RANGE" in request]
    assert 10 < max(ranges) <= 49
    flat = Repository(history.flat, LocalState(history.state))
    whole = flat.restore("vol@latest", tmp_path / "flat.raw", image_format="raw")
    assert deep.bytes_read <= 1.1 * whole.bytes_read
    assert (tmp_path / "deep.raw").read_bytes() == (tmp_path / "flat.raw").read_bytes()


def test_a_store_that_takes_few_ranges_is_asked_once_too(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    real = MemoryStore.get_ranges

    def get_ranges(self: MemoryStore, name: str, ranges: Sequence[Range]) -> Views:
        nonlocal most
        most = max(most, len(ranges))
        return real(self, name, ranges)

    monkeypatch.setattr(MemoryStore, "get_ranges", get_ranges)
    monkeypatch.setattr(MemoryStore, "ranges_at_once", 5)
    monkeypatch.setattr(MemoryStore, "request_cost", 16 << 20)
    repository = Repository(history.deep, LocalState(history.state))
    history.deep.calls.clear()
    repository.restore("vol@latest", tmp_path / "few.raw", image_format="raw")
    assert most == 5
    assert history.deep.calls["get"] + history.deep.calls["get_ranges"] == history.live_packs
    flat = Repository(history.flat, LocalState(history.state))
    flat.restore("vol@latest", tmp_path / "flat.raw", image_format="raw")
    assert (tmp_path / "few.raw").read_bytes() == (tmp_path / "flat.raw").read_bytes()


def place_blocks(gaps: Sequence[int] | Int64s, size: int) -> tuple[Int64s, Int64s]:
    """The offsets and the ends of blocks of `size` bytes with these gaps between them."""
    offsets = np.append(0, np.cumsum(np.array(gaps, np.int64) + size))
    return offsets, offsets + size


@pytest.mark.parametrize("most", [1, 2, 3, 7, 49, None])
@pytest.mark.parametrize("gap", [0, 10])
def test_ranges_are_few_and_split_at_the_widest_gaps(gap: int, most: int | None) -> None:
    gaps = np.random.default_rng(gap).integers(0, 60, 80)
    starts = _range_starts(*place_blocks(gaps, 1 << 16), gap, most, 1 << 20)
    assert starts[0] == 0
    assert most is None or len(starts) <= most
    split, joined = gaps[starts[1:] - 1], np.delete(gaps, starts[1:] - 1)
    assert split.min(initial=100) > gap
    if most is None or np.count_nonzero(gaps > gap) < most:
        assert joined.max(initial=0) <= gap
    else:
        assert len(starts) == most
    assert joined.max(initial=0) <= split.min(initial=100)


@pytest.mark.parametrize(
    ("gaps", "cost", "ranges"),
    [
        ([9] * 51, 27, 49 + 3),  # a second request saves just what it costs
        ([9] * 51, 28, 49),
        ([9] * 100, 27, 2 * 49 + 3),
        ([9] * 100, 28, 2 * 49),
        ([99] * 48 + [9] * 100, 9 * 49, 3 * 49),
        ([99] * 48 + [9] * 100, 9 * 49 + 1, 49),
        ([9] * 48, 0, 49),
        ([9] * 49, 10, 49),
        ([], 0, 1),
    ],
)
def test_a_further_request_is_made_for_bytes_enough(gaps: list[int], cost: int, ranges: int) -> None:
    starts = _range_starts(*place_blocks(gaps, 1), 1, 49, cost)
    assert len(starts) == ranges
    assert (np.diff(starts) > 0).all()


@pytest.mark.swift_only("it counts requests for several ranges")
def test_spread_blocks_of_a_pack_are_fetched_from_swift_without_the_rest(
    swift: SwiftServer, swift_store: OpenSwift, tmp_path: Path
) -> None:
    """Every fifth block of a pack: 52 of 256, so that all gaps are equal and more than a request can name."""
    volume = tmp_path / "vol.raw"
    content = np.random.default_rng(1).integers(0, 256, (256, BLOCK_SIZE), np.uint8)
    volume.write_bytes(content)
    repository = Repository(swift_store(), LocalState(tmp_path / "state"), create=True)
    first = repository.snapshot(volume, image_format="raw").snapshot
    content[np.arange(256) % 5 != 0] ^= 1
    volume.write_bytes(content)
    repository.snapshot(volume, image_format="raw")
    swift.calm()
    restored = repository.restore("vol@latest", tmp_path / "restored.raw", image_format="raw")
    assert (tmp_path / "restored.raw").read_bytes() == volume.read_bytes()
    asked = [request for request in swift.list_requests() if f"/packs/{first}/" in request["path"]]
    assert [request["RANGE"].count(",") + 1 for request in asked] == [49, 3]
    needed = 256 * BLOCK_SIZE
    assert needed <= restored.bytes_read <= 1.01 * needed


@given(
    st.lists(st.tuples(st.integers(0, 900), st.integers(1, 70)), min_size=1, max_size=100),
    st.integers(0, 100),
    st.integers(100, 2000),
)
def test_where_each_range_is_a_request_a_quarter_more_is_read_at_most(
    blocks: list[tuple[int, int]], gap: int, cost: int
) -> None:
    """`blocks` are gaps, and the lengths of blocks after them."""
    gaps, lengths = np.array(blocks, np.int64).T
    ends = np.cumsum(gaps + lengths)
    offsets = ends - lengths

    def count_read(starts: Int64s) -> int:
        return int((ends[np.append(starts[1:], ends.size) - 1] - offsets[starts]).sum())

    starts = _range_starts(offsets, ends, gap, 1, cost)
    without = count_read(_range_starts(offsets, ends, gap, None, cost))
    assert count_read(starts) <= 1.25 * without
    left_out = (offsets[1:] - ends[:-1])[starts[1:] - 1]
    fetched = np.delete(offsets[1:] - ends[:-1], starts[1:] - 1)
    assert fetched.max(initial=0) <= max(gap, left_out.min(initial=1000))
    if left_out.size and left_out.min() < cost:
        assert count_read(starts) + left_out.min() > 1.25 * without, "there is a request that need not be"


@dataclass(frozen=True)
class Restored:
    """A restore by a host that knows nothing: its file, the bytes fetched, the requests for packs."""

    path: Path
    bytes: int
    requests: int


@pytest.mark.parametrize("step", [None, 8, 3])
def test_a_store_that_sends_the_first_range_only_costs_few_more_bytes(
    history: History, swift: SwiftServer, swift_store: OpenSwift, tmp_path: Path, step: int | None
) -> None:
    """A restore after 100 increments, and one that needs every `step`-th block of a pack, beside Swift's.

    With --ceph the store is a real gateway, which no fault has to make what it is.
    """

    def restore(name: str, server: SwiftServer, store: Store) -> Restored:
        if step is None:
            history.copy_into(store)
        else:
            taker = Repository(store, LocalState(tmp_path / f"taker-{name}"), create=True)
            take_every(step, taker, tmp_path)
        repository = Repository(store, LocalState(tmp_path / f"stranger-{name}"))
        target = tmp_path / f"{name}.raw"
        server.calm()
        if name == "first" and not isinstance(server, CephServer):
            server.inject(Fault("first", method="GET", path="/packs/", times=10_000))
        result = repository.restore("vol@latest", target, image_format="raw")
        return Restored(target, result.bytes_read, server.count("GET", "/packs/"))

    with SwiftServer() as other, pytest.MonkeyPatch.context() as patch:
        for key, value in other.environment().items():
            patch.setenv(key, value)
        other.create_container("box")
        with SwiftStore.open("box/repository") as store:
            plain = restore("plain", other, store)
    first = restore("first", swift, swift_store())
    print(
        f"step {step}: {plain.requests} and {first.requests} requests, {plain.bytes} and {first.bytes} bytes"
    )
    assert first.path.read_bytes() == plain.path.read_bytes()
    assert first.bytes <= 1.25 * plain.bytes
    assert first.requests <= (2 * plain.requests if step is None else 256 // step + 4)


def take_every(step: int, repository: Repository, folder: Path) -> None:
    """Take two snapshots; the second needs every `step`-th block of the first one's pack."""
    content = np.random.default_rng(1).integers(0, 256, (256, BLOCK_SIZE), np.uint8)
    volume = folder / "vol.raw"
    volume.write_bytes(content)
    repository.snapshot(volume, image_format="raw")
    content[np.arange(256) % step != 0] ^= 1
    volume.write_bytes(content)
    repository.snapshot(volume, image_format="raw")


def test_the_history_is_long(history: History) -> None:
    assert len(select_kind(list(history.deep.objects), "manifests")) == INCREMENTS + 1
