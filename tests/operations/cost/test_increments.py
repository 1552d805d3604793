"""The cost of an increment: it depends on what changed, not on the volume or its history."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from island_fast import _diff
from island_fast.api import Repository
from island_fast.bench.synthetic_volume import SyntheticVolume
from island_fast.repository.local_state import LocalState
from tests.support.memory_store import MemoryStore

BLOCK = 65536
EDITED = 12


@pytest.mark.parametrize("blocks", [256, 4096])
def test_bytes_read_hashed_and_sent_are_those_that_changed(
    blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = 0
    real = _diff.hash_blocks

    def hash_blocks(data: np.ndarray, size: int, seed: int, digests: np.ndarray) -> None:
        nonlocal hashed
        hashed += memoryview(data).nbytes
        real(data, size, seed, digests)

    store = MemoryStore()
    repository = Repository(store, LocalState(tmp_path / "state"), create=True)
    volume = SyntheticVolume(tmp_path / "vol.qcow2", blocks, seed=3)
    volume.snapshot(repository)
    changed = volume.edit(EDITED)
    monkeypatch.setattr(_diff, "hash_blocks", hash_blocks)
    store.calls.clear()
    store.sent = 0
    taken = volume.snapshot(repository)
    assert taken.bytes_read == hashed == (changed + taken.blocks_sampled) * BLOCK
    assert 16 <= taken.blocks_sampled <= 32
    assert changed * BLOCK < store.sent < changed * BLOCK + 8192
    assert store.calls["put"] == taken.objects_written == 3
    assert store.calls["get"] == 2, "the record before, which it stands on, and its own, read back"
    assert store.calls["head"] <= 8, "the end of the catalog, that of its epoch, and what is built upon"
    assert not store.calls["list"] + store.calls["get_ranges"] + store.calls["delete"]


def test_a_long_history_costs_an_increment_no_request(tmp_path: Path) -> None:
    store = MemoryStore()
    repository = Repository(store, LocalState(tmp_path / "state"), create=True)
    volume = SyntheticVolume(tmp_path / "vol.qcow2", 32, seed=4)
    costs = []
    for _ in range(40):
        volume.edit(2)
        store.calls.clear()
        volume.snapshot(repository)
        costs.append(dict(store.calls))
    assert costs[2] == costs[31] == costs[32] == costs[39]
