"""Mending damaged objects of a lineage, as its owner, from bytes that still exist on this host.

A pack is written anew under its next name, with the same slots under the same numbers, of blocks that can
still be read in it and of blocks whose digests are the right ones elsewhere: in images that hold them at the
same place, or in other packs of the lineage. It is read back before the record that switches the name, so a
crash anywhere leaves the lineage as it was, or mended. A manifest gets its own bytes again, and a catalog
that only this host can read is begun anew. docs/reliability.md, "Mending".
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from island_fast.arrays import Bools, Buffer, Int64s
from island_fast.dirtymap import BLOCK_SIZE, NO_INTERVALS, merge_intervals
from island_fast.errors import (
    UNREADABLE,
    ConflictError,
    DamagedObjectError,
    IslandError,
    NotFoundError,
    ObjectMissingError,
)
from island_fast.formats.catalog import ObjectsSwept, Packs
from island_fast.formats.frame import Kind, open_frame, read_json
from island_fast.formats.keys import SLOT_BITS
from island_fast.formats.names import stop_name
from island_fast.formats.pack import ABSENT, compress_blocks, digest_blocks, open_pack, seal_pack
from island_fast.formats.runs import Runs
from island_fast.images.backing import Backing
from island_fast.images.qcow2_source import Qcow2Source
from island_fast.images.raw_source import RawSource
from island_fast.images.source import Source, View
from island_fast.progress import Progress
from island_fast.repository.health import Health
from island_fast.repository.integrity.catalog import check_records
from island_fast.repository.integrity.objects import (
    CONTRADICTION,
    Finding,
    PackChecker,
    PackState,
    check_manifest,
    readable_slots,
    slots_in_mask,
)
from island_fast.repository.lineage import Lineage
from island_fast.repository.liveness import rebase_rewritten
from island_fast.repository.pack_reader import BATCH, unpack_slots
from island_fast.stores.checked_read import get_checked

__all__ = ["Mender", "heal_known_damage", "mend_catalog", "mend_manifest", "mend_packs", "views_in"]


_AT_ONCE = 32  # packs for one record
_LOG = logging.getLogger(__name__)


def mend_packs(
    lineage: Lineage,
    findings: Sequence[Finding],
    views: Sequence[View],
    progress: Progress,
) -> dict[int, Int64s]:
    """Write the packs in `findings` anew as far as their blocks can be had, from `views` among others.

    By key of each pack that was, the slots that are still lost, as intervals of slot keys; `Health` has them,
    too. ConflictError, with nothing changed, unless this host owns the lineage.
    """
    packs = {finding.key: finding.lost for finding in findings if finding.key is not None}
    still: dict[int, Int64s] = {}
    if not packs:
        return still
    keys, done = list(packs), 0
    lost = merge_intervals(np.concatenate(list(packs.values())))
    with lineage.files.lock_sweeps():
        with lineage.hold_lock():
            lineage.require_owner()
        mending = _Mending(lineage, lost, views)
        for at in range(0, len(keys), _AT_ONCE):
            still |= mending.mend(keys[at : at + _AT_ONCE])
            done += sum(len(packs[key]) for key in keys[at : at + _AT_ONCE])
            progress("mend", done * BLOCK_SIZE, sum(map(len, packs.values())) * BLOCK_SIZE)
    return still


def heal_known_damage(lineage: Lineage, source: Source, progress: Progress) -> None:
    """Mend, from an image that is held, the packs that this host knows to be damaged; before a snapshot.

    What cannot be mended is told, and no error: the snapshot sends again what it needs of it.
    """
    health = Health(lineage)
    keys = np.unique(health.lost()[:, 0] >> SLOT_BITS).tolist()
    if not keys:
        return
    try:
        packs = PackChecker(lineage)
        findings = [finding for finding in map(packs.check, keys) if finding]
        for key in set(keys) - {finding.key for finding in findings}:
            health.note_verified(packs.reader.locate(key).name, time.time())
        health.save()
        mend_packs(lineage, findings, views_in(source, lineage), progress)
    except (IslandError, OSError) as error:
        _LOG.warning("damaged packs could not be mended: %s", error)


def views_in(source: Source, lineage: Lineage) -> list[View]:
    """Points of an image that may have what a lineage lost: its pins, the newest first, and the present."""
    pins = [found for row in lineage.state.live.values() if (found := source.find_pinned(row.pin))]
    return [*(source.view(pin) for pin in reversed(pins)), source.view(None)]


@dataclass(slots=True)
class _Found:
    """Stored bytes and codecs of slots whose blocks were found elsewhere."""

    stored: dict[int, bytes] = field(default_factory=dict)
    codec: dict[int, int] = field(default_factory=dict)

    def put(self, slots: Iterable[int], stored: Iterable[Buffer], codecs: Iterable[int]) -> None:
        for slot, data, codec in zip(slots, stored, codecs, strict=True):
            self.stored[slot], self.codec[slot] = bytes(data), codec


class _Mending:
    """Packs being mended, under the lock that keeps sweeps away. `lost` are all slot keys to be found."""

    def __init__(self, lineage: Lineage, lost: Int64s, views: Sequence[View]) -> None:
        self._lineage = lineage
        self._views = list(views)
        self._packs = PackChecker(lineage)
        self._epoch = lineage.epoch
        self._homes = self._find_homes(lost)
        self._others = self._find_others(lost)

    def _find_homes(self, lost: Int64s) -> Int64s:
        """The block that each slot in `lost` holds, for entries are inherited in their place.

        Rows of slot key and block, int64[n, 2], ascending.
        """
        homes = NO_INTERVALS
        for _, _, runs in self._lineage.live_runs():
            blocks, slots = _expanded(runs.among(lost))
            homes = np.unique(np.concatenate([homes, np.stack([slots, blocks], axis=1)]), axis=0)
        return homes

    def _find_others(self, lost: Int64s) -> Int64s:
        """Where else those blocks are, in whatever state: rows of block and slot key, int64[n, 2]."""
        blocks = np.unique(self._homes[:, 1])
        found = NO_INTERVALS
        for _, _, runs in self._lineage.live_runs():
            named, row, offset = runs.locate(blocks)
            slots = (runs.pack[row] << SLOT_BITS) + runs.slot[row] + offset
            mine = np.stack([blocks[named], slots], axis=1)
            found = np.unique(np.concatenate([found, mine]), axis=0)
        at = np.searchsorted(lost[:, 0], found[:, 1], side="right") - 1
        return found[(at < 0) | (found[:, 1] >= lost[at, 1])] if len(lost) else found

    def mend(self, keys: Sequence[int]) -> dict[int, Int64s]:
        """Write these packs anew where that gains anything, and then the record that switches their names.

        By key of each that was, what is still lost.
        """
        before, renamed, names = Packs(), Packs(), {}
        still: dict[int, Int64s] = {}
        for key in keys:
            left = self._packs.read_state(key)
            if left is None or not left.kind:  # mended by another, or gone
                still[key] = NO_INTERVALS
                continue
            row = self._lineage.state.packs.rows(self._lineage.state.packs.find(np.array([key])))
            found = self._search(key, left)
            keep = left.good.copy()
            keep[list(found.stored)] = True
            gains = bool(found.stored) or (not left.whole and bool(keep.any()))
            if left.index is None or not gains:
                continue
            fresh = replace(row, suffix=np.array([secrets.randbits(62) + 1]))
            name = self._lineage.pack_name(fresh, 0)
            fresh = replace(fresh, size=np.array([self._write(name, left, found, keep)]))
            before, renamed = before.updated(row), renamed.updated(fresh)
            names[name] = left.live & ~keep
            still[key] = slots_in_mask(key, names[name])
        if names:
            self._switch(before, renamed)
            self._note(names)
        return still

    def _search(self, key: int, left: PackState) -> _Found:
        """Blocks of the slots that are needed and cannot be read, from wherever they are."""
        found = _Found()
        wanted = np.flatnonzero(left.live & ~left.good) + (key << SLOT_BITS)
        homes = self._homes[np.isin(self._homes[:, 0], wanted)]
        if left.index is None or not len(homes):
            return found
        rows = np.stack([homes[:, 1], homes[:, 0] - (key << SLOT_BITS)], axis=1)
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        for view in self._views:
            todo = _without(rows, found)
            try:
                self._lend(view, todo[todo[:, 0] < view.blocks], left, found)
            except (IslandError, OSError) as error:
                _LOG.warning("an image cannot be read to mend a pack: %s", error)
        self._borrow(_without(rows, found), left, found)
        return found

    def _lend(self, view: View, rows: Int64s, left: PackState, found: _Found) -> None:
        """Take from an image what it has: `rows` are block and slot, ascending by block."""
        assert left.index is not None
        for at in range(0, len(rows), BATCH):
            blocks, slots = rows[at : at + BATCH, 0], rows[at : at + BATCH, 1]
            data = np.empty((blocks.size, BLOCK_SIZE), np.uint8)
            view.read(blocks, data)
            digests = digest_blocks(data, left.index.header.seed)
            equal = (digests == left.index.rows["digest"][slots]).all(axis=1)
            stored, _, codecs = compress_blocks(data, np.flatnonzero(equal))
            found.put(slots[equal].tolist(), stored, codecs.tolist())

    def _borrow(self, rows: Int64s, left: PackState, found: _Found) -> None:
        """Take from other packs of the lineage what they have."""
        assert left.index is not None
        others = self._others[np.isin(self._others[:, 0], rows[:, 0])]
        for key in np.unique(others[:, 1] >> SLOT_BITS).tolist():
            mine = others[others[:, 1] >> SLOT_BITS == key]
            theirs = mine[:, 1] - (key << SLOT_BITS)
            slots = rows[np.searchsorted(rows[:, 0], mine[:, 0]), 1]
            with contextlib.suppress(*UNREADABLE):
                index = self._packs.reader.read_index(key)
                same = index.rows["digest"][theirs] == left.index.rows["digest"][slots]
                order = np.flatnonzero(same.all(axis=1))
                order = order[np.argsort(theirs[order], kind="stable")]
                if order.size:
                    self._copy(key, theirs[order], slots[order], found)

    def _copy(self, key: int, theirs: Int64s, slots: Int64s, found: _Found) -> None:
        """Copy the stored bytes of the slots `theirs` of the pack `key`, each proved."""
        for batch in unpack_slots(self._packs.reader, key, theirs, self._lineage.store.range_gap):
            codecs = batch.index.rows["codec"][theirs[batch.part]].tolist()
            found.put(slots[batch.part].tolist(), batch.stored, codecs)

    def _write(self, name: str, left: PackState, found: _Found, keep: Bools) -> int:
        """Put the pack under its new name, and read it back; the object's size in bytes."""
        assert left.index is not None
        rows = left.index.rows
        starts = rows["offset"].astype(np.int64) + left.index.data_start
        codecs = np.full(len(rows), ABSENT, np.uint8)
        lengths = np.zeros(len(rows), np.int64)
        parts: list[Buffer] = []
        for slot in np.flatnonzero(keep).tolist():
            if slot in found.stored:
                part: Buffer = found.stored[slot]
                codecs[slot] = found.codec[slot]
            else:
                assert left.data is not None
                part = left.data[starts[slot] : starts[slot] + int(rows["length"][slot])]
                codecs[slot] = rows["codec"][slot]
            lengths[slot] = len(part)
            parts.append(part)
        store = self._lineage.store
        sealed, size = seal_pack(name, left.index.header, parts, lengths, codecs, left.index.digests)
        store.put(name, sealed)
        index, data = get_checked(store, name, lambda given: open_pack(name, given))
        if not readable_slots(index, data, np.flatnonzero(keep))[keep].all():
            raise DamagedObjectError(f"pack {name}, just written, does not hold what it should; run it again")
        return size

    def _switch(self, before: Packs, renamed: Packs) -> None:
        """Append the record from which on the packs are found under their new names."""
        lineage = self._lineage
        with lineage.hold_lock():
            if lineage.epoch != self._epoch:
                raise ConflictError(
                    f"volume {lineage.name} changed hands meanwhile, so nothing was mended; run it again"
                )
            rows = rebase_rewritten(lineage, before, renamed)
            rows = replace(rows, dead=np.minimum(rows.dead, rows.size))
            lineage.append(ObjectsSwept(packs=rows))

    def _note(self, names: Mapping[str, Bools]) -> None:
        health = Health(self._lineage)
        for name, lost in names.items():
            if lost.any():
                health.note_damaged(name, lost)
            else:
                health.note_verified(name, time.time())
        health.save()


def _expanded(runs: Runs) -> tuple[Int64s, Int64s]:
    """Block and slot key of each block of `runs`, which hold pack keys."""
    within = np.arange(runs.blocks) - np.repeat(np.cumsum(runs.length) - runs.length, runs.length)
    slots = (runs.pack << SLOT_BITS) + runs.slot
    return np.repeat(runs.start, runs.length) + within, np.repeat(slots, runs.length) + within


def _without(rows: Int64s, found: _Found) -> Int64s:
    """The rows of block and slot whose slot was not found yet."""
    got = np.fromiter(found.stored, np.int64, len(found.stored))
    return rows[~np.isin(rows[:, 1], got)]


def mend_manifest(lineage: Lineage, snapshot: str) -> bool:
    """Give a snapshot's manifest its bytes again, which this host holds; False if it does not.

    They are what was written under that name, and nothing else ever stands there. ConflictError unless this
    host owns the lineage.
    """
    with lineage.hold_lock():
        lineage.require_owner()
        row = lineage.state.live.get(snapshot)
        if row is None or lineage.read_cached_manifest(row.id, row.attempt, row.checksum) is None:
            return False
        name = lineage.manifest_name(row)
        data = lineage.files.cache.read(name) or b""
        try:
            lineage.store.put(name, [data])
        except ConflictError:  # what rotted stands in the way
            lineage.store.delete(name)
            lineage.store.put(name, [data])
        return check_manifest(lineage, row, whole=True) is None


def mend_catalog(lineage: Lineage) -> None:
    """Begin the catalog anew, from what this host knows of it: nobody reads the older records again.

    That is an adoption by the owner; one that was interrupted is gone on with. ConflictError unless this host
    is the owner.
    """
    with lineage.hold_lock():
        if _stopped_by(lineage) != lineage.writer:
            lineage.require_owner()
        lineage.adopt()


def _stopped_by(lineage: Lineage) -> str | None:
    """Who began to adopt the lineage and has not ended; None if nobody did, or if that cannot be read."""
    name = stop_name(lineage.name, lineage.epoch)

    def check(data: memoryview) -> str:
        return str(read_json(name, open_frame(Kind.STOP, name, data).section(1, 1 << 16)).get("writer"))

    with contextlib.suppress(ObjectMissingError, *UNREADABLE):
        return get_checked(lineage.store, name, check, newest=True)
    return None


@dataclass(frozen=True, slots=True)
class Mender:
    """An image, with its backing files, to take lost blocks from beside the volume's own."""

    image: Path | None
    backing: Sequence[Backing]

    def views(self, lineage: Lineage, stack: ExitStack) -> list[View]:
        """What the images hold, the named one first; one that cannot be used is told."""
        known = lineage.files.image()
        paths = [self.image] if self.image else []
        if known and all(os.path.realpath(path) != known for path in paths):
            paths.append(Path(known))
        views: list[View] = []
        for path in paths:
            try:
                backing = self.backing if path == self.image else ()
                source = stack.enter_context(_source(path, lineage, backing))
                views += views_in(source, lineage)
            except (IslandError, OSError) as error:
                _LOG.warning("%s cannot be used to mend anything: %s", path, error)
        return views


def _source(path: Path, lineage: Lineage, backing: Sequence[Backing]) -> Source:
    """An image in the format that the newest snapshot says; what is taken of it is proved by digests."""
    newest, image_format = lineage.state.newest(), "qcow2"
    if newest is not None:
        try:
            image_format = lineage.manifest(newest).properties.get("format", image_format)
        except (NotFoundError, *UNREADABLE):
            pass
    if image_format == "raw":
        return RawSource(path)
    return Qcow2Source(path, lock=False, backing=backing)


@dataclass(slots=True)
class _Outcome:
    """What was mended: the catalog, manifests by snapshot, packs by key with what they still lack."""

    catalog: bool = False
    manifests: set[str] = field(default_factory=set)
    packs: dict[int, Int64s] = field(default_factory=dict)
    refusal: str = ""

    def mended(self, finding: Finding) -> bool:
        """Whether nothing is left of a finding."""
        if finding.key is not None:
            return finding.key in self.packs and not len(self.packs[finding.key])
        if finding.kind == CONTRADICTION:
            return False
        return finding.snapshot in self.manifests if finding.snapshot else self.catalog

    def left(self, finding: Finding) -> Finding:
        """What is left of a finding that was not mended."""
        if finding.key is None:
            return finding
        return replace(finding, lost=self.packs.get(finding.key, finding.lost))


def _mend(lineage: Lineage, findings: Sequence[Finding], mender: Mender, progress: Progress) -> _Outcome:
    """Mend what can be mended; a refusal is kept, to be told with what it left."""
    outcome = _Outcome()
    clear = [finding for finding in findings if finding.kind != CONTRADICTION]
    try:
        if any(f.key is None and f.snapshot is None for f in clear):
            mend_catalog(lineage)
            left = [name for name in lineage.stop_names if lineage.store.head(name) is None]
            outcome.catalog = not left and not check_records(lineage, lineage.current_record_names)[0]
        for snapshot in [f.snapshot for f in clear if f.snapshot]:
            if mend_manifest(lineage, snapshot):
                outcome.manifests.add(snapshot)
        with ExitStack() as stack:
            packs = [f for f in findings if f.key is not None]
            views = mender.views(lineage, stack) if packs else []
            outcome.packs = mend_packs(lineage, packs, views, progress)
    except IslandError as error:
        outcome.refusal = f"it was not mended: {error}"
    return outcome
