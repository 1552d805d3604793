"""Copies of snapshots in another repository: what is sent, what is not, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from island_fast.api import Repository
from island_fast.errors import (
    ConflictError,
    DamagedObjectError,
    NotFoundError,
    RefusedError,
    StoreError,
)
from island_fast.formats.pack import read_front
from island_fast.repository import streams
from island_fast.repository.local_state import LocalState
from island_fast.repository.pack_reader import PackReader
from island_fast.repository.snapshot_writer import SnapshotWriter, StoredSnapshot
from island_fast.results import Copied
from tests.operations.conftest import PACK, check, let_any_image_in
from tests.support import qemu
from tests.support.memory_store import MemoryStore
from tests.support.memory_store import Stored as Object

pytestmark = qemu.needs_qemu

MIB = 1 << 20
BLOCK = 65536
DAY = 24 * 3600.0


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "vol.qcow2", 64 * MIB, lazy_refcounts="on")
    qemu.noise(path, 0, 2 * MIB, 1)
    return path


@pytest.fixture
def far_store() -> MemoryStore:
    return MemoryStore(location="far")


@pytest.fixture
def far(far_store: MemoryStore, tmp_path: Path) -> Repository:
    return Repository(far_store, LocalState(tmp_path / "state"), create=True)


def packs(store: MemoryStore, snapshot: str = "") -> list[str]:
    return sorted(name for name in store.objects if f"/packs/{snapshot}" in name)


def names_sent(far_store: MemoryStore, before: set[str]) -> set[str]:
    return {name for name in far_store.objects if "/packs/" in name} - before


def test_a_lineage_copied_whole_keeps_its_tree(
    repository: Repository, far: Repository, image: Path, tmp_path: Path
) -> None:
    first = repository.snapshot(image, label="first", properties={"who": "me"})
    branch = tmp_path / "branch.qcow2"
    repository.restore(first.snapshot, branch)
    qemu.noise(image, MIB, MIB, 2)
    repository.snapshot(image, label="second")
    qemu.resize(branch, 96 * MIB)
    qemu.noise(branch, 80 * MIB, MIB, 3)
    let_any_image_in(repository)
    other = repository.snapshot(branch, label="other")
    assert other.parent == first.snapshot
    let_any_image_in(repository)
    qemu.io(image, qemu.discard(0, MIB))
    repository.snapshot(image, label="third")
    copied = repository.copy(far)
    there, here = far.snapshots(), repository.snapshots()
    assert [replace(one, bytes_stored=0) for one in there] == [replace(one, bytes_stored=0) for one in here]
    assert [one.copied for one in copied] == [True] * 4
    assert [one.parent for one in copied] == [one.parent for one in here]
    near_lineage, far_lineage = repository.existing_lineage("vol"), far.existing_lineage("vol")
    for row in near_lineage.state.live.values():
        ours, theirs = near_lineage.manifest(row), far_lineage.manifest(far_lineage.state.live[row.id])
        assert ours.properties == theirs.properties
        assert (ours.pin, ours.rule, ours.reason, ours.created) == (
            theirs.pin, theirs.rule, theirs.reason, theirs.created,
        )  # fmt: skip
    for one in here:
        targets = [tmp_path / f"{one.snapshot}.{side}" for side in ("near", "far")]
        repository.restore(one.snapshot, targets[0])
        far.restore(one.snapshot, targets[1])
        qemu.compare(*targets, other_format="qcow2")
        qemu.check(targets[1])


def test_blocks_travel_as_they_are_stored(
    repository: Repository, store: MemoryStore, far: Repository, far_store: MemoryStore, image: Path
) -> None:
    """Compressed once, and dead slots stay behind."""
    qemu.io(image, qemu.write(3 * MIB, 4 * MIB, 7))
    repository.snapshot(image)
    repository.copy(far)
    (near_name,), (far_name,) = packs(store), packs(far_store)
    ours = read_front(near_name, store.objects[near_name].data)
    theirs = read_front(far_name, far_store.objects[far_name].data)
    assert ours.rows.tobytes() == theirs.rows.tobytes()
    tails = [bytes(s.objects[i.name].data[i.data_start :]) for s, i in ((store, ours), (far_store, theirs))]
    assert tails[0] == tails[1]


@pytest.mark.usefixtures("small_packs")
def test_this_host_keeps_the_fronts_of_packs_alone(
    repository: Repository, far: Repository, far_store: MemoryStore, image: Path
) -> None:
    """However many pieces a pack was put together from, no stored block stays in local state."""
    repository.snapshot(image)
    for part in range(6):
        for block in (part, 16 + part):
            qemu.noise(image, block * BLOCK, BLOCK, 3 + block)
        repository.snapshot(image)
    repository.delete([one.snapshot for one in repository.snapshots()[:-1]])
    (copied,) = repository.copy(far, ["vol@latest"])
    cache = far.lineage("vol").files.cache
    names = packs(far_store, copied.snapshot)
    assert len(names) > 2
    for name in names:
        front = cache.read(name)
        assert front is not None
        assert len(front) == read_front(name, far_store.objects[name].data).data_start


def test_a_whole_pack_in_local_state_is_cut_to_its_front(repository: Repository, image: Path) -> None:
    """Earlier copies kept whole packs there."""
    repository.snapshot(image)
    lineage = repository.existing_lineage("vol")
    (name,) = lineage.pack_names(lineage.state.packs)
    kept = lineage.files.cache.read(name)
    lineage.files.cache.write(name, repository.store.get(name))
    PackReader(lineage).read_index(int(lineage.state.packs.key[0]))
    assert lineage.files.cache.read(name) == kept


def test_what_is_there_is_not_sent_again(
    repository: Repository, store: MemoryStore, far: Repository, far_store: MemoryStore, image: Path
) -> None:
    first = repository.snapshot(image)
    repository.copy(far, [first.snapshot])
    qemu.noise(image, MIB, 3 * BLOCK, 2)
    repository.snapshot(image)
    store.received = far_store.received = 0
    before = far_store.sent
    answers = repository.copy(far, volume="vol")
    assert [(a.copied, a.blocks_sent) for a in answers] == [(False, 0), (True, 3)]
    assert answers[1].bytes_read == store.received < 4 * BLOCK
    assert far_store.sent - before < 4 * BLOCK
    assert far_store.received < BLOCK, "records that are read back"
    puts = far_store.calls["put"]
    assert [a.copied for a in repository.copy(far)] == [False, False]
    assert far_store.calls["put"] == puts


def test_each_pack_is_fetched_once(
    repository: Repository,
    store: MemoryStore,
    far: Repository,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However scattered it is what a snapshot needs of older packs; what it needs ends up in full packs."""
    for number in range(6):
        commands = [qemu.write((number + 6 * i) * BLOCK, BLOCK, number + 1) for i in range(5)]
        qemu.io(image, *commands)
        last = repository.snapshot(image)
    store.calls.clear()
    (answer,) = repository.copy(far, [last.snapshot])
    assert store.calls["get"] + store.calls["get_ranges"] == 6
    assert answer.objects_written == 1 + 1 + 2, "record 0, one pack, a manifest and a record"


def test_older_ones_may_follow_newer_ones(
    repository: Repository, far: Repository, far_store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    """They share what they have in common all the same, and the newest stays the newest."""
    taken = []
    truth = {}
    for number in range(4):
        qemu.noise(image, number * MIB, BLOCK, number)
        taken.append(repository.snapshot(image).snapshot)
        truth[taken[-1]] = qemu.content(image)
    for number, sent in ((2, 33), (3, 1), (0, 1), (1, 1)):
        (answer,) = repository.copy(far, [taken[number]])
        assert answer.blocks_sent == sent
    assert [one.snapshot for one in far.snapshots()] == taken
    assert far.show("vol@latest").snapshot == taken[-1]
    for gone in (2, 0):
        far.delete([taken[gone]])
        far_store.now += DAY
        far.sweep()
        del truth[taken[gone]]
        for snapshot, content in truth.items():
            check(far, snapshot, content, tmp_path)


def test_a_parent_that_was_deleted_here_is_compared_by_digests(
    repository: Repository, store: MemoryStore, far: Repository, image: Path, tmp_path: Path
) -> None:
    first = repository.snapshot(image)
    repository.copy(far)
    qemu.noise(image, 0, 2 * BLOCK, 2)
    second = repository.snapshot(image)
    repository.delete([first.snapshot])
    store.received = 0
    (answer,) = repository.copy(far)
    assert (answer.parent, answer.blocks_sent) == (first.snapshot, 2)
    assert answer.bytes_read == store.received < 3 * BLOCK
    check(far, second.snapshot, qemu.content(image), tmp_path)


def test_a_copy_that_was_deleted_can_be_made_again(
    repository: Repository, far: Repository, far_store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    """With other names: what the first one left may be deleted at any time."""
    first = repository.snapshot(image)
    content = qemu.content(image)
    qemu.noise(image, 0, BLOCK, 2)
    second = repository.snapshot(image)
    repository.copy(far)
    ever = set(far_store.objects)
    far.delete([first.snapshot])
    put: list[str] = []
    real = MemoryStore.put
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MemoryStore, "put", lambda store, name, parts: [put.append(name), real(store, name, parts)]
        )
        (answer,) = repository.copy(far, [first.snapshot])
    assert (answer.copied, answer.parent) == (True, second.snapshot)
    assert answer.blocks_sent == 32, "what it had left to others stays theirs"
    assert len(put) == answer.objects_written == 3
    assert not ever & set(put)
    assert [one.snapshot for one in far.snapshots()] == [first.snapshot, second.snapshot]
    for gone in (second.snapshot, first.snapshot):
        check(far, first.snapshot, content, tmp_path)
        far.delete([gone])
        far_store.now += DAY
        far.sweep()
    assert packs(far_store) == []


@pytest.fixture
def tiny(small_packs: None, far_store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of PACK blocks; one at a time is on its way."""
    far_store.uploads = 1
    monkeypatch.setattr(streams, "_PACKS_FETCHED", 1)


def interrupt(repository: Repository, far: Repository, packs: int) -> list[str]:
    """Names of the packs that a copy sent until the far store stopped answering."""
    sent: list[str] = []
    real = MemoryStore.put

    def put(store: MemoryStore, name: str, parts: list[bytes]) -> None:
        if store.location == "far" and "/packs/" in name:
            if len(sent) == packs:
                raise StoreError("the store does not answer")
            sent.append(name)
        real(store, name, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryStore, "put", put)
        with pytest.raises(StoreError):
            repository.copy(far)
    return sent


@pytest.mark.usefixtures("tiny")
def test_what_was_acknowledged_is_not_sent_again(
    repository: Repository,
    store: MemoryStore,
    far: Repository,
    far_store: MemoryStore,
    image: Path,
    tmp_path: Path,
) -> None:
    taken = repository.snapshot(image)
    sent = interrupt(repository, far, 3)
    assert far.snapshots() == []
    store.received = 0
    (answer,) = repository.copy(far)
    assert (answer.blocks_kept, answer.blocks_sent) == (3 * PACK, PACK)
    assert answer.bytes_read == store.received < (PACK + 1) * BLOCK, "nor fetched"
    assert set(sent) < set(packs(far_store))
    assert len(packs(far_store)) == 4
    check(far, taken.snapshot, qemu.content(image), tmp_path)
    far_store.now += 2 * DAY
    assert far.sweep()[0].objects_removed == 0
    assert [r for r, _ in far.lineage("vol").files.registrations.all()] == []


@pytest.mark.usefixtures("tiny")
def test_a_snapshot_does_not_go_on_with_a_copy_nor_a_copy_with_a_snapshot(
    repository: Repository, far: Repository, image: Path, tmp_path: Path
) -> None:
    """It would have the id of another content."""
    first = repository.snapshot(image)
    repository.copy(far)
    qemu.noise(image, 0, 2 * PACK * BLOCK, 2)
    second = repository.snapshot(image)
    content = qemu.content(image)
    interrupt(repository, far, 1)
    restored = tmp_path / "restored.qcow2"
    far.restore(first.snapshot, restored)
    qemu.noise(restored, 0, 2 * PACK * BLOCK, 3)
    taken = far.snapshot(restored, volume="vol")
    assert (taken.snapshot != second.snapshot, taken.attempt, taken.blocks_kept) == (True, 0, 0)
    (_, answer) = repository.copy(far)
    assert answer.blocks_kept == PACK
    check(far, second.snapshot, content, tmp_path)
    check(far, taken.snapshot, qemu.content(restored), tmp_path)


@pytest.mark.usefixtures("tiny")
def test_a_second_process_does_not_copy_the_same_snapshot(
    repository: Repository, far: Repository, image: Path
) -> None:
    taken = repository.snapshot(image)
    interrupt(repository, far, 1)
    registrations = far.lineage("vol").files.registrations
    ((registration, _),) = registrations.all()
    with (
        registrations.register(registration),
        pytest.raises(RefusedError, match="another process is copying"),
    ):
        repository.copy(far, [taken.snapshot])


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_copy_of_an_earlier_owner_is_not_gone_on_with(
    repository: Repository, far: Repository, image: Path, tmp_path: Path
) -> None:
    taken = repository.snapshot(image)
    interrupt(repository, far, 1)
    with Repository(far.store, LocalState(tmp_path / "elsewhere")) as elsewhere:
        elsewhere.adopt("vol")
    with pytest.raises(ConflictError, match="belongs to host"):
        repository.copy(far, [taken.snapshot])
    far.adopt("vol")
    assert repository.copy(far, [taken.snapshot])[0].blocks_kept == 0


def spoil(store: MemoryStore, name: str, at: int = -100) -> None:
    data = bytearray(store.objects[name].data)
    data[at] ^= 1
    store.objects[name] = Object(bytes(data), 0.0)


def test_a_damaged_block_is_not_copied(
    repository: Repository, store: MemoryStore, far: Repository, far_store: MemoryStore, image: Path
) -> None:
    """It is named, its snapshot is not there, and the others are."""
    first = repository.snapshot(image)
    qemu.noise(image, 0, 2 * MIB, 2)
    second = repository.snapshot(image)
    qemu.noise(image, 4 * MIB, MIB, 3)
    third = repository.snapshot(image)
    (name,) = packs(store, second.snapshot)
    spoil(store, name)
    answers = repository.copy(far)
    assert [a.snapshot for a in answers] == [first.snapshot]
    assert [type(error) for error in repository.left_out] == [DamagedObjectError] * 2, (
        "the third needs it too"
    )
    assert name in str(repository.left_out[0])
    assert [one.snapshot for one in far.snapshots()] == [first.snapshot]
    assert not packs(far_store, second.snapshot) + packs(far_store, third.snapshot)
    assert far.sweep()[0].objects_removed == 0


def test_what_the_far_repository_is_known_to_have_lost_is_sent_again(
    repository: Repository, far: Repository, far_store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    repository.snapshot(image)
    repository.copy(far)
    (name,) = packs(far_store)
    spoil(far_store, name)
    qemu.noise(image, 0, BLOCK, 2)
    second = repository.snapshot(image)
    assert far.verify(sample=1.0).damages
    (_, answer) = repository.copy(far)
    assert answer.blocks_sent == 2, "the one that changed, and the one that is lost"
    check(far, second.snapshot, qemu.content(image), tmp_path)


def test_a_block_that_no_checksum_but_its_digest_proves(
    repository: Repository, store: MemoryStore, far: Repository, image: Path
) -> None:
    """Ranges of a pack are fetched where little of it is needed; they are checked no less."""
    repository.snapshot(image)
    (name,) = packs(store)
    qemu.noise(image, 0, 30 * BLOCK, 2)
    second = repository.snapshot(image)
    spoil(store, name)
    repository.copy(far, [second.snapshot])
    assert name in str(repository.left_out[0])
    assert far.snapshots() == []


def test_a_far_copy_that_is_not_what_it_should_be_is_no_parent(
    repository: Repository, far: Repository, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SnapshotWriter.locate_blocks

    def stored(*words: Any) -> StoredSnapshot:
        whole = real(*words)
        return replace(whole, runs=replace(whole.runs, length=whole.runs.length - np.int64(1)))

    first = repository.snapshot(image)
    monkeypatch.setattr(SnapshotWriter, "locate_blocks", stored)
    repository.copy(far)
    monkeypatch.undo()
    qemu.noise(image, 0, BLOCK, 2)
    second = repository.snapshot(image)
    answers = repository.copy(far)
    assert [(a.snapshot, a.copied) for a in answers] == [(first.snapshot, False)]
    (error,) = repository.left_out
    assert f"snapshot {first.snapshot} in far does not hold what it holds in memory" in str(error)
    far.delete([first.snapshot])
    assert [a.snapshot for a in repository.copy(far)] == [first.snapshot, second.snapshot]
    check(far, second.snapshot, qemu.content(image), tmp_path)


def test_a_snapshot_that_is_deleted_meanwhile(
    repository: Repository, far: Repository, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = repository.snapshot(image)
    real = MemoryStore.get

    def get(store: MemoryStore, name: str, **how: Any) -> memoryview:
        if "/packs/" in name and repository.snapshots():
            repository.delete([taken.snapshot])
            repository.sweep()
        return real(store, name, **how)

    monkeypatch.setattr(MemoryStore, "get", get)
    assert repository.copy(far, [taken.snapshot]) == []
    (error,) = repository.left_out
    assert isinstance(error, NotFoundError)
    assert "was deleted while it was copied" in str(error)
    assert far.snapshots() == []


# Whose the far volume is.


def test_another_volume_of_that_name_is_refused(
    repository: Repository, far: Repository, far_store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    repository.snapshot(image)
    stranger = qemu.create(tmp_path / "stranger.qcow2", MIB)
    far.snapshot(stranger, volume="vol")
    before = dict(far_store.objects)
    with pytest.raises(RefusedError, match="is not a copy of volume vol in memory"):
        repository.copy(far, ["vol@latest"])
    assert repository.copy(far) == []
    assert "is not a copy" in str(repository.left_out[0])
    assert far_store.objects == before


def test_another_hosts_volume_is_refused(
    repository: Repository, far: Repository, far_store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    repository.snapshot(image)
    with Repository(far_store, LocalState(tmp_path / "elsewhere"), create=True) as theirs:
        repository.state, mine = theirs.state, repository.state
        repository.copy(theirs)
    repository.state = mine
    qemu.noise(image, 0, BLOCK, 2)
    repository.snapshot(image)
    with pytest.raises(ConflictError, match=r"belongs to host .*'island adopt vol'"):
        repository.copy(far, ["vol@latest"])
    far.adopt("vol")
    assert [a.copied for a in repository.copy(far)] == [False, True]


def test_a_repository_that_was_copied_file_by_file_is_refused(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path
) -> None:
    """Both have one id, and local state would take the one for the other."""
    repository.snapshot(image)
    twin = MemoryStore(location="twin")
    twin.objects = dict(store.objects)
    for other in (Repository(twin, repository.state), repository):
        with pytest.raises(RefusedError, match="copied from it file by file"):
            repository.copy(other)


def test_snapshots_of_restored_copies_go_on_there_and_others_do_not(
    repository: Repository, far: Repository, image: Path, tmp_path: Path
) -> None:
    repository.snapshot(image)
    copied = repository.copy(far)[0]
    with pytest.raises(RefusedError, match="not known as its image and does not hold its pin"):
        far.snapshot(qemu.create(tmp_path / "other.qcow2", MIB), volume="vol")
    restored = tmp_path / "restored.qcow2"
    far.restore(copied.snapshot, restored)
    qemu.noise(restored, 0, BLOCK, 2)
    taken = far.snapshot(restored, volume="vol")
    assert (taken.parent, taken.rule, taken.blocks_changed) == (copied.snapshot, "table-diff", 1)
    (first, second) = far.copy(repository)
    assert (first.copied, second.copied, second.parent) == (False, True, copied.snapshot)
    check(repository, taken.snapshot, qemu.content(restored), tmp_path)
    assert [a.copied for a in repository.copy(far)] == [False, False]


def test_an_empty_repository_copies_nothing_and_makes_nothing(
    repository: Repository, far: Repository, far_store: MemoryStore, image: Path
) -> None:
    repository.delete([repository.snapshot(image).snapshot])
    assert repository.copy(far) == []
    assert repository.copy(far, volume="vol") == []
    assert far_store.objects == {}


def test_the_answer_tells_the_work(repository: Repository, far: Repository, image: Path) -> None:
    taken = repository.snapshot(image, label="one")
    told: list[tuple[str, int, int]] = []

    def progress(*what: Any) -> None:
        assert not what[1] or packs(cast(MemoryStore, far.store)), "only what is durable is done"
        told.append(what)

    (answer,) = repository.copy(far, progress=progress)
    assert isinstance(answer, Copied)
    (row,) = far.snapshots()
    assert answer.bytes_stored == row.bytes_stored
    assert (answer.snapshot, answer.volume, answer.label) == (taken.snapshot, "vol", "one")
    assert told[-1] == ("copy", 2 * MIB, 2 * MIB)


def test_progress_is_told_over_all_snapshots(repository: Repository, far: Repository, image: Path) -> None:
    repository.snapshot(image)
    qemu.noise(image, 0, MIB, 2)
    repository.snapshot(image)
    told: list[tuple[str, int, int]] = []
    repository.copy(far, progress=lambda *what: told.append(what))
    done = [one[1] for one in told]
    assert done == sorted(done)
    assert {2 * MIB, 3 * MIB} <= {*done}
    assert {one[2] for one in told} == {3 * MIB}
