"""Repair damaged objects of a lineage, as its owner, from bytes that still exist on this host.

A pack is written again under its next name, with the same slots under the same numbers. It gets those of its
blocks that can still be read, and blocks with the right digests from elsewhere: from images that hold them at
the same place, or from other packs of the lineage. The new pack is read back before the record that switches
the name, so a crash anywhere leaves the lineage as it was, or repaired. A manifest gets its own bytes again,
from this host's cache. A catalog that only this host can read is started again. docs/reliability.md,
"Mending".

`heal` is for verify, which hands down findings and gets back what is left of each. `heal_known_damage` is for
snapshots, which repair what this host already knows before they read the image.
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
from island_fast.formats.frame import LIMITS, Kind, open_frame
from island_fast.formats.keys import SLOT_BITS
from island_fast.formats.names import stop_name
from island_fast.formats.pack import ABSENT, Index, compress_blocks, digest_blocks, open_pack, seal_pack
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

__all__ = ["HealResult", "heal", "heal_known_damage"]

_AT_ONCE = 32  # packs for one record
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HealResult:
    """What is left of each finding, None for one that was repaired; and why the repair ended early, or ""."""

    left: list[Finding | None]
    refusal: str


def heal(
    lineage: Lineage,
    findings: Sequence[Finding],
    image: Path | None,
    backing: Sequence[Backing],
    progress: Progress,
) -> HealResult:
    """Repair what can be repaired: the catalog first, then manifests, then packs.

    Lost blocks are taken from the volume's own image, and from `image`, which has these `backing` files, if
    it is given. An error, such as that another host owns the lineage, ends the repair and is in the result;
    what was repaired before it stays repaired. Objects that contradict each other are left alone, except
    for packs.
    """
    catalog, manifests, packs, refusal = False, set[str](), dict[int, Int64s](), ""
    clear = [finding for finding in findings if finding.kind != CONTRADICTION]
    in_packs = [finding for finding in findings if finding.key is not None]
    try:
        if any(one.key is None and one.snapshot is None for one in clear):
            catalog = _heal_catalog(lineage)
        for snapshot in [one.snapshot for one in clear if one.snapshot]:
            if _heal_manifest(lineage, snapshot):
                manifests.add(snapshot)
        if in_packs:
            with ExitStack() as stack:
                views = _open_views(lineage, image, backing, stack)
                packs = _heal_packs(lineage, in_packs, views, progress)
    except IslandError as error:
        refusal = f"it was not repaired: {error}"

    def left(finding: Finding) -> Finding | None:
        if finding.key is not None:
            lost = packs.get(finding.key, finding.lost)
            return None if finding.key in packs and not len(lost) else replace(finding, lost=lost)
        repaired = finding.snapshot in manifests if finding.snapshot else catalog
        return None if repaired and finding.kind != CONTRADICTION else finding

    return HealResult([left(finding) for finding in findings], refusal)


def heal_known_damage(lineage: Lineage, source: Source, progress: Progress) -> None:
    """Repair the packs that this host knows to be damaged from the open image, before a snapshot of it.

    If a pack cannot be repaired, that is logged and not an error: the snapshot sends what it needs of it
    again.
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
        _heal_packs(lineage, findings, _views_of(source, lineage), progress)
    except (IslandError, OSError) as error:
        _LOG.warning("damaged packs could not be repaired: %s", error)


# The catalog.


def _heal_catalog(lineage: Lineage) -> bool:
    """Start the catalog again from what this host knows of it; return whether it is whole then.

    Nobody reads the older records again. This is an adoption by the owner, and it resumes one that was
    interrupted. ConflictError unless this host is the owner; DamagedObjectError if the store holds another
    copy of the repository, with a history of its own.
    """
    lineage.require_known_history()  # before anything is given up
    with lineage.hold_lock(give_up=True):
        if _find_adopter(lineage) != lineage.writer:
            lineage.require_owner()
        lineage.adopt()
    missing = [name for name in lineage.stop_names if lineage.store.head(name) is None]
    return not missing and not check_records(lineage, lineage.current_record_names)[0]


def _find_adopter(lineage: Lineage) -> str | None:
    """Return who began to adopt the lineage and did not finish; None if nobody, or if it cannot be read."""
    name = stop_name(lineage.name, lineage.epoch)

    def check(data: memoryview) -> str:
        return str(open_frame(Kind.STOP, name, data).json().get("writer"))

    with contextlib.suppress(ObjectMissingError, *UNREADABLE):
        return get_checked(lineage.store, name, check, limit=LIMITS[Kind.STOP].size, newest=True)
    return None


# Manifests.


def _heal_manifest(lineage: Lineage, snapshot: str) -> bool:
    """Write a snapshot's manifest again if this host holds its bytes; return whether it is whole then.

    The bytes are those that were written under that name, and no others are ever stored there. ConflictError
    unless this host owns the lineage; DamagedObjectError if the store holds another catalog.
    """
    with lineage.hold_lock():
        lineage.require_owner()
        lineage.require_standing()
        row = lineage.state.live.get(snapshot)
        if row is None or lineage.read_cached_manifest(row.id, row.attempt, row.checksum) is None:
            return False
        name = lineage.manifest_name(row)
        data = lineage.files.cache.read(name) or b""
        try:
            lineage.store.put(name, [data])
        except ConflictError:  # the damaged object is in the way
            lineage.store.delete(name)
            lineage.store.put(name, [data])
        return check_manifest(lineage, row, whole=True) is None


# Packs.


def _heal_packs(
    lineage: Lineage, findings: Sequence[Finding], views: Sequence[View], progress: Progress
) -> dict[int, Int64s]:
    """Write the packs in `findings` again, as far as their blocks can be found, in `views` or in other packs.

    Return the slots that are still lost, as intervals of slot keys, by the key of each pack that was written
    or turned out to be whole or swept; `Health` notes them, too. ConflictError, with nothing changed, unless
    this host owns the lineage.
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
        healing = _PackHealing(lineage, lost, views)
        for at in range(0, len(keys), _AT_ONCE):
            still |= healing.heal(keys[at : at + _AT_ONCE])
            done += sum(len(packs[key]) for key in keys[at : at + _AT_ONCE])
            progress("mend", done * BLOCK_SIZE, sum(map(len, packs.values())) * BLOCK_SIZE)
    return still


@dataclass(slots=True)
class _FoundSlots:
    """Slots of one pack whose blocks were found elsewhere: their stored bytes and codecs."""

    stored: dict[int, bytes] = field(default_factory=dict)
    codec: dict[int, int] = field(default_factory=dict)

    def add(self, slots: Iterable[int], stored: Iterable[Buffer], codecs: Iterable[int]) -> None:
        """Add slots."""
        for slot, data, codec in zip(slots, stored, codecs, strict=True):
            self.stored[slot], self.codec[slot] = bytes(data), codec

    def drop_from(self, rows: Int64s) -> Int64s:
        """Return the rows of block and slot whose slot was not found yet."""
        slots = np.fromiter(self.stored, np.int64, len(self.stored))
        return rows[~np.isin(rows[:, 1], slots)]


class _PackHealing:
    """Packs being repaired, under the lock that keeps sweeps away. `lost` are all slot keys to be found."""

    def __init__(self, lineage: Lineage, lost: Int64s, views: Sequence[View]) -> None:
        self._lineage = lineage
        self._views = list(views)
        self._packs = PackChecker(lineage)
        self._epoch = lineage.epoch
        self._blocks = self._find_blocks(lost)
        self._others = self._find_other_slots(lost)

    def _find_blocks(self, lost: Int64s) -> Int64s:
        """Find the blocks that the slots in `lost` hold: all snapshots have an inherited entry at its block.

        Return rows of slot key and block, int64[n, 2], ascending.
        """
        found = NO_INTERVALS
        for _, _, runs in self._lineage.live_runs():
            blocks, slots = _expand(runs.among(lost))
            found = np.unique(np.concatenate([found, np.stack([slots, blocks], axis=1)]), axis=0)
        return found

    def _find_other_slots(self, lost: Int64s) -> Int64s:
        """Find the other slots that hold a state of those blocks: rows of block and slot key, int64[n, 2]."""
        blocks = np.unique(self._blocks[:, 1])
        found = NO_INTERVALS
        for _, _, runs in self._lineage.live_runs():
            named, row, offset = runs.locate(blocks)
            slots = (runs.pack[row] << SLOT_BITS) + runs.slot[row] + offset
            mine = np.stack([blocks[named], slots], axis=1)
            found = np.unique(np.concatenate([found, mine]), axis=0)
        at = np.searchsorted(lost[:, 0], found[:, 1], side="right") - 1
        return found[(at < 0) | (found[:, 1] >= lost[at, 1])] if len(lost) else found

    def heal(self, keys: Sequence[int]) -> dict[int, Int64s]:
        """Write these packs again where that gains anything, and then the record that switches their names.

        Return what is still lost, as in `_heal_packs`.
        """
        before, renamed, names = Packs(), Packs(), {}
        still: dict[int, Int64s] = {}
        for key in keys:
            damaged = self._packs.read_state(key)
            if damaged is None or not damaged.kind:  # repaired by another process, or swept
                still[key] = NO_INTERVALS
                continue
            row = self._lineage.state.packs.rows(self._lineage.state.packs.find(np.array([key])))
            found = self._search(key, damaged)
            keep = damaged.good.copy()
            keep[list(found.stored)] = True
            gains = bool(found.stored) or (not damaged.whole and bool(keep.any()))
            if damaged.index is None or not gains:
                continue
            fresh = replace(row, suffix=np.array([secrets.randbits(62) + 1]))
            name = self._lineage.pack_name(fresh, 0)
            fresh = replace(fresh, size=np.array([self._write(name, damaged, found, keep)]))
            before, renamed = before.update(row), renamed.update(fresh)
            names[name] = damaged.live & ~keep
            still[key] = slots_in_mask(key, names[name])
        if names:
            self._switch(before, renamed)
            self._note_health(names)
        return still

    def _search(self, key: int, damaged: PackState) -> _FoundSlots:
        """Search images and packs for the blocks of slots that are needed and cannot be read."""
        found = _FoundSlots()
        wanted = np.flatnonzero(damaged.live & ~damaged.good) + (key << SLOT_BITS)
        blocks = self._blocks[np.isin(self._blocks[:, 0], wanted)]
        if damaged.index is None or not len(blocks):
            return found
        rows = np.stack([blocks[:, 1], blocks[:, 0] - (key << SLOT_BITS)], axis=1)
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        for view in self._views:
            todo = found.drop_from(rows)
            try:
                self._take_from_image(view, todo[todo[:, 0] < view.blocks], damaged.index, found)
            except (IslandError, OSError) as error:
                _LOG.warning("an image cannot be read to repair a pack: %s", error)
        self._take_from_packs(found.drop_from(rows), damaged.index, found)
        return found

    def _take_from_image(self, view: View, rows: Int64s, index: Index, found: _FoundSlots) -> None:
        """Add to `found` what an image has: `rows` are block and slot, ascending by block."""
        for at in range(0, len(rows), BATCH):
            blocks, slots = rows[at : at + BATCH, 0], rows[at : at + BATCH, 1]
            data = np.empty((blocks.size, BLOCK_SIZE), np.uint8)
            view.read(blocks, data)
            digests = digest_blocks(data, index.header.seed)
            equal = (digests == index.rows["digest"][slots]).all(axis=1)
            stored, _, codecs = compress_blocks(data, np.flatnonzero(equal))
            found.add(slots[equal].tolist(), stored, codecs.tolist())

    def _take_from_packs(self, rows: Int64s, index: Index, found: _FoundSlots) -> None:
        """Add to `found` what other packs of the lineage have."""
        others = self._others[np.isin(self._others[:, 0], rows[:, 0])]
        for key in np.unique(others[:, 1] >> SLOT_BITS).tolist():
            mine = others[others[:, 1] >> SLOT_BITS == key]
            theirs = mine[:, 1] - (key << SLOT_BITS)
            slots = rows[np.searchsorted(rows[:, 0], mine[:, 0]), 1]
            with contextlib.suppress(*UNREADABLE):
                other = self._packs.reader.read_index(key)
                same = other.rows["digest"][theirs] == index.rows["digest"][slots]
                order = np.flatnonzero(same.all(axis=1))
                order = order[np.argsort(theirs[order], kind="stable")]
                if order.size:
                    self._copy(key, theirs[order], slots[order], found)

    def _copy(self, key: int, theirs: Int64s, slots: Int64s, found: _FoundSlots) -> None:
        """Copy the stored bytes of the slots `theirs` of the pack `key`, each verified by its digest."""
        for batch in unpack_slots(self._packs.reader, key, theirs, self._lineage.store.range_gap):
            codecs = batch.index.rows["codec"][theirs[batch.part]].tolist()
            found.add(slots[batch.part].tolist(), batch.stored, codecs)

    def _write(self, name: str, damaged: PackState, found: _FoundSlots, keep: Bools) -> int:
        """Put the pack under its new name, and read it back; return the object's size in bytes."""
        assert damaged.index is not None
        rows = damaged.index.rows
        starts = rows["offset"].astype(np.int64) + damaged.index.data_start
        codecs = np.full(len(rows), ABSENT, np.uint8)
        lengths = np.zeros(len(rows), np.int64)
        parts: list[Buffer] = []
        for slot in np.flatnonzero(keep).tolist():
            if slot in found.stored:
                part: Buffer = found.stored[slot]
                codecs[slot] = found.codec[slot]
            else:
                assert damaged.data is not None
                part = damaged.data[starts[slot] : starts[slot] + int(rows["length"][slot])]
                codecs[slot] = rows["codec"][slot]
            lengths[slot] = len(part)
            parts.append(part)
        store = self._lineage.store
        sealed, size = seal_pack(name, damaged.index.header, parts, lengths, codecs, damaged.index.digests)
        store.put(name, sealed)
        index, data = get_checked(store, name, lambda given: open_pack(name, given), limit=size)
        if not readable_slots(index, data, np.flatnonzero(keep))[keep].all():
            raise DamagedObjectError(f"pack {name} is damaged although it was just written; run it again")
        return size

    def _switch(self, before: Packs, renamed: Packs) -> None:
        """Append the record that gives the packs their new names."""
        lineage = self._lineage
        with lineage.hold_lock():
            if lineage.epoch != self._epoch:
                raise ConflictError(
                    f"volume {lineage.name} was adopted meanwhile, so nothing was repaired; run it again"
                )
            rows = rebase_rewritten(lineage, before, renamed)
            rows = replace(rows, dead=np.minimum(rows.dead, rows.size))
            lineage.append(ObjectsSwept(packs=rows))

    def _note_health(self, names: Mapping[str, Bools]) -> None:
        """Note which of the new packs are whole, and which slots the others lack."""
        health = Health(self._lineage)
        for name, lost in names.items():
            if lost.any():
                health.note_damaged(name, lost)
            else:
                health.note_verified(name, time.time())
        health.save()


def _expand(runs: Runs) -> tuple[Int64s, Int64s]:
    """Return block and slot key of each block of `runs`, which hold pack keys."""
    within = np.arange(runs.blocks) - np.repeat(np.cumsum(runs.length) - runs.length, runs.length)
    slots = (runs.pack << SLOT_BITS) + runs.slot
    return np.repeat(runs.start, runs.length) + within, np.repeat(slots, runs.length) + within


# Images that may have what was lost.


def _open_views(
    lineage: Lineage, image: Path | None, backing: Sequence[Backing], stack: ExitStack
) -> list[View]:
    """Open `image`, if given, and the volume's own image; log which of them cannot be used."""
    own = lineage.files.image()
    paths = [image] if image else []
    if own and all(os.path.realpath(path) != own.path for path in paths):
        paths.append(Path(own.path))
    views: list[View] = []
    for path in paths:
        try:
            source = stack.enter_context(_open_source(path, lineage, backing if path == image else ()))
            views += _views_of(source, lineage)
        except (IslandError, OSError) as error:
            _LOG.warning("%s cannot be used for repairs: %s", path, error)
    return views


def _open_source(path: Path, lineage: Lineage, backing: Sequence[Backing]) -> Source:
    """Open an image, in the format of the newest snapshot: digests prove what is taken from it."""
    newest, image_format = lineage.state.newest(), "qcow2"
    if newest is not None:
        with contextlib.suppress(NotFoundError, *UNREADABLE):
            image_format = lineage.manifest(newest).properties.get("format", image_format)
    if image_format == "raw":
        return RawSource(path)
    return Qcow2Source(path, lock=False, backing=backing)


def _views_of(source: Source, lineage: Lineage) -> list[View]:
    """Return the points of an image that may have what was lost: its pins, newest first, and its present."""
    pins = [found for row in lineage.state.live.values() if (found := source.find_pinned(row.pin))]
    return [*(source.view(pin) for pin in reversed(pins)), source.view(None)]
