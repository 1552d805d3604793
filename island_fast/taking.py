"""Taking a snapshot: pin, find the change, send it, commit, drop the old pin.

The order is the protocol: the registration before the first object, packs before the manifest, the manifest
before the record, the old pin dropped only after it. A failure before the record leaves the image as it was,
and packs that the next attempt keeps or a sweep removes; what a crash leaves at each step is in
docs/reliability.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from island_fast import __version__
from island_fast.answer import SnapshotTaken
from island_fast.catalog import Packs, Record, SnapshotRow, manifest_name
from island_fast.choosing import Request, Start, choose, keyed
from island_fast.dirtymap import intersect_intervals, subtract_intervals, total
from island_fast.errors import ConflictError, DamagedError, IslandError
from island_fast.health import resent
from island_fast.lineage import Lineage
from island_fast.local import Registration
from island_fast.manifest import Manifest, Runs, encode, merge, tabulate
from island_fast.pack import PackHeader
from island_fast.packreader import KnownDigests, PackReader
from island_fast.pipeline import Known, PackRow, PackSink, Sent, send
from island_fast.progress import Progress
from island_fast.qcow2 import InternalSnapshot, PinnedBase
from island_fast.resuming import KeptPacks, find_interrupted, note_sent
from island_fast.slots import PACK_BITS, pack_keys, slot_intervals
from island_fast.source import Change, Source, View, pin_name

__all__ = ["Request", "take"]

Int64s = NDArray[np.int64]


def take(
    lineage: Lineage,
    source: Source,
    request: Request,
    progress: Progress,
) -> SnapshotTaken:
    """Take a snapshot of `source` into `lineage`, which was refreshed and accepts this image.

    An attempt that was interrupted is gone on with: its id is this one's, and what it sent is not sent again.
    On an error nothing is visible in the repository, and the image keeps the pins that it had.
    """
    return _Taking(lineage, source, request, progress).run()


def new_id() -> str:
    """A snapshot id that nobody has used."""
    return os.urandom(16).hex()


class _Taking:
    """One snapshot being taken. `_begin` sets `_id`, `_start` (from what) and `_registration`."""

    _start: Start
    _registration: Registration
    _packs: PackReader
    _kept: KeptPacks

    def __init__(
        self,
        lineage: Lineage,
        source: Source,
        request: Request,
        progress: Progress,
    ) -> None:
        self._lineage = lineage
        self._source = source
        self._request = request
        self._progress = progress
        self._committing = False
        self._objects = 0

    @property
    def _id(self) -> str:
        return self._registration.snapshot

    def run(self) -> SnapshotTaken:
        began = time.monotonic()
        created = time.time_ns()
        with ExitStack() as stack:
            self._begin(stack)
            internal = self._internal(stack)
            view = self._source.view(internal)
            change = self._source.change(view, self._start.base, self._start.why_not, self._progress)
            parent = self._parent_runs()
            change, whole = resent(self._lineage, change, parent)
            sent = self._send(change, view.read, whole)
            own = self._own_runs(sent)
            runs, changed = self._merged(change, sent, own, parent, view.blocks)
            pin = internal.identity if internal else self._would_be_pin(created, view)
            manifest = self._manifest(change, runs, pin, view, created)
            row = self._commit(manifest, *self._own_packs(sent, own))
        notes = self._drop_old_pins(internal)
        return SnapshotTaken(
            snapshot=row.id,
            lineage=self._lineage.name,
            parent=row.parent,
            volume=self._lineage.name,
            label=row.label,
            volume_size=row.volume_size,
            rule=change.rule,
            reason=change.reason,
            blocks_candidate=change.candidates.count(),
            blocks_changed=changed,
            blocks_kept=sent.kept.count(),
            bytes_read=view.bytes_read,
            bytes_stored=row.stored + row.manifest_size,
            objects_written=self._objects,
            attempt=row.attempt,
            seconds=time.monotonic() - began,
            notes=notes,
        )

    # From what.

    def _begin(self, stack: ExitStack) -> None:
        """Make the lineage if it is new, choose parent and base, and register before the first object."""
        lineage, request = self._lineage, self._request
        with lineage.locked():
            if not lineage.exists:
                lineage.create(request.writer)
                self._objects += 1
            lineage.require_owner(request.writer)
            lineage.files.set_image(self._source.path)
            before = find_interrupted(lineage)
            self._start = choose(lineage, self._source, request)
            parent = self._start.parent.id if self._start.parent else None
            snapshot, attempt = (before.snapshot, before.attempt + 1) if before else (new_id(), 0)
            self._registration = Registration(snapshot, attempt, parent, lineage.epoch)
            stack.enter_context(lineage.files.register(self._registration))
        self._packs = PackReader(lineage)
        self._kept = KeptPacks(lineage, snapshot, self._packs)

    # The image.

    def _internal(self, stack: ExitStack) -> InternalSnapshot | None:
        """The internal snapshot to store: a given one, a new pin, or None for the image as it is."""
        if self._request.at is not None:
            return self._source.named(self._request.at)
        if not self._request.pin or self._source.unpinnable:
            return None
        name = self._pin_name
        if self._registration.attempt:
            self._source.discard(name)  # the one of the attempt that was interrupted
        stack.enter_context(self._unpinned_on_error(name))
        return self._source.pin(name)

    @property
    def _pin_name(self) -> str:
        return pin_name(self._request.repository, self._lineage.name, self._id)

    @contextmanager
    def _unpinned_on_error(self, name: str) -> Iterator[None]:
        """Drop the new pin if the body fails, or is interrupted, before the record could be written."""
        try:
            yield
        except BaseException:
            if not self._committing:
                with suppress(IslandError, OSError):
                    self._source.discard(name)
            raise

    def _would_be_pin(self, created: int, view: View) -> PinnedBase:
        """The identity that the pin of a restored image gets when this image keeps none."""
        return PinnedBase(self._pin_name, "1", created // 10**9, created % 10**9, view.volume_size)

    def _drop_old_pins(self, internal: InternalSnapshot | None) -> tuple[str, ...]:
        """Drop every pin of the lineage but the new one; what cannot be dropped is told, and no error."""
        if internal is None or self._request.at is not None:
            return ()
        notes = []
        for old in self._source.pins(self._request.repository, self._lineage.name):
            if old.identity != internal.identity:
                try:
                    self._source.unpin(old)
                except IslandError as error:
                    notes.append(f"the old pin {old.name} stays until the next snapshot: {error}")
        if not notes:
            self._lineage.files.forget_retired()
        return tuple(notes)

    # The blocks.

    def _parent_runs(self) -> Runs:
        parent = self._start.parent
        return keyed(self._lineage, self._lineage.manifest(parent)) if parent else Runs.empty()

    def _send(
        self,
        change: Change,
        read: Callable[[Int64s, NDArray[np.uint8]], None],
        parent: Runs,
    ) -> Sent:
        lineage = self._lineage
        header = PackHeader(lineage.name, self._id, self._kept.next_number, lineage.seed)
        known = Known(KnownDigests(parent, self._packs.index), self._kept.digests)

        def stored(row: PackRow, blocks: Int64s, front: bytes) -> None:
            note_sent(lineage, self._id, row, blocks, front)

        sink = PackSink(lineage.store, header, self._registration.attempt, stored)
        sent = send(read, change.data, known, sink, self._progress, compress=self._request.compress)
        self._objects += len(sent.packs)
        return sent

    def _own_runs(self, sent: Sent) -> Runs:
        """The blocks that are in packs of this snapshot, of whichever attempt, by pack number."""
        kept = self._kept.runs.within(sent.kept.runs())
        return merge(kept, sent.runs.intervals(), sent.runs)

    def _merged(self, change: Change, sent: Sent, own: Runs, parent: Runs, blocks: int) -> tuple[Runs, int]:
        """The snapshot's runs with pack keys, and how many blocks differ from the parent's."""
        owner = np.full(len(own), self._lineage.numbers.number(self._id), np.int64)
        fresh = replace(own, pack=pack_keys(owner, own.pack))
        replaced = subtract_intervals(change.replaced, sent.same.runs())
        runs = merge(parent, replaced, fresh)
        self._check_inherited(runs, parent, owner=self._lineage.numbers.number(self._id))
        within = np.array([[0, blocks]], np.int64)
        lost = intersect_intervals(intersect_intervals(parent.intervals(), replaced), within)
        return runs, fresh.blocks + total(subtract_intervals(lost, fresh.intervals()))

    def _check_inherited(self, runs: Runs, parent: Runs, owner: int) -> None:
        """Every slot must be this snapshot's own, or one that the parent names."""
        foreign = np.flatnonzero(runs.pack >> PACK_BITS != owner)
        named = slot_intervals(runs.pack[foreign], runs.slot[foreign], runs.length[foreign])
        if subtract_intervals(named, slot_intervals(parent.pack, parent.slot, parent.length)).size:
            raise DamagedError("the new manifest names blocks that its parent lacks; nothing was stored")

    # The objects.

    def _manifest(self, change: Change, runs: Runs, pin: PinnedBase, view: View, created: int) -> Manifest:
        table, runs = tabulate(runs, self._lineage.name, self._lineage.numbers)
        facts = {
            "tool": f"island {__version__}",
            "host": os.uname().nodename,
            "consistency": "crash",
            **self._source.facts,
        }
        return Manifest(
            lineage=self._lineage.name,
            snapshot=self._id,
            attempt=self._registration.attempt,
            parent=self._registration.parent,
            volume_size=view.volume_size,
            created=created,
            label=self._request.label,
            rule=change.rule,
            reason=change.reason,
            seed=self._lineage.seed,
            pin=pin,
            packs=table,
            runs=runs,
            properties=facts | dict(self._request.properties),
        )

    def _own_packs(self, sent: Sent, own: Runs) -> tuple[Packs, Int64s]:
        """Rows of the packs written, and of those kept; and the slots in these that are born dead."""
        owner = np.full(len(sent.packs), self._lineage.numbers.number(self._id), np.int64)
        number, attempt, size, slots = (
            np.array([getattr(pack, name) for pack in sent.packs], np.int64)
            for name in ("number", "attempt", "size", "slots")
        )
        none = np.zeros(len(sent.packs), np.int64)
        written = Packs(pack_keys(owner, number), attempt, none, size, slots, none)
        kept, dead = self._kept.rows(own)
        if dead.size:
            from island_fast.reclaim import with_more_dead  # only after an interruption

            kept = kept.updated(with_more_dead(kept, dead, self._kept.index))
        return kept.updated(written), dead

    def _commit(self, manifest: Manifest, packs: Packs, dead: Int64s) -> SnapshotRow:
        """Write the manifest, then under the lineage's lock the record that makes the snapshot exist."""
        lineage = self._lineage
        name = manifest_name(lineage.name, self._id, manifest.attempt)
        data, checksum = encode(name, manifest)
        lineage.store.put(name, [data])
        row = SnapshotRow(
            id=self._id,
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
            self._progress("commit", 0, 0)
            self._committing = True
            lineage.append(record, self._request.writer)
        self._objects += 2
        lineage.files.cache(name, data)
        return row

    def _still_allowed(self) -> None:
        """Refuse unless this host owns the lineage as it did, the registration stands, the parent is live."""
        lineage, parent = self._lineage, self._registration.parent
        lineage.require_owner(self._request.writer)
        if lineage.epoch != self._registration.epoch:
            raise ConflictError(f"volume {lineage.name} changed hands meanwhile; take the snapshot again")
        if not lineage.files.registered(self._registration):
            raise ConflictError(
                "the registration of this snapshot is gone, so its packs may be swept; take it again"
            )
        if parent is not None and parent not in lineage.state.live:
            raise ConflictError(f"snapshot {parent} was deleted meanwhile; take the new one again")
