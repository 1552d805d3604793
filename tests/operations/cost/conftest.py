"""One long history for all that is counted of it: 100 increments of 1 %, scattered, all kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.bench.synthetic_volume import EditedVolume
from island_fast.repository.local_state import LocalState
from island_fast.stores.base import Store
from tests.support.memory_store import MemoryStore

BLOCKS = 1024  # four full packs at first: how often each is cut is the same for larger volumes
INCREMENTS = 100


@dataclass(frozen=True)
class History:
    """The objects of a repository with the newest of many snapshots, and of one with the same state alone."""

    deep: MemoryStore
    flat: MemoryStore
    state: Path  # local state of the host that took all of them
    live_packs: int

    def poured(self, store: Store, *, flat: bool = False) -> Store:
        """`store`, with the objects of one of them in it."""
        for name, stored in (self.flat if flat else self.deep).objects.items():
            store.put(name, [stored.data])
        return store


@pytest.fixture(scope="session")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    folder = tmp_path_factory.mktemp("history")
    volume = EditedVolume(folder / "vol.qcow2", BLOCKS, seed=1)
    deep = Repository(MemoryStore(), LocalState(folder / "state"), create=True)
    volume.snapshot(deep)
    for _ in range(INCREMENTS):
        volume.edit(math.ceil(BLOCKS / 100))
        volume.snapshot(deep)
    flat = Repository(MemoryStore(), LocalState(folder / "state"), create=True)
    volume.snapshot(flat)
    found = deep.find("vol@latest")
    packs = len(found.lineage.manifest(found.row).packs)
    return History(deep.store, flat.store, folder / "state", packs)


def named(names: Sequence[str], kind: str) -> list[str]:
    """Those of `names` that are packs, manifests or catalog records."""
    return [name for name in names if f"/{kind}/" in name]
