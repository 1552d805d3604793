"""What must be true of a repository: what is live restores, and in the end nothing else is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from island_fast.dirtymap import BLOCK_SIZE, merge_intervals, subtract_intervals
from island_fast.formats.catalog import SnapshotRow, State
from island_fast.formats.keys import SLOT_BITS
from island_fast.progress import silent
from island_fast.repository.lineage import Lineage
from island_fast.repository.pack_reader import PackReader
from island_fast.repository.streams import restore_blocks
from tests.faults.machine.memory_image import PALETTE, Content
from tests.faults.machine.process import Process
from tests.faults.machine.world import World


def _columns(state: State) -> tuple[np.ndarray, ...]:
    return state.packs.key, state.packs.dead, state.packs.slots


def object_names(world: World, lineage: Lineage, row: SnapshotRow) -> frozenset[str]:
    """The objects that the snapshot needs now, by name: no name ever holds other bytes."""
    with world.account.by(Process(world.account)):
        keys = lineage.manifest(row).packs.keys(lineage.numbers)
    packs = lineage.state.packs
    rows = packs.find(keys).tolist()
    assert -1 not in rows, f"snapshot {row.id} needs a pack that the catalog does not name"
    names = {lineage.pack_name(packs, at) for at in rows}
    return frozenset(names | {lineage.manifest_name(row)})


def restored(world: World, lineage: Lineage, row: SnapshotRow, packs: PackReader) -> np.ndarray:
    """The snapshot's blocks, uint8[n, BLOCK_SIZE], read without faults."""
    with world.account.by(Process(world.account)):
        return volume_of(lineage, row, packs)


def volume_of(lineage: Lineage, row: SnapshotRow, packs: PackReader) -> np.ndarray:
    """The snapshot's blocks, uint8[n, BLOCK_SIZE]."""
    out = np.zeros((row.volume_size // BLOCK_SIZE, BLOCK_SIZE), np.uint8)

    def write(blocks: np.ndarray, rows: np.ndarray) -> None:
        out[blocks] = rows

    manifest = lineage.manifest(row)
    keys = manifest.packs.keys(lineage.numbers)
    runs = replace(manifest.runs, pack=keys[manifest.runs.pack])
    restore_blocks(runs, packs, write, lineage.store.range_gap, silent)
    return out


def is_content(blocks: np.ndarray, content: Content) -> bool:
    return np.array_equal(blocks, PALETTE[list(content)])


def balanced(world: World, name: str) -> None:
    """Below the lineage are its catalog, and what its live snapshots need, and the state says so."""
    lineage = world.reader(name)
    with world.account.by(Process(world.account)):
        accounted(lineage, world.objects(name))


def accounted(lineage: Lineage, objects: Mapping[str, bytes]) -> None:
    """The same of a lineage, refreshed, and all objects below it, by name."""
    state = lineage.state
    packs = lineage.pack_names(state.packs)
    manifests = [lineage.manifest_name(row) for row in state.live.values()]
    kept = {n for n in objects if "/catalog/" not in n}
    assert not kept - {*packs, *manifests}, f"never removed: {sorted(kept - {*packs, *manifests})}"
    assert kept == {*packs, *manifests}, f"missing: {sorted({*packs, *manifests} - kept)}"
    assert not state.dropped, "manifests of deleted snapshots were never removed"
    sizes = [len(objects[name]) for name in packs]
    assert state.packs.size.tolist() == sizes, "the state has other sizes than the objects"
    assert (2 * state.packs.dead <= state.packs.size).all(), "a pack is more than half dead"
    starts = state.packs.key << SLOT_BITS
    every = np.stack([starts, starts + state.packs.slots], axis=1)
    assert not subtract_intervals(state.dead, every).size, "dead slots of no pack"
    alive = subtract_intervals(every, state.dead)
    assert set((alive[:, 0] >> SLOT_BITS).tolist()) == set(state.packs.key.tolist()), "a pack is wholly dead"
    reader = PackReader(lineage)
    for key, dead, slots in zip(*(c.tolist() for c in _columns(state)), strict=True):
        lengths = reader.read_index(key).lengths
        assert dead == lengths[~state.live_slots(key, slots)].sum(), "a pack's dead bytes are miscounted"
    named = [lineage.manifest(row).slot_intervals(lineage.numbers) for row in state.live.values()]
    needed = merge_intervals(np.concatenate([np.zeros((0, 2), np.int64), *named]))
    assert not subtract_intervals(needed, alive).size, "slots that snapshots need count as dead"
    assert not subtract_intervals(alive, needed).size, "slots that nothing needs do not count as dead"
