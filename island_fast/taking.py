"""Taking a snapshot: pin, find the change, send it, commit, drop the old pin.

The order is the protocol: the registration before the first object, packs before the manifest, the manifest
before the record, the old pin dropped only after it. A failure before the record leaves the image as it was
and garbage that a sweep removes; what it leaves at each step is in docs/format.md, "Write order".
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from island_fast import __version__
from island_fast.catalog import Packs, Record, SnapshotRow, manifest_name
from island_fast.choosing import Request, Start, choose, keyed
from island_fast.dirtymap import intersect_intervals, subtract_intervals, total
from island_fast.errors import ConflictError, DamagedError, IslandError
from island_fast.lineage import Lineage
from island_fast.local import Registration
from island_fast.manifest import Manifest, Runs, encode, merge, tabulate
from island_fast.pack import PackHeader
from island_fast.packreader import KnownDigests, PackReader
from island_fast.pipeline import PackSink, Sent, send
from island_fast.progress import Progress
from island_fast.qcow2 import InternalSnapshot, PinnedBase
from island_fast.results import SnapshotTaken
from island_fast.slots import PACK_BITS, pack_keys, slot_intervals
from island_fast.source import Change, Source, View, pin_name

__all__ = ["Request", "take"]

Int64s = NDArray[np.int64]
_NONE = np.zeros((0, 2), np.int64)


def take(
    lineage: Lineage,
    source: Source,
    request: Request,
    progress: Progress,
) -> SnapshotTaken:
    """Take a snapshot of `source` into `lineage`, which was refreshed and accepts this image.

    On an error nothing is visible in the repository, and the image keeps the pins that it had.
    """
    return _Taking(lineage, source, request, progress).run()


class _Taking:
    """One snapshot being taken."""

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
        self._epoch = 0  # of the lineage, when the snapshot was registered

    def run(self) -> SnapshotTaken:
        began = time.monotonic()
        created = time.time_ns()
        with ExitStack() as stack:
            start = self._start(stack)
            internal = self._internal(start, stack)
            view = self._source.view(internal)
            change = self._source.change(view, start.base, start.why_not, self._progress)
            parent = self._parent_runs(start.parent)
            sent = self._send(start.id, change, view.read, parent)
            runs, changed = self._merged(start, change, sent, parent, view.blocks)
            pin = internal.identity if internal else self._would_be_pin(start.id, created, view)
            manifest = self._manifest(start, change, runs, pin, view, created)
            row = self._commit(start, manifest, sent)
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
            bytes_read=view.bytes_read,
            bytes_stored=row.stored + row.manifest_size,
            objects_written=self._objects,
            seconds=time.monotonic() - began,
            notes=notes,
        )

    # From what.

    def _start(self, stack: ExitStack) -> Start:
        """Make the lineage if it is new, choose parent and base, and register before the first object."""
        lineage, request = self._lineage, self._request
        with lineage.locked():
            if not lineage.exists:
                lineage.create(request.writer)
                self._objects += 1
            lineage.require_owner(request.writer)
            self._epoch = lineage.epoch
            lineage.files.set_image(self._source.path)
            start = choose(lineage, self._source, request)
            registration = Registration(start.id, 0, start.parent.id if start.parent else None)
            stack.enter_context(lineage.files.register(registration))
            return start

    # The image.

    def _internal(self, start: Start, stack: ExitStack) -> InternalSnapshot | None:
        """The internal snapshot to store: a given one, a new pin, or None for the image as it is."""
        if self._request.at is not None:
            return self._source.named(self._request.at)
        if not self._request.pin or self._source.unpinnable:
            return None
        name = pin_name(self._request.repository, self._lineage.name, start.id)
        stack.enter_context(self._unpinned_on_error(name))
        return self._source.pin(name)

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

    def _would_be_pin(self, snapshot: str, created: int, view: View) -> PinnedBase:
        """The identity that the pin of a restored image gets when this image keeps none."""
        name = pin_name(self._request.repository, self._lineage.name, snapshot)
        return PinnedBase(name, "1", created // 10**9, created % 10**9, view.volume_size)

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

    def _parent_runs(self, parent: SnapshotRow | None) -> Runs:
        return keyed(self._lineage, self._lineage.manifest(parent)) if parent else Runs.empty()

    def _send(
        self,
        snapshot: str,
        change: Change,
        read: Callable[[Int64s, NDArray[np.uint8]], None],
        parent: Runs,
    ) -> Sent:
        lineage = self._lineage
        header = PackHeader(lineage.name, snapshot, 0, lineage.seed)
        known = KnownDigests(parent, PackReader(lineage))
        sent = send(read, change.data, known, PackSink(lineage.store, header, 0), self._progress)
        self._objects += len(sent.packs)
        return sent

    def _merged(
        self, start: Start, change: Change, sent: Sent, parent: Runs, blocks: int
    ) -> tuple[Runs, int]:
        """The snapshot's runs with pack keys, and how many blocks differ from the parent's."""
        owner = np.full(len(sent.runs), self._lineage.numbers.number(start.id), np.int64)
        fresh = replace(sent.runs, pack=pack_keys(owner, sent.runs.pack))
        replaced = subtract_intervals(change.replaced, sent.same.runs())
        runs = merge(parent, replaced, fresh)
        self._check_inherited(runs, parent, owner=self._lineage.numbers.number(start.id))
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

    def _manifest(
        self, start: Start, change: Change, runs: Runs, pin: PinnedBase, view: View, created: int
    ) -> Manifest:
        table, runs = tabulate(runs, self._lineage.name, self._lineage.numbers)
        facts = {
            "tool": f"island {__version__}",
            "host": socket.gethostname(),
            "consistency": "crash",
            **self._source.facts,
        }
        return Manifest(
            lineage=self._lineage.name,
            snapshot=start.id,
            attempt=0,
            parent=start.parent.id if start.parent else None,
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

    def _commit(self, start: Start, manifest: Manifest, sent: Sent) -> SnapshotRow:
        """Write the manifest, then under the lineage's lock the record that makes the snapshot exist."""
        lineage = self._lineage
        name = manifest_name(lineage.name, start.id, 0)
        data, checksum = encode(name, manifest)
        lineage.store.put(name, [data])
        row = SnapshotRow(
            id=start.id,
            parent=manifest.parent,
            attempt=0,
            checksum=checksum.hex(),
            manifest_size=len(data),
            created=manifest.created,
            label=manifest.label,
            volume_size=manifest.volume_size,
            stored=sum(pack.size for pack in sent.packs),
            pin=manifest.pin,
        )
        with lineage.locked():
            self._still_allowed(start)
            self._progress("commit", 0, 0)
            self._committing = True
            lineage.append(self._record(row, sent), self._request.writer)
        self._objects += 2
        lineage.files.cache(name, data)
        for pack in sent.packs:
            lineage.files.cache(pack.name, pack.front)
        return row

    def _still_allowed(self, start: Start) -> None:
        """Refuse unless this host still owns the lineage, the registration stands, and the parent is live.

        An owner in between knew nothing of the registration and may have swept this snapshot's objects, so
        it is no help that the lineage came back.
        """
        lineage, parent = self._lineage, start.parent.id if start.parent else None
        lineage.require_owner(self._request.writer)
        if lineage.epoch != self._epoch:
            raise ConflictError(f"volume {lineage.name} changed hands meanwhile; take the snapshot again")
        if not lineage.files.registered(Registration(start.id, 0, parent)):
            raise ConflictError("this snapshot took so long that a sweep gave it up; take it again")
        if parent is not None and parent not in lineage.state.live:
            raise ConflictError(f"snapshot {parent} was deleted meanwhile; take the new one again")

    def _record(self, row: SnapshotRow, sent: Sent) -> Record:
        owner = np.full(len(sent.packs), self._lineage.numbers.number(row.id), np.int64)
        number, size, slots = (
            np.array([getattr(pack, name) for pack in sent.packs], np.int64)
            for name in ("number", "size", "slots")
        )
        none = np.zeros(len(sent.packs), np.int64)
        packs = Packs(pack_keys(owner, number), none, none, size, slots, none)
        return Record(
            lineage="", epoch=0, number=0, writer="", host="", previous=None, time=row.created,
            event="snapshot", seed=0, snapshot=row, packs=packs,
        )  # fmt: skip
