"""An interrupted snapshot goes on where it was: what the store has acknowledged is not sent again."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.errors import ConflictError, IslandError, StoreError
from island_fast.repository.local_state import LocalState
from tests.operations.conftest import PACK, check
from tests.support import qemu
from tests.support.memory_store import MemoryStore

MIB = 1 << 20
DAY = 24 * 3600.0
BLOCK = 65536

pytestmark = pytest.mark.usefixtures("small_packs")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "vol.qcow2", 64 * MIB, lazy_refcounts="on")
    qemu.noise(path, 0, 10 * PACK * BLOCK, 1)
    return path


class Outage:
    """The store stops answering after some packs; `packs` are the names that were put since."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.packs: list[str] = []
        self.left = 1 << 30
        real = MemoryStore.put

        def put(store: MemoryStore, name: str, parts: list[bytes]) -> None:
            if self.left <= 0:
                raise StoreError("the store does not answer")
            if "/packs/" in name:
                self.left -= 1
                self.packs.append(name)
            real(store, name, parts)

        monkeypatch.setattr(MemoryStore, "put", put)

    def interrupt(self, repository: Repository, image: Path, packs: int) -> None:
        """Let a snapshot fail after so many packs."""
        self.left = packs
        with pytest.raises(StoreError):
            repository.snapshot(image)
        self.left = 1 << 30
        assert len(self.packs) == packs
        self.packs.clear()


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Outage:
    return Outage(monkeypatch)


def registrations(repository: Repository) -> list[str]:
    return [r.snapshot for r, _ in repository.lineage("vol").files.registrations.all()]


def left_over(repository: Repository, store: MemoryStore) -> set[str]:
    """Packs and manifests that the state does not name."""
    lineage = next(repository.lineages("vol"))
    kept = {step["object"] for step in repository.sweep(dry_run=True)[0].as_json()["steps"]}
    assert not kept
    names = {f"vol/manifests/{row.id}-{row.attempt}" for row in lineage.state.live.values()}
    packs = lineage.state.packs
    names |= set(lineage.pack_names(packs))
    return {n for n in store.objects if "/packs/" in n or "/manifests/" in n} - names


def test_packs_that_were_acknowledged_are_not_sent_again(
    repository: Repository, store: MemoryStore, image: Path, outage: Outage, tmp_path: Path
) -> None:
    outage.interrupt(repository, image, packs=6)
    (interrupted,) = registrations(repository)
    taken = repository.snapshot(image)
    assert (taken.snapshot, taken.attempt) == (interrupted, 1)
    assert (taken.blocks_kept, taken.blocks_changed) == (6 * PACK, 10 * PACK)
    assert outage.packs == [f"vol/packs/{interrupted}/1-{n:08d}" for n in range(6, 10)]
    assert registrations(repository) == []
    assert left_over(repository, store) == set()
    check(repository, taken.snapshot, qemu.content(image), tmp_path)
    assert repository.snapshot(image).attempt == 0


def test_the_volume_is_stored_as_it_is_now(
    repository: Repository, store: MemoryStore, image: Path, outage: Outage, tmp_path: Path
) -> None:
    """What changed since the interruption is sent, and what it replaced is born dead."""
    outage.interrupt(repository, image, packs=6)
    qemu.noise(image, 2 * PACK * BLOCK, 6 * BLOCK, 2)  # most of the third pack
    qemu.io(image, qemu.discard(0, PACK * BLOCK))  # all of the first
    taken = repository.snapshot(image)
    assert taken.blocks_kept == 6 * PACK - 6 - PACK
    assert len(outage.packs) == 5
    check(repository, taken.snapshot, qemu.content(image), tmp_path)
    lineage = next(repository.lineages("vol"))
    assert len(lineage.state.dead) == 1
    assert int((lineage.state.dead[:, 1] - lineage.state.dead[:, 0]).sum()) == 6
    assert int(lineage.state.packs.dead.sum()) == 6 * BLOCK
    (swept,) = repository.sweep()
    assert swept.packs_repacked == 1
    check(repository, taken.snapshot, qemu.content(image), tmp_path)
    store.now += DAY + 1
    assert repository.sweep()[0].objects_removed == 1, "the pack that is not needed at all"
    assert left_over(repository, store) == set()
    check(repository, taken.snapshot, qemu.content(image), tmp_path)


def test_it_may_be_interrupted_again_and_again(
    repository: Repository, store: MemoryStore, image: Path, outage: Outage, tmp_path: Path
) -> None:
    outage.interrupt(repository, image, packs=3)
    qemu.noise(image, 0, BLOCK, 3)
    outage.interrupt(repository, image, packs=2)
    outage.interrupt(repository, image, packs=1)
    taken = repository.snapshot(image)
    assert (taken.attempt, taken.blocks_kept) == (3, 5 * PACK), "one pack holds but the block that changed"
    check(repository, taken.snapshot, qemu.content(image), tmp_path)
    assert left_over(repository, store) == set()


def test_an_increment_goes_on_too(
    repository: Repository, image: Path, outage: Outage, tmp_path: Path
) -> None:
    first = repository.snapshot(image)
    outage.packs.clear()
    qemu.noise(image, 0, 5 * PACK * BLOCK, 2)
    outage.interrupt(repository, image, packs=2)
    taken = repository.snapshot(image)
    assert (taken.rule, taken.parent, taken.blocks_kept) == ("table-diff", first.snapshot, 2 * PACK)
    assert len(outage.packs) == 3
    repository.delete([first.snapshot])
    repository.sweep()
    check(repository, taken.snapshot, qemu.content(image), tmp_path)


def test_a_parent_that_was_deleted_meanwhile_matters_not(
    repository: Repository, image: Path, outage: Outage, tmp_path: Path
) -> None:
    first = repository.snapshot(image)
    qemu.noise(image, 0, 2 * PACK * BLOCK, 2)
    second = repository.snapshot(image)
    outage.packs.clear()
    qemu.noise(image, 0, 4 * PACK * BLOCK, 3)
    outage.interrupt(repository, image, packs=2)
    repository.delete([second.snapshot])
    repository.sweep()
    taken = repository.snapshot(image)
    assert (taken.parent, taken.blocks_kept) == (first.snapshot, 2 * PACK)
    check(repository, taken.snapshot, qemu.content(image), tmp_path)


def test_a_pack_that_is_not_there_any_more_is_sent_again(
    repository: Repository, store: MemoryStore, image: Path, outage: Outage, tmp_path: Path
) -> None:
    outage.interrupt(repository, image, packs=4)
    gone, cut = sorted(name for name in store.objects if "/packs/" in name)[:2]
    del store.objects[gone]
    store.objects[cut] = type(store.objects[cut])(store.objects[cut].data[:-1], 0.0)
    taken = repository.snapshot(image)
    assert taken.blocks_kept == 2 * PACK
    check(repository, taken.snapshot, qemu.content(image), tmp_path)


@pytest.mark.parametrize("shift, kept", [(0, 3), (1, 2), (-1, 0)])
def test_notes_and_fronts_that_are_lost_or_wrong_cost_only_time(
    repository: Repository, image: Path, outage: Outage, tmp_path: Path, shift: int, kept: int
) -> None:
    outage.interrupt(repository, image, packs=5)
    files = repository.lineage("vol").files
    (interrupted,) = registrations(repository)
    notes = sorted((files.folder / "cache/sent" / interrupted).iterdir())
    notes[0].write_bytes(b"{")
    notes[1].unlink()
    text = notes[4].read_text()
    notes[4].write_text(text.replace(f'"runs": [[{4 * PACK}, ', f'"runs": [[{4 * PACK + shift}, '))
    assert (notes[4].read_text() == text) == (shift == 0)
    files.notes.remove_all("packs")
    taken = repository.snapshot(image)
    assert taken.blocks_kept == kept * PACK
    check(repository, taken.snapshot, qemu.content(image), tmp_path)


def test_a_sweep_gives_an_attempt_up_after_a_day_without_a_pack(
    repository: Repository, store: MemoryStore, image: Path, outage: Outage, tmp_path: Path
) -> None:
    outage.interrupt(repository, image, packs=4)
    (interrupted,) = registrations(repository)
    store.now += DAY + 1
    assert repository.sweep()[0].objects_removed == 0, "an attempt that may go on keeps its packs"
    path = repository.lineage("vol").files.folder / "running" / interrupted
    os.utime(path, (time.time() - DAY - 1,) * 2)
    assert repository.sweep()[0].objects_removed == 4
    taken = repository.snapshot(image)
    assert (taken.attempt, taken.blocks_kept) == (0, 0)
    assert taken.snapshot != interrupted
    check(repository, taken.snapshot, qemu.content(image), tmp_path)


def test_a_registration_that_a_crash_left_behind_its_record_is_not_gone_on_with(
    repository: Repository, image: Path, outage: Outage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registrations_of = type(repository.lineage("vol").files.registrations)
    with monkeypatch.context() as patch:
        patch.setattr(registrations_of, "_forget", lambda *_: False)
        first = repository.snapshot(image)
    assert registrations(repository) == [first.snapshot]
    before = qemu.content(image)
    qemu.noise(image, 0, BLOCK, 2)
    second = repository.snapshot(image)
    assert second.snapshot != first.snapshot
    assert registrations(repository) == []
    check(repository, first.snapshot, before, tmp_path)
    check(repository, second.snapshot, qemu.content(image), tmp_path)


def test_an_attempt_of_an_earlier_epoch_neither_goes_on_nor_commits(
    repository: Repository, store: MemoryStore, image: Path, outage: Outage, tmp_path: Path
) -> None:
    outage.interrupt(repository, image, packs=4)
    other = Repository(store, LocalState(tmp_path / "other"))
    other.adopt("vol")
    repository.adopt("vol")
    taken = repository.snapshot(image)
    assert (taken.attempt, taken.blocks_kept) == (0, 0)
    check(repository, taken.snapshot, qemu.content(image), tmp_path)


def test_a_snapshot_that_was_overtaken_by_two_adoptions_does_not_commit(
    repository: Repository, store: MemoryStore, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host owned the lineage in between, and may have swept what this one was sending."""
    repository.snapshot(image)
    qemu.noise(image, 0, BLOCK, 2)
    real = MemoryStore.put

    def put(self: MemoryStore, name: str, parts: list[bytes]) -> None:
        real(self, name, parts)
        if "/packs/" in name:
            Repository(store, LocalState(tmp_path / "other")).adopt("vol")
            Repository(store, repository.state).adopt("vol")

    monkeypatch.setattr(MemoryStore, "put", put)
    with pytest.raises(ConflictError, match="changed hands"):
        repository.snapshot(image)
    assert len(repository.snapshots()) == 1
    with pytest.raises(IslandError):
        repository.show("vol@" + registrations(repository)[0])
