"""Find the blocks that hold data, or that may differ between two points, from the L2 tables alone.

The table diff rests on one fact of qcow2: a cluster that two trees of one file reference is never written in
place, so equal entries mean equal content. The caller decides when it can rely on that (docs/format.md,
"Pinned base"). This module counts the one contradiction that tables can show: an entry that is shared and yet
marked COPIED.

L2 tables are read into a few reused buffers. Where an L1 entry is equal on both sides, the volume under it
(512 MiB with 64 KiB clusters) is equal and no table of it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from island_fast import _diff
from island_fast.arrays import Bools, Int64s, Uint64s
from island_fast.dirtymap import BLOCK_BITS, DirtyMap
from island_fast.errors import UnsupportedImageError
from island_fast.qcow2.header import COPIED
from island_fast.qcow2.holes import FileData
from island_fast.qcow2.image import L1_OFFSET_MASK, Image, Point
from island_fast.qcow2.overlap import Claims

__all__ = ["Progress", "TableDiff", "count_shared_copied", "find_allocated", "find_changed", "has_compressed"]

Progress = Callable[[int, int], None]
"""Called with (L1 entries done, L1 entries to do)."""

_READ_LIMIT = 1 << 20
_WINDOW = 1 << 16
_REST = np.uint64(~COPIED & (1 << 64) - 1)
_OFFSET = np.uint64(L1_OFFSET_MASK)
_COPIED = np.uint64(COPIED)
# Masks for entries as they are on disk, big-endian.
_DISK_COPIED = _COPIED.byteswap()
_DISK_COMPRESSED = np.uint64(1 << 62).byteswap()
_DISK_ZERO = np.uint64(1).byteswap()
_DISK_OFFSET = np.uint64(L1_OFFSET_MASK | 1 << 62).byteswap()


@dataclass(frozen=True, slots=True)
class TableDiff:
    """The blocks of the new point that may differ from the old one; every block that does is among them.

    `tables_read` counts the L2 tables that were read. `shared_copied` counts the L2 entries that both points
    have and that are marked COPIED nevertheless. If it is not 0, a writer may have changed a shared cluster
    in place, and the map must not be used.
    """

    map: DirtyMap
    tables_read: int
    shared_copied: int


def find_allocated(
    image: Image,
    point: Point,
    within: DirtyMap | None = None,
    progress: Progress | None = None,
    *,
    skip_holes: bool = False,
) -> DirtyMap:
    """Find the blocks that hold stored data: those that overlap a normal or a compressed cluster.

    All others read as zeros. With `within` (of `point.blocks` blocks), only blocks in it are returned, and
    only tables that cover one of them are read. With `skip_holes`, what the file system reports as holes of
    the file is not stored data. The size of the file on disk limits the work of reading the blocks found.

    Raises DamagedImageError: a table is not completely inside the file, or has a flag that the image's
        version does not have.
    Raises UnsupportedImageError: the tables claim far more data than the file can hold.
    """
    header = image.header
    found = DirtyMap(point.blocks)
    offsets = image.read_l1(point)
    offsets &= _OFFSET
    wanted = np.flatnonzero(offsets)
    if within is not None:
        wanted = wanted[_tables_covering(image, within, wanted)]
    tables = _Tables(image)
    claims = Claims(header, image.file_size, image.bytes_on_disk)
    data = FileData(image) if skip_holes else None
    done = 0
    for first, stop in _spans(offsets, wanted, header.cluster_size, tables.batch):
        entries = tables.read(0, int(offsets[first]), stop - first)
        cluster = first * header.table_entries
        stored = data.take_out(entries, cluster, header, found) if data and data.has_holes else 0
        stored += _diff.mark_allocated(
            entries, cluster, header.cluster_bits, found.words, found.blocks, header.entry_words
        )
        compressed = _count_compressed(entries[:: header.entry_words]) if stored else 0
        if not claims.add(stored, min(stored, compressed)):
            raise UnsupportedImageError(
                f"'{image.path}': the tables of {point.title} claim more data than a file of"
                f" {image.file_size} bytes can hold: the same bytes many times, or data compressed more than"
                " 1032 times; if the image is valid, convert it with qemu-img convert"
            )
        done += stop - first
        if progress is not None:
            progress(done, len(wanted))
    if within is not None:
        found &= within
    return found


def has_compressed(image: Image, point: Point) -> bool:
    """Return whether any cluster of the point is compressed.

    Raises DamagedImageError: a table is not completely inside the file.
    """
    offsets = image.read_l1(point)
    offsets &= _OFFSET
    tables = _Tables(image)
    return any(
        _count_compressed(tables.read(0, int(offsets[first]), stop - first)[:: image.header.entry_words])
        for first, stop in _spans(offsets, np.flatnonzero(offsets), image.header.cluster_size, tables.batch)
    )


def find_changed(image: Image, old: Point, new: Point, progress: Progress | None = None) -> TableDiff:
    """Find the blocks of `new` whose clusters have another entry than in `old`.

    If the sizes differ, the cluster that contains the smaller end and everything after it count as changed.

    Raises DamagedImageError: a table is not completely inside the file.
    """
    found = DirtyMap(new.blocks)
    header = image.header
    before, after = _read_both_l1(image, old, new)
    differ = np.flatnonzero((before ^ after) & _REST)
    tables = _Tables(image)
    shared = done = 0
    entries, step = header.table_entries, header.entry_words
    for first, count in _pair_spans(before, after, differ, header.cluster_size, tables.batch):
        a = tables.read_or_zeros(0, int(before[first] & _OFFSET), count)
        b = tables.read_or_zeros(1, int(after[first] & _OFFSET), count)
        _diff.mark_changed(a, b, first * entries, header.cluster_bits, found.words, found.blocks, step)
        shared += _count_in_tables(a, b, (a, b), step)
        done += count
        if progress is not None:
            progress(done, len(differ))
    if old.disk_size != new.disk_size:
        end = min(old.disk_size, new.disk_size)
        first = end >> header.cluster_bits << header.cluster_bits >> BLOCK_BITS
        found.set_range(min(first, found.blocks), found.blocks)
    return TableDiff(found, tables.count, shared)


def count_shared_copied(image: Image, active: Point, base: Point) -> int:
    """Count the active entries that are COPIED and yet equal to the base's: 0 in a sound image.

    Tables that both points share through an L1 entry without the flag are not read: a writer copies such a
    table before it changes anything below it, so nothing was written in place through it.

    Raises DamagedImageError: a table is not completely inside the file.
    """
    now, then = _read_both_l1(image, active, base)
    alike = ((now ^ then) & _REST) == 0
    used = (now & _OFFSET) != 0
    count = int(np.count_nonzero(alike & used & ((now & _COPIED) != 0)))
    tables = _Tables(image)
    for index in map(int, np.flatnonzero(~alike & used & ((then & _OFFSET) != 0))):
        a = tables.read(0, int(now[index] & _OFFSET), 1)
        b = tables.read(1, int(then[index] & _OFFSET), 1)
        count += _count_in_tables(a, b, (a,), image.header.entry_words)
    return count


class _Tables:
    """Reads L2 tables into two reused buffers of `batch` tables each; `count` is the number read."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._words = image.header.cluster_size // 8
        self.batch = max(1, _READ_LIMIT // image.header.cluster_size)
        self._buffers: dict[int, Uint64s] = {}
        self._zeros = np.zeros(0, np.uint64)
        self.count = 0

    def read(self, side: int, offset: int, tables: int) -> Uint64s:
        """Return the entries of consecutive tables, as on disk; valid until the next read of that side."""
        if side not in self._buffers:
            self._buffers[side] = np.empty(self.batch * self._words, np.uint64)
        entries = self._buffers[side][: tables * self._words]
        if self._image.read_into(offset, entries.view(np.uint8).data) < entries.nbytes:
            raise self._image.damage_error(f"the L2 table at {offset} was cut off while it was read")
        if self._image.header.version == 2 and np.any(
            entries & (_DISK_COMPRESSED | _DISK_ZERO) == _DISK_ZERO
        ):
            raise self._image.damage_error(
                f"the L2 table at {offset} has a zero flag, which version 2 does not have"
            )
        self.count += tables
        return entries

    def read_or_zeros(self, side: int, offset: int, tables: int) -> Uint64s:
        """Return the same; for offset 0 as many tables of unallocated entries."""
        if offset:
            return self.read(side, offset, tables)
        if not len(self._zeros):
            self._zeros = np.zeros(self.batch * self._words, np.uint64)
        return self._zeros[: tables * self._words]


def _count_compressed(entries: Uint64s) -> int:
    """Count the compressed entries, as on disk."""
    # Most often there is none, which is found fastest this way.
    if not np.bitwise_or.reduce(entries) & _DISK_COMPRESSED:
        return 0
    return int(np.count_nonzero(entries & _DISK_COMPRESSED))


def _read_both_l1(image: Image, one: Point, other: Point) -> tuple[Uint64s, Uint64s]:
    """Read both L1 tables; the shorter one is extended by unallocated entries."""
    a, b = image.read_l1(one), image.read_l1(other)
    length = max(len(a), len(b))
    return _pad(a, length), _pad(b, length)


def _pad(table: Uint64s, length: int) -> Uint64s:
    # Tables can take 32 MiB, so the longer one is not copied.
    return table if len(table) == length else np.pad(table, (0, length - len(table)))


def _count_in_tables(a: Uint64s, b: Uint64s, marked: tuple[Uint64s, ...], step: int) -> int:
    """Count the entries with a host offset that are equal in both tables and COPIED in one of `marked`.

    Entries are as on disk. step: words per entry. Only the first word counts, because subclusters are written
    in place like clusters.
    """
    marked = tuple(table[::step] for table in marked)
    if not any(np.bitwise_or.reduce(table) & _DISK_COPIED for table in marked):
        return 0  # always so between two sound snapshots, and fast to check
    a, b = a[::step], b[::step]
    alike = ((a ^ b) & ~_DISK_COPIED) == 0
    alike &= np.logical_or.reduce([(table & _DISK_COPIED) != 0 for table in marked])
    return int(np.count_nonzero(alike & ((a & _DISK_OFFSET) != 0)))


def _pair_spans(
    before: Uint64s, after: Uint64s, differ: Int64s, cluster: int, limit: int
) -> Iterator[tuple[int, int]]:
    """Yield runs (first index, count) of L1 entries in `differ`, at most `limit` long.

    At each point, the tables of a run are adjacent in the file, or all are missing.
    """
    if not len(differ):
        return
    near = np.diff(differ) == 1
    for side in (before, after):
        offsets = side[differ] & _OFFSET
        step = np.diff(offsets.astype(np.int64))
        near &= np.where(offsets[1:] != 0, (step == cluster) & (offsets[:-1] != 0), offsets[:-1] == 0)
    firsts = np.flatnonzero(np.concatenate(([True], ~near)))
    counts = np.diff(firsts, append=len(differ)).tolist()
    for first, count in zip(differ[firsts].tolist(), counts, strict=True):
        for at in range(0, count, limit):
            yield first + at, min(limit, count - at)


def _spans(offsets: Uint64s, wanted: Int64s, cluster: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yield runs [first, stop) of wanted L1 entries with adjacent tables in the file, at most `limit` long.

    Without them, small tables (512 B) would cost one system call per 32 KiB of volume.
    """
    for begin in range(0, len(wanted), _WINDOW):
        part = wanted[begin : begin + _WINDOW]
        near = np.diff(part) == 1
        near &= np.diff(offsets[part].astype(np.int64)) == cluster
        firsts = part[np.concatenate(([True], ~near))].tolist()
        stops = (part[np.concatenate((~near, [True]))] + 1).tolist()
        for first, stop in zip(firsts, stops, strict=True):
            for at in range(first, stop, limit):
                yield at, min(at + limit, stop)


def _tables_covering(image: Image, within: DirtyMap, tables: Int64s) -> Bools:
    """Return for each of these L1 indices whether its table covers a block of `within`."""
    span = image.header.table_span
    reach = np.zeros(int(tables[-1]) + 2 if len(tables) else 1, np.int64)
    last = len(reach) - 1
    for runs in within.iter_runs():
        first = np.minimum((runs[:, 0] << BLOCK_BITS) // span, last)
        stop = np.minimum(-(-(runs[:, 1] << BLOCK_BITS) // span), last)
        np.add.at(reach, first, 1)
        np.subtract.at(reach, stop, 1)
    covering: Bools = np.cumsum(reach)[tables] > 0
    return covering
