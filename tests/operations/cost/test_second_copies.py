"""A second copy settles: what retention took away there stays away, and only what changed is sent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from island_fast.api import Repository
from island_fast.bench.synthetic_volume import SyntheticVolume
from island_fast.operations.retain import Keep
from island_fast.repository.local_state import LocalState
from tests.support.memory_store import MemoryStore

BLOCKS = 512
NIGHTS = 14
CHANGED = 8  # blocks a night
DAY = 24 * 3600.0


@pytest.fixture(autouse=True)
def no_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


class Nights:
    """A volume with a near and a far repository, each with a retention of its own, swept every night."""

    def __init__(self, folder: Path, near: Keep, far: Keep) -> None:
        self.folder = folder
        self.stores = [MemoryStore(location=where) for where in ("near", "far")]
        self.volume = SyntheticVolume(folder / "vol.qcow2", BLOCKS, seed=1)
        self.keep = [near, far]
        self.changed = 0  # bytes that the near repository stored of the volume
        self.open()

    def open(self, state: str = "state") -> None:
        self.near, self.far = (
            Repository(store, LocalState(self.folder / state), create=True) for store in self.stores
        )

    def night(self, copy: bool = True) -> int:
        """One night; return how many snapshots were copied."""
        self.volume.edit(CHANGED)
        self.changed += self.volume.snapshot(self.near).bytes_stored
        self.tidy(0)
        if not copy:
            return 0
        copied = self.near.copy(self.far)
        assert not self.near.left_out
        self.tidy(1)
        return sum(one.copied for one in copied)

    def tidy(self, side: int) -> None:
        repository = (self.near, self.far)[side]
        repository.retain(self.keep[side])
        self.stores[side].now += DAY
        repository.sweep()


def size(store: MemoryStore) -> int:
    return sum(len(stored.data) for stored in store.objects.values())


@pytest.mark.parametrize(("near", "far"), [(3, 7), (7, 3), (5, 5), (7, 1)])
@pytest.mark.parametrize("every", [1, 4])
def test_nights_of_retention_on_both_sides(tmp_path: Path, near: int, far: int, every: int) -> None:
    """Each night a snapshot, each `every`th a copy of all that is there."""
    nights = Nights(tmp_path, Keep(last=near), Keep(last=far))
    nights.night()
    base, nights.changed = nights.stores[1].sent, 0
    for number in range(NIGHTS):
        copied = nights.night((number + 1) % every == 0 or number == NIGHTS - 1)
        assert copied <= min(every, near)
    assert nights.stores[1].sent - base <= 1.1 * nights.changed
    assert size(nights.stores[1]) <= 1.2 * size(nights.stores[0])
    assert len(nights.far.snapshots()) == min(far, NIGHTS + 1)


def test_one_old_snapshot_near_is_no_better_parent_than_what_is_only_far(tmp_path: Path) -> None:
    """The first snapshot stays on the near side for ever, so that retention makes it the parent of many."""
    nights = Nights(tmp_path, Keep(last=3), Keep(last=7))
    nights.night()
    (first,) = (one.snapshot for one in nights.near.snapshots())
    base, nights.changed = nights.stores[1].sent, 0
    for number in range(NIGHTS):
        nights.volume.edit(CHANGED)
        nights.changed += nights.volume.snapshot(nights.near).bytes_stored
        taken = [one.snapshot for one in nights.near.snapshots()]
        nights.near.delete([one for one in taken[:-2] if one != first])
        if number % 4 == 3:
            nights.near.copy(nights.far)
            nights.tidy(1)
    assert nights.stores[1].sent - base <= 1.1 * nights.changed


def test_what_went_away_stays_away_whoever_looks(tmp_path: Path) -> None:
    """Also for a host that lost its local state, after many sweeps, and after an adoption."""
    nights = Nights(tmp_path, Keep(last=7), Keep(last=2))
    for _ in range(NIGHTS):
        nights.night()
    nights.open("other")
    nights.far.adopt("vol")
    copied = nights.near.copy(nights.far)
    assert [one.copied for one in copied] == [False] * 7
    assert [one.deleted for one in copied] == [True] * 5 + [False] * 2
    named = nights.near.copy(nights.far, [copied[0].snapshot])
    assert [(one.copied, one.deleted) for one in named] == [(True, False)]
    assert [one.snapshot for one in nights.far.snapshots()] == [copied[at].snapshot for at in (0, 5, 6)]
    nights.tidy(1)
    assert not any(one.copied for one in nights.near.copy(nights.far, volume="vol"))
