"""`diff` misses no change of real volumes; what it and `usage` cost; what keeps them from answering."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.errors import DamagedError, NotFoundError, UsageError
from island_fast.repository.local_state import LocalState
from island_fast.results import Difference
from tests.operations.conftest import let_any_image_in
from tests.support import qemu
from tests.support.memory_store import MemoryStore

MIB = 1 << 20
BLOCK = 65536


@pytest.fixture
def lineage(repository: Repository, tmp_path: Path) -> dict[str, bytes]:
    """Contents of snapshots of a volume that is written to, zeroed, shrunk, grown and restored, by id."""
    image = qemu.create(tmp_path / "vol.qcow2", 4 * MIB, lazy_refcounts="on")
    contents = {}

    def taken(image: Path) -> str:
        snapshot = repository.snapshot(image).snapshot
        contents[snapshot] = qemu.content(image)
        return snapshot

    qemu.io(image, qemu.write(0, 3 * MIB, 1))
    first = taken(image)
    qemu.io(image, qemu.write(BLOCK, 5 * BLOCK, 2), qemu.discard(MIB, 3 * BLOCK))
    taken(image)
    qemu.io(image, qemu.write(2 * BLOCK, BLOCK, 1))  # as it was at first
    qemu.resize(image, 3 * MIB - 5 * BLOCK - 512)
    taken(image)
    qemu.resize(image, 5 * MIB)
    qemu.io(image, qemu.write(4 * MIB, 3 * BLOCK, 3))
    taken(image)
    branch = tmp_path / "branch.qcow2"
    repository.restore(first, branch)
    qemu.io(branch, qemu.write(0, 100, 4))
    let_any_image_in(repository)
    taken(branch)
    return contents


def applied(found: Difference, before: bytes, after: bytes) -> bytes:
    """`before`, resized, with the extents of `after` that are told put over it."""
    content = bytearray(before[: len(after)].ljust(len(after), b"\0"))
    for start, length, kind in found.extents():
        piece = after[start : start + length]
        assert kind == "data" or not any(piece)
        content[start : start + length] = piece
    return bytes(content)


def test_no_change_is_missed(repository: Repository, lineage: dict[str, bytes]) -> None:
    """Of all pairs, in both directions; and what is told is no more than what was written."""
    for since, snapshot in itertools.product(lineage, repeat=2):
        found = repository.diff(since, snapshot)
        assert applied(found, lineage[since], lineage[snapshot]) == lineage[snapshot]
        assert (found.since_size, found.volume_size) == (len(lineage[since]), len(lineage[snapshot]))
        assert found.bytes_changed <= 3 * MIB + 3 * BLOCK
    first, second, third, fourth, branch = lineage
    assert [*repository.diff(first, second).extents()] == [
        (BLOCK, 5 * BLOCK, "data"),
        (MIB, 3 * BLOCK, "zero"),
    ]
    assert [*repository.diff(second, first).extents()] == [
        (BLOCK, 5 * BLOCK, "data"),
        (MIB, 3 * BLOCK, "data"),
    ]
    assert (2 * BLOCK, BLOCK) in [(s, n) for s, n, _ in repository.diff(second, third).extents()]
    assert [*repository.diff(first, branch).extents()] == [(0, BLOCK, "data")]
    assert [*repository.diff(branch, branch).extents()] == []
    assert repository.diff(third, fourth).bytes_zero == 0, "what grows is zero without being told"


def test_a_diff_asks_for_two_manifests(
    repository: Repository, store: MemoryStore, lineage: dict[str, bytes], tmp_path: Path
) -> None:
    snapshots = [f"vol@{snapshot}" for snapshot in lineage]
    other = Repository(store, LocalState(tmp_path / "other"))
    other.diff(snapshots[0], snapshots[4])  # reads the catalog
    before = Counter(store.calls)
    other.diff(snapshots[1], snapshots[3])
    asked = store.calls - before
    assert asked["get"] == 2
    assert asked.keys() == {"get", "head"}
    before = Counter(store.calls)
    other.diff(snapshots[3], snapshots[0])
    assert (store.calls - before).keys() == {"head"}, "manifests are kept"


def test_two_volumes_have_nothing_to_compare(repository: Repository, tmp_path: Path) -> None:
    image = qemu.create(tmp_path / "vol.qcow2", MIB)
    one, other = (repository.snapshot(image, volume=name, pin=False).snapshot for name in ("one", "other"))
    with pytest.raises(UsageError, match="two snapshots of one volume"):
        repository.diff(one, other)
    with pytest.raises(NotFoundError):
        repository.diff(one, "f" * 32)


def test_usage_asks_for_each_manifest_once(
    repository: Repository, store: MemoryStore, lineage: dict[str, bytes], tmp_path: Path
) -> None:
    other = Repository(store, LocalState(tmp_path / "other"))
    other.snapshots()  # reads the catalog
    before = Counter(store.calls)
    told: list[tuple[str, int, int]] = []
    used = other.usage(progress=lambda *step: told.append(step))
    asked = store.calls - before
    assert asked["get"] == used.total.snapshots == len(lineage) == len(told)
    assert asked.keys() == {"folders", "head", "get"}
    assert told[-1][1] == told[-1][2]
    before = Counter(store.calls)
    assert other.usage("vol") == used
    assert (store.calls - before).keys() == {"head"}, "manifests are kept, one volume needs no listing"


def test_usage_of_all_is_the_sum(repository: Repository, store: MemoryStore, tmp_path: Path) -> None:
    image = qemu.create(tmp_path / "vol.qcow2", MIB)
    qemu.noise(image, 0, 3 * BLOCK)
    for volume in ("one", "two"):
        repository.snapshot(image, volume=volume, pin=False)
    emptied = repository.snapshot(image, volume="zero", pin=False).snapshot
    repository.delete([emptied])
    used = repository.usage()
    one, two, zero = used.volumes
    assert (one.bytes_logical, one.bytes_shared) == (3 * BLOCK, 0)
    assert (zero.bytes_logical, zero.bytes_freed) == (0, zero.bytes_stored)
    assert used.total.bytes_stored == one.bytes_stored + two.bytes_stored + zero.bytes_stored
    assert used.total.snapshots == 2
    repository.sweep()
    assert repository.usage("zero").total.compression is None


def test_usage_goes_on_without_a_damaged_volume(
    repository: Repository, store: MemoryStore, tmp_path: Path
) -> None:
    image = qemu.create(tmp_path / "vol.qcow2", MIB)
    bad, _ = (repository.snapshot(image, volume=name, pin=False).snapshot for name in ("bad", "good"))
    name = f"bad/manifests/{bad}-0"
    store.objects[name] = replace(store.objects[name], data=b"x" * 100)
    other = Repository(store, LocalState(tmp_path / "other"))
    assert [one.volume for one in other.usage().volumes] == ["good"]
    (error,) = other.left_out
    assert isinstance(error, DamagedError)
    with pytest.raises(DamagedError):
        other.usage("bad")


def test_usage_counts_again_when_a_snapshot_goes_meanwhile(
    repository: Repository, store: MemoryStore, tmp_path: Path
) -> None:
    image = qemu.create(tmp_path / "vol.qcow2", MIB)
    taken = [repository.snapshot(image).snapshot for _ in range(3)]
    other = Repository(store, LocalState(tmp_path / "other"))

    def meddle(phase: str, done: int, total: int) -> None:
        if len(repository.snapshots()) == 3:
            repository.delete([taken[2]])
            repository.sweep()

    assert other.usage(progress=meddle) == repository.usage()
    assert [one.snapshot for one in repository.snapshots()] == taken[:2]
