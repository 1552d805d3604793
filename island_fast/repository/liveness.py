"""Plans for giving space back: which slots a delete frees, and what a sweep removes and rewrites.

A delete looks at the snapshot and its live neighbours only; a sweep reads no manifests. Rules:
docs/format.md, "Delete and sweep". Doubt removes nothing: a listing only ever adds candidates, which must
be unknown to the state, of no registered snapshot, and older than the grace. `repository.py` and
`sweeping.py` carry the plans out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from island_fast.arrays import Int64s
from island_fast.dirtymap import distinct, merge_intervals, subtract_intervals
from island_fast.errors import UNREADABLE, ConflictError, DamagedObjectError
from island_fast.formats.catalog import Packs, SnapshotRow, State
from island_fast.formats.keys import PACK_BITS, SLOT_BITS, SnapshotNumbers
from island_fast.formats.pack import Index
from island_fast.repository.lineage import Lineage

__all__ = ["as_of_now", "freeable", "live_slots", "needed_alone", "with_more_dead"]


_LOG = logging.getLogger(__name__)
_SLOT_MASK = (1 << SLOT_BITS) - 1


def needed_alone(
    state: State, numbers: SnapshotNumbers, row: SnapshotRow, slots: Callable[[SnapshotRow], Int64s]
) -> Int64s:
    """Slot keys that no live snapshot but `row` needs, int64[n, 2], merged, by its live neighbours.

    `slots(row)` gives what a snapshot needs. Siblings are asked for only when the snapshot holds, outside its
    parent, a slot in a pack that it did not write itself (design: only then can a sibling share one that the
    parent lacks).
    """
    free = slots(row)
    parent = state.live.get(row.parent or "")
    neighbours = state.children(row.id) + ([parent] if parent else [])
    for neighbour in neighbours:
        free = subtract_intervals(free, slots(neighbour))
    if (free[:, 0] >> (SLOT_BITS + PACK_BITS) != numbers.number(row.id)).any():
        for sibling in state.children(row.parent):
            if sibling.id != row.id:
                free = subtract_intervals(free, slots(sibling))
    return merge_intervals(free)


def freeable(state: State) -> int:
    """Bytes that a sweep without grace would free of what the catalog names: removed less rewritten."""
    gone, repacked = _packs_to_sweep(state)
    manifests = sum(row.manifest_size for row in state.dropped.values())
    return int(gone.size.sum() + repacked.dead.sum()) + manifests


def with_more_dead(packs: Packs, free: Int64s, index: Callable[[int], Index]) -> Packs:
    """The rows of packs that lose slots, with the stored bytes of those slots added to their dead.

    `free` are slot keys, int64[n, 2], merged; `index(key)` gives a pack's index. Of a pack that cannot be
    read, bytes are estimated by slots: they decide only when it is swept. DamagedObjectError for a pack that
    `packs` lacks, or a slot that its pack does.
    """
    keys = distinct(free[:, 0] >> SLOT_BITS)
    at = packs.find(keys)
    if (at < 0).any():
        raise DamagedObjectError("a manifest names a pack that the catalog does not; nothing was deleted")
    rows = packs.rows(at)
    dead = rows.dead.copy()
    bounds = np.append(np.searchsorted(free[:, 0], keys << SLOT_BITS), len(free))
    for row in range(len(rows)):
        mine = free[bounds[row] : bounds[row + 1]]
        first = mine[:, 0] & _SLOT_MASK
        stop = first + mine[:, 1] - mine[:, 0]
        if int(stop.max()) > int(rows.slots[row]):
            raise DamagedObjectError("a manifest names a slot that its pack lacks; nothing was deleted")
        ends = _ends(rows, row, index)
        dead[row] += int((ends[stop] - ends[first]).sum())
    return replace(rows, dead=np.minimum(dead, rows.size))


def _ends(packs: Packs, row: int, index: Callable[[int], Index]) -> Int64s:
    """Stored bytes before each slot of a pack, and in all; estimated if the pack cannot be read."""
    slots, size = int(packs.slots[row]), int(packs.size[row])
    try:
        lengths = index(int(packs.key[row])).lengths
        if lengths.size != slots:
            raise DamagedObjectError("a pack has other slots than the catalog says")
    except UNREADABLE as error:
        _LOG.warning("%s; the bytes that are freed are an estimate", error)
        return np.arange(slots + 1) * size // max(slots, 1)
    return np.append(0, np.cumsum(lengths))


def _packs_to_sweep(state: State) -> tuple[Packs, Packs]:
    """Packs without a live slot, and packs that are more than half dead."""
    packs = state.packs
    dead_slots = np.zeros(len(packs), np.int64)
    rows = packs.find(state.dead[:, 0] >> SLOT_BITS)
    if (rows < 0).any():
        raise DamagedObjectError(
            "the catalog counts dead slots of a pack that it does not name; nothing was removed"
        )
    np.add.at(dead_slots, rows, state.dead[:, 1] - state.dead[:, 0])
    gone = dead_slots >= packs.slots
    return packs.rows(gone), packs.rows(~gone & (2 * packs.dead > packs.size))


def live_slots(state: State, key: int, slots: int) -> NDArray[np.bool_]:
    """Which of a pack's slots are not dead."""
    keep = np.ones(slots, np.bool_)
    at, end = np.searchsorted(state.dead[:, 0], [key << SLOT_BITS, (key + 1) << SLOT_BITS])
    for first, stop in (state.dead[at:end] - (key << SLOT_BITS)).tolist():
        keep[first:stop] = False
    return keep


def as_of_now(lineage: Lineage, before: Packs, renamed: Packs) -> Packs:
    """Rows of packs that were written anew from the rows `before`, for a record that is appended now.

    Slots that died since then stay dead: none comes back to life. ConflictError if a pack is gone.
    """
    at = lineage.state.packs.find(renamed.key)
    if (at < 0).any():
        raise ConflictError(f"volume {lineage.name} was swept by another process; run it again")
    return replace(renamed, dead=lineage.state.packs.dead[at] - before.dead)
