"""Going on after an interruption: packs of an earlier attempt at a snapshot are kept, not sent again.

An attempt notes every pack that the store has acknowledged (`local.py`). The next one stores the volume as
it is then, under the same snapshot id: a block whose digest is that of the same block in a noted pack, which
is still there, is not sent. So nothing depends on how the earlier attempt read it, nor on the notes being
right; what is lost of them is sent again.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter

import numpy as np

from island_fast.arrays import Int64s
from island_fast.dirtymap import distinct, merge_intervals, subtract_intervals
from island_fast.errors import UNREADABLE, ObjectMissingError
from island_fast.formats.catalog import Packs, pack_name
from island_fast.formats.keys import MAX_PACK_NUMBER, PACK_BITS, SLOT_BITS, pack_keys, slot_intervals
from island_fast.formats.pack import Index
from island_fast.formats.runs import Runs, merge
from island_fast.repository.lineage import Lineage
from island_fast.repository.local_state import Registration, SentPack
from island_fast.repository.pack_reader import KnownDigests, PackReader, Place
from island_fast.repository.streams import PackRow

__all__ = ["KeptPacks", "find_interrupted", "forget_used", "note_sent"]


def find_interrupted(lineage: Lineage, copied: str | None = None) -> Registration | None:
    """The attempt that the next snapshot of `lineage` goes on with: the newest that sent packs.

    With `copied`, that at copying this snapshot. Under the lineage's lock. Ids that are used up are not
    among them.
    """
    forget_used(lineage)
    return lineage.files.interrupted(lineage.epoch, copied)


def forget_used(lineage: Lineage) -> None:
    """Remove registrations of snapshots that have been committed: crashes, and lost answers, leave them.

    Under the lineage's lock, and before a sweep takes a deleted snapshot's last trace out of the state. Not
    those of running processes: a snapshot that was deleted may be copied here once more.
    """
    state, files = lineage.state, lineage.files
    owners = {lineage.numbers.id(int(owner)) for owner in distinct(state.packs.key >> PACK_BITS)}
    used = owners | set(state.live) | set(state.dropped) | {one.snapshot for one in files.retired()}
    for registration, alive in files.running():
        if registration.snapshot in used and not alive:
            files.unregister(registration.snapshot)


def note_sent(lineage: Lineage, snapshot: str, row: PackRow, blocks: Int64s, front: bytes) -> None:
    """Note that the store has acknowledged a pack, with its `blocks` in order of their slots."""
    first = np.flatnonzero(np.append(True, np.diff(blocks) != 1))
    lengths = np.diff(np.append(first, blocks.size))
    runs = tuple(zip(blocks[first].tolist(), lengths.tolist(), strict=True))
    lineage.files.cache(row.name, front)
    lineage.files.note_sent(snapshot, SentPack(row.number, row.attempt, row.size, row.slots, runs))


class KeptPacks:
    """Packs that earlier attempts at `snapshot` stored. `runs` tell their blocks by pack number.

    Of a block that several attempts sent, the last pack counts.
    """

    def __init__(self, lineage: Lineage, snapshot: str, packs: PackReader) -> None:
        self._lineage = lineage
        self._snapshot = snapshot
        self._packs = packs
        self._sent = {pack.number: pack for pack in lineage.files.sent(snapshot)}
        self._there: dict[int, bool] = {}
        self.next_number = max(self._sent, default=-1) + 1
        self.runs = Runs.empty()
        for _, group in groupby(self._sent.values(), attrgetter("attempt")):
            attempt = _runs(group)
            self.runs = merge(self.runs, attempt.intervals(), attempt)
        self.digests = KnownDigests(self.runs, self._index)

    def _index(self, number: int) -> Index | None:
        """The index of a kept pack; None if it is not, or not whole, in the store any more."""
        place = self._place(number)
        if number not in self._there:
            info = self._lineage.store.head(place.name)
            self._there[number] = info is not None and info.size == place.size
        if self._there[number]:
            try:
                index = self._packs.index_at(place)
            except (ObjectMissingError, *UNREADABLE):
                self._there[number] = False
            else:
                return index if len(index.rows) == place.slots else None
        return None

    def _place(self, number: int) -> Place:
        pack = self._sent[number]
        name = pack_name(self._lineage.name, self._snapshot, number, pack.attempt)
        return Place(name, pack.slots, pack.size)

    def rows(self, own: Runs) -> tuple[Packs, Int64s]:
        """What the catalog must know of the kept packs that `own` runs (by pack number) name.

        Their rows, without dead bytes, and the slots in them that no run names: slot keys, int64[n, 2].
        """
        used = np.array(sorted(self._sent.keys() & set(distinct(own.pack).tolist())), np.int64)
        sent = [self._sent[number] for number in used.tolist()]
        attempt, size, slots = (
            np.array([getattr(pack, name) for pack in sent], np.int64)
            for name in ("attempt", "size", "slots")
        )
        owner = self._lineage.numbers.number(self._snapshot)
        none = np.zeros(used.size, np.int64)
        packs = Packs(pack_keys(np.full(used.size, owner), used), attempt, none, size, slots, none)
        space = np.stack([packs.key << SLOT_BITS, (packs.key << SLOT_BITS) + slots], axis=1)
        keys = pack_keys(np.full(len(own), owner), own.pack)
        named = merge_intervals(slot_intervals(keys, own.slot, own.length))
        return packs, subtract_intervals(space, named)

    def index(self, key: int) -> Index:
        """The index of a kept pack, by its key; DamagedObjectError if it cannot be read."""
        return self._packs.index_at(self._place(key & MAX_PACK_NUMBER))


def _runs(packs: Iterable[SentPack]) -> Runs:
    """The blocks of one attempt's packs, in order; none if the notes contradict each other."""
    rows = [
        (start, length, pack.number, slot)
        for pack in packs
        for (start, length), slot in zip(pack.runs, _first_slots(pack), strict=True)
    ]
    columns = np.array(rows, np.int64).reshape(-1, 4).T
    order = np.argsort(columns[0], kind="stable")
    runs = Runs(*(column[order] for column in columns))
    rises = bool((runs.start[1:] >= runs.start[:-1] + runs.length[:-1]).all())
    return runs if rises and (runs.start >= 0).all() and (runs.length > 0).all() else Runs.empty()


def _first_slots(pack: SentPack) -> list[int]:
    lengths = np.array([length for _, length in pack.runs], np.int64)
    slots: list[int] = (np.cumsum(lengths) - lengths).tolist()
    return slots
