"""Reading packs of a lineage: their indexes from the local cache or the store, their blocks from the store.

Packs are read by pack key; the catalog states the current full name. If no pack has that name any more, it
was repacked or swept: the catalog is read again, and the pack is missing only if its name has not changed.
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

from island_fast.arrays import Bytes2D, Int64s
from island_fast.dirtymap import BLOCK_SIZE
from island_fast.errors import (
    UNREADABLE,
    DamagedObjectError,
    IslandError,
    ObjectMissingError,
)
from island_fast.formats.frame import LIMITS, Kind
from island_fast.formats.pack import Index, front_size, open_pack, read_front, stored_ranges, unpack_blocks
from island_fast.formats.runs import Runs
from island_fast.repository.lineage import Lineage
from island_fast.stores.base import Range, Store
from island_fast.stores.checked_read import get_checked

__all__ = ["BATCH", "PackLocation", "PackReader", "UnpackedBatch", "group_by_pack", "unpack_slots"]

BATCH = 32  # blocks that are read, hashed, compressed or decoded at a time: 2 MiB

T = TypeVar("T")

_INDEXES_KEPT = 64
_EXCESS = 4  # bytes that are needed, for each that is read only to save a request
_SPARED = 32  # a pack is fetched whole if at most one slot in this many is not wanted
_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class FetchCounts:
    """What was fetched so far: requests, and bytes."""

    objects: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class PackLocation:
    """Where a pack is now: its full name, the number of its slots, and the object's size in bytes."""

    name: str
    slots: int
    size: int


class PackReader:
    """Reads packs of `lineage`, which must have been refreshed. Thread-safe.

    `fetched` counts what came from the store; what the local cache had is not in it.
    """

    def __init__(self, lineage: Lineage) -> None:
        self.fetched = FetchCounts()
        self._lineage = lineage
        self._lock = threading.Lock()
        self._indexes: OrderedDict[str, Index] = OrderedDict()
        self._damaged: dict[int, IslandError | None] = {}  # packs found damaged; None once that was logged

    @property
    def store(self) -> Store:
        """The store that holds the packs."""
        return self._lineage.store

    def locate(self, key: int) -> PackLocation:
        """Return where a pack is, by the catalog as it was last read.

        DamagedObjectError if the catalog does not name it.
        """
        with self._lock:
            packs = self._lineage.state.packs
            row = int(packs.find(np.array([key], np.int64))[0])
            if row < 0:
                raise DamagedObjectError(
                    f"volume {self._lineage.name}: a manifest names a pack that its catalog does not; the "
                    "snapshot is damaged"
                )
            name = self._lineage.pack_name(packs, row)
            return PackLocation(name, int(packs.slots[row]), int(packs.size[row]))

    def with_current_location(self, key: int, read: Callable[[PackLocation], T]) -> T:
        """Call `read(location)`, again with the new location as often as the pack was repacked meanwhile.

        `read` raises ObjectMissingError if there is no such object; DamagedObjectError if the location has
        not changed then.
        """
        location = self.locate(key)
        while True:
            try:
                return read(location)
            except ObjectMissingError:
                with self._lock:
                    self._lineage.refresh()
            newer = self.locate(key)
            if newer == location:
                raise DamagedObjectError(
                    f"pack {location.name} is missing from {self._lineage.store.location}; the snapshots "
                    "that need it are damaged"
                )
            location = newer

    # Blocks.

    def read_slots(self, key: int, slots: Int64s, gap: int) -> tuple[Index, list[memoryview]]:
        """Return the pack's index and the stored bytes of each of `slots` (ascending).

        If nearly all slots are wanted, the whole pack is read and its checksum verified. Else ranges are
        read, merged over gaps <= `gap`; then only the digests can verify the blocks. If the store takes fewer
        ranges at once, further requests are made as long as each saves `Store.request_cost` bytes or more,
        and the narrowest gaps that are left are read; if it takes one at a time, at most a quarter more is
        read than without them. Ranges are also read from a pack that is not whole any more, because these
        blocks can be: call `log_damage` once they are verified.
        """
        total = self.locate(key).slots
        if slots.size + total // _SPARED >= total:
            try:
                return self.read_whole(key, slots)
            except UNREADABLE as error:
                with self._lock:
                    self._damaged.setdefault(key, error)
        return self.with_current_location(key, lambda location: self._read_blocks(location, slots, gap))

    def read_whole(self, key: int, slots: Int64s, failed_reads: int = 0) -> tuple[Index, list[memoryview]]:
        """Do the same as `read_slots` by reading the whole pack and verifying its checksum.

        `failed_reads` reads before this one gave damaged bytes.
        """
        index, data = self.with_current_location(
            key, lambda location: self._read_object(location, failed_reads)
        )
        offsets, lengths = stored_ranges(index, slots)
        spans = zip(offsets.tolist(), (offsets + lengths).tolist(), strict=True)
        return index, [data[a:b] for a, b in spans]

    def read_unchecked(self, location: PackLocation) -> memoryview:
        """Return the bytes of a pack as the store has them, of whatever size.

        ObjectMissingError if there is no such object.
        """
        data = self._lineage.store.get(location.name, limit=LIMITS[Kind.PACK].size)
        self.count(data.nbytes)
        return data

    def log_damage(self, key: int) -> None:
        """Warn, once, that a pack was found damaged although the blocks that were wanted are whole."""
        with self._lock:
            damage = self._damaged.get(key)
            if damage is not None:
                self._damaged[key] = None
        if damage is not None:
            _LOG.warning(
                "%s; its blocks are read singly, by their digests; run 'island verify --all --heal'", damage
            )

    def _read_blocks(
        self, location: PackLocation, wanted: Int64s, gap: int
    ) -> tuple[Index, list[memoryview]]:
        index = self.read_index_at(location)
        offsets, lengths = stored_ranges(index, wanted)
        ends = offsets + lengths
        store = self._lineage.store
        first = _range_starts(offsets, ends, gap, store.ranges_at_once, store.request_cost)
        last = np.append(first[1:], offsets.size) - 1
        spans = np.stack([offsets[first], ends[last] - offsets[first]], axis=1)
        parts = self._read_ranges(location, [(int(o), int(n)) for o, n in spans])
        owner = np.searchsorted(first, np.arange(offsets.size), side="right") - 1
        starts = offsets - offsets[first][owner]
        cuts = zip(owner.tolist(), starts.tolist(), (starts + lengths).tolist(), strict=True)
        return index, [parts[o][a:b] for o, a, b in cuts]

    def _read_ranges(self, location: PackLocation, ranges: list[Range]) -> list[memoryview]:
        """Return the bytes of `ranges`, from the whole pack if it seems to be truncated."""
        try:
            parts = self._lineage.store.get_ranges(location.name, ranges)
        except DamagedObjectError:
            _, data = self._read_object(location, failed_reads=1)
            return [data[offset : offset + length] for offset, length in ranges]
        self.count(sum(part.nbytes for part in parts))
        return parts

    # Indexes.

    def read_index(self, key: int) -> Index:
        """Return the index of the pack with this key."""
        return self.with_current_location(key, self.read_index_at)

    def cached_index(self, key: int) -> Index | None:
        """Return the index of the pack with this key if it is on this host; this makes no request."""
        with contextlib.suppress(*UNREADABLE):
            name = self.locate(key).name
            with self._lock:
                known = self._indexes.get(name)
            return known or self._read_cached_index(name)
        return None

    def read_index_at(self, location: PackLocation) -> Index:
        """Return the index of the pack at `location`, which the catalog need not name.

        ObjectMissingError if it is gone.
        """
        name = location.name
        with self._lock:
            if name in self._indexes:
                self._indexes.move_to_end(name)
                return self._indexes[name]
        index = self._read_cached_index(name) or self._fetch_index(location)
        with self._lock:
            self._indexes[name] = index
            if len(self._indexes) > _INDEXES_KEPT:
                self._indexes.popitem(last=False)
        return index

    def _read_cached_index(self, name: str) -> Index | None:
        front = self._lineage.files.cache.read(name)
        if front is not None:
            with contextlib.suppress(*UNREADABLE):
                index = read_front(name, front)
                if len(front) > index.data_start:  # copies once kept more than the front
                    self._lineage.files.cache.write(name, front[: index.data_start])
                return index
        return None

    def _fetch_index(self, location: PackLocation) -> Index:
        length = min(front_size(location.slots), location.size)
        try:
            (front,) = self._lineage.store.get_ranges(location.name, [(0, length)])
            self.count(front.nbytes)
            index = read_front(location.name, front)
        except UNREADABLE:
            index, front = self._read_object(location, failed_reads=1)
        self._lineage.files.cache.write(location.name, front[: index.data_start])
        return index

    # Both.

    def _read_object(self, location: PackLocation, failed_reads: int) -> tuple[Index, memoryview]:
        """Read the whole pack and verify its checksum; return its index and the object's bytes."""

        def check(data: memoryview) -> tuple[Index, memoryview]:
            self.count(data.nbytes)
            return open_pack(location.name, data)

        return get_checked(
            self._lineage.store, location.name, check, limit=location.size, failed_reads=failed_reads
        )

    def count(self, size: int) -> None:
        """Count a request that fetched `size` bytes."""
        with self._lock:
            self.fetched.objects += 1
            self.fetched.bytes += size


def _range_starts(offsets: Int64s, ends: Int64s, gap: int, most: int | None, request_cost: int) -> Int64s:
    """Return which of the blocks that lie from `offsets` to `ends` begin a range.

    A range ends at each gap > `gap`. If one request takes at most `most` ranges, the widest gaps come first:
    the first request leaves out `most` - 1 of them, and each further one up to `most`, which must add up to
    `request_cost` bytes or more. Where each range is a request, also as many more gaps are left out as it
    takes to keep the others below a share (1 / _EXCESS) of what would be read without them.
    """
    gaps = offsets[1:] - ends[:-1]
    wide = np.flatnonzero(gaps > gap)
    if most is not None and wide.size >= most:
        wide = wide[np.argsort(-gaps[wide], kind="stable")]
        saved = np.add.reduceat(gaps[wide], np.arange(most - 1, wide.size, most))  # by each further request
        worth = saved >= request_cost
        if most == 1:
            read = np.cumsum(saved[::-1])[::-1]  # of gaps, if only those before are left out
            worth |= read > (ends[-1] - offsets[0] - read[0]) // _EXCESS
        requests = 1 + int(np.count_nonzero(worth))
        wide = np.sort(wide[: requests * most - 1])
    return np.append(0, wide + 1)


def group_by_pack(runs: Runs) -> Iterator[tuple[int, Runs]]:
    """Yield each pack that `runs` name, once, with its runs, in the order of the volume: that suits disks."""
    order = np.argsort(runs.pack, kind="stable")
    packs = runs.pack[order]
    first = np.flatnonzero(np.append(packs.size > 0, packs[1:] != packs[:-1]))
    keys = packs[first]
    bounds = np.append(first, len(runs))
    for at in np.argsort(runs.start[order[first]], kind="stable").tolist():
        rows = order[bounds[at] : bounds[at + 1]]
        yield int(keys[at]), Runs(runs.start[rows], runs.length[rows], runs.pack[rows], runs.slot[rows])


@dataclass(frozen=True, slots=True)
class UnpackedBatch:
    """Blocks of one pack: which part of the wanted slots they are, their stored bytes, and their content.

    `rows` (uint8[n, BLOCK_SIZE]) match the digests in `index`. They are overwritten by the next batch.
    """

    index: Index
    part: slice
    stored: list[memoryview]
    rows: Bytes2D


def unpack_slots(
    packs: PackReader, key: int, slots: Int64s, gap: int, buffer: Bytes2D | None = None
) -> Iterator[UnpackedBatch]:
    """Read, decode and check the blocks in `slots` (ascending) of a pack.

    They come in batches of at most BATCH blocks, decoded into `buffer` (uint8[BATCH, BLOCK_SIZE]) if one is
    given. If the digests of a batch differ, the whole pack is read again; DamagedObjectError if that does not
    help. For `gap` see `PackReader.read_slots`.
    """
    if not slots.size:
        return
    index, stored = packs.read_slots(key, slots, gap)
    out = np.empty((BATCH, BLOCK_SIZE), np.uint8) if buffer is None else buffer
    for at in range(0, slots.size, BATCH):
        part = slice(at, at + BATCH)
        rows = out[: slots[part].size]
        try:
            unpack_blocks(index, slots[part], stored[part], rows)
        except DamagedObjectError:
            index, stored = packs.read_whole(key, slots, failed_reads=1)
            unpack_blocks(index, slots[part], stored[part], rows)
        yield UnpackedBatch(index, part, stored[part], rows)
    packs.log_damage(key)
