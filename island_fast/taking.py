"""Taking a snapshot: pin, find the change, send it, commit, drop the old pin.

The order is the protocol: the registration before the first object, packs before the manifest, the manifest
before the record, the old pin dropped only after it. A failure before the record leaves the image as it was
and garbage that a sweep removes; what it leaves at each step is in docs/format.md, "Write order".
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from island_fast import __version__
from island_fast.catalog import Packs, Record, SnapshotRow, manifest_name
from island_fast.dirtymap import intersect_intervals, subtract_intervals, total
from island_fast.errors import ConflictError, DamagedError, IslandError
from island_fast.lineage import Lineage
from island_fast.local import Registration
from island_fast.manifest import Manifest, Runs, encode, merge, tabulate
from island_fast.pack import PackHeader
from island_fast.packreader import KnownDigests, PackReader
from island_fast.pipeline import PackSink, Sent, send
from island_fast.progress import Progress
from island_fast.qcow2 import InternalSnapshot, PinnedBase, Point
from island_fast.results import SnapshotTaken
from island_fast.slots import PACK_BITS, pack_keys, slot_intervals
from island_fast.source import Base, Change, Source, pin_name

__all__ = ["Request", "take"]

Int64s = NDArray[np.int64]
_NONE = np.zeros((0, 2), np.int64)


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for: see `Repository.snapshot`."""

    repository: str
    writer: str
    label: str = ""
    pin: bool = True
    at: str | None = None
    full: bool = False
    properties: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Start:
    """What the snapshot starts from: id, parent, and the base of a table diff or why there is none."""

    id: str
    parent: SnapshotRow | None
    base: Base | None
    why_not: str


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

    def run(self) -> SnapshotTaken:
        began = time.monotonic()
        created = time.time_ns()
        with ExitStack() as stack:
            start = self._start(stack)
            internal = self._internal(start, stack)
            point = self._point(internal)
            change = self._source.change(point, start.base, start.why_not, self._progress)
            reader = self._source.reader(point)
            parent = self._parent_runs(start.parent)
            sent = self._send(start.id, change, reader.read, parent)
            runs, changed = self._merged(start, change, sent, parent, point.blocks)
            pin = internal.identity if internal else self._would_be_pin(start.id, created, point)
            manifest = self._manifest(start, change, runs, pin, point, created)
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
            bytes_read=reader.bytes_read,
            bytes_stored=row.stored + row.manifest_size,
            objects_written=self._objects,
            seconds=time.monotonic() - began,
            notes=notes,
        )

    # From what.

    def _start(self, stack: ExitStack) -> _Start:
        """Make the lineage if it is new, choose parent and base, and register before the first object."""
        lineage, request = self._lineage, self._request
        with lineage.locked():
            if not lineage.exists:
                lineage.create(request.writer)
                self._objects += 1
            lineage.require_owner(request.writer)
            lineage.files.set_image(self._source.path)
            start = self._chosen(secrets.token_hex(16))
            registration = Registration(start.id, 0, start.parent.id if start.parent else None)
            stack.enter_context(lineage.files.register(registration))
            return start

    def _chosen(self, snapshot: str) -> _Start:
        parent, base, why = self._parent_and_base()
        if base is not None:
            why = self._refusal() or self._source.evidence(base) or ""
        return _Start(snapshot, parent, None if why else base, why)

    def _refusal(self) -> str | None:
        """Why no table diff is wanted or possible, whatever base there is."""
        if self._request.full:
            return "a full scan was asked for"
        if self._request.at is None and not self._request.pin:
            return "without a pin, the image as it is cannot be compared with a pinned base"
        return self._source.unpinnable

    def _parent_and_base(self) -> tuple[SnapshotRow | None, Base | None, str]:
        """The newest live snapshot whose pin is in the image; else a deleted one's and its ancestor."""
        live = self._lineage.state.live
        for row in reversed(live.values()):  # type: ignore[call-overload]
            if internal := self._source.image.find(row.pin):
                return row, Base(internal, _NONE), ""
        for retired in self._lineage.files.retired():
            row = live.get(retired.parent or "")
            if row and (base := self._retired_base(retired, row)):
                return row, base, ""
        newest = self._lineage.state.newest()
        if newest is None:
            return None, None, self._refusal() or "it is the first snapshot of the volume"
        why = f"the pinned base of snapshot {newest.id[:8]} is not in the image"
        return newest, None, self._refusal() or why

    def _retired_base(self, deleted: Registration, ancestor: SnapshotRow) -> Base | None:
        """The pin of a deleted snapshot as base, with the blocks that it wrote after its ancestor."""
        retired = self._lineage.cached_manifest(deleted.snapshot, deleted.attempt)
        internal = self._source.image.find(retired.pin) if retired else None
        if retired is None or internal is None:
            return None
        then = self._keyed(self._lineage.manifest(ancestor))
        return Base(internal, differing(self._keyed(retired), then))

    # The image.

    def _internal(self, start: _Start, stack: ExitStack) -> InternalSnapshot | None:
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

    def _point(self, internal: InternalSnapshot | None) -> Point:
        return self._source.image.at(internal) if internal else self._source.image.active()

    def _would_be_pin(self, snapshot: str, created: int, point: Point) -> PinnedBase:
        """The identity that the pin of a restored image gets when this image keeps none."""
        name = pin_name(self._request.repository, self._lineage.name, snapshot)
        return PinnedBase(name, "1", created // 10**9, created % 10**9, point.disk_size)

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

    def _keyed(self, manifest: Manifest) -> Runs:
        """Runs of a manifest with pack keys instead of table indices."""
        return replace(manifest.runs, pack=manifest.packs.keys(self._lineage.numbers)[manifest.runs.pack])

    def _parent_runs(self, parent: SnapshotRow | None) -> Runs:
        return self._keyed(self._lineage.manifest(parent)) if parent else Runs.empty()

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
        self, start: _Start, change: Change, sent: Sent, parent: Runs, blocks: int
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
        self, start: _Start, change: Change, runs: Runs, pin: PinnedBase, point: Point, created: int
    ) -> Manifest:
        table, runs = tabulate(runs, self._lineage.name, self._lineage.numbers)
        header = self._source.image.header
        facts = {
            "tool": f"island {__version__}",
            "host": socket.gethostname(),
            "consistency": "crash",
            "qcow2.version": str(header.version),
            "qcow2.cluster_bits": str(header.cluster_bits),
        }
        return Manifest(
            lineage=self._lineage.name,
            snapshot=start.id,
            attempt=0,
            parent=start.parent.id if start.parent else None,
            volume_size=point.disk_size,
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

    def _commit(self, start: _Start, manifest: Manifest, sent: Sent) -> SnapshotRow:
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

    def _still_allowed(self, start: _Start) -> None:
        """Refuse unless this host owns the lineage, the registration stands, and the parent is live."""
        lineage, parent = self._lineage, start.parent.id if start.parent else None
        lineage.require_owner(self._request.writer)
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


def differing(one: Runs, other: Runs) -> Int64s:
    """Blocks that the two name differently, int64[n, 2]; both hold pack keys of one numbering."""
    edges = np.unique(np.concatenate([one.intervals().ravel(), other.intervals().ravel()]))
    if not edges.size:
        return _NONE
    spans = np.stack([edges[:-1], edges[1:]], axis=1)
    unequal = np.flatnonzero(_entry(one, spans[:, 0]) != _entry(other, spans[:, 0]))
    return np.asarray(spans[unequal], np.int64)


def _entry(runs: Runs, blocks: Int64s) -> Int64s:
    """The slot key of each block; -1 for a block that is not named."""
    keys = np.full(blocks.size, -1, np.int64)
    named, row, offset = runs.locate(blocks)
    keys[named] = slot_intervals(runs.pack[row], runs.slot[row] + offset, offset)[:, 0]
    return keys
