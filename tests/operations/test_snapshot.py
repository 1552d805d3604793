"""What a snapshot costs, which rule it uses, and what a failure leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.dirtymap import DirtyMap
from island_fast.errors import (
    ConflictError,
    ImageInUseError,
    IslandError,
    NotFoundError,
    RefusedError,
    StoreError,
    UsageError,
)
from island_fast.repository.local_state import LocalState
from island_fast.results import SnapshotTaken
from tests.operations.conftest import PACK
from tests.support import qemu
from tests.support.daemon import StorageDaemon
from tests.support.memory_store import MemoryStore

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "vol.qcow2", 64 * MIB, lazy_refcounts="on")
    qemu.io(path, qemu.write(0, 5 * MIB, 1), qemu.write(20 * MIB, MIB, 2))
    return path


def restored(repository: Repository, reference: str, tmp_path: Path) -> bytes:
    target = tmp_path / "restored.raw"
    repository.restore(reference, target, image_format="raw")
    data = target.read_bytes()
    target.unlink()
    return data


def pins(image: Path) -> list[str]:
    lines = qemu.run("qemu-img", "snapshot", "-l", image).splitlines()[2:]
    return [line.split()[1] for line in lines]


def test_the_second_snapshot_of_an_unchanged_volume_reads_a_sample_and_writes_two_objects(
    repository: Repository, store: MemoryStore, image: Path
) -> None:
    first = repository.snapshot(image)
    before = set(store.objects)
    second = repository.snapshot(image)
    assert second.rule == "table-diff"
    assert (second.blocks_candidate, second.blocks_changed) == (0, 0)
    assert 0 < second.bytes_read <= second.blocks_sampled * 65536 <= 32 * 65536
    written = sorted(set(store.objects) - before)
    assert [name.split("/")[1] for name in written] == ["catalog", "manifests"]
    assert second.objects_written == 2
    assert second.parent == first.snapshot


def test_work_follows_what_changed(repository: Repository, image: Path) -> None:
    first = repository.snapshot(image)
    assert (first.rule, first.blocks_candidate, first.blocks_changed) == ("full-scan", 96, 96)
    assert first.bytes_read == 6 * MIB
    qemu.io(image, qemu.write(MIB, 65536, 9), qemu.write(40 * MIB, 2 * 65536, 9))
    second = repository.snapshot(image)
    assert (second.rule, second.blocks_candidate, second.blocks_changed) == ("table-diff", 3, 3)
    assert 3 * 65536 < second.bytes_read <= (3 + second.blocks_sampled) * 65536


def test_a_rewrite_with_the_same_bytes_is_read_and_not_sent(repository: Repository, image: Path) -> None:
    repository.snapshot(image)
    qemu.io(image, qemu.write(0, MIB, 1))
    again = repository.snapshot(image)
    assert (again.blocks_candidate, again.blocks_changed, again.objects_written) == (16, 0, 2)


def test_zeros_written_over_data_are_stated_and_not_sent(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    repository.snapshot(image)
    qemu.io(image, qemu.write(0, MIB, 0), qemu.discard(2 * MIB, MIB))
    told = repository.snapshot(image)
    assert (told.blocks_changed, told.objects_written) == (32, 2)
    data = restored(repository, "vol@latest", tmp_path)
    assert data[:MIB] == bytes(MIB)
    assert data[2 * MIB : 3 * MIB] == bytes(MIB)
    assert data[MIB : 2 * MIB] == b"\1" * MIB


def test_one_pin_stays_and_it_is_the_newest(repository: Repository, image: Path) -> None:
    for _ in range(3):
        taken = repository.snapshot(image)
        assert pins(image) == [f"island-{repository.id[:8]}.vol-{taken.snapshot}"]
    qemu.check(image)


def test_without_a_pin_the_image_is_left_as_it_is(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    before = image.read_bytes()
    first = repository.snapshot(image, pin=False)
    second = repository.snapshot(image, pin=False)
    assert image.read_bytes() == before
    assert (second.rule, second.blocks_changed, second.objects_written) == ("full-scan", 0, 2)
    assert second.parent == first.snapshot
    assert restored(repository, second.snapshot, tmp_path) == qemu.content(image)
    third = repository.snapshot(image)
    assert third.reason.startswith(f"snapshot {second.snapshot[:8]} was taken without a pin")
    qemu.snapshot_delete(image, pins(image)[0])
    lost = repository.snapshot(image).reason
    assert lost == f"the pinned base of snapshot {third.snapshot[:8]} is not in the image"


def test_a_full_scan_can_be_asked_for(repository: Repository, image: Path) -> None:
    repository.snapshot(image)
    full = repository.snapshot(image, full=True)
    assert (full.rule, full.reason) == ("full-scan", "a full scan was requested")
    assert (full.blocks_candidate, full.blocks_changed) == (96, 0)


def test_an_internal_snapshot_of_the_users_own_is_stored(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    qemu.snapshot_create(image, "mine")
    qemu.io(image, qemu.write(0, MIB, 7))
    qemu.snapshot_create(image, "later")
    first = repository.snapshot(image, at="mine")
    second = repository.snapshot(image, at="later")
    assert (first.rule, second.rule, second.blocks_candidate) == ("full-scan", "table-diff", 16)
    assert restored(repository, first.snapshot, tmp_path) == qemu.content(image, "mine")
    assert restored(repository, second.snapshot, tmp_path) == qemu.content(image, "later")
    assert pins(image) == ["mine", "later"]
    with pytest.raises(NotFoundError, match="no internal snapshot"):
        repository.snapshot(image, at="nobody's")


def test_a_version_2_image_is_scanned_and_not_pinned(repository: Repository, tmp_path: Path) -> None:
    old = qemu.create(tmp_path / "old.qcow2", 8 * MIB, compat="0.10")
    qemu.io(old, qemu.write(0, MIB, 3))
    for _ in range(2):
        taken = repository.snapshot(old)
        assert taken.rule == "full-scan"
        assert "version 2" in taken.reason
    assert pins(old) == []
    assert restored(repository, "old@latest", tmp_path) == qemu.content(old)


def test_a_base_made_again_under_its_name_is_not_trusted(repository: Repository, image: Path) -> None:
    repository.snapshot(image)
    (pin,) = pins(image)
    qemu.snapshot_delete(image, pin)
    qemu.io(image, qemu.write(0, MIB, 8))
    qemu.snapshot_create(image, pin)
    qemu.io(image, qemu.write(MIB, MIB, 8))
    taken = repository.snapshot(image)
    assert taken.rule == "full-scan"
    assert "pinned base" in taken.reason
    assert taken.blocks_changed == 32


def test_a_deleted_newest_snapshots_pin_still_serves(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    first = repository.snapshot(image)
    qemu.io(image, qemu.write(0, MIB, 5))
    gone = repository.snapshot(image)
    repository.delete([gone.snapshot])
    repository.sweep(grace=0)
    qemu.io(image, qemu.write(30 * MIB, 65536, 6))
    taken = repository.snapshot(image)
    assert (taken.rule, taken.parent) == ("table-diff", first.snapshot)
    assert taken.blocks_candidate == 16 + 1
    assert restored(repository, taken.snapshot, tmp_path) == qemu.content(image)


def test_a_restored_volume_goes_on_incrementally(repository: Repository, image: Path, tmp_path: Path) -> None:
    first = repository.snapshot(image)
    qemu.io(image, qemu.write(0, MIB, 5))
    repository.snapshot(image)
    back = tmp_path / "back.qcow2"
    repository.restore(first.snapshot, back)
    qemu.check(back)
    qemu.io(back, qemu.write(MIB, 65536, 5))
    branch = repository.snapshot(back)
    assert (branch.volume, branch.parent, branch.rule) == ("vol", first.snapshot, "table-diff")
    assert branch.blocks_candidate == 1
    assert restored(repository, branch.snapshot, tmp_path) == qemu.content(back)


def test_the_wrong_image_is_kept_out_of_a_volume(repository: Repository, image: Path, tmp_path: Path) -> None:
    repository.snapshot(image)
    (tmp_path / "other").mkdir()
    stranger = qemu.create(tmp_path / "other" / "vol.qcow2", MIB)
    for volume in (None, "vol"):
        with pytest.raises(RefusedError, match="island adopt vol"):
            repository.snapshot(stranger, volume=volume)
    assert repository.snapshot(stranger, volume="another").volume == "another"
    repository.adopt("vol")
    assert repository.snapshot(stranger, volume="vol").volume == "vol"


def test_a_moved_image_is_known_by_its_pin(repository: Repository, image: Path) -> None:
    repository.snapshot(image)
    moved = image.rename(image.with_name("moved.qcow2"))
    assert repository.snapshot(moved).volume == "vol"


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 129, "a b", "repository"])
def test_a_name_that_is_none_is_refused(repository: Repository, image: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a volume"):
        repository.snapshot(image, volume=name or "ä")


def test_another_hosts_volume_needs_adoption(store: MemoryStore, image: Path, tmp_path: Path) -> None:
    here = Repository(store, LocalState(tmp_path / "one"), create=True)
    first = here.snapshot(image)
    there = Repository(store, LocalState(tmp_path / "two"))
    with pytest.raises(ConflictError, match="island adopt vol"):
        there.snapshot(image, volume="vol")
    with pytest.raises(ConflictError, match=r"belongs to host .* \(another user, or another ISLAND_STATE\)"):
        there.delete([first.snapshot])
    assert there.adopt("vol").epoch == 1
    second = there.snapshot(image, volume="vol")
    assert (second.rule, second.parent) == ("table-diff", first.snapshot)
    with pytest.raises(ConflictError, match="belongs to host"):
        here.snapshot(image)
    assert [s.snapshot for s in here.snapshots()] == [first.snapshot, second.snapshot]


def test_losing_local_state_loses_nothing(store: MemoryStore, image: Path, tmp_path: Path) -> None:
    first = Repository(store, LocalState(tmp_path / "one"), create=True).snapshot(image)
    qemu.io(image, qemu.write(0, 65536, 5))
    again = Repository(store, LocalState(tmp_path / "two"))
    again.adopt("vol")
    second = again.snapshot(image)
    assert (second.parent, second.rule, second.blocks_changed) == (first.snapshot, "table-diff", 1)


def test_an_image_in_use_needs_its_monitor(repository: Repository, image: Path, tmp_path: Path) -> None:
    with StorageDaemon(image) as daemon:
        with pytest.raises(ImageInUseError, match="--qmp"):
            repository.snapshot(image)
        with pytest.raises(ImageInUseError):
            repository.snapshot(image, pin=False)
        daemon.io(qemu.write(0, MIB, 4))
        first = repository.snapshot(image, qmp=daemon.qmp_socket)
        daemon.io(qemu.write(MIB, MIB, 4))
        second = repository.snapshot(image, qmp=daemon.qmp_socket)
        daemon.io(qemu.write(2 * MIB, MIB, 4))
    assert (first.rule, second.rule, second.blocks_candidate) == ("full-scan", "table-diff", 16)
    data = restored(repository, second.snapshot, tmp_path)
    assert (data[: 2 * MIB], data[2 * MIB : 3 * MIB]) == (b"\4" * 2 * MIB, b"\1" * MIB)
    qemu.check(image)


def spoil(store: MemoryStore, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """Let every put of a name with `word` in it fail as an unreachable store does."""
    real = MemoryStore.put

    def put(self: MemoryStore, name: str, parts: object) -> None:
        if word in name:
            raise StoreError("the store does not answer")
        real(self, name, parts)  # type: ignore[arg-type]

    monkeypatch.setattr(MemoryStore, "put", put)


@pytest.mark.parametrize("word", ["/packs/", "/manifests/"])
def test_a_failure_before_the_record_leaves_the_image_as_it_was(
    word: str, repository: Repository, store: MemoryStore, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = repository.snapshot(image)
    before = pins(image)
    qemu.io(image, qemu.write(0, MIB, 5))
    with monkeypatch.context() as patch:
        spoil(store, patch, word)
        with pytest.raises(StoreError):
            repository.snapshot(image)
    assert pins(image) == before
    assert [s.snapshot for s in repository.snapshots()] == [first.snapshot]
    again = repository.snapshot(image)
    assert (again.rule, again.parent) == ("table-diff", first.snapshot)


def test_a_record_of_unknown_outcome_is_settled_before_anything_else(
    repository: Repository, store: MemoryStore, image: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = repository.snapshot(image)
    qemu.io(image, qemu.write(0, MIB, 5))
    with monkeypatch.context() as patch:
        spoil(store, patch, "/catalog/")
        with pytest.raises(StoreError):
            repository.snapshot(image)
    assert len(pins(image)) == 2, "the snapshot may exist: its pin is kept"
    told = repository.snapshots()
    assert [s.parent for s in told] == [None, first.snapshot], "settled by whoever looks next"
    third = repository.snapshot(image)
    assert (third.parent, third.rule, third.blocks_candidate) == (told[1].snapshot, "table-diff", 0)
    assert len(pins(image)) == 1
    assert restored(repository, told[1].snapshot, tmp_path) == qemu.content(image)


def test_a_restore_leaves_nothing_half_made(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    taken = repository.snapshot(image)
    target = tmp_path / "target" / "x.qcow2"
    with pytest.raises(IslandError, match="cannot be created"):
        repository.restore(taken.snapshot, target)
    target.parent.mkdir()
    target.write_bytes(b"precious")
    with pytest.raises(RefusedError, match="already exists"):
        repository.restore(taken.snapshot, target)
    assert target.read_bytes() == b"precious"
    target.unlink()
    name = next(name for name in store.objects if "/packs/" in name)
    del store.objects[name]
    with pytest.raises(IslandError, match="missing"):
        repository.restore(taken.snapshot, target)
    assert list(target.parent.iterdir()) == []


def test_references(repository: Repository, image: Path) -> None:
    def ids(told: SnapshotTaken) -> str:
        return told.snapshot

    one, two = ids(repository.snapshot(image)), ids(repository.snapshot(image))
    for reference in (two, f"vol@{two}", "vol@latest", two[:12]):
        assert repository.show(reference).snapshot == two
    assert repository.show(f"vol@{one[:10]}").snapshot == one
    for reference in ("f" * 32, "vol@" + "f" * 32, "nobody@latest"):
        with pytest.raises(NotFoundError):
            repository.show(reference)
    for reference in ("", "vol@"):
        with pytest.raises((UsageError, NotFoundError)):
            repository.show(reference)


def test_bytes_that_a_growing_volume_shows_again_are_found(
    repository: Repository, image: Path, tmp_path: Path
) -> None:
    """Shrunk and grown within a cluster, qemu shows old bytes again: no table entry changes for it."""
    qemu.run("qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", image, 4 * MIB + 512)
    repository.snapshot(image)
    qemu.run("qemu-img", "resize", "-q", "-f", "qcow2", image, 8 * MIB)
    assert qemu.content(image)[4 * MIB + 512 : 4 * MIB + 65536] == b"\1" * (65536 - 512)
    taken = repository.snapshot(image)
    assert taken.rule == "table-diff"
    assert restored(repository, taken.snapshot, tmp_path) == qemu.content(image)


def test_no_bitmap_of_the_volume_is_made_for_each_batch(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a batch costs must not follow the volume's size: a map of 64 TiB has 128 MiB."""
    made = []
    real = DirtyMap.__init__

    def counted(self: DirtyMap, blocks: int) -> None:
        made.append(blocks)
        real(self, blocks)

    monkeypatch.setattr(DirtyMap, "__init__", counted)
    counts = []
    for name, size in (("one", MIB), ("many", 48 * MIB)):
        image = qemu.create(tmp_path / f"{name}.qcow2", 64 * MIB, lazy_refcounts="on")
        qemu.io(image, qemu.write(0, size, 1))
        repository.snapshot(image)
        made.clear()
        assert repository.snapshot(image, full=True).blocks_changed == 0
        counts.append(len(made))
    assert counts[0] == counts[1]


def test_progress_is_of_what_is_durable(
    repository: Repository, store: MemoryStore, image: Path, small_packs: None
) -> None:
    """A store that is slow, or slowed down, is not told of as done."""
    told: list[tuple[int, int]] = []

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "send":
            packs = sum("/packs/" in name for name in store.objects)
            assert done <= packs * PACK * 65536
            told.append((done, total))

    qemu.noise(image, 0, 5 * PACK * 65536)
    repository.snapshot(image, progress=progress)
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] >= 5 * PACK * 65536
    assert len({done for done, _ in told}) > 4


def test_a_folder_for_local_state_can_be_named(image: Path, tmp_path: Path) -> None:
    with Repository.open(tmp_path / "snapshots", state=str(tmp_path / "here"), create=True) as here:
        taken = here.snapshot(image)
        assert (tmp_path / "here" / here.id / "vol").is_dir()
    with (
        Repository.open(tmp_path / "snapshots", state=tmp_path / "there") as there,
        pytest.raises(ConflictError, match="island adopt vol"),
    ):
        there.delete([taken.snapshot])
