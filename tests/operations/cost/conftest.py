"""One long history for the tests that count: 100 scattered increments of 1 %, none deleted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.bench.synthetic_volume import SyntheticVolume
from island_fast.repository.local_state import LocalState
from island_fast.stores.base import Store
from tests.support.memory_store import MemoryStore

BLOCKS = 1024  # four full packs at first; larger volumes have packs that are cut up as often
INCREMENTS = 100


@dataclass(frozen=True)
class History:
    """Two repositories: `deep` has many snapshots, `flat` has the newest state as its only snapshot."""

    deep: MemoryStore
    flat: MemoryStore
    state: Path  # local state of the host that took all of them
    live_packs: int

    def copy_into(self, store: Store, *, flat: bool = False) -> Store:
        """Copy the objects of one of the repositories into `store`, and return it."""
        for name, stored in (self.flat if flat else self.deep).objects.items():
            store.put(name, [stored.data])
        return store


@pytest.fixture(scope="session")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    folder = tmp_path_factory.mktemp("history")
    volume = SyntheticVolume(folder / "vol.qcow2", BLOCKS, seed=1)
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


def select_kind(names: Sequence[str], kind: str) -> list[str]:
    """Return the names of one kind: "packs", "manifests" or "catalog"."""
    return [name for name in names if f"/{kind}/" in name]
