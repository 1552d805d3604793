"""What of a damaged snapshot can be proved intact: blocks of damaged packs, and a manifest that is not whole.

A block is proved by its digest, in an index that says which slot it is in. An index is proved by its
checksum, or it is this host's copy; what is read by a damaged one counts only if all of it is in order.
Damaged objects are read several times, because another replica can hold what one has lost.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np

from island_fast.arrays import Bools, Buffer, Bytes2D, Int64s
from island_fast.errors import UNREADABLE, DamagedObjectError, ObjectMissingError
from island_fast.formats.catalog import SnapshotRow
from island_fast.formats.keys import split_pack_key
from island_fast.formats.manifest import Manifest, decode, decode_damaged
from island_fast.formats.pack import (
    Index,
    PackHeader,
    find_in_place,
    read_damaged_front,
    read_front,
    stored_ranges,
    unpack_blocks,
)
from island_fast.repository.integrity.objects import readable_slots
from island_fast.repository.lineage import Lineage
from island_fast.repository.pack_reader import BATCH, PackLocation, PackReader
from island_fast.stores.checked_read import READS

__all__ = ["Salvage"]


class Salvage:
    """Reads what is left of one snapshot. Thread-safe, as `PackReader` is.

    `lost` are the blocks that could not be read, in parts and in no order; `damaged` are the objects that are
    missing or not as they were written, by name, each with a message.
    """

    def __init__(self, lineage: Lineage) -> None:
        self.packs = PackReader(lineage)
        self.lost: list[Int64s] = []
        self.damaged: dict[str, str] = {}
        self._lineage = lineage
        self._lock = threading.Lock()

    def read_manifest(self, row: SnapshotRow) -> Manifest:
        """Return the manifest of a live snapshot, from an object that need not be whole.

        Errors as of `Lineage.manifest`, but DamagedObjectError only if the object does not say for certain
        where the blocks are.
        """
        lineage, name = self._lineage, self._lineage.manifest_name(row)
        if cached := lineage.read_cached_manifest(row.id, row.attempt, row.checksum):
            return cached
        with contextlib.suppress(ObjectMissingError):
            for _ in range(READS):
                with contextlib.suppress(*UNREADABLE):
                    return self._decode_manifest(name, row, self._read_in_halves(name, row.manifest_size))
        return lineage.manifest(row)

    def _decode_manifest(self, name: str, row: SnapshotRow, data: Buffer) -> Manifest:
        """Return the manifest in `data`; DamagedObjectError if it is not certain, or is another one."""
        most = len(self._lineage.state.packs)
        try:
            manifest, checksum = decode(name, data, most)
        except UNREADABLE as error:
            manifest, checksum = decode_damaged(name, data, most), bytes.fromhex(row.checksum)
            self.damaged[name] = str(error)
        said = (manifest.lineage, manifest.snapshot, manifest.attempt, manifest.volume_size, checksum.hex())
        if said != (self._lineage.name, row.id, row.attempt, row.volume_size, row.checksum):
            raise DamagedObjectError(f"manifest {name} is not the one that its catalog record names")
        return manifest

    def _read_in_halves(self, name: str, size: int) -> memoryview:
        """Return the bytes of an object of `size` bytes by two ranges.

        Swift takes a replica away whose rot it detects, which it does when it sends the whole object: that
        can be the last one.
        """
        parts = self.packs.store.get_ranges(name, [(0, size // 2), (size // 2, size - size // 2)])
        return memoryview(b"".join(parts))

    def unpack(
        self, key: int, blocks: Int64s, slots: Int64s, buffer: Bytes2D
    ) -> Iterator[tuple[slice | Int64s, Bytes2D]]:
        """Yield what can be read of the blocks of a pack; see `streams.Unpack`. The others become `lost`."""
        left = np.arange(slots.size)
        for index, data, intact in self._read_pack(key):
            good = _find_good(index, data, intact, slots[left])
            found, left = left[good], left[~good]
            for at in range(0, found.size, BATCH):
                part = found[at : at + BATCH]
                offsets, lengths = stored_ranges(index, slots[part])
                spans = zip(offsets.tolist(), (offsets + lengths).tolist(), strict=True)
                rows = buffer[: part.size]
                unpack_blocks(index, slots[part], [data[a:b] for a, b in spans], rows)
                yield part, rows
            if not left.size:
                return
        with self._lock:
            self.lost.append(blocks[left])

    def _read_pack(self, key: int) -> Iterator[tuple[Index, memoryview, bool]]:
        """Yield the index and the bytes of a pack, as often as it comes with other bytes.

        Third is whether the index is intact, or this host's copy. What comes after the first is of a damaged
        pack, which is noted.
        """
        before: memoryview | None = None
        for read in (self._read_by_ranges, self._read_whole):
            for _ in range(READS):
                try:
                    location, data = self.packs.with_current_location(key, read)
                except UNREADABLE as error:
                    self._note_damaged(key, str(error))
                    break  # it is shorter than its ranges, or missing
                if before is None or data != before:
                    yield from self._read_indexes(key, location, data)
                before = data
                self._note_damaged(key, f"pack {location.name} is damaged")

    def _read_by_ranges(self, location: PackLocation) -> tuple[PackLocation, memoryview]:
        data = self._read_in_halves(location.name, location.size)
        self.packs.count(data.nbytes)
        return location, data

    def _read_whole(self, location: PackLocation) -> tuple[PackLocation, memoryview]:
        return location, self.packs.read_unchecked(location)

    def _note_damaged(self, key: int, message: str) -> None:
        try:
            name = self.packs.locate(key).name
        except DamagedObjectError:  # the catalog does not name it
            owner, number = split_pack_key(key)
            name = f"{self._lineage.name}/packs/{self._lineage.numbers.id(owner)}/?-{number:08d}"
        with self._lock:
            self.damaged.setdefault(name, message)

    def _read_indexes(
        self, key: int, location: PackLocation, data: memoryview
    ) -> Iterator[tuple[Index, memoryview, bool]]:
        """Yield the indexes that there are for a damaged pack: its own and this host's copy."""
        owner, number = split_pack_key(key)
        lineage = self._lineage
        header = PackHeader(lineage.name, lineage.numbers.id(owner), number, lineage.seed)
        try:
            index, intact = read_damaged_front(location.name, data, header, location.slots)
        except UNREADABLE:  # not the bytes of this pack, or too few to know
            return
        front = None if intact else lineage.files.cache.read(location.name)
        if front is not None:
            with contextlib.suppress(*UNREADABLE):
                yield read_front(location.name, front), data, True
        yield index, data, intact


def _find_good(index: Index, data: memoryview, intact: bool, slots: Int64s) -> Bools:
    """Return which of `slots` can be read, bool[n]. Of a damaged index, every slot has a say in it."""
    there = slots < len(index.rows)
    good = readable_slots(index, data, slots[there] if intact else np.arange(len(index.rows)))
    if not intact:
        good = find_in_place(index, data, good)
    found = np.zeros(slots.size, np.bool_)
    found[there] = good[slots[there]]
    return found
