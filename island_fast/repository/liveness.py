"""Which slots and packs a delete frees, and what a sweep or a repair must record of packs written again.

A delete looks at the snapshot and its live neighbours only, and at the indexes of the packs that lose slots;
what the state alone says is in `State`. Rules: docs/format.md, "Delete and sweep". The files `delete.py`,
`sweep.py` and `heal.py` in operations/ carry them out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from island_fast.arrays import Int64s
from island_fast.dirtymap import distinct, merge_intervals, subtract_intervals
from island_fast.errors import UNREADABLE, ConflictError, DamagedObjectError
from island_fast.formats.catalog import Packs, SnapshotRow, State
from island_fast.formats.keys import PACK_BITS, SLOT_BITS, SnapshotNumbers
from island_fast.formats.pack import Index
from island_fast.repository.lineage import Lineage

__all__ = ["add_dead_slots", "only_needed_by", "rebase_rewritten"]


_LOG = logging.getLogger(__name__)
_SLOT_MASK = (1 << SLOT_BITS) - 1


def only_needed_by(
    row: SnapshotRow, state: State, numbers: SnapshotNumbers, slots: Callable[[SnapshotRow], Int64s]
) -> Int64s:
    """Return the slot keys that no live snapshot except `row` needs: int64[n, 2], merged.

    `slots(row)` returns what a snapshot needs. It is called for `row`, its live parent and children, and for
    its siblings only if `row` holds, outside its parent, a slot in a pack that it did not write itself: only
    then can a sibling share a slot that the parent lacks.
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


def add_dead_slots(packs: Packs, free: Int64s, index: Callable[[int], Index]) -> Packs:
    """Return the rows of packs that lose slots, with the stored bytes of those slots added to their dead.

    `free` are slot keys, int64[n, 2], merged; `index(key)` returns a pack's index. If a pack cannot be read,
    the bytes are estimated by the number of slots: they decide only when the pack is swept.
    DamagedObjectError for a pack that `packs` lacks, or a slot that its pack lacks.
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
        ends = _slot_ends(rows, row, index)
        dead[row] += int((ends[stop] - ends[first]).sum())
    return replace(rows, dead=np.minimum(dead, rows.size))


def _slot_ends(packs: Packs, row: int, index: Callable[[int], Index]) -> Int64s:
    """Return the stored bytes before each slot of a pack, and of all; estimated if it cannot be read."""
    slots, size = int(packs.slots[row]), int(packs.size[row])
    try:
        lengths = index(int(packs.key[row])).lengths
        if lengths.size != slots:
            raise DamagedObjectError("a pack has other slots than the catalog says")
    except UNREADABLE as error:
        _LOG.warning("%s; the bytes that are freed are an estimate", error)
        return np.arange(slots + 1) * size // max(slots, 1)
    return np.append(0, np.cumsum(lengths))


def rebase_rewritten(lineage: Lineage, before: Packs, rewritten: Packs) -> Packs:
    """Return the rows of packs that were written again from the rows `before`, for a record appended now.

    Slots that died since `before` was read stay dead. ConflictError if a pack is gone.
    """
    at = lineage.state.packs.find(rewritten.key)
    if (at < 0).any():
        raise ConflictError(f"volume {lineage.name} was swept by another process; run it again")
    return replace(rewritten, dead=lineage.state.packs.dead[at] - before.dead)
