"""An id whose snapshot has been committed is never used again, however its registration came to be left."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.errors import DamagedObjectError, StoreError
from island_fast.operations import snapshot as snapshot_operation
from island_fast.repository.local_state import Registrations
from tests.operations.conftest import PACK, check, let_any_image_in
from tests.support import qemu
from tests.support.memory_store import MemoryStore

MIB = 1 << 20
BLOCK = 65536

pytestmark = pytest.mark.usefixtures("small_packs")


@contextmanager
def answers_lost() -> Iterator[None]:
    """Records are stored, and whoever sent them is not told."""
    real = MemoryStore.put

    def put(store: MemoryStore, name: str, parts: list[bytes]) -> None:
        real(store, name, parts)
        if "/catalog/" in name:
            raise StoreError("the answer was lost")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryStore, "put", put)
        with pytest.raises(StoreError):
            yield


def registered(repository: Repository) -> set[str]:
    return {r.snapshot for r, _ in repository.lineage("vol").files.registrations.all()}


def newest(repository: Repository) -> str:
    return repository.snapshots("vol")[-1].snapshot


def test_a_swept_snapshot_is_not_gone_on_with(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pin is the base of the next diff; taken anew under its name, changes would be missed."""
    ids = (f"{n:032x}" for n in itertools.chain((3, 2, 1), itertools.count(10)))
    monkeypatch.setattr(snapshot_operation, "make_id", lambda: next(ids))
    image = qemu.create(tmp_path / "vol.qcow2", 2048 * MIB, lazy_refcounts="on")
    qemu.noise(image, 0, 12 * BLOCK, 1)
    qemu.noise(image, 1024 * MIB, 12 * BLOCK, 2)
    repository.snapshot(image)
    qemu.noise(image, 0, 12 * BLOCK, 3)
    parent = repository.snapshot(image).snapshot
    qemu.noise(image, 0, 12 * BLOCK, 5)
    with answers_lost():
        repository.snapshot(image)
    used = newest(repository)
    repository.delete([parent])
    with answers_lost():
        repository.delete([used])
    repository.sweep()
    assert registered(repository) == set()
    qemu.noise(image, 1024 * MIB, 4 * BLOCK, 7)
    taken = repository.snapshot(image)
    assert (taken.attempt, taken.rule) == (0, "table-diff")
    assert taken.snapshot != used
    check(repository, taken.snapshot, qemu.content(image), tmp_path)


def test_of_two_registrations_that_are_left_the_used_one_goes_whichever_is_newer(
    repository: Repository, store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another snapshot inherited must not be declared dead by a record of the same id."""
    image = qemu.create(tmp_path / "vol.qcow2", 64 * MIB, lazy_refcounts="on")
    qemu.noise(image, 0, 10 * PACK * BLOCK, 1)
    repository.snapshot(image)
    copy = Path(shutil.copy(image, tmp_path / "copy.qcow2"))
    qemu.noise(image, 0, PACK * BLOCK, 2)
    qemu.noise(copy, 0, 3 * PACK * BLOCK, 3)
    used = _two_at_once(repository, store, image, copy, monkeypatch)
    folder = repository.lineage("vol").files.folder / "running"
    assert registered(repository) > {used}
    for snapshot in registered(repository):
        os.utime(folder / snapshot, (time.time() - (10 if snapshot == used else 0),) * 2)
    qemu.noise(image, 0, BLOCK, 4)
    child = repository.snapshot(image, volume="vol")
    content = qemu.content(image)
    assert (child.parent, child.attempt) == (used, 1)
    with answers_lost():
        repository.delete([used])
    repository.sweep()
    qemu.noise(image, 0, BLOCK, 2)  # as the used one had it
    taken = repository.snapshot(image, volume="vol")
    assert (taken.attempt, taken.blocks_kept) == (0, 0)
    repository.sweep()
    check(repository, taken.snapshot, qemu.content(image), tmp_path)
    check(repository, child.snapshot, content, tmp_path)


def _two_at_once(
    repository: Repository, store: MemoryStore, image: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A snapshot of `copy` that an outage ends, and beside it one of `image` that dies behind its record."""
    real, sent, used = MemoryStore.put, [], []

    def put(self: MemoryStore, name: str, parts: list[bytes]) -> None:
        if "/packs/" in name and used:
            raise StoreError("the store does not answer")
        real(self, name, parts)
        if "/packs/" in name and not sent:
            sent.append(name)
            with pytest.MonkeyPatch.context() as dying:
                dying.setattr(Registrations, "_forget", lambda *_: False)
                let_any_image_in(repository)
                used.append(Repository(store, repository.state).snapshot(image).snapshot)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryStore, "put", put)
        let_any_image_in(repository)
        with pytest.raises(StoreError):
            repository.snapshot(copy, volume="vol")
    return used[0]


def test_a_record_that_makes_a_snapshot_twice_is_not_sent(
    repository: Repository, store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = qemu.create(tmp_path / "vol.qcow2", 8 * MIB, lazy_refcounts="on")
    qemu.noise(image, 0, 2 * PACK * BLOCK, 1)
    first = repository.snapshot(image).snapshot
    content = qemu.content(image)
    qemu.noise(image, 0, BLOCK, 2)
    records = [name for name in store.objects if "/catalog/" in name]
    monkeypatch.setattr(snapshot_operation, "make_id", lambda: first)
    monkeypatch.setattr(snapshot_operation, "pin_name", lambda *_: "island-other")
    before = dict(store.objects)
    monkeypatch.setattr(
        MemoryStore, "put", lambda self, name, parts: before.setdefault(name, b"".join(parts))
    )
    with pytest.raises(DamagedObjectError, match="made before"):
        repository.snapshot(image)
    assert [name for name in before if "/catalog/" in name] == records
    check(repository, first, content, tmp_path)


def test_an_id_that_was_used_up_after_local_state_was_kept_does_not_come_again(
    repository: Repository, store: MemoryStore, tmp_path: Path
) -> None:
    """Local state is put back from a copy that was made while a snapshot stood interrupted.

    Meanwhile the snapshot was finished, deleted and swept, so the state has no trace of it; other records
    followed. A copy of it can still be elsewhere, under its id.
    """
    image = qemu.create(tmp_path / "vol.qcow2", 64 * MIB, lazy_refcounts="on")
    qemu.noise(image, 0, 10 * PACK * BLOCK, 1)
    repository.snapshot(image)
    qemu.noise(image, 0, 10 * PACK * BLOCK, 2)
    real, sent = MemoryStore.put, []

    def put(self: MemoryStore, name: str, parts: list[bytes]) -> None:
        if len(sent) == 3:
            raise StoreError("the store does not answer")
        real(self, name, parts)
        sent.append(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryStore, "put", put)
        with pytest.raises(StoreError):
            repository.snapshot(image)
    (interrupted,) = registered(repository)
    kept = Path(shutil.copytree(repository.state.root, tmp_path / "kept"))
    kept_image = Path(shutil.copy(image, tmp_path / "kept.qcow2"))
    assert repository.snapshot(image).snapshot == interrupted
    repository.delete([interrupted])
    repository.sweep()
    shutil.rmtree(repository.state.root)
    shutil.copytree(kept, repository.state.root)
    shutil.copy(kept_image, image)
    Repository(store, repository.state).snapshots()  # a verb that only reads caches what came since
    qemu.noise(image, 0, 4 * BLOCK, 3)
    taken = Repository(store, repository.state).snapshot(image)
    assert taken.snapshot != interrupted
    check(repository, taken.snapshot, qemu.content(image), tmp_path)
