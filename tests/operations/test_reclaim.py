"""Deleting frees exactly what nobody else needs, and a sweep really removes it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.errors import ConflictError, DamagedError, NotFoundError, RefusedError, StoreError
from island_fast.formats.catalog import CHECKPOINT_EVERY
from island_fast.operations.restore import RestoreTarget, restore
from island_fast.progress import silent
from island_fast.repository.local_state import LocalState, Registration
from tests.operations.conftest import check, let_any_image_in
from tests.support import qemu
from tests.support.memory_store import MemoryStore

MIB = 1 << 20
DAY = 24 * 3600.0


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "vol.qcow2", 64 * MIB, lazy_refcounts="on")
    qemu.noise(path, 0, 4 * MIB, 1)
    return path


def size(store: MemoryStore) -> int:
    """Bytes of all packs and manifests."""
    return sum(len(o.data) for name, o in store.objects.items() if "/catalog/" not in name)


def check_all(repository: Repository, truth: dict[str, bytes], folder: Path) -> None:
    assert {s.snapshot for s in repository.snapshots()} == set(truth)
    for snapshot, content in truth.items():
        check(repository, snapshot, content, folder)


def test_a_delete_and_a_sweep_free_what_was_told(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    first = repository.snapshot(image)
    qemu.noise(image, 0, MIB, 2)
    middle = repository.snapshot(image)
    qemu.noise(image, 0, MIB, 3)
    last = repository.snapshot(image)
    before = size(store)
    (planned,) = repository.delete([middle.snapshot], dry_run=True)
    assert len(repository.snapshots()) == 3
    (told,) = repository.delete([middle.snapshot])
    assert told == planned
    assert told.bytes_freed == told.bytes_unreferenced + pack_overhead(store, middle.snapshot)
    (swept,) = repository.sweep()
    assert before - size(store) == told.bytes_freed == swept.bytes_freed
    assert swept.objects_removed == 2
    assert {s.snapshot for s in repository.snapshots()} == {first.snapshot, last.snapshot}


def pack_overhead(store: MemoryStore, snapshot: str) -> int:
    """Bytes of a snapshot's packs that are no block's: header and index."""
    packs = [o.data for name, o in store.objects.items() if f"/packs/{snapshot}/" in name]
    return sum(len(data) % 65536 for data in packs)  # noise is stored as it is: whole blocks


def test_a_pack_more_than_half_dead_is_repacked_under_its_slot_numbers(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    first = repository.snapshot(image)
    qemu.noise(image, 0, 3 * MIB, 2)
    second = repository.snapshot(image)
    content = qemu.content(image)
    manifest = next(o.data for n, o in store.objects.items() if f"/manifests/{second.snapshot}" in n)
    before = size(store)
    (told,) = repository.delete([first.snapshot])
    (swept,) = repository.sweep()
    assert (swept.packs_repacked, swept.objects_removed) == (1, 2)
    assert before - size(store) == told.bytes_freed == swept.bytes_freed
    assert told.bytes_unreferenced >= 3 * MIB
    assert manifest in [o.data for o in store.objects.values()], "manifests stay as they are"
    check_all(repository, {second.snapshot: content}, tmp_path)
    assert repository.sweep()[0].objects_removed == 0
    qemu.io(image, qemu.write(10 * MIB, 65536, 7))
    third = repository.snapshot(image)
    repository.delete([second.snapshot])
    repository.sweep()
    check_all(repository, {third.snapshot: qemu.content(image)}, tmp_path)


def test_branch_delete_delete_loses_nothing(repository: Repository, image: Path, tmp_path: Path) -> None:
    """A, then B and C both from A; delete A, delete B: C keeps every block."""
    a = repository.snapshot(image)
    other = tmp_path / "other.qcow2"
    repository.restore(a.snapshot, other)
    qemu.noise(image, MIB, 65536, 2)
    b = repository.snapshot(image)
    qemu.noise(other, 2 * MIB, 65536, 3)
    let_any_image_in(repository)
    c = repository.snapshot(other)
    assert (b.parent, c.parent) == (a.snapshot, a.snapshot)
    repository.delete([a.snapshot])
    assert [s.parent for s in repository.snapshots()] == [None, None]
    repository.delete([b.snapshot])
    repository.sweep()
    check_all(repository, {c.snapshot: qemu.content(other)}, tmp_path)


def test_the_last_snapshot_takes_everything_with_it(
    repository: Repository, store: MemoryStore, image: Path
) -> None:
    taken = [repository.snapshot(image).snapshot for _ in range(3)]
    repository.delete(taken)
    repository.sweep()
    assert size(store) == len(store.objects["repository"].data)
    assert repository.snapshots() == []
    assert repository.snapshot(image).rule == "full-scan"


def test_what_a_crash_left_goes_after_the_grace_and_not_before(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    repository.snapshot(image)
    lost = "vol/packs/" + "c" * 32 + "/0-00000000"
    store.put(lost, [b"left by a crash"])
    assert repository.sweep()[0].objects_removed == 0
    store.now += DAY - 1
    assert repository.sweep(dry_run=True)[0].objects_removed == 0
    store.now += 2
    assert repository.sweep()[0].objects_removed == 0, "nothing says that this host left it"
    assert repository.sweep(dry_run=True, unknown=True)[0].objects_removed == 1
    files = LocalState(tmp_path / "state").lineage(repository.id, "vol")
    with files.registrations.register(Registration("c" * 32, 0, None)):
        assert repository.sweep(unknown=True)[0].objects_removed == 0, "a running snapshot's objects are live"
    assert repository.sweep()[0].objects_removed == 1
    assert lost not in store.objects


def test_a_grace_keeps_young_objects(repository: Repository, store: MemoryStore, image: Path) -> None:
    gone = repository.snapshot(image)
    repository.snapshot(image)
    repository.delete([gone.snapshot])
    assert repository.sweep(grace=10)[0].objects_removed == 0
    store.now += 10
    assert repository.sweep(grace=10)[0].objects_removed == 1


def test_the_base_of_a_running_snapshot_cannot_be_deleted(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    base = repository.snapshot(image)
    files = LocalState(tmp_path / "state").lineage(repository.id, "vol")
    with (
        files.registrations.register(Registration("d" * 32, 0, base.snapshot)),
        pytest.raises(RefusedError, match="in progress"),
    ):
        repository.delete([base.snapshot])
    repository.delete([base.snapshot])


def test_a_restore_follows_a_pack_that_was_repacked_meanwhile(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    first = repository.snapshot(image)
    qemu.noise(image, 0, 3 * MIB, 2)
    second = repository.snapshot(image)
    found = repository.find(second.snapshot)
    manifest = found.lineage.manifest(found.row)
    repository.delete([first.snapshot])
    repository.sweep()
    target = tmp_path / "late.raw"
    restore(found, manifest, RestoreTarget(target, "raw", pin=False), silent)
    assert target.read_bytes() == qemu.content(image)


def test_a_restore_whose_snapshot_is_deleted_says_so(
    repository: Repository, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = repository.snapshot(image)
    found = repository.find(only.snapshot)
    other = Repository(repository.store, repository.state)
    other.delete([only.snapshot])
    other.sweep()
    monkeypatch.setattr(repository, "find", lambda _: found)
    with pytest.raises(NotFoundError, match="was deleted while it was restored"):
        repository.restore(only.snapshot, tmp_path / "late.raw", image_format="raw")


@pytest.mark.parametrize("kind", ["packs", "manifests"])
def test_damage_is_named_and_nothing_is_written(
    kind: str, store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    taken = Repository(store, LocalState(tmp_path / "one"), create=True).snapshot(image)
    name = next(n for n in store.objects if f"/{kind}/" in n)
    data = bytearray(store.objects[name].data)
    data[len(data) // 2] ^= 1
    store.objects[name] = type(store.objects[name])(bytes(data), 0.0)
    reader = Repository(store, LocalState(tmp_path / "two"))  # without the first one's caches
    with pytest.raises(DamagedError, match=kind):
        reader.restore(taken.snapshot, tmp_path / "out.qcow2")
    assert not (tmp_path / "out.qcow2").exists()


def test_a_snapshot_whose_own_blocks_are_whole_is_restored_from_a_damaged_pack(
    repository: Repository, store: MemoryStore, tmp_path: Path
) -> None:
    raw = tmp_path / "vol.raw"
    raw.write_bytes(random.Random(1).randbytes(8 * 65536))
    first = repository.snapshot(raw, image_format="raw")
    with open(raw, "r+b") as file:
        file.write(b"x" * 65536)
    second = repository.snapshot(raw, image_format="raw")  # needs seven blocks of eight of the first pack
    name = f"vol/packs/{first.snapshot}/0-00000000"
    data = bytearray(store.objects[name].data)
    data[-8 * 65536 + 5] ^= 1  # in the block that only the first needs
    store.objects[name] = type(store.objects[name])(bytes(data), 0.0)
    reader = Repository(store, LocalState(tmp_path / "two"))
    check(reader, second.snapshot, raw.read_bytes(), tmp_path)
    with pytest.raises(DamagedError, match="checksum differs"):
        reader.restore(first.snapshot, tmp_path / "out.raw", image_format="raw")


def test_a_hole_in_the_catalog_refuses_deletes(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    for _ in range(4):
        repository.snapshot(image)
    del store.objects["vol/catalog/000000-00000002"]
    fresh = Repository(store, LocalState(tmp_path / "fresh"))
    with pytest.raises(DamagedError, match="hole"):
        fresh.adopt("vol")


def test_a_long_catalog_is_read_from_its_checkpoint(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    taken = [repository.snapshot(image).snapshot for _ in range(2 * CHECKPOINT_EVERY + 3)]
    fresh = Repository(store, LocalState(tmp_path / "fresh"))
    store.calls.clear()
    assert [s.snapshot for s in fresh.snapshots("vol")] == taken
    last = len(taken)
    records = last % CHECKPOINT_EVERY + 1
    assert store.calls["get"] == records
    assert store.calls["head"] <= records + 1 + 4  # each of them, the confirmed end, and the way to it


def test_a_delete_reads_the_neighbours_only(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    counts = []
    for length in (3, 30):
        while len(repository.snapshots()) < length:
            qemu.noise(image, 0, 65536, len(repository.snapshots()))
            repository.snapshot(image)
        cold = Repository(store, LocalState(tmp_path / f"cold{length}"))
        cold.adopt("vol")
        store.calls.clear()
        row = cold.snapshots()[-2]
        cold.delete([row.snapshot])
        counts.append((store.calls["get"], store.calls["get_ranges"], store.calls["put"]))
        repository.adopt("vol")
    assert counts[0] == counts[1]


def test_a_restore_asks_for_each_object_once_whatever_the_depth(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    for step in range(20):
        qemu.noise(image, step * MIB, MIB, step)
        taken = repository.snapshot(image)
    told = repository.restore(taken.snapshot, tmp_path / "deep.qcow2")
    live_packs = len([n for n in store.objects if "/packs/" in n])
    assert told.objects_read <= live_packs + 1
    assert told.bytes_read <= 1.05 * size(store)


def test_a_range_that_comes_damaged_is_fetched_once_more(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = repository.snapshot(image)
    qemu.noise(image, 0, 3 * MIB, 2)  # of the first pack less than half is needed now
    second = repository.snapshot(image)
    real, spoilt = MemoryStore.get_ranges, []

    def get_ranges(self: MemoryStore, name: str, ranges: list[tuple[int, int]]) -> list[memoryview]:
        found = real(self, name, ranges)
        if first.snapshot in name and not spoilt and sum(n for _, n in ranges) > 65536:
            spoilt.append(name)
            found[0] = memoryview(bytes(found[0].nbytes))
        return found

    monkeypatch.setattr(MemoryStore, "get_ranges", get_ranges)
    target = tmp_path / "out.raw"
    repository.restore(second.snapshot, target, image_format="raw")
    assert spoilt
    assert target.read_bytes() == qemu.content(image)


def test_a_delete_that_is_settled_later_keeps_the_pin_as_base(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = repository.snapshot(image)
    qemu.noise(image, 0, MIB, 2)
    second = repository.snapshot(image)
    real = MemoryStore.put

    def put(self: MemoryStore, name: str, parts: object) -> None:
        real(self, name, parts)  # type: ignore[arg-type]
        raise StoreError("the answer was lost")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryStore, "put", put)
        with pytest.raises(StoreError):
            repository.delete([second.snapshot])
    third = repository.snapshot(image)
    assert (third.rule, third.parent, third.blocks_changed) == ("table-diff", first.snapshot, 16)
    assert {s.snapshot for s in repository.snapshots()} == {first.snapshot, third.snapshot}


def test_a_long_lived_repository_sees_what_another_process_did(
    repository: Repository, store: MemoryStore, image: Path
) -> None:
    first = repository.snapshot(image)
    assert repository.find("vol@latest").row.id == first.snapshot
    other = Repository(store, repository.state)
    second = other.snapshot(image)
    assert [one.row.id for one in repository.find_all(["vol@latest", first.snapshot])] == [
        second.snapshot,
        first.snapshot,
    ]
    other.delete([first.snapshot])
    with pytest.raises(NotFoundError):
        repository.find_all([second.snapshot, first.snapshot])


def test_snapshots_found_together_share_the_lineage_of_their_volume(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    taken = [repository.snapshot(image).snapshot for _ in range(3)]
    other = repository.snapshot(qemu.create(tmp_path / "other.qcow2", MIB)).snapshot
    found = repository.find_all([f"vol@{taken[0]}", other, taken[1][:30], "vol@latest", taken[0]])
    assert [one.row.id for one in found] == [taken[0], other, taken[1], taken[2], taken[0]]
    assert len({id(one.lineage) for one in found}) == 2


def test_what_only_reads_makes_no_writer_id(repository: Repository, image: Path, tmp_path: Path) -> None:
    taken = repository.snapshot(image)
    state = LocalState(tmp_path / "elsewhere")
    reader = Repository(repository.store, state)
    reader.delete([taken.snapshot], dry_run=True)
    reader.verify(taken.snapshot)
    reader.restore(taken.snapshot, tmp_path / "target.qcow2")
    assert not (state.root / "writer").exists()
    with pytest.raises(ConflictError):
        reader.delete([taken.snapshot])
    assert (state.root / "writer").exists()
