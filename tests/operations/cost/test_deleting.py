"""The requests of a delete: as many in a long lineage as in a short one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.bench.synthetic_volume import SyntheticVolume
from island_fast.repository.local_state import LocalState
from island_fast.stores.base import ObjectInfo
from tests.support.memory_store import MemoryStore

SHORT = 3
LONG = 63
"""Snapshots. The newest record is the last before a checkpoint, as far after one as possible."""


class LateStore(MemoryStore):
    """With `late`, its listings are so late that they show nothing."""

    late = False

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        found = super().list(prefix)
        return iter(()) if self.late else found


@dataclass
class Requests:
    """The number of requests of a delete: with warm local state, with none, with none and late listings."""

    warm: int
    cold: int
    late: int


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Requests]:
    def count(length: int) -> Requests:
        folder = tmp_path_factory.mktemp(f"of{length}")
        store, home = LateStore(), folder / "home"
        repository = Repository(store, LocalState(home), create=True)
        volume = SyntheticVolume(folder / "vol.qcow2", 32, seed=length)
        taken = []
        for _ in range(length):
            taken.append(volume.snapshot(repository).snapshot)
            volume.edit(1)
        objects = dict(store.objects)

        def requests(name: str, late: bool) -> int:
            state = LocalState(home if name == "warm" else folder / name)
            if name != "warm":
                state.root.mkdir()
                shutil.copy(home / "writer", state.root)
            store.objects, store.late = dict(objects), late
            store.calls.clear()
            Repository(store, state).delete([f"vol@{taken[-2]}"])
            return store.calls.total()

        return Requests(requests("warm", False), requests("cold", False), requests("late", True))

    return count


def test_a_delete_costs_the_same_in_a_long_lineage(counted: Callable[[int], Requests]) -> None:
    """Without local state, the end of the catalog is found by halving and read from its checkpoint on."""
    short, long = counted(SHORT), counted(LONG)
    assert long.warm == short.warm
    assert long.cold <= short.cold + 34
    assert long.late <= short.cold + 2 * math.log2(LONG) + 34
    assert short.warm < short.cold < long.cold < long.late


@pytest.fixture
def warm(tmp_path: Path) -> tuple[MemoryStore, list[str]]:
    store = MemoryStore()
    repository = Repository(store, LocalState(tmp_path / "state"), create=True)
    volume, taken = SyntheticVolume(tmp_path / "vol.qcow2", 32, seed=1), []
    for _ in range(5):
        taken.append(volume.snapshot(repository).snapshot)
        volume.edit(1)
    return store, taken


@pytest.mark.parametrize("form", ["vol@{}", "{}"])
def test_further_references_to_a_volume_ask_the_store_nothing(
    warm: tuple[MemoryStore, list[str]], tmp_path: Path, form: str
) -> None:
    store, taken = warm
    references = [form.format(snapshot) for snapshot in taken[1:4]]

    def requests(use: Callable[[Repository], object]) -> int:
        repository = Repository(store, LocalState(tmp_path / "state"))
        store.calls.clear()
        use(repository)
        return store.calls.total()

    one = requests(lambda repository: repository.find(references[0]))
    assert one > 0
    assert requests(lambda repository: repository.find_all(references)) == one
    plan = requests(lambda repository: repository.delete(references[:1], dry_run=True))
    assert requests(lambda repository: repository.delete(references, dry_run=True)) == plan
    compared = requests(lambda repository: repository.diff(*references[:2]))
    assert compared == one
    first = requests(lambda repository: repository.delete(references[:1]))
    both = requests(lambda repository: repository.delete(references[1:]))
    assert both - first < first, "each has a record of its own, and nothing more"
