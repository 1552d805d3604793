"""Storing a snapshot under its registration, wherever its blocks come from: packs, manifest, record.

The order is the protocol (docs/format.md, "Write order"). Taking a snapshot of an image and copying one from
another repository both end here, so what holds of one holds of the other: every entry is the snapshot's own
or its parent's, and what an interrupted attempt has sent is not sent again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from island_fast.arrays import Int64s
from island_fast.dirtymap import subtract_intervals
from island_fast.errors import ConflictError, DamagedError
from island_fast.formats.catalog import Packs, Record, SnapshotRow, manifest_name
from island_fast.formats.keys import MAX_PACK_NUMBER, PACK_BITS, pack_keys
from island_fast.formats.manifest import Manifest, encode
from island_fast.formats.pack import PackHeader
from island_fast.formats.runs import Runs, merge
from island_fast.repository.lineage import Lineage
from island_fast.repository.local_state import Registration
from island_fast.repository.pack_reader import KnownDigests, PackReader
from island_fast.repository.resuming import KeptPacks, note_sent
from island_fast.repository.streams import Known, PackRow, PackSink, Sent

__all__ = ["Stored", "Storing"]


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a snapshot's blocks are now, and what its record must say of its packs.

    `runs` are all its blocks, `fresh` those that are not the parent's; both hold pack keys. `packs` are the
    rows of its own packs, `dead` the slots in them that it has no use for: slot keys, int64[n, 2].
    """

    runs: Runs
    fresh: Runs
    packs: Packs
    dead: Int64s


class Storing:
    """One snapshot being stored in `lineage` under `registration`, which stands locked. `packs` reads there.

    `objects` counts what was written.
    """

    def __init__(self, lineage: Lineage, registration: Registration, writer: str) -> None:
        self.packs = PackReader(lineage)
        self.objects = 0
        self._lineage = lineage
        self._registration = registration
        self._writer = writer
        self._kept = KeptPacks(lineage, registration.snapshot, self.packs)

    @property
    def _owner(self) -> int:
        return self._lineage.numbers.number(self._registration.snapshot)

    def known(self, parent: Runs) -> Known:
        """The digests of blocks that need not be sent: those of `parent` (with pack keys), and kept ones."""
        return Known(KnownDigests(parent, self.packs.index), self._kept.digests)

    def sink(self, at_once: int | None = None) -> PackSink:
        """Where blocks go: packs of this snapshot, each noted as soon as the store has acknowledged it.

        At most `at_once` are sent at a time, if the store takes as many.
        """
        lineage, snapshot = self._lineage, self._registration.snapshot
        header = PackHeader(lineage.name, snapshot, self._next_number(), lineage.seed)

        def stored(row: PackRow, blocks: Int64s, front: bytes) -> None:
            note_sent(lineage, snapshot, row, blocks, front)

        return PackSink(lineage.store, header, self._registration.attempt, stored, at_once)

    def _next_number(self) -> int:
        """Behind the packs of earlier attempts, and those that a deleted copy of the snapshot left in use."""
        keys = self._lineage.state.packs.key
        mine = keys[keys >> PACK_BITS == self._owner] & MAX_PACK_NUMBER
        return max(self._kept.next_number, int(mine.max(initial=-1)) + 1)

    def stored(self, sent: Sent, parent: Runs, replaced: Int64s) -> Stored:
        """What the snapshot holds when its `replaced` blocks (int64[n, 2]) were sent, found kept, or zero.

        Of the rest, and of those found to be the same, it inherits the entries of `parent` (with pack keys).
        """
        self.objects += len(sent.packs)
        own = merge(self._kept.runs.within(sent.kept.runs()), sent.runs.intervals(), sent.runs)
        fresh = replace(own, pack=pack_keys(np.full(len(own), self._owner), own.pack))
        runs = merge(parent, subtract_intervals(replaced, sent.same.runs()), fresh)
        self._check_inherited(runs, parent)
        return Stored(runs, fresh, *self._own_packs(sent, own))

    def _check_inherited(self, runs: Runs, parent: Runs) -> None:
        """Every slot must be this snapshot's own, or one that the parent names for blocks there."""
        for part in runs.windows():
            near = parent.around(int(part.start[0]), int(part.start[-1] + part.length[-1]))
            named = part.slots()[part.pack >> PACK_BITS != self._owner]
            if subtract_intervals(named, near.slots()).size:
                raise DamagedError("the new manifest names blocks that its parent lacks; nothing was stored")

    def _own_packs(self, sent: Sent, own: Runs) -> tuple[Packs, Int64s]:
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
            from island_fast.repository.liveness import with_more_dead  # only after an interruption

            kept = kept.updated(with_more_dead(kept, dead, self._kept.index))
        return kept.updated(written), dead

    def commit(
        self, manifest: Manifest, packs: Packs, dead: Int64s, last_word: Callable[[Record], Record]
    ) -> SnapshotRow:
        """Write the manifest, then under the lineage's lock the record that makes the snapshot exist.

        `last_word` is told of the record when nothing speaks against it any more; what it gives is appended.
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
        record = Record(
            lineage="", epoch=0, number=0, writer="", host="", previous=None, time=row.created,
            event="snapshot", seed=0, snapshot=row, packs=packs, dead=dead,
        )  # fmt: skip
        with lineage.locked():
            self._still_allowed()
            lineage.append(last_word(record), self._writer)
        self.objects += 2
        lineage.files.cache(name, data)
        return row

    def _still_allowed(self) -> None:
        """Refuse unless this host owns the lineage as it did, the registration stands, the parent is live."""
        lineage, parent = self._lineage, self._registration.parent
        lineage.require_owner(self._writer)
        if lineage.epoch != self._registration.epoch:
            raise ConflictError(f"volume {lineage.name} changed hands meanwhile; run it again")
        if not lineage.files.registered(self._registration):
            raise ConflictError(
                "the registration of this snapshot is gone, so its packs may be swept; run it again"
            )
        if parent is not None and parent not in lineage.state.live:
            raise ConflictError(f"snapshot {parent} was deleted meanwhile; run it again")
