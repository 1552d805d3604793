"""A write that the store refuses for certain never happens; one of unknown outcome may have happened.

Reading needs no writing in either case. A full repository can be freed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.errors import StoreError, StoreFullError, StoreRefusedError
from island_fast.operations.retain import Keep
from island_fast.repository.lineage import Lineage
from tests.operations.conftest import check
from tests.support import qemu
from tests.support.memory_store import MemoryStore

MIB = 1 << 20
RECORD = "/catalog/"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "vol.qcow2", 64 * MIB, lazy_refcounts="on")
    qemu.noise(path, 0, MIB, 1)
    return path


@pytest.fixture
def three(repository: Repository, image: Path) -> list[str]:
    """Ids of three snapshots, the oldest first."""
    taken = []
    for seed in (1, 2, 3):
        qemu.noise(image, MIB * seed, MIB, seed)
        taken.append(repository.snapshot(image).snapshot)
    return taken


def fail(
    patch: pytest.MonkeyPatch, error: StoreError, fails: Callable[[str], bool], *, done: bool = False
) -> None:
    """Let puts of the names that `fails` picks end with `error`; with `done`, after they were carried out."""
    real = MemoryStore.put

    def put(self: MemoryStore, name: str, parts: list[bytes]) -> None:
        failing = fails(name)
        if done or not failing:
            real(self, name, parts)
        if failing:
            raise error

    patch.setattr(MemoryStore, "put", put)


def is_record(name: str) -> bool:
    return RECORD in name


def ids(repository: Repository) -> list[str]:
    return [one.snapshot for one in repository.snapshots()]


REFUSED = StoreRefusedError("403 Forbidden")
UNKNOWN = StoreError("the answer was lost")


def test_what_retain_deleted_is_no_delete_that_is_run_again(
    repository: Repository, three: list[str], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The delete ended before its record; the one of today means today's newest snapshot."""
    with monkeypatch.context() as patch:
        patch.setattr(Lineage, "append", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            repository.delete(["vol@latest"])
    newest = repository.snapshot(image).snapshot
    repository.retain(Keep(last=1))
    assert ids(repository) == [newest]
    (deleted,) = repository.delete(["vol@latest"])
    assert (deleted.snapshot, ids(repository)) == (newest, [])


def test_a_refused_delete_never_happens(
    repository: Repository, three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail(patch, REFUSED, is_record)
        with pytest.raises(StoreRefusedError):
            repository.delete([three[0]])
        with pytest.raises(StoreRefusedError):
            repository.retain(Keep(last=1))
        assert repository.lineage("vol").files.pending.all() == []
    assert ids(repository) == three
    assert repository.sweep()[0].objects_removed == 0
    repository.delete([three[0]])
    assert ids(repository) == three[1:]


def test_a_refused_snapshot_leaves_neither_pin_nor_record(
    repository: Repository, image: Path, three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = qemu.info(image)["snapshots"]
    qemu.noise(image, 0, MIB, 9)
    with monkeypatch.context() as patch:
        fail(patch, REFUSED, is_record)
        with pytest.raises(StoreRefusedError):
            repository.snapshot(image)
    assert qemu.info(image)["snapshots"] == before
    assert ids(repository) == three
    again = repository.snapshot(image)
    assert (again.attempt, again.blocks_kept) == (1, 16), "what was sent is used"


@pytest.mark.parametrize("done", [False, True], ids=["lost", "done"])
def test_what_may_have_happened_is_settled_although_it_is_refused_then(
    repository: Repository,
    three: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    done: bool,
) -> None:
    """Until then all that only reads goes on, with a warning."""
    with monkeypatch.context() as patch:
        fail(patch, UNKNOWN, is_record, done=done)
        with pytest.raises(StoreError, match="lost"):
            repository.delete([three[0]])
    with monkeypatch.context() as patch:
        fail(patch, REFUSED, is_record)
        left = three[1:] if done else three
        caplog.set_level(logging.WARNING)
        assert ids(repository) == left
        repository.show(left[0])
        repository.restore(left[0], tmp_path / "out.raw", image_format="raw")
        assert repository.verify().damages == ()
        repository.usage()
        repository.diff(three[1], three[2])
        says = f"the delete of snapshot {three[0]} is unknown"
        assert (says in caplog.text) is not done, "it shows, or somebody says that it does not"
        for write in (lambda: repository.delete([three[2]]), repository.sweep):
            with pytest.raises(StoreRefusedError):
                write()
        assert len(repository.lineage("vol").files.pending.all()) == 1
    assert ids(repository) == three[1:], "whoever looks next can write"
    assert repository.lineage("vol").files.pending.all() == []


@pytest.mark.parametrize("done", [False, True], ids=["lost", "done"])
@pytest.mark.parametrize("looks", [False, True], ids=["at once", "after a look"])
def test_a_delete_of_the_latest_that_is_tried_again_deletes_one(
    repository: Repository, three: list[str], monkeypatch: pytest.MonkeyPatch, done: bool, looks: bool
) -> None:
    with monkeypatch.context() as patch:
        fail(patch, UNKNOWN, is_record, done=done)
        for _ in range(2):
            with pytest.raises(StoreError, match="lost"):
                repository.delete(["vol@latest"])
    if looks:
        assert ids(repository) == three[:2]
    (plan,) = repository.delete(["vol@latest"], dry_run=True)
    (told,) = repository.delete(["vol@latest"])
    assert told == plan
    assert told.snapshot == three[2]
    assert told.bytes_unreferenced > MIB
    assert ids(repository) == three[:2]
    (told,) = repository.delete(["vol@latest"])
    assert told.snapshot == three[1], "what was reported is over"


def test_a_delete_of_several_that_is_tried_again_deletes_no_other(
    repository: Repository, three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["vol@latest", three[0][:9]]
    records = 0

    def second(name: str) -> bool:
        nonlocal records
        records += is_record(name)
        return records == 2

    with monkeypatch.context() as patch:
        fail(patch, REFUSED, second)
        with pytest.raises(StoreRefusedError):
            repository.delete(asked)
    assert ids(repository) == three[:2]
    assert [one.snapshot for one in repository.delete(asked)] == [three[2], three[0]]
    assert ids(repository) == three[1:2]


def test_an_id_that_an_unknown_delete_took_out_is_reported_when_asked_for_again(
    repository: Repository, three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail(patch, UNKNOWN, is_record, done=True)
        with pytest.raises(StoreError, match="lost"):
            repository.delete([three[1]])
    (other,) = repository.delete(["vol@latest"])
    assert other.snapshot == three[2], "the other one was not the latest"
    (told,) = repository.delete([three[1][:10]])
    assert told.snapshot == three[1]
    assert ids(repository) == three[:1]


FULL = StoreFullError("no space is left")


@pytest.fixture
def half_dead(repository: Repository, image: Path, small_packs: None) -> str:
    """The live snapshot of two; a pack of the deleted one is wholly dead, and one is to be repacked."""
    qemu.noise(image, 0, MIB, 1)
    first = repository.snapshot(image).snapshot
    qemu.noise(image, 0, (MIB >> 1) + (6 << 16), 2)
    second = repository.snapshot(image).snapshot
    repository.delete([first])
    return second


def is_repacked(name: str) -> bool:
    return "/packs/" in name and "." in name.rpartition("/")[2]


def test_a_sweep_without_room_first_deletes_and_then_repacks(
    repository: Repository,
    store: MemoryStore,
    image: Path,
    half_dead: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (dead,) = (
        step.object
        for step in repository.sweep(dry_run=True)[0].steps
        if "/packs/" in step.object and step.action == "remove"
    )
    with monkeypatch.context() as patch:
        fail(patch, FULL, lambda name: is_repacked(name) and dead in store.objects)
        (swept,) = repository.sweep()
    assert (swept.packs_repacked, repository.left_out) == (1, [])
    assert swept.bytes_removed > swept.bytes_rewritten > 0
    assert repository.sweep()[0].objects_removed == 0
    check(repository, half_dead, qemu.content(image), tmp_path)


def test_a_sweep_that_has_no_room_at_all_to_repack_frees_the_rest_and_says_so(
    repository: Repository, image: Path, half_dead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail(patch, FULL, is_repacked)
        (swept,) = repository.sweep()
        assert (swept.packs_repacked, repository.left_out) == (0, [FULL])
        assert swept.objects_removed == 2, "a pack and a manifest"
        (swept,) = repository.sweep()
        assert (swept.objects_removed, repository.left_out) == (0, [FULL])
    assert repository.sweep()[0].packs_repacked == 1
    check(repository, half_dead, qemu.content(image), tmp_path)


def test_what_a_sweep_wrote_again_goes_if_its_record_then_has_no_room(
    repository: Repository,
    store: MemoryStore,
    image: Path,
    half_dead: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = set(store.objects)
    with monkeypatch.context() as patch:
        fail(patch, FULL, lambda name: is_record(name) and any(map(is_repacked, store.objects)))
        (swept,) = repository.sweep()
    assert (swept.packs_repacked, repository.left_out) == (0, [FULL])
    assert swept.objects_removed == 2
    assert not [name for name in set(store.objects) - there if not is_record(name)]
    assert repository.sweep()[0].packs_repacked == 1
    check(repository, half_dead, qemu.content(image), tmp_path)
