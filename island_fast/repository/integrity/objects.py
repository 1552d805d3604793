"""Checks of single objects of a lineage: is it stored, is it what was written, and what can still be read.

Nothing is changed. A `Finding` describes an object that is not as it should be; `PackState` says which slots
of a pack can still be read. An object that a sweep removed or repacked meanwhile is not a finding.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import numpy as np

from island_fast.arrays import Bools, Bytes2D, Int64s
from island_fast.dirtymap import BLOCK_SIZE, NO_INTERVALS
from island_fast.errors import UNREADABLE, DamagedObjectError, ObjectMissingError
from island_fast.formats.catalog import SnapshotRow
from island_fast.formats.keys import SLOT_BITS, split_pack_key
from island_fast.formats.manifest import decode
from island_fast.formats.pack import (
    ABSENT,
    MAX_SLOTS,
    Index,
    PackHeader,
    front_size,
    open_pack,
    read_front,
    stored_ranges,
    unpack_blocks,
)
from island_fast.repository.lineage import Lineage
from island_fast.repository.pack_reader import BATCH, PackLocation, PackReader
from island_fast.stores.base import Store
from island_fast.stores.checked_read import get_checked

__all__ = [
    "CONTRADICTION",
    "DIFFERS",
    "INDEX",
    "LOST_BLOCKS",
    "MISSING",
    "ROT",
    "TRUNCATED",
    "Finding",
    "PackChecker",
    "PackState",
    "check_manifest",
    "readable_slots",
    "slots_in_mask",
]

MISSING, TRUNCATED, INDEX, ROT, LOST_BLOCKS, CONTRADICTION, DIFFERS = (
    "missing", "truncated", "index", "rot", "lost-blocks", "contradiction", "differs",
)  # fmt: skip
"""Kinds of findings: nothing is stored under the name; the object is too short; the index of a pack cannot be
read; bytes changed; a repaired pack lacks blocks that were lost; objects contradict each other; a snapshot
differs from its pin."""


@dataclass(frozen=True, slots=True)
class Finding:
    """An object that is not as it should be: its full name, the kind of the finding, and a message.

    For a pack, `key` is its key and `lost` are the slots that a snapshot needs and that cannot be read, as
    intervals of slot keys, int64[n, 2]. For a manifest, `snapshot` is its snapshot. For the catalog, neither
    is set.
    """

    name: str
    kind: str
    message: str
    key: int | None = None
    lost: Int64s = field(default_factory=lambda: NO_INTERVALS)
    snapshot: str | None = None


@dataclass(frozen=True, slots=True)
class PackState:
    """What of a pack can still be read, and what is wrong with it.

    `live` are the slots that snapshots need, `good` those of them that can be read; both bool[slots]. `index`
    is the pack's own, or this host's copy if the pack's own is lost (`index_lost`; no other host can read the
    pack then), or None without either. `data` are the bytes that the store gave, None if the object is
    missing. `whole`: the object is as it was written. `kind` and `message` say what is wrong, "" if nothing
    is.
    """

    location: PackLocation
    index: Index | None
    data: memoryview | None
    live: Bools
    good: Bools
    whole: bool
    index_lost: bool
    kind: str
    message: str


class PackChecker:
    """Checks packs of one lineage. Thread-safe, as long as nothing else uses the lineage."""

    def __init__(self, lineage: Lineage) -> None:
        self.reader = PackReader(lineage)
        self._lineage = lineage

    def check_presence(self, key: int) -> Finding | None:
        """Return what is wrong with the pack if it is missing or of the wrong size; its blocks are not read.

        A pack that was repaired can lack a block that is needed. So its index is read too, and cached.
        """

        def is_present(location: PackLocation) -> bool:
            info = self._lineage.store.head(location.name)
            if info is None:
                raise ObjectMissingError(location.name)
            if info.size != location.size:
                return False
            if "." not in location.name.rpartition("/")[2]:  # never written again
                return True
            rows = self.reader.read_index_at(location).rows
            live = self._lineage.state.live_slots(key, location.slots)
            return len(rows) == location.slots and not (rows["codec"][live] == ABSENT).any()

        try:
            if self.reader.with_current_location(key, is_present):
                return None
        except UNREADABLE:
            pass
        return self.check(key)

    def check(self, key: int) -> Finding | None:
        """Read the pack; return what is wrong, or None if nothing is or no snapshot needs the pack."""
        state = self.read_state(key)
        if state is None or not state.kind:
            return None
        lost = state.live if state.index_lost else state.live & ~state.good
        return Finding(state.location.name, state.kind, state.message, key, slots_in_mask(key, lost))

    def read_state(self, key: int) -> PackState | None:
        """Read the whole pack, and check every block that a snapshot needs; None if the pack is swept."""
        try:
            return self.reader.with_current_location(key, lambda location: self._read(key, location))
        except DamagedObjectError as error:  # missing, or not in the catalog any more
            with contextlib.suppress(DamagedObjectError):
                return self._judge(key, self.reader.locate(key), None, MISSING, str(error))
            return None

    def _read(self, key: int, location: PackLocation) -> PackState:
        """Read the pack at `location`; ObjectMissingError if there is none."""
        store, name = self._lineage.store, location.name
        try:
            _, data = get_checked(store, name, lambda found: open_pack(name, found), limit=location.size)
        except UNREADABLE as error:
            data = _read_at_most(store, name, location.size)
            return self._judge(key, location, data, self._kind_of_damage(location, data), str(error))
        return self._judge(key, location, data, "", "")

    def _kind_of_damage(self, location: PackLocation, data: memoryview) -> str:
        if data.nbytes < min(front_size(location.slots), location.size):
            return TRUNCATED
        if _read_index(location.name, data) is None:
            return INDEX
        return TRUNCATED if data.nbytes < location.size else ROT

    def _judge(
        self, key: int, location: PackLocation, data: memoryview | None, kind: str, message: str
    ) -> PackState:
        """Return the state of a pack whose object is `data`; `kind` and `message` are known so far."""
        name, live = location.name, self._lineage.state.live_slots(key, location.slots)
        index = _read_index(name, data)
        foreign = index is not None and not self._belongs(index, key, location)
        index_lost = index is None or foreign
        if index_lost:
            index = _read_index(name, self._lineage.files.cache.read(name))
        if index is not None and not self._belongs(index, key, location):
            index = None
        if not kind and foreign:
            kind, message = CONTRADICTION, f"pack {name} is not the one that its catalog record names"
        good = np.zeros(location.slots, np.bool_)
        if index is not None and data is not None:
            good = readable_slots(index, data, np.flatnonzero(live))
        whole = not kind
        if whole and not good[live].all():
            kind, message = ROT, f"pack {name} holds blocks that are not what was written (digests differ)"
            if index is not None and (index.rows["codec"][live & ~good] == ABSENT).all():
                kind, message = LOST_BLOCKS, f"pack {name} lacks blocks that were lost"
        return PackState(location, index, data, live, good, whole, index_lost, kind, message)

    def _belongs(self, index: Index, key: int, location: PackLocation) -> bool:
        """Return whether an index is that of the pack, by what the catalog says."""
        owner, number = split_pack_key(key)
        lineage = self._lineage
        header = PackHeader(lineage.name, lineage.numbers.id(owner), number, lineage.seed)
        return index.header == header and len(index.rows) == location.slots


def _read_at_most(store: Store, name: str, size: int) -> memoryview:
    """Return what is stored of an object, and no more than `size` bytes of a larger one."""
    try:
        return store.get(name, limit=size)
    except DamagedObjectError:
        return store.get_ranges(name, [(0, size)])[0]


def _read_index(name: str, data: memoryview | bytes | None) -> Index | None:
    """Return the index at the beginning of `data`; None if it cannot be read."""
    if data is not None:
        with contextlib.suppress(*UNREADABLE):
            return read_front(name, data[: front_size(MAX_SLOTS)])
    return None


def slots_in_mask(key: int, mask: Bools) -> Int64s:
    """Return the slots of a pack that `mask` marks, each as an interval of slot keys, int64[n, 2]."""
    slots = np.flatnonzero(mask) + (key << SLOT_BITS)
    return np.stack([slots, slots + 1], axis=1)


def readable_slots(index: Index, data: memoryview, slots: Int64s) -> Bools:
    """Return which of all slots of a pack are among `slots` and hold what their digests say, bool[slots].

    `data` is the object, or what is left of it.
    """
    good = np.zeros(len(index.rows), np.bool_)
    rows = np.empty((BATCH, BLOCK_SIZE), np.uint8)
    for at in range(0, slots.size, BATCH):
        _mark_readable(index, data, slots[at : at + BATCH], rows, good)
    return good


def _mark_readable(index: Index, data: memoryview, slots: Int64s, rows: Bytes2D, good: Bools) -> None:
    """Mark in `good` those of `slots` that can be read, by halving until each that cannot is alone."""
    try:
        offsets, lengths = stored_ranges(index, slots)
        spans = zip(offsets.tolist(), (offsets + lengths).tolist(), strict=True)
        unpack_blocks(index, slots, [data[a:b] for a, b in spans], rows[: slots.size])
    except UNREADABLE:
        if slots.size > 1:
            half = slots.size // 2
            _mark_readable(index, data, slots[:half], rows, good)
            _mark_readable(index, data, slots[half:], rows, good)
    else:
        good[slots] = True


def check_manifest(lineage: Lineage, row: SnapshotRow, *, whole: bool) -> Finding | None:
    """Return what is wrong with the manifest of a snapshot, or None if nothing is or it was deleted.

    The manifest is read if `whole`, or if its size is wrong; else only its presence is checked, which is
    enough while this host has its content.
    """
    name = lineage.manifest_name(row)

    def check(data: memoryview) -> None:
        most = len(lineage.state.packs) if row.id in lineage.state.live else None
        manifest, checksum = decode(name, data, most)
        if checksum.hex() != row.checksum or manifest.snapshot != row.id:
            raise DamagedObjectError(f"manifest {name} is not the one that its catalog record names")

    try:
        if not whole:
            info = lineage.store.head(name)
            whole = info is None or info.size != row.manifest_size
        if whole:
            get_checked(lineage.store, name, check, limit=row.manifest_size)
        return None
    except ObjectMissingError:
        kind, message = MISSING, f"manifest {name} is missing from {lineage.store.location}"
    except UNREADABLE as error:
        kind, message = ROT, str(error)
        with contextlib.suppress(ObjectMissingError, DamagedObjectError):
            there = _read_at_most(lineage.store, name, row.manifest_size)
            kind = TRUNCATED if there.nbytes < row.manifest_size else ROT
    lineage.refresh()
    return Finding(name, kind, message, snapshot=row.id) if row.id in lineage.state.live else None
