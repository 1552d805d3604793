"""Looking at single objects of a lineage: is it there, is it what was written, and what of it is left.

Nothing is changed. An object that is not as it should be is a `Finding`; of a pack, `Remains` tell which of
its slots can still be read. What a sweep removed or repacked meanwhile is no finding.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from island_fast.arrays import Bools, Int64s
from island_fast.dirtymap import BLOCK_SIZE, NO_INTERVALS
from island_fast.errors import UNREADABLE, DamagedObjectError, ObjectMissingError
from island_fast.formats.catalog import SnapshotRow
from island_fast.formats.keys import SLOT_BITS, split_pack_key
from island_fast.formats.manifest import Manifest, decode
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
from island_fast.repository.pack_reader import BATCH, PackReader, Place
from island_fast.stores.checked_read import get_checked

__all__ = [
    "CONTRADICTION",
    "DIFFERS",
    "INDEX",
    "LOST_BLOCKS",
    "MISSING",
    "ROT",
    "TRUNCATED",
    "Examiner",
    "Finding",
    "Remains",
    "manifest_finding",
    "readable",
    "slots_of",
]


MISSING, TRUNCATED, INDEX, ROT, LOST_BLOCKS, CONTRADICTION, DIFFERS = (
    "missing", "truncated", "index", "rot", "lost-blocks", "contradiction", "differs",
)  # fmt: skip
"""Kinds of findings: nothing is stored under the name; too few bytes are; the index of a pack cannot be read;
bytes changed; a pack that was mended lacks blocks that were not to be had; objects contradict each other; a
snapshot is not what its pin holds."""


@dataclass(frozen=True, slots=True)
class Finding:
    """An object that is not as it should be: its full name, in what way, and a sentence.

    Of a pack, `key` is its key and `lost` the slots that a snapshot needs and that cannot be read, as
    intervals of slot keys, int64[n, 2]. Of a manifest, `snapshot` is its snapshot. Neither: the catalog.
    """

    name: str
    kind: str
    told: str
    key: int | None = None
    lost: Int64s = field(default_factory=lambda: NO_INTERVALS)
    snapshot: str | None = None


@dataclass(frozen=True, slots=True)
class Remains:
    """What is left of a pack. `live` slots are needed, `good` ones among them can be read; bool[slots].

    `index` is this host's copy where the pack's own, `bare`, is lost: no other host can read anything then.
    None where there is neither. `whole`: the object is as it was written.
    `kind` and `told` say what is wrong, "" if nothing is. `data` is what the store gave, None for nothing.
    """

    place: Place
    index: Index | None
    data: memoryview | None
    live: Bools
    good: Bools
    whole: bool
    bare: bool
    kind: str
    told: str


class Examiner:
    """Packs of one lineage, examined. Thread-safe, while nothing else uses the lineage."""

    def __init__(self, lineage: Lineage) -> None:
        self.reader = PackReader(lineage)
        self._lineage = lineage

    def look(self, key: int) -> Finding | None:
        """Whether the pack is there and of the right size. Its data is not asked for.

        One that was written anew could have been without a block that is needed: its index is looked at,
        which this host keeps from then on.
        """

        def ask(place: Place) -> bool:
            info = self._lineage.store.head(place.name)
            if info is None:
                raise ObjectMissingError(place.name)
            if info.size != place.size:
                return False
            if "." not in place.name.rpartition("/")[2]:
                return True
            rows = self.reader.index_at(place).rows
            return len(rows) == place.slots and not (rows["codec"][self._live(key, place)] == ABSENT).any()

        try:
            if self.reader.following(key, ask):
                return None
        except UNREADABLE:
            pass
        return self.finding(key)

    def finding(self, key: int) -> Finding | None:
        """What is wrong with the pack; None if all is well, or if no snapshot needs it any more."""
        left = self.remains(key)
        if left is None or not left.kind:
            return None
        lost = left.live if left.bare else left.live & ~left.good
        return Finding(left.place.name, left.kind, left.told, key, slots_of(key, lost))

    def remains(self, key: int) -> Remains | None:
        """Read the pack whole, and prove every block that a snapshot needs; None if the pack is gone."""
        try:
            return self.reader.following(key, lambda place: self._read(key, place))
        except DamagedObjectError as error:  # missing, or not in the catalog any more
            with contextlib.suppress(DamagedObjectError):
                return self._judged(key, self.reader.place(key), None, MISSING, str(error))
            return None

    def _live(self, key: int, place: Place) -> Bools:
        return self._lineage.state.live_slots(key, place.slots)

    def _read(self, key: int, place: Place) -> Remains:
        """The pack under its present name; ObjectMissingError if there is none."""
        store = self._lineage.store
        try:
            _, data = get_checked(store, place.name, lambda found: open_pack(place.name, found))
        except UNREADABLE as error:
            data = store.get(place.name)
            return self._judged(key, place, data, self._kind(place, data), str(error))
        return self._judged(key, place, data, "", "")

    def _kind(self, place: Place, data: memoryview) -> str:
        if data.nbytes < min(front_size(place.slots), place.size):
            return TRUNCATED
        if self._front(place.name, data) is None:
            return INDEX
        return TRUNCATED if data.nbytes < place.size else ROT

    def _judged(self, key: int, place: Place, data: memoryview | None, kind: str, told: str) -> Remains:
        """What is left of a pack that holds `data`, of which `kind` and `told` say what is wrong so far."""
        live = self._live(key, place)
        index = self._front(place.name, data) if data is not None else None
        stranger = index is not None and not self._is_its(index, key, place)
        bare = index is None or stranger
        if bare:
            index = self._front(place.name, self._lineage.files.cache.read(place.name))
        if index is not None and not self._is_its(index, key, place):
            index = None
        if not kind and stranger:
            kind, told = CONTRADICTION, f"pack {place.name} is not the one that its catalog record names"
        good = np.zeros(place.slots, np.bool_)
        if index is not None and data is not None:
            good = readable(index, data, np.flatnonzero(live))
        whole = not kind
        if whole and not good[live].all():
            kind, told = ROT, f"pack {place.name} holds blocks that are not what was written (digests differ)"
            if index is not None and (index.rows["codec"][live & ~good] == ABSENT).all():
                kind, told = LOST_BLOCKS, f"pack {place.name} lacks blocks that were lost"
        return Remains(place, index, data, live, good, whole, bare, kind, told)

    def _front(self, name: str, data: memoryview | bytes | None) -> Index | None:
        """The index at the beginning of `data`; None if there is none that can be read."""
        if data is not None:
            with contextlib.suppress(*UNREADABLE):
                return read_front(name, data[: front_size(MAX_SLOTS)])
        return None

    def _is_its(self, index: Index, key: int, place: Place) -> bool:
        """Whether an index is that of the pack, by what the catalog says."""
        owner, number = split_pack_key(key)
        lineage = self._lineage
        wanted = PackHeader(lineage.name, lineage.numbers.id(owner), number, lineage.seed)
        return index.header == wanted and len(index.rows) == place.slots


def slots_of(key: int, mask: Bools) -> Int64s:
    """The slots of a pack that `mask` marks, each as an interval of slot keys, int64[n, 2]."""
    slots = np.flatnonzero(mask) + (key << SLOT_BITS)
    return np.stack([slots, slots + 1], axis=1)


def readable(index: Index, data: memoryview, slots: Int64s) -> Bools:
    """Which of a pack's slots, bool[all of them], are among `slots` and hold what their digests say.

    `data` is the object, or what is left of it.
    """
    good = np.zeros(len(index.rows), np.bool_)
    rows = np.empty((BATCH, BLOCK_SIZE), np.uint8)
    for at in range(0, slots.size, BATCH):
        _try(index, data, slots[at : at + BATCH], rows, good)
    return good


def _try(index: Index, data: memoryview, slots: Int64s, rows: NDArray[np.uint8], good: Bools) -> None:
    """Mark those of `slots` that can be read in `good`, by halving until what cannot is alone."""
    try:
        offsets, lengths = stored_ranges(index, slots)
        spans = zip(offsets.tolist(), (offsets + lengths).tolist(), strict=True)
        unpack_blocks(index, slots, [data[a:b] for a, b in spans], rows[: slots.size])
    except UNREADABLE:
        if slots.size > 1:
            half = slots.size // 2
            _try(index, data, slots[:half], rows, good)
            _try(index, data, slots[half:], rows, good)
    else:
        good[slots] = True


def manifest_finding(lineage: Lineage, row: SnapshotRow, *, whole: bool) -> Finding | None:
    """What is wrong with the manifest of a snapshot in the store; None if nothing is, or if it was deleted.

    It is read if `whole`; else only asked for, as long as this host has its content.
    """
    name = lineage.manifest_name(row)
    try:
        if not whole:
            info = lineage.store.head(name)
            whole = info is None or info.size != row.manifest_size
        if whole:
            get_checked(lineage.store, name, lambda data: _proved(name, data, row))
        return None
    except ObjectMissingError:
        kind, told = MISSING, f"manifest {name} is missing from {lineage.store.location}"
    except UNREADABLE as error:
        kind, told = ROT, str(error)
        with contextlib.suppress(ObjectMissingError):
            kind = TRUNCATED if lineage.store.get(name).nbytes < row.manifest_size else ROT
    lineage.refresh()
    return Finding(name, kind, told, snapshot=row.id) if row.id in lineage.state.live else None


def _proved(name: str, data: memoryview, row: SnapshotRow) -> Manifest:
    manifest, checksum = decode(name, data)
    if checksum.hex() != row.checksum or manifest.snapshot != row.id:
        raise DamagedObjectError(f"manifest {name} is not the one that its catalog record names")
    return manifest
