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
from island_fast.formats.frame import LIMITS, Kind, open_frame
from island_fast.formats.keys import split_pack_key
from island_fast.formats.manifest import Manifest, decode_damaged
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
from island_fast.repository.pack_reader import BATCH, PackLocation, PackReader, unpack_slots
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

        DamagedObjectError if it does not say for certain where the blocks are; else as `Lineage.manifest`.
        """
        lineage, name = self._lineage, self._lineage.manifest_name(row)
        try:
            return lineage.manifest(row)
        except UNREADABLE as error:
            self.damaged[name] = str(error)
            for _ in range(READS):
                try:
                    data = lineage.store.get(name, limit=LIMITS[Kind.MANIFEST].size)
                except (ObjectMissingError, DamagedObjectError):
                    break
                with contextlib.suppress(*UNREADABLE):
                    return self._decode_manifest(name, row, data)
            raise

    def _decode_manifest(self, name: str, row: SnapshotRow, data: Buffer) -> Manifest:
        """Return the manifest in `data`; DamagedObjectError if that is whole: then it is another one."""
        manifest = decode_damaged(name, data, len(self._lineage.state.packs))
        said = (manifest.lineage, manifest.snapshot, manifest.attempt, manifest.volume_size)
        if said != (self._lineage.name, row.id, row.attempt, row.volume_size) or _is_whole(name, data):
            raise DamagedObjectError(f"manifest {name} is not the one that its catalog record names")
        return manifest

    def unpack(
        self, key: int, blocks: Int64s, slots: Int64s, buffer: Bytes2D
    ) -> Iterator[tuple[slice | Int64s, Bytes2D]]:
        """Yield what can be read of the blocks of a pack; see `streams.Unpack`. The others become `lost`."""
        done = 0
        try:
            for batch in unpack_slots(self.packs, key, slots, self.packs.store.range_gap, buffer):
                yield batch.part, batch.rows
                done += len(batch.rows)
            return
        except UNREADABLE as error:
            self._note_damaged(key, error)
        left = np.arange(done, slots.size)
        for index, data, intact in self._read_damaged(key):
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

    def _note_damaged(self, key: int, error: Exception) -> None:
        try:
            name = self.packs.locate(key).name
        except DamagedObjectError:  # the catalog does not name it
            owner, number = split_pack_key(key)
            name = f"{self._lineage.name}/packs/{self._lineage.numbers.id(owner)}/?-{number:08d}"
        with self._lock:
            self.damaged[name] = str(error)

    def _read_damaged(self, key: int) -> Iterator[tuple[Index, memoryview, bool]]:
        """Yield the index and the bytes of a damaged pack, as often as it comes with other bytes.

        Third is whether the index is intact, or this host's copy.
        """
        try:
            location = self.packs.locate(key)
        except DamagedObjectError:
            return
        before: memoryview | None = None
        for _ in range(READS):
            try:
                data = self.packs.read_unchecked(location)
            except (ObjectMissingError, *UNREADABLE):
                return
            if before is None or data != before:
                yield from self._read_indexes(key, location, data)
            before = data

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


def _is_whole(name: str, data: Buffer) -> bool:
    with contextlib.suppress(*UNREADABLE):
        open_frame(Kind.MANIFEST, name, data)
        return True
    return False


def _find_good(index: Index, data: memoryview, intact: bool, slots: Int64s) -> Bools:
    """Return which of `slots` can be read, bool[n]. Of a damaged index, every slot has a say in it."""
    there = slots < len(index.rows)
    good = readable_slots(index, data, slots[there] if intact else np.arange(len(index.rows)))
    if not intact:
        good = find_in_place(index, data, good)
    found = np.zeros(slots.size, np.bool_)
    found[there] = good[slots[there]]
    return found
