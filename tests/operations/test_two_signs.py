"""What deletes or builds upon asks the store for two independent signs, and believes none of them alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.errors import ConflictError, DamagedError, StoreError
from island_fast.formats.catalog import decode_record, encode_record
from island_fast.formats.keys import SnapshotNumbers
from island_fast.operations import sweep
from island_fast.repository.lineage import Lineage
from island_fast.repository.local_state import LocalState
from island_fast.stores.base import ObjectInfo
from tests.operations.conftest import check
from tests.support import qemu
from tests.support.memory_store import MemoryStore, Stored

MIB = 1 << 20
DAY = 24 * 3600.0


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "vol.qcow2", 64 * MIB, lazy_refcounts="on")
    qemu.noise(path, 0, 4 * MIB, 1)
    return path


@pytest.fixture
def other(store: MemoryStore, repository: Repository, image: Path, tmp_path: Path) -> Repository:
    """Another host, which adopted the volume and took a snapshot; the store lost the stop, a day passed."""
    repository.snapshot(image)
    moved = tmp_path / "moved.qcow2"
    shutil.copy(image, moved)
    other = Repository(store, LocalState(tmp_path / "other"))
    other.adopt("vol")
    qemu.noise(moved, 8 * MIB, MIB, 2)
    other.snapshot(moved, volume="vol")
    del store.objects["vol/catalog/000000-stop"]
    store.now += 2 * DAY
    return other


def again(store: MemoryStore, repository: Repository) -> Repository:
    """Another process of the same host."""
    return Repository(store, repository.state)


# The end of an epoch.


def test_a_former_owner_whose_stop_was_lost_sweeps_nothing(
    store: MemoryStore, repository: Repository, other: Repository
) -> None:
    before = dict(store.objects)
    for unknown in (False, True):
        with pytest.raises(ConflictError, match="nothing was done"):
            again(store, repository).sweep(grace=0, unknown=unknown)
    assert store.objects == before


def test_a_former_owner_whose_stop_was_lost_takes_and_deletes_nothing(
    store: MemoryStore, repository: Repository, other: Repository, image: Path
) -> None:
    before = dict(store.objects)
    host = again(store, repository)
    with pytest.raises(ConflictError, match="belongs to host"):
        host.snapshot(image, volume="vol")
    with pytest.raises(ConflictError):
        host.delete(["vol@latest"])
    assert store.objects == before
    assert {row.snapshot for row in host.snapshots()} == {row.snapshot for row in other.snapshots()}


def test_a_host_without_caches_finds_the_epoch_whose_stop_was_lost(
    store: MemoryStore, other: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryStore, "list", lambda self, prefix: iter(()))  # as late as can be
    lineage = Repository(store, LocalState(tmp_path / "third")).existing_lineage("vol")
    assert (lineage.epoch, len(lineage.state.live)) == (1, 2)


def test_a_snapshot_that_an_adoption_overtakes_whose_stop_is_denied_is_not_reported(
    store: MemoryStore, repository: Repository, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adoption comes just before the record is put, and HEAD never sees the stop."""
    repository.snapshot(image)
    real, peek = MemoryStore.put, MemoryStore.head

    def put(self: MemoryStore, name: str, parts: list[bytes]) -> None:
        if name == "vol/catalog/000000-00000002":
            monkeypatch.setattr(MemoryStore, "put", real)
            Repository(store, LocalState(tmp_path / "other")).adopt("vol")
        real(self, name, parts)

    monkeypatch.setattr(MemoryStore, "put", put)
    monkeypatch.setattr(
        MemoryStore, "peek", lambda self, name: None if name.endswith("-stop") else peek(self, name), False
    )
    qemu.noise(image, 0, MIB, 3)
    with pytest.raises(ConflictError, match="adopted by another host"):
        repository.snapshot(image)


def test_a_sweep_refuses_what_a_listing_shows_beyond_its_end(
    store: MemoryStore, repository: Repository, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = repository.snapshot(image).snapshot
    repository.snapshot(image)
    repository.delete([first])
    real = MemoryStore.list
    before = dict(store.objects)
    for beyond in ("000000-00000004", "000000-stop", "000001-00000000"):

        def shown(
            self: MemoryStore, prefix: str, name: str = f"vol/catalog/{beyond}"
        ) -> Iterator[ObjectInfo]:
            yield from real(self, prefix)
            if prefix == "vol/catalog/":
                yield ObjectInfo(name, 200, 0.0)

        with monkeypatch.context() as patch:
            patch.setattr(MemoryStore, "list", shown)
            assert repository.sweep() == []
        (error,) = repository.left_out
        assert isinstance(error, ConflictError)
        assert beyond in str(error)
        assert store.objects == before
    assert repository.sweep()[0].objects_removed == 1


@pytest.mark.parametrize("age", [0.0, 2 * DAY])
def test_a_sweep_asks_for_the_epoch_twice_and_once_for_each_doomed_object(
    store: MemoryStore, repository: Repository, image: Path, age: float
) -> None:
    """A sweep that only looked at the catalog's end made seven HEADs with a record to append, six without."""
    repository.snapshot(image)
    lineage = repository.lineage("vol")
    with pytest.raises(RuntimeError), lineage.files.registrations.register(_registration("d" * 32)):
        raise RuntimeError
    for number in range(5):
        store.put(f"vol/packs/{'d' * 32}/0-{number:08d}", [b"garbage"])
    store.now += 2 * DAY
    store.calls.clear()
    assert again(store, repository).sweep()[0].objects_removed == 5
    assert store.calls["head"] <= 6 + 2 + 5
    repository.delete([repository.snapshot(image).snapshot])
    store.now += 2 * DAY
    store.calls.clear()
    removed = again(store, repository).sweep(grace=age)[0].objects_removed
    assert removed
    assert store.calls["head"] <= 7 + 2 + (removed if age else 0)


# Garbage.


def _registration(snapshot: str) -> object:
    from island_fast.repository.local_state import Registration

    return Registration(snapshot, 0, None)


def test_what_others_stored_is_reported_and_goes_only_when_that_is_asked_for(
    store: MemoryStore, repository: Repository, image: Path
) -> None:
    repository.snapshot(image)
    strange = [
        f"vol/packs/{'c' * 32}/0-00000000",
        f"vol/packs/{'c' * 32}-0",
        f"vol/manifests/{'c' * 32}-0",
        "vol/manifests/README",
        "vol/packs/a/b/c/d",
    ]
    for name in strange:
        store.put(name, [b"of somebody else"])
    store.now += 2 * DAY
    for dry_run in (True, False):
        (swept,) = repository.sweep(grace=0, dry_run=dry_run)
        assert (swept.objects_removed, swept.objects_unknown, swept.bytes_unknown) == (0, 5, 80)
        assert {(step.action, step.object) for step in swept.steps} == {("keep", name) for name in strange}
    assert repository.sweep(unknown=True)[0].objects_removed == 5
    assert not store.objects.keys() & set(strange)


def test_a_store_that_lists_any_number_of_objects_costs_bounded_memory(
    store: MemoryStore, repository: Repository, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store of ten million took gigabytes."""
    monkeypatch.setattr(sweep, "_MOST", 3)
    repository.snapshot(image)
    for number in range(7):
        store.put(f"vol/packs/{'c' * 32}/0-{number:08d}", [b"of somebody else"])
    store.now += 2 * DAY
    (swept,) = repository.sweep()
    assert (swept.objects_unknown, swept.bytes_unknown, len(swept.steps)) == (7, 7 * 16, 3)
    removed = [repository.sweep(unknown=True)[0].objects_removed for _ in range(4)]
    assert removed == [3, 3, 1, 0]


def test_what_a_snapshot_of_this_host_left_is_garbage_when_its_registration_is_long_gone(
    store: MemoryStore, repository: Repository, image: Path
) -> None:
    """A PUT that was given up can arrive late, and a deletion can be undone by a server that was away."""
    taken = repository.snapshot(image).snapshot
    packs = {name: one for name, one in store.objects.items() if f"/packs/{taken}/" in name}
    qemu.noise(image, 0, 4 * MIB, 2)
    repository.snapshot(image)
    repository.delete([taken])
    repository.sweep()
    assert not store.objects.keys() & packs.keys()
    store.objects |= packs
    store.now += 2 * DAY
    assert again(store, repository).sweep()[0].objects_removed == len(packs)


def test_what_a_former_owner_left_is_reported_and_what_its_catalog_named_is_garbage(
    store: MemoryStore, repository: Repository, image: Path, tmp_path: Path
) -> None:
    taken = repository.snapshot(image).snapshot
    other = Repository(store, LocalState(tmp_path / "other"))
    other.adopt("vol")
    store.put(f"vol/packs/{'d' * 32}/0-00000000", [b"of a snapshot that was never finished"])
    store.put(f"vol/packs/{taken}/7-00000009", [b"of an attempt at one that was"])
    store.now += 2 * DAY
    (swept,) = other.sweep()
    assert (swept.objects_removed, swept.objects_unknown) == (1, 1)
    assert other.sweep(unknown=True)[0].objects_removed == 1


@pytest.mark.parametrize("answer", ["absent", "other size", "young"])
def test_a_listing_alone_removes_nothing(
    store: MemoryStore, repository: Repository, image: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    repository.snapshot(image)
    name = f"vol/packs/{'d' * 32}/0-00000000"
    with repository.lineage("vol").files.registrations.register(_registration("d" * 32)):
        store.put(name, [b"garbage"])
    real, infos = MemoryStore.head, {"absent": None, "other size": ObjectInfo(name, 8, 3 * DAY)}
    infos["young"] = ObjectInfo(name, 7, 60.0)
    store.now += 2 * DAY
    with monkeypatch.context() as patch:
        patch.setattr(MemoryStore, "head", lambda self, n: infos[answer] if n == name else real(self, n))
        assert repository.sweep()[0].objects_removed == 0
    assert repository.sweep()[0].objects_removed == 1


# A repository that is older than what this host knows.

DEEDS: dict[str, Callable[[Repository, Path], object]] = {
    "snapshot": lambda host, image: host.snapshot(image),
    "snapshot --full": lambda host, image: host.snapshot(image, full=True),
    "snapshot --no-pin": lambda host, image: host.snapshot(image, pin=False),
    "delete": lambda host, image: host.delete(["vol@latest"]),
    "adopt": lambda host, image: host.adopt("vol"),
    "sweep": lambda host, image: _swept(host),
}


def _swept(host: Repository) -> None:
    host.sweep()
    for error in host.left_out:
        raise error


def _of_the_same_size(name: str, data: bytes) -> bytes:
    """Return another record for the same name, as another copy of the repository can have it."""
    numbers = SnapshotNumbers()
    record, _ = decode_record(name, data, numbers)
    for later in range(1, 10_000):
        other, _ = encode_record(name, replace(record, time=record.time + later), numbers)
        if len(other) == len(data):
            return other
    raise AssertionError


@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.parametrize(
    "older", ["yesterday's copy", "newest record lost", "another record", "another record of the same size"]
)
def test_nothing_is_appended_to_a_repository_older_than_local_state(
    store: MemoryStore, repository: Repository, image: Path, deed: str, older: str
) -> None:
    repository.snapshot(image)
    yesterday = dict(store.objects)
    qemu.noise(image, 0, MIB, 2)
    repository.snapshot(image)
    today = dict(store.objects)
    newest = "vol/catalog/000000-00000002"
    if older == "yesterday's copy":
        store.objects = dict(yesterday)
    elif older == "newest record lost":
        del store.objects[newest]
    elif older == "another record":
        store.objects[newest] = Stored(today[newest].data + b" ", 0.0)
    else:
        store.objects[newest] = Stored(_of_the_same_size(newest, today[newest].data), 0.0)
    before = dict(store.objects)
    pins = qemu.info(image)["snapshots"]
    with pytest.raises(DamagedError, match="put the right copy back") as raised:
        DEEDS[deed](again(store, repository), image)
    assert raised.value.exit_code == 6
    assert store.objects == before
    assert qemu.info(image)["snapshots"] == pins
    store.objects = today
    DEEDS[deed](again(store, repository), image)


def test_the_way_out_of_an_older_repository_goes_on_with_what_is_there(
    store: MemoryStore, repository: Repository, image: Path, tmp_path: Path
) -> None:
    repository.snapshot(image)
    yesterday = dict(store.objects)
    qemu.noise(image, 0, MIB, 2)
    repository.snapshot(image)
    store.objects = yesterday
    shutil.rmtree(repository.lineage("vol").files.folder / "cache" / "catalog")
    again(store, repository).adopt("vol")
    taken = again(store, repository).snapshot(image)
    check(again(store, repository), taken.snapshot, qemu.content(image), tmp_path)
    assert not Repository(store, LocalState(tmp_path / "fresh")).verify(sample=1.0).damages


def test_the_way_out_of_a_lost_record_puts_the_catalog_right(
    store: MemoryStore, repository: Repository, image: Path, tmp_path: Path
) -> None:
    repository.snapshot(image)
    qemu.noise(image, 0, MIB, 2)
    repository.snapshot(image)
    del store.objects["vol/catalog/000000-00000002"]
    assert again(store, repository).verify(heal=True)
    taken = again(store, repository).snapshot(image)
    check(again(store, repository), taken.snapshot, qemu.content(image), tmp_path)


@pytest.fixture
def copies(store: MemoryStore, repository: Repository, image: Path) -> tuple[dict[str, Stored], str]:
    """Two copies of a repository that this host used in turn: the one that it left, and what only it holds.

    The store has the other one, which the host goes on with as it was told to.
    """
    repository.snapshot(image)
    began = dict(store.objects)
    qemu.noise(image, 0, MIB, 2)
    taken = repository.snapshot(image).snapshot
    left, store.objects = store.objects, began
    shutil.rmtree(repository.lineage("vol").files.folder / "cache" / "catalog")
    again(store, repository).adopt("vol")
    again(store, repository).snapshot(image, full=True)
    return left, taken


def _pending(store: MemoryStore) -> bytes:
    """Return a record that was about to be appended to what the store holds."""
    name, numbers = "vol/catalog/000001-00000001", SnapshotNumbers()
    record, _ = decode_record(name, store.objects[name].data, numbers)
    return encode_record("vol/catalog/000001-00000009", replace(record, number=9), numbers)[0]


def test_healing_does_not_replace_a_history_that_this_host_does_not_know(
    store: MemoryStore, repository: Repository, copies: tuple[dict[str, Stored], str], tmp_path: Path
) -> None:
    """What the state knows and the store lacks could be repaired from the image. None of it may be."""
    pending = repository.lineage("vol").files.pending
    pending.add("000001-00000009", _pending(store))
    store.objects, taken = copies
    before = dict(store.objects)
    found = again(store, repository).verify(heal=True)
    assert found.damages
    assert not any(one.mended for one in found.damages)
    assert any("another copy of the repository" in one.remedy for one in found.damages)
    assert store.objects == before
    assert pending.all(), "it can still be settled where it belongs"
    fresh = Repository(store, LocalState(tmp_path / "fresh"))
    assert taken in {one.snapshot for one in fresh.snapshots()}


def test_a_copy_that_went_on_by_itself_is_named_with_the_way_out(
    store: MemoryStore, repository: Repository, copies: tuple[dict[str, Stored], str], image: Path
) -> None:
    """Its records do not follow those that this host knows, which is no damage of theirs."""
    store.objects, _ = copies
    other = Repository(store, LocalState(repository.state.root.with_name("other")))
    other.adopt("vol")
    for _ in range(2):
        other.snapshot(image, volume="vol", full=True)
    with pytest.raises(DamagedError, match=r"put the right copy back.*remove .*cache/catalog"):
        again(store, repository).snapshots("vol")
    shutil.rmtree(repository.lineage("vol").files.folder / "cache" / "catalog")
    assert len(again(store, repository).snapshots("vol")) == 4


@pytest.mark.parametrize("way", ["adopt", "heal"])
def test_a_record_of_unknown_outcome_does_not_lock_an_older_copy(
    store: MemoryStore,
    repository: Repository,
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    """What it follows is gone for good, so it can never be settled."""
    repository.snapshot(image)
    yesterday = dict(store.objects)
    qemu.noise(image, 0, MIB, 2)
    repository.snapshot(image)
    with monkeypatch.context() as patch:
        patch.setattr(Lineage, "_send", lambda *_, **__: (_ for _ in ()).throw(StoreError("lost")))
        with pytest.raises(StoreError):
            repository.snapshot(image)
    store.objects = yesterday
    files = repository.lineage("vol").files
    with pytest.raises(DamagedError, match="put the right copy back"):
        again(store, repository).adopt("vol")
    assert files.pending.all(), "nothing is given up before the way out is taken"
    if way == "adopt":
        shutil.rmtree(files.folder / "cache" / "catalog")
        again(store, repository).adopt("vol")
    else:
        again(store, repository).verify(heal=True)
    taken = again(store, repository).snapshot(image)
    check(again(store, repository), taken.snapshot, qemu.content(image), tmp_path)
    assert not Repository(store, LocalState(tmp_path / "fresh")).verify(taken.snapshot, sample=1.0).damages


def test_what_a_second_copy_held_once_is_not_reported_as_there(
    store: MemoryStore, repository: Repository, image: Path
) -> None:
    """There is nothing to send, as far as this host remembers the far repository."""
    far = MemoryStore(location="far")
    repository.snapshot(image)
    repository.copy(Repository(far, repository.state, create=True))
    yesterday = dict(far.objects)
    qemu.noise(image, 0, MIB, 2)
    repository.snapshot(image)
    repository.copy(Repository(far, repository.state))
    far.objects = yesterday
    assert repository.copy(Repository(far, repository.state)) == []
    assert "put the right copy back" in str(repository.left_out[0])


def test_nothing_inherits_from_a_snapshot_whose_manifest_is_gone(
    store: MemoryStore, repository: Repository, image: Path, tmp_path: Path
) -> None:
    taken = repository.snapshot(image).snapshot
    name = f"vol/manifests/{taken}-0"
    stored = store.objects.pop(name)
    before = dict(store.objects)
    for other in (None, Stored(stored.data[:-1], 0.0)):
        if other:
            before[name] = store.objects[name] = other
        with pytest.raises(DamagedError, match="--heal"):
            again(store, repository).snapshot(image)
        assert store.objects == before
    assert again(store, repository).verify(heal=True)
    assert store.objects[name].data == stored.data
    again(store, repository).snapshot(image)


def test_a_copy_does_not_inherit_from_one_whose_manifest_is_gone(
    store: MemoryStore, repository: Repository, image: Path, tmp_path: Path
) -> None:
    far = MemoryStore(location="far")
    first = repository.snapshot(image).snapshot
    repository.copy(Repository(far, repository.state, create=True))
    qemu.noise(image, 0, MIB, 2)
    repository.snapshot(image)
    far.objects = {name: one for name, one in far.objects.items() if f"/manifests/{first}" not in name}
    before = dict(far.objects)
    assert not [one for one in repository.copy(Repository(far, repository.state)) if one.copied]
    assert isinstance(repository.left_out[0], DamagedError)
    assert far.objects == before


@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_full_scan_on_request_asks_for_each_pack_it_inherits_from(
    store: MemoryStore, repository: Repository, image: Path, tmp_path: Path, how: str
) -> None:
    """This host holds the indexes of the packs, so digests alone would say that nothing is to be sent."""
    repository.snapshot(image)
    name = next(name for name in store.objects if "/packs/" in name)
    stored = store.objects.pop(name)
    if how == "cut":
        store.objects[name] = Stored(stored.data[: len(stored.data) // 2], 0.0)
    taken = again(store, repository).snapshot(image, full=True)
    fresh = Repository(store, LocalState(tmp_path / "fresh"))
    check(fresh, taken.snapshot, qemu.content(image), tmp_path)


# Adoption.


def test_an_adoption_does_not_end_below_what_a_listing_shows(
    store: MemoryStore, repository: Repository, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HEAD denies the newest record as often as it is asked."""
    repository.snapshot(image)
    other = Repository(store, LocalState(tmp_path / "other"))
    other.snapshots()
    taken = repository.snapshot(image).snapshot
    real = MemoryStore.head
    newest = "vol/catalog/000000-00000002"
    monkeypatch.setattr(MemoryStore, "head", lambda self, name: None if name == newest else real(self, name))
    other.adopt("vol")
    assert taken in {row.snapshot for row in other.snapshots()}


def test_an_adoption_is_refused_if_what_is_listed_cannot_be_read(
    store: MemoryStore, repository: Repository, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.snapshot(image)
    other = Repository(store, LocalState(tmp_path / "other"))
    other.snapshots()
    repository.snapshot(image)
    newest = store.objects.pop("vol/catalog/000000-00000002")
    before = dict(store.objects)
    real = MemoryStore.list

    def shown(self: MemoryStore, prefix: str) -> Iterator[ObjectInfo]:
        yield from real(self, prefix)
        if prefix == "vol/catalog/":
            yield ObjectInfo("vol/catalog/000000-00000002", len(newest.data), 0.0)

    monkeypatch.setattr(MemoryStore, "list", shown)
    with pytest.raises(DamagedError, match="lists record vol/catalog/000000-00000002"):
        other.adopt("vol")
    assert store.objects == before, "not even the stop was put, which would end the owner's work"


def test_an_adoption_whose_stop_was_lost_before_it_finished_is_given_up(
    store: MemoryStore, repository: Repository, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner can have gone on meanwhile; what it took must not vanish when the adopter comes back."""
    repository.snapshot(image)
    other = Repository(store, LocalState(tmp_path / "other"))
    with monkeypatch.context() as patch:
        patch.setattr(Lineage, "_send", lambda *_, **__: (_ for _ in ()).throw(ConnectionError))
        with pytest.raises(ConnectionError):
            other.adopt("vol")
    del store.objects["vol/catalog/000000-stop"]
    taken = again(store, repository).snapshot(image).snapshot
    found = Repository(store, LocalState(tmp_path / "other"))
    assert taken in {row.snapshot for row in found.snapshots()}
    assert "vol/catalog/000001-00000000" not in store.objects
    again(store, repository).snapshot(image)
