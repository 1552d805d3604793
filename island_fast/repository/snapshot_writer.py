"""Store a snapshot under its registration, wherever its blocks come from: packs, manifest, record.

The order is the protocol (docs/format.md, "Write order"). Snapshots of images and copies from another
repository are both stored here, so the same holds for both: every entry is the snapshot's own or its
parent's, and what an interrupted attempt has sent is not sent again.
"""

from __future__ import annotations

import random
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

__all__ = [
    "SnapshotWriter",
    "StoredSnapshot",
    "find_interrupted",
    "named_ids",
    "next_attempt",
    "remove_used_registrations",
]


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """Where a snapshot's blocks are stored, and what its record says about its packs.

    `runs` are all its blocks, `fresh` those that are not inherited; both hold pack keys. `packs` are the rows
    of its own packs, `dead` the slots in them that it does not need: slot keys, int64[n, 2].
    """

    runs: Runs
    fresh: Runs
    packs: Packs
    dead: Int64s


class SnapshotWriter:
    """Stores one snapshot in `lineage`, under `registration`, which the caller holds.

    `packs` reads the lineage's packs; `objects` counts the objects written.
    """

    def __init__(self, lineage: Lineage, registration: Registration) -> None:
        self.packs = PackReader(lineage)
        self.objects = 0
        self._lineage = lineage
        self._registration = registration
        self._kept = _KeptPacks(lineage, registration.snapshot, self.packs)
        lineage.store.refuses_overwrites()  # what is not known costs a request for each pack

    @property
    def _owner(self) -> int:
        return self._lineage.numbers.number(self._registration.snapshot)

    def known_blocks(self, parent: Runs) -> KnownBlocks:
        """Return the digests of blocks that need not be sent: of `parent` (with pack keys), and kept ones."""
        return KnownBlocks(KnownDigests(parent, self.packs.read_index), self._kept.digests)

    def pack_writer(self, at_once: int | None = None) -> PackWriter:
        """Return a writer of this snapshot's packs; it notes each that the store has acknowledged.

        It uploads at most `at_once` packs at a time, and never more than the store takes.
        """
        lineage, snapshot = self._lineage, self._registration.snapshot
        header = PackHeader(lineage.name, snapshot, self._next_number(), lineage.seed)

        def note_sent(row: WrittenPack, blocks: Int64s, front: bytes) -> None:
            lineage.files.cache.write(row.name, front)
            pack = SentPack(row.number, row.attempt, row.size, row.slots, _runs_in_pack(blocks))
            lineage.files.registrations.note_sent(snapshot, pack)

        return PackWriter(lineage.store, header, self._registration.attempt, note_sent, at_once)

    def _next_number(self) -> int:
        """Return a pack number after those of earlier attempts, and of a deleted copy of this snapshot."""
        keys = self._lineage.state.packs.key
        mine = keys[keys >> PACK_BITS == self._owner] & MAX_PACK_NUMBER
        return max(self._kept.next_number, int(mine.max(initial=-1)) + 1)

    def locate_blocks(self, sent: SendResult, parent: Runs, replaced: Int64s) -> StoredSnapshot:
        """Return where the snapshot's blocks are, now that they are sent.

        Its `replaced` blocks (int64[n, 2]) were sent, found kept, or are zero. For the rest, and for those
        that were found to be the same, it inherits the entries of `parent` (with pack keys).
        """
        self.objects += len(sent.packs)
        own = merge(self._kept.runs.within(sent.kept.runs()), sent.runs.intervals(), sent.runs)
        fresh = replace(own, pack=pack_keys(np.full(len(own), self._owner), own.pack))
        runs = merge(parent, subtract_intervals(replaced, sent.same.runs()), fresh)
        self._check_inherited(runs, parent)
        return StoredSnapshot(runs, fresh, *self._own_packs(sent, own))

    def _check_inherited(self, runs: Runs, parent: Runs) -> None:
        """Refuse slots that are neither this snapshot's own nor the parent's for the same blocks."""
        for part in runs.windows():
            near = parent.around(int(part.start[0]), int(part.start[-1] + part.length[-1]))
            named = part.slots()[part.pack >> PACK_BITS != self._owner]
            if subtract_intervals(named, near.slots()).size:
                raise DamagedError("the new manifest names blocks that its parent lacks; nothing was stored")

    def _own_packs(self, sent: SendResult, own: Runs) -> tuple[Packs, Int64s]:
        """Return the rows of the packs written and kept, and the slots in the kept ones that are dead."""
        owner = np.full(len(sent.packs), self._owner, np.int64)
        number, attempt, size, slots = (
            np.array([getattr(pack, name) for pack in sent.packs], np.int64)
            for name in ("number", "attempt", "size", "slots")
        )
        none = np.zeros(len(sent.packs), np.int64)
        written = Packs(pack_keys(owner, number), attempt, none, size, slots, none)
        kept, dead = self._kept.pack_rows(own)
        if dead.size:
            from island_fast.repository.liveness import add_dead_slots  # only after an interruption

            kept = kept.update(add_dead_slots(kept, dead, self._kept.read_index))
        return kept.update(written), dead

    def commit(
        self,
        manifest: Manifest,
        stored: StoredSnapshot,
        finalize: Callable[[SnapshotAdded], State | None],
    ) -> SnapshotRow:
        """Write the manifest, then, under the lineage's lock, the record that makes the snapshot exist.

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
            stored=int(stored.packs.size.sum()),
            pin=manifest.pin,
        )
        event = SnapshotAdded(row, stored.packs, stored.dead)
        with lineage.hold_lock():
            self._require_unchanged()
            lineage.append(event, finalize(event))
        self.objects += 2
        lineage.files.cache.write(name, data)
        return row

    def _require_unchanged(self) -> None:
        """Raise a ConflictError unless owner, epoch and registration are the same, and the parent is live."""
        lineage, parent = self._lineage, self._registration.parent
        lineage.require_owner()
        if lineage.epoch != self._registration.epoch:
            raise ConflictError(f"volume {lineage.name} changed hands meanwhile; run it again")
        if self._registration not in lineage.files.registrations:
            raise ConflictError(
                "the registration of this snapshot is gone, so its packs can be swept; run it again"
            )
        if parent is not None and parent not in lineage.state.live:
            raise ConflictError(f"snapshot {parent} was deleted meanwhile; run it again")


def next_attempt(lineage: Lineage, before: Registration) -> int:
    """Return the number of the attempt that resumes `before`.

    Local state that was put back does not know of later attempts. Where the store refuses no PUT, the numbers
    of those are left out, unless by chance; all attempts of a snapshot still are within 2^20 of each other.
    """
    return before.attempt + 1 + (0 if lineage.store.refuses_overwrites() else random.randrange(1 << 12))


def find_interrupted(lineage: Lineage, copied: str | None = None) -> Registration | None:
    """Return the interrupted attempt that the next snapshot of `lineage` resumes: the newest that sent packs.

    With `copied`, return the interrupted copy of that snapshot. Call it under the lineage's lock. Attempts at
    snapshots that exist, or existed, are removed first.
    """
    remove_used_registrations(lineage)
    return lineage.files.registrations.find_interrupted(lineage.epoch, copied)


def remove_used_registrations(lineage: Lineage) -> None:
    """Remove registrations of snapshots that were committed, which crashes and lost answers leave behind.

    Call it under the lineage's lock, and before a sweep removes the last trace of a deleted snapshot from the
    state. That trace can be gone already if local state is older than the repository: so the records that
    came after the registration are asked, too. Registrations of running processes stay: a snapshot that was
    deleted can be copied here again.
    """
    files = lineage.files
    used = named_ids(lineage) | {one.snapshot for one in files.deleted_snapshots()}
    for registration, alive in files.registrations.all():
        if not alive and (registration.snapshot in used or _was_added(lineage, registration)):
            files.registrations.remove(registration.snapshot)


def named_ids(lineage: Lineage) -> set[str]:
    """Return the ids of the snapshots that the state names: those live or dropped, and those with packs."""
    state = lineage.state
    owners = {lineage.numbers.id(int(owner)) for owner in distinct(state.packs.key >> PACK_BITS)}
    return owners | set(state.live) | set(state.dropped)


def _was_added(lineage: Lineage, registration: Registration) -> bool:
    """Return whether a record after the registration can have added its snapshot, in the same epoch."""
    if registration.epoch != lineage.epoch or registration.record is None:
        return False  # it is not resumed
    added = lineage.snapshots_added_since(registration.record)
    return added is None or registration.snapshot in added


class _KeptPacks:
    """The packs that earlier attempts at `snapshot` stored. `runs` are their blocks, by pack number.

    If several attempts sent a block, the last pack counts.
    """

    def __init__(self, lineage: Lineage, snapshot: str, packs: PackReader) -> None:
        self._lineage = lineage
        self._snapshot = snapshot
        self._packs = packs
        self._sent = {pack.number: pack for pack in lineage.files.registrations.sent_packs(snapshot)}
        self._intact: dict[int, bool] = {}
        self.next_number = max(self._sent, default=-1) + 1
        self.runs = Runs.empty()
        for _, group in groupby(self._sent.values(), attrgetter("attempt")):
            attempt = _parse_runs(group)
            self.runs = merge(self.runs, attempt.intervals(), attempt)
        self.digests = KnownDigests(self.runs, self._read_index_if_intact)

    def _read_index_if_intact(self, number: int) -> Index | None:
        """Return the index of a kept pack; None if the store does not have all of the pack any more."""
        location = self._locate(number)
        if number not in self._intact:
            info = self._lineage.store.head(location.name)
            self._intact[number] = info is not None and info.size == location.size
        if self._intact[number]:
            try:
                index = self._packs.read_index_at(location)
            except (ObjectMissingError, *UNREADABLE):
                self._intact[number] = False
            else:
                return index if len(index.rows) == location.slots else None
        return None

    def _locate(self, number: int) -> PackLocation:
        pack = self._sent[number]
        name = pack_name(self._lineage.name, self._snapshot, number, pack.attempt)
        return PackLocation(name, pack.slots, pack.size)

    def pack_rows(self, own: Runs) -> tuple[Packs, Int64s]:
        """Return the rows of the kept packs that `own` runs (by pack number) name, without dead bytes.

        Second are the slots in them that no run names: slot keys, int64[n, 2].
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

    def read_index(self, key: int) -> Index:
        """Return the index of a kept pack, by its key; DamagedObjectError if it cannot be read."""
        return self._packs.read_index_at(self._locate(key & MAX_PACK_NUMBER))


def _runs_in_pack(blocks: Int64s) -> tuple[tuple[int, int], ...]:
    """Return start and length of each run of `blocks`, which are those of a pack, in order of its slots."""
    first = np.flatnonzero(np.append(True, np.diff(blocks) != 1))
    lengths = np.diff(np.append(first, blocks.size))
    return tuple(zip(blocks[first].tolist(), lengths.tolist(), strict=True))


def _parse_runs(packs: Iterable[SentPack]) -> Runs:
    """Return the blocks of one attempt's packs, in order; none if the notes contradict each other."""
    rows = [
        (start, length, pack.number, slot)
        for pack in packs
        for (start, length), slot in zip(pack.runs, _first_slots(pack), strict=True)
    ]
    columns = np.array(rows, np.int64).reshape(-1, 4).T
    order = np.argsort(columns[0], kind="stable")
    runs = Runs(*(column[order] for column in columns))
    ascending = bool((runs.start[1:] >= runs.start[:-1] + runs.length[:-1]).all())
    return runs if ascending and (runs.start >= 0).all() and (runs.length > 0).all() else Runs.empty()


def _first_slots(pack: SentPack) -> list[int]:
    lengths = np.array([length for _, length in pack.runs], np.int64)
    slots: list[int] = (np.cumsum(lengths) - lengths).tolist()
    return slots
