"""What `show` and a dry run tell is what the store really loses, counted from its objects alone."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from island_fast.api import Repository
from island_fast.formats.manifest import decode
from island_fast.formats.pack import ABSENT, open_pack
from island_fast.operations.retain import Keep
from island_fast.repository import pack_reader, pack_writer
from tests.operations.conftest import let_any_image_in
from tests.support import qemu
from tests.support.memory_store import MemoryStore

BLOCK = 65536
MIB = 1 << 20


@pytest.fixture
def tree(repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nine snapshots: a trunk of five, two branches of two from its second and fourth; several packs each."""
    monkeypatch.setattr(pack_reader, "BATCH", 4)
    monkeypatch.setattr(pack_writer, "MAX_SLOTS", 8)
    draw = random.Random(5)
    taken = []

    def live(image: Path, times: int) -> None:
        for _ in range(times):
            for _ in range(3):
                at, length = draw.randrange(60) * BLOCK, draw.randrange(1, 12) * BLOCK
                qemu.noise(image, at, length, draw.randrange(1 << 30))
            taken.append(repository.snapshot(image).snapshot)

    image = qemu.create(tmp_path / "vol.qcow2", 8 * MIB, lazy_refcounts="on")
    live(image, 5)
    for number, start in enumerate((taken[1], taken[3])):
        branch = tmp_path / f"branch{number}.qcow2"
        repository.restore(start, branch)
        let_any_image_in(repository)
        live(branch, 2)
    return taken


class Store:
    """The objects of a repository, read without catalog or caches."""

    def __init__(self, store: MemoryStore, live: set[str]) -> None:
        self._objects = {name: stored.data for name, stored in store.objects.items()}
        self._needed: dict[tuple[str, int], set[int]] = {}
        self.held: Counter[tuple[str, int, int]] = Counter()  # how many live snapshots hold each slot
        self.dropped = 0  # bytes of the manifests of others
        for name, data in self._objects.items():
            if "/manifests/" in name:
                if name.split("/")[2].partition("-")[0] not in live:
                    self.dropped += len(data)
                    continue
                manifest, _ = decode(name, data)
                for pack, slot, length in zip(
                    manifest.runs.pack, manifest.runs.slot, manifest.runs.length, strict=True
                ):
                    owner = manifest.packs.snapshots[manifest.packs.snapshot[pack]]
                    key = (owner, int(manifest.packs.number[pack]))
                    self._needed.setdefault(key, set()).update(range(slot, slot + length))
                    self.held.update((*key, at) for at in range(slot, slot + length))

    def size(self) -> int:
        """Bytes of all packs and manifests."""
        return sum(len(d) for name, d in self._objects.items() if "/packs/" in name or "/manifests/" in name)

    def needed(self) -> int:
        """Stored bytes of all slots that some live manifest names."""
        return sum(self._pack(name)[0] for name in self._objects if "/packs/" in name)

    def unneeded(self) -> list[tuple[int, int]]:
        """For each pack, bytes of slots that nobody needs, and of the object."""
        return [self._pack(name)[1:] for name in self._objects if "/packs/" in name]

    def _pack(self, name: str) -> tuple[int, int, int]:
        index, data = open_pack(name, self._objects[name])
        key = (index.header.snapshot, index.header.number)
        slots = np.array(sorted(self._needed.get(key, ())), np.int64)
        assert not (index.rows["codec"][slots] == ABSENT).any(), "a slot that is needed was left out"
        live = int(index.lengths[slots].sum())
        return live, int(index.lengths.sum()) - live, data.nbytes


def check_usage(repository: Repository, held: Store) -> None:
    """What `usage` tells is what the objects show, and what the next sweep would free."""
    used = repository.usage()
    (one,) = used.volumes
    assert replace(used.total, volume="vol") == one
    assert one.bytes_logical == held.held.total() * BLOCK
    assert one.bytes_distinct == len(held.held) * BLOCK
    assert one.bytes_shared == sum(holders > 1 for holders in held.held.values()) * BLOCK
    assert one.bytes_stored == held.size()
    assert one.bytes_dead == held.dropped + sum(dead for dead, _ in held.unneeded())
    assert one.bytes_freed == repository.sweep(dry_run=True)[0].bytes_freed
    needed = one.bytes_stored - one.bytes_dead
    assert one.compression == (one.bytes_distinct / needed if needed else None)


@pytest.mark.parametrize("seed", range(6))
def test_every_figure_is_what_the_store_loses(
    repository: Repository, store: MemoryStore, tree: list[str], seed: int
) -> None:
    """Snapshots of a tree are deleted in random order, sometimes several before a sweep."""
    draw = random.Random(seed)
    live = set(tree)
    for snapshot in draw.sample(tree, len(tree)):
        shown = repository.show(snapshot)
        (would,) = repository.delete([snapshot], dry_run=True)
        before = Store(store, live)
        (told,) = repository.delete([snapshot])
        assert would == told
        assert (shown.bytes_unreferenced, shown.bytes_freed) == (told.bytes_unreferenced, told.bytes_freed)
        live.remove(snapshot)
        after = Store(store, live)
        manifest = len(store.objects[f"vol/manifests/{snapshot}-0"].data)
        assert told.bytes_unreferenced == before.needed() - after.needed() + manifest
        if draw.random() < 0.6:
            size = after.size()
            swept = repository.sweep(dry_run=True)[0]
            assert repository.sweep()[0] == swept
            left = Store(store, live)
            assert swept.bytes_freed == size - left.size()
            assert sum(step.bytes for step in swept.steps) == swept.bytes_removed
            assert all(2 * dead <= whole for dead, whole in left.unneeded()), "more than half dead"
            check_usage(repository, left)
        else:
            check_usage(repository, after)
    repository.sweep()
    assert Store(store, set()).size() == 0


@pytest.mark.parametrize("seed", range(3))
def test_what_one_delete_frees_is_what_the_next_sweep_removes(
    repository: Repository, store: MemoryStore, tree: list[str], seed: int
) -> None:
    draw = random.Random(seed)
    live = set(tree)
    for snapshot in draw.sample(tree, len(tree)):
        size = Store(store, live).size()
        (told,) = repository.delete([snapshot])
        repository.sweep()
        live.remove(snapshot)
        assert told.bytes_freed == size - Store(store, live).size()


def test_what_retaining_frees_is_what_the_next_sweep_removes(
    repository: Repository, store: MemoryStore, tree: list[str]
) -> None:
    size = Store(store, set(tree)).size()
    (would,) = repository.retain(Keep(last=4), dry_run=True)
    assert len(repository.snapshots()) == len(tree), "a dry run deletes nothing"
    (told,) = repository.retain(Keep(last=4))
    assert told == would
    assert (told.kept, told.deleted) == (4, len(tree) - 4)
    live = {one.snapshot for one in told.snapshots if one.kept}
    assert live == set(tree[-4:]) == {one.snapshot for one in repository.snapshots()}
    for figure in ("bytes_freed", "bytes_unreferenced"):
        assert getattr(told, figure) == sum(getattr(one, figure) for one in told.snapshots)
    after = Store(store, live)
    assert told.bytes_unreferenced == after.dropped + sum(dead for dead, _ in after.unneeded())
    repository.sweep()
    assert told.bytes_freed == size - Store(store, live).size()
