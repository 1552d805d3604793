"""Reading packs of a lineage: their indexes from the local cache or the store, their blocks from the store.

Packs are asked for by pack key; the catalog tells the current full name. A pack that is gone under its name
was repacked or swept: the catalog is read again, and only if the name stays is the pack missing.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from island_fast.arrays import Bytes2D, Int64s
from island_fast.dirtymap import BLOCK_SIZE, distinct
from island_fast.errors import (
    UNREADABLE,
    DamagedObjectError,
    IslandError,
    ObjectMissingError,
)
from island_fast.formats.catalog import pack_full_name
from island_fast.formats.pack import Index, front_size, open_pack, read_front, stored_ranges, unpack_blocks
from island_fast.formats.runs import Runs
from island_fast.repository.lineage import Lineage
from island_fast.stores.base import Range, Store
from island_fast.stores.checked_read import get_checked

__all__ = ["BATCH", "KnownDigests", "PackReader", "Place", "Unpacked", "by_pack", "unpacked"]

BATCH = 32  # blocks read, hashed and compressed at a time: 2 MiB

T = TypeVar("T")

_INDEXES_KEPT = 64
_SPARED = 32  # a pack of which at most one slot in this many is not wanted is fetched whole
_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class Fetched:
    """Work done so far: objects asked for, and bytes that came."""

    objects: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pack is now: its full name, its slots, and the object's size in bytes."""

    name: str
    slots: int
    size: int


class PackReader:
    """Reads packs of `lineage`, which must have been refreshed. Thread-safe.

    `fetched` counts what the store was asked for; what the local cache answers is not in it.
    """

    def __init__(self, lineage: Lineage) -> None:
        self.fetched = Fetched()
        self._lineage = lineage
        self._lock = threading.Lock()
        self._indexes: OrderedDict[str, Index] = OrderedDict()
        self._damaged: dict[int, IslandError | None] = {}  # packs that are not whole; None: it was told

    @property
    def store(self) -> Store:
        """Where the packs are."""
        return self._lineage.store

    def index(self, key: int) -> Index:
        """The index of the pack with this key."""
        return self.following(key, self.index_at)

    def stored(self, key: int, slots: Int64s, gap: int) -> tuple[Index, list[memoryview]]:
        """The stored bytes of each of `slots` (ascending), by whichever way moves less.

        That is the whole pack, checked, or ranges merged over gaps <= `gap`, which only the blocks' digests
        can prove; over more gaps, the smallest first, if the store takes fewer ranges at once. Where a pack
        is not whole any more, these blocks may be: `tell_damage` when they are proved.
        """
        if slots.size + self.slots(key) // _SPARED >= self.slots(key):
            try:
                return self.proved(key, slots)
            except UNREADABLE as error:
                with self._lock:
                    self._damaged.setdefault(key, error)
        return self.following(key, lambda place: self._blocks(place, slots, gap))

    def tell_damage(self, key: int) -> None:
        """Warn, once, that a pack was found not to be whole, although the blocks asked for are."""
        with self._lock:
            damage = self._damaged.get(key)
            if damage is not None:
                self._damaged[key] = None
        if damage is not None:
            _LOG.warning(
                "%s; its blocks are read singly, by their digests; run 'island verify --all --heal'", damage
            )

    def proved(self, key: int, slots: Int64s, damaged: int = 0) -> tuple[Index, list[memoryview]]:
        """The same out of the whole pack, which its checksum proves; `damaged` reads were in vain before."""
        index, data = self.following(key, lambda place: self._whole(place, damaged))
        offsets, lengths = stored_ranges(index, slots)
        spans = zip(offsets.tolist(), (offsets + lengths).tolist(), strict=True)
        return index, [data[a:b] for a, b in spans]

    def slots(self, key: int) -> int:
        """How many slots the catalog says that the pack has."""
        return self.place(key).slots

    def _row(self, key: int) -> int:
        row = int(self._lineage.state.packs.find(np.array([key], np.int64))[0])
        if row < 0:
            raise DamagedObjectError(
                f"volume {self._lineage.name}: a manifest names a pack that its catalog does not; the "
                "snapshot is damaged"
            )
        return row

    def place(self, key: int) -> Place:
        """Where the pack is, by the catalog as it was last read; DamagedObjectError if it is in none."""
        with self._lock:
            packs = self._lineage.state.packs
            row = self._row(key)
            name = pack_full_name(self._lineage.name, packs, row, self._lineage.numbers)
            return Place(name, int(packs.slots[row]), int(packs.size[row]))

    def following(self, key: int, fetch: Callable[[Place], T]) -> T:
        """`fetch(place)`, again under the newer name as often as the pack was repacked meanwhile.

        `fetch` raises ObjectMissingError where there is nothing; DamagedObjectError if the name stays.
        """
        place = self.place(key)
        while True:
            try:
                return fetch(place)
            except ObjectMissingError:
                with self._lock:
                    self._lineage.refresh()
            newer = self.place(key)
            if newer == place:
                raise DamagedObjectError(
                    f"pack {place.name} is missing from {self._lineage.store.location}; the snapshots "
                    "that need it are damaged"
                )
            place = newer

    def index_at(self, place: Place) -> Index:
        """The index of the pack at `place`, be it in the catalog or not; ObjectMissingError if it is gone."""
        name = place.name
        with self._lock:
            if name in self._indexes:
                self._indexes.move_to_end(name)
                return self._indexes[name]
        index = self._cached_index(name) or self._fetched_index(place)
        with self._lock:
            self._indexes[name] = index
            if len(self._indexes) > _INDEXES_KEPT:
                self._indexes.popitem(last=False)
        return index

    def _cached_index(self, name: str) -> Index | None:
        front = self._lineage.files.cached(name)
        if front is not None:
            with contextlib.suppress(*UNREADABLE):
                return read_front(name, front)
        return None

    def _fetched_index(self, place: Place) -> Index:
        length = min(front_size(place.slots), place.size)
        try:
            (front,) = self._lineage.store.get_ranges(place.name, [(0, length)])
            self._count(front.nbytes)
            index = read_front(place.name, front)
        except UNREADABLE:
            index, front = self._whole(place, damaged=1)
        self._lineage.files.cache(place.name, front[: index.data_start])
        return index

    def _whole(self, place: Place, damaged: int) -> tuple[Index, memoryview]:
        def check(data: memoryview) -> tuple[Index, memoryview]:
            self._count(data.nbytes)
            return open_pack(place.name, data)

        return get_checked(self._lineage.store, place.name, check, failed_reads=damaged)

    def _blocks(self, place: Place, wanted: Int64s, gap: int) -> tuple[Index, list[memoryview]]:
        index = self.index_at(place)
        offsets, lengths = stored_ranges(index, wanted)
        ends = offsets + lengths
        first = _range_starts(offsets[1:] - ends[:-1], gap, self._lineage.store.ranges_at_once)
        last = np.append(first[1:], offsets.size) - 1
        spans = np.stack([offsets[first], ends[last] - offsets[first]], axis=1)
        parts = self._ranges(place, [(int(o), int(n)) for o, n in spans])
        owner = np.searchsorted(first, np.arange(offsets.size), side="right") - 1
        starts = offsets - offsets[first][owner]
        cuts = zip(owner.tolist(), starts.tolist(), (starts + lengths).tolist(), strict=True)
        return index, [parts[o][a:b] for o, a, b in cuts]

    def _ranges(self, place: Place, ranges: list[Range]) -> list[memoryview]:
        """The bytes of `ranges`, out of the whole pack if it seems to be cut short."""
        try:
            parts = self._lineage.store.get_ranges(place.name, ranges)
        except DamagedObjectError:
            _, data = self._whole(place, damaged=1)
            return [data[offset : offset + length] for offset, length in ranges]
        self._count(sum(part.nbytes for part in parts))
        return parts

    def _count(self, size: int) -> None:
        with self._lock:
            self.fetched.objects += 1
            self.fetched.bytes += size


def _range_starts(gaps: Int64s, gap: int, most: int | None) -> Int64s:
    """Which blocks begin a range, where `gaps` bytes lie between them; at most `most`, if that is set."""
    if most is not None and np.count_nonzero(gaps > gap) >= most:
        gap = int(np.sort(gaps)[-most])
    return np.flatnonzero(np.append(True, gaps > gap))


class KnownDigests:
    """Digests of blocks that are stored already, from the indexes of the packs that `runs` name.

    It answers only "is this block the same?"; where the block is, the runs tell. `index` gives the index of
    what stands in the runs' column `pack`; None if that pack is not to be relied on. Of a pack whose index
    cannot be read no block counts as the same, which is told. Thread-safe.
    """

    def __init__(self, runs: Runs, index: Callable[[int], Index | None]) -> None:
        self._runs = runs
        self._index = index
        self._unreadable: set[int] = set()
        self._lock = threading.Lock()  # so that no two threads fetch the same index

    def names(self, blocks: Int64s) -> bool:
        """Whether anything is known of any of `blocks`; asks nobody."""
        return self._runs.locate(blocks)[0].size > 0

    def same(self, blocks: Int64s, digests: Bytes2D) -> NDArray[np.bool_]:
        """Which of `blocks` (ascending) have the content whose digest is in the same row of `digests`."""
        answer = np.zeros(blocks.size, np.bool_)
        named, row, offset = self._runs.locate(blocks)
        keys, slots = self._runs.pack[row], self._runs.slot[row] + offset
        for key in distinct(keys):
            mine = keys == key
            with self._lock:
                index = self._readable(int(key), slots[mine])
            if index is None:
                continue
            known = index.rows["digest"][slots[mine]]
            answer[named[mine]] = (known == digests[named[mine]]).all(axis=1)
        return answer

    def _readable(self, key: int, slots: Int64s) -> Index | None:
        """The index of a pack that holds `slots`; None if it cannot be relied on."""
        if key in self._unreadable:
            return None
        try:
            index = self._index(key)
            if index is not None:
                stored_ranges(index, slots)  # refuses slots that the pack does not hold
            return index
        except UNREADABLE as error:
            _LOG.warning("%s; those of its blocks that are read are sent again", error)
            self._unreadable.add(key)
            return None


def by_pack(runs: Runs) -> Iterator[tuple[int, Runs]]:
    """Each pack that `runs` name, once, with its runs; in the volume's order, which disks like."""
    order = np.argsort(runs.pack, kind="stable")
    packs = runs.pack[order]
    first = np.flatnonzero(np.append(packs.size > 0, packs[1:] != packs[:-1]))
    keys = packs[first]
    bounds = np.append(first, len(runs))
    for at in np.argsort(runs.start[order[first]], kind="stable").tolist():
        rows = order[bounds[at] : bounds[at + 1]]
        yield int(keys[at]), Runs(runs.start[rows], runs.length[rows], runs.pack[rows], runs.slot[rows])


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Blocks of one pack: which of the slots asked for, as they are stored, and decoded.

    `rows` (uint8[n, BLOCK_SIZE]) are proved by the digests in `index`, and change when the next batch comes.
    """

    index: Index
    part: slice
    stored: list[memoryview]
    rows: Bytes2D


def unpacked(
    packs: PackReader, key: int, slots: Int64s, gap: int, buffer: Bytes2D | None = None
) -> Iterator[Unpacked]:
    """The blocks in `slots` (ascending) of a pack, in batches that `buffer` holds, or one made for it."""
    if not slots.size:
        return
    index, stored = packs.stored(key, slots, gap)
    out = np.empty((BATCH, BLOCK_SIZE), np.uint8) if buffer is None else buffer
    for at in range(0, slots.size, BATCH):
        part = slice(at, at + BATCH)
        rows = out[: slots[part].size]
        try:
            unpack_blocks(index, slots[part], stored[part], rows)
        except DamagedObjectError:
            index, stored = packs.proved(key, slots, damaged=1)
            unpack_blocks(index, slots[part], stored[part], rows)
        yield Unpacked(index, part, stored[part], rows)
    packs.tell_damage(key)
