"""Storing a snapshot under its registration, wherever its blocks come from: packs, manifest, record.

The order is the protocol (docs/format.md, "Write order"). Taking a snapshot of an image and copying one from
another repository both end here, so what holds of one holds of the other: every entry is the snapshot's own
or its parent's, and what an interrupted attempt has sent is not sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter

import numpy as np

from island_fast.arrays import Int64s
from island_fast.dirtymap import distinct, merge_intervals, subtract_intervals
from island_fast.errors import UNREADABLE, ConflictError, DamagedError, ObjectMissingError
from island_fast.formats.catalog import Packs, SnapshotAdded, SnapshotRow, State
from island_fast.formats.keys import MAX_PACK_NUMBER, PACK_BITS, SLOT_BITS, pack_keys, slot_intervals
from island_fast.formats.manifest import Manifest, encode
from island_fast.formats.names import manifest_name, pack_name
from island_fast.formats.pack import Index, PackHeader
from island_fast.formats.runs import Runs, merge
from island_fast.repository.digests import KnownBlocks, KnownDigests
from island_fast.repository.lineage import Lineage
from island_fast.repository.local_state import Registration, SentPack
from island_fast.repository.pack_reader import PackLocation, PackReader
from island_fast.repository.pack_writer import PackWriter, WrittenPack
from island_fast.repository.streams import SendResult

__all__ = ["SnapshotWriter", "StoredSnapshot", "find_interrupted", "remove_used_registrations"]


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """Where a snapshot's blocks are now, and what its record must say of its packs.

    `runs` are all its blocks, `fresh` those that are not the parent's; both hold pack keys. `packs` are the
    rows of its own packs, `dead` the slots in them that it has no use for: slot keys, int64[n, 2].
    """

    runs: Runs
    fresh: Runs
    packs: Packs
    dead: Int64s


class SnapshotWriter:
    """One snapshot being stored in `lineage` under `registration`, which stands locked. `packs` reads there.

    `objects` counts what was written.
    """

    def __init__(self, lineage: Lineage, registration: Registration) -> None:
        self.packs = PackReader(lineage)
        self.objects = 0
        self._lineage = lineage
        self._registration = registration
        self._kept = KeptPacks(lineage, registration.snapshot, self.packs)

    @property
    def _owner(self) -> int:
        return self._lineage.numbers.number(self._registration.snapshot)

    def known(self, parent: Runs) -> KnownBlocks:
        """The digests of blocks that need not be sent: those of `parent` (with pack keys), and kept ones."""
        return KnownBlocks(KnownDigests(parent, self.packs.read_index), self._kept.digests)

    def sink(self, at_once: int | None = None) -> PackWriter:
        """Where blocks go: packs of this snapshot, each noted as soon as the store has acknowledged it.

        At most `at_once` are sent at a time, if the store takes as many.
        """
        lineage, snapshot = self._lineage, self._registration.snapshot
        header = PackHeader(lineage.name, snapshot, self._next_number(), lineage.seed)

        def stored(row: WrittenPack, blocks: Int64s, front: bytes) -> None:
            note_sent(lineage, snapshot, row, blocks, front)

        return PackWriter(lineage.store, header, self._registration.attempt, stored, at_once)

    def _next_number(self) -> int:
        """Behind the packs of earlier attempts, and those that a deleted copy of the snapshot left in use."""
        keys = self._lineage.state.packs.key
        mine = keys[keys >> PACK_BITS == self._owner] & MAX_PACK_NUMBER
        return max(self._kept.next_number, int(mine.max(initial=-1)) + 1)

    def stored(self, sent: SendResult, parent: Runs, replaced: Int64s) -> StoredSnapshot:
        """What the snapshot holds when its `replaced` blocks (int64[n, 2]) were sent, found kept, or zero.

        Of the rest, and of those found to be the same, it inherits the entries of `parent` (with pack keys).
        """
        self.objects += len(sent.packs)
        own = merge(self._kept.runs.within(sent.kept.runs()), sent.runs.intervals(), sent.runs)
        fresh = replace(own, pack=pack_keys(np.full(len(own), self._owner), own.pack))
        runs = merge(parent, subtract_intervals(replaced, sent.same.runs()), fresh)
        self._check_inherited(runs, parent)
        return StoredSnapshot(runs, fresh, *self._own_packs(sent, own))

    def _check_inherited(self, runs: Runs, parent: Runs) -> None:
        """Every slot must be this snapshot's own, or one that the parent names for blocks there."""
        for part in runs.windows():
            near = parent.around(int(part.start[0]), int(part.start[-1] + part.length[-1]))
            named = part.slots()[part.pack >> PACK_BITS != self._owner]
            if subtract_intervals(named, near.slots()).size:
                raise DamagedError("the new manifest names blocks that its parent lacks; nothing was stored")

    def _own_packs(self, sent: SendResult, own: Runs) -> tuple[Packs, Int64s]:
        """Rows of the packs written, and of those kept; and the slots in these that are born dead."""
        owner = np.full(len(sent.packs), self._owner, np.int64)
        number, attempt, size, slots = (
            np.array([getattr(pack, name) for pack in sent.packs], np.int64)
            for name in ("number", "attempt", "size", "slots")
        )
        none = np.zeros(len(sent.packs), np.int64)
        written = Packs(pack_keys(owner, number), attempt, none, size, slots, none)
        kept, dead = self._kept.rows(own)
        if dead.size:
            from island_fast.repository.liveness import add_dead_slots  # only after an interruption

            kept = kept.updated(add_dead_slots(kept, dead, self._kept.index))
        return kept.updated(written), dead

    def commit(
        self,
        manifest: Manifest,
        packs: Packs,
        dead: Int64s,
        finalize: Callable[[SnapshotAdded], State | None],
    ) -> SnapshotRow:
        """Write the manifest, then under the lineage's lock the record that makes the snapshot exist.

        `finalize` is called with the event once the commit is certain; the record carries the checkpoint that
        it returns, if any.
        """
        lineage = self._lineage
        name = manifest_name(lineage.name, manifest.snapshot, manifest.attempt)
        data, checksum = encode(name, manifest)
        lineage.store.put(name, [data])
        row = SnapshotRow(
            id=manifest.snapshot,
            parent=manifest.parent,
            attempt=manifest.attempt,
            checksum=checksum.hex(),
            manifest_size=len(data),
            created=manifest.created,
            label=manifest.label,
            volume_size=manifest.volume_size,
            stored=int(packs.size.sum()),
            pin=manifest.pin,
        )
        event = SnapshotAdded(row, packs, dead)
        with lineage.hold_lock():
            self._still_allowed()
            lineage.append(event, finalize(event))
        self.objects += 2
        lineage.files.cache.write(name, data)
        return row

    def _still_allowed(self) -> None:
        """Refuse unless this host owns the lineage as it did, the registration stands, the parent is live."""
        lineage, parent = self._lineage, self._registration.parent
        lineage.require_owner()
        if lineage.epoch != self._registration.epoch:
            raise ConflictError(f"volume {lineage.name} changed hands meanwhile; run it again")
        if self._registration not in lineage.files.registrations:
            raise ConflictError(
                "the registration of this snapshot is gone, so its packs may be swept; run it again"
            )
        if parent is not None and parent not in lineage.state.live:
            raise ConflictError(f"snapshot {parent} was deleted meanwhile; run it again")


def find_interrupted(lineage: Lineage, copied: str | None = None) -> Registration | None:
    """The attempt that the next snapshot of `lineage` goes on with: the newest that sent packs.

    With `copied`, that at copying this snapshot. Under the lineage's lock. Ids that are used up are not
    among them.
    """
    remove_used_registrations(lineage)
    return lineage.files.registrations.find_interrupted(lineage.epoch, copied)


def remove_used_registrations(lineage: Lineage) -> None:
    """Remove registrations of snapshots that have been committed: crashes, and lost answers, leave them.

    Under the lineage's lock, and before a sweep takes a deleted snapshot's last trace out of the state. Not
    those of running processes: a snapshot that was deleted may be copied here once more.
    """
    state, files = lineage.state, lineage.files
    owners = {lineage.numbers.id(int(owner)) for owner in distinct(state.packs.key >> PACK_BITS)}
    used = owners | set(state.live) | set(state.dropped) | {one.snapshot for one in files.deleted_snapshots()}
    for registration, alive in files.registrations.all():
        if registration.snapshot in used and not alive:
            files.registrations.remove(registration.snapshot)


def note_sent(lineage: Lineage, snapshot: str, row: WrittenPack, blocks: Int64s, front: bytes) -> None:
    """Note that the store has acknowledged a pack, with its `blocks` in order of their slots."""
    first = np.flatnonzero(np.append(True, np.diff(blocks) != 1))
    lengths = np.diff(np.append(first, blocks.size))
    runs = tuple(zip(blocks[first].tolist(), lengths.tolist(), strict=True))
    lineage.files.cache.write(row.name, front)
    sent = SentPack(row.number, row.attempt, row.size, row.slots, runs)
    lineage.files.registrations.note_sent(snapshot, sent)


class KeptPacks:
    """Packs that earlier attempts at `snapshot` stored. `runs` tell their blocks by pack number.

    Of a block that several attempts sent, the last pack counts.
    """

    def __init__(self, lineage: Lineage, snapshot: str, packs: PackReader) -> None:
        self._lineage = lineage
        self._snapshot = snapshot
        self._packs = packs
        self._sent = {pack.number: pack for pack in lineage.files.registrations.sent_packs(snapshot)}
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
                index = self._packs.read_index_at(place)
            except (ObjectMissingError, *UNREADABLE):
                self._there[number] = False
            else:
                return index if len(index.rows) == place.slots else None
        return None

    def _place(self, number: int) -> PackLocation:
        pack = self._sent[number]
        name = pack_name(self._lineage.name, self._snapshot, number, pack.attempt)
        return PackLocation(name, pack.slots, pack.size)

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
        return self._packs.read_index_at(self._place(key & MAX_PACK_NUMBER))


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
