"""Which blocks hold data, and which may differ between two points, from the L2 tables alone.

The diff rests on one fact of qcow2: a cluster that two trees of one file reference is never written
in place, so equal entries mean equal content. When that may be relied on is for the caller to
decide (the pinned base is there with its whole identity, the other side is a snapshot too, and so
on); this module counts the one contradiction that tables can show, an entry that is shared and yet
marked COPIED.

L2 tables stream through a few reused buffers; an L1 entry that is equal on both sides settles the
volume under it (512 MiB with 64 KiB clusters) without reading anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from island_fast import _diff
from island_fast.dirtymap import BLOCK_BITS, DirtyMap
from island_fast.errors import UnsupportedImageError
from island_fast.qcow2.header import COPIED
from island_fast.qcow2.image import L1_OFFSET_MASK, Image, Point
from island_fast.qcow2.overlap import Claims

__all__ = ["Changed", "Progress", "allocated", "changed", "find_shared_copied"]

Progress = Callable[[int, int], None]
"""Called with (L1 entries done, L1 entries to do)."""

_READ_LIMIT = 1 << 20
_WINDOW = 1 << 16
_REST = np.uint64(~COPIED & (1 << 64) - 1)
_OFFSET = np.uint64(L1_OFFSET_MASK)
_COPIED = np.uint64(COPIED)
# Masks for entries as they stand on disk, big-endian.
_DISK_COPIED = _COPIED.byteswap()
_DISK_COMPRESSED = np.uint64(1 << 62).byteswap()
_DISK_ZERO = np.uint64(1).byteswap()
_DISK_OFFSET = np.uint64(L1_OFFSET_MASK | 1 << 62).byteswap()

_Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Changed:
    """The blocks of the new point that may differ from the old one: a superset, never less.

    `tables_read` counts L2 tables read. `shared_copied` counts L2 entries that both points hold and
    that are marked COPIED nevertheless: not 0 means that a writer may have changed a shared cluster
    in place, and the map proves nothing.
    """

    map: DirtyMap
    tables_read: int
    shared_copied: int


def allocated(
    image: Image,
    point: Point,
    within: DirtyMap | None = None,
    progress: Progress | None = None,
) -> DirtyMap:
    """The blocks that hold stored data: touched by a normal or a compressed cluster.

    All others read as zeros. With `within` (of `point.blocks` blocks), only those blocks are looked
    at and only tables that cover one of them are read. What reading the blocks found will cost is bounded.

    Raises DamagedImageError: a table is not whole and inside the file, or has a flag that the image's version
    does not know.
    Raises UnsupportedImageError: the tables claim far more data than the file can hold.
    """
    header = image.header
    found = DirtyMap(point.blocks)
    offsets = image.l1(point)
    offsets &= _OFFSET
    wanted = np.flatnonzero(offsets)
    if within is not None:
        wanted = wanted[_touched(image, within, wanted)]
    tables = _Tables(image)
    claims = Claims(header, image.file_size, image.bytes_on_disk)
    done = 0
    for first, stop in _spans(offsets, wanted, header.cluster_size, tables.batch):
        entries = tables.read(0, int(offsets[first]), stop - first)
        cluster = first * header.table_entries
        stored = _diff.mark_allocated(
            entries, cluster, header.cluster_bits, found.words, found.blocks, header.entry_words
        )
        packed = _count_packed(entries[:: header.entry_words]) if stored else 0
        if not claims.add(stored, min(stored, packed)):
            raise UnsupportedImageError(
                f"'{image.path}': the tables of {point.title} claim more data than a file of"
                f" {image.file_size} bytes can hold, so the same bytes many times, or compressed over 1032"
                " times, which is not read; if it is right, convert it with qemu-img convert"
            )
        done += stop - first
        if progress is not None:
            progress(done, len(wanted))
    if within is not None:
        found &= within
    return found


def changed(image: Image, old: Point, new: Point, progress: Progress | None = None) -> Changed:
    """The blocks of `new` whose clusters have another entry there than in `old`.

    If the sizes differ, the cluster that holds the smaller end and everything after it are changed.

    Raises DamagedImageError: a table is not whole and inside the file.
    """
    found = DirtyMap(new.blocks)
    header = image.header
    before, after = _pair(image, old, new)
    differ = np.flatnonzero((before ^ after) & _REST)
    tables = _Tables(image)
    shared = done = 0
    entries, step = header.table_entries, header.entry_words
    for first, count in _twin_spans(before, after, differ, header.cluster_size, tables.batch):
        a = tables.read_or_zeros(0, int(before[first] & _OFFSET), count)
        b = tables.read_or_zeros(1, int(after[first] & _OFFSET), count)
        _diff.mark_changed(a, b, first * entries, header.cluster_bits, found.words, found.blocks, step)
        shared += _count_shared_copied(a, b, (a, b), step)
        done += count
        if progress is not None:
            progress(done, len(differ))
    if old.disk_size != new.disk_size:
        end = min(old.disk_size, new.disk_size)
        first = end >> header.cluster_bits << header.cluster_bits >> BLOCK_BITS
        found.set_range(min(first, found.blocks), found.blocks)
    return Changed(found, tables.count, shared)


def find_shared_copied(image: Image, active: Point, base: Point) -> int:
    """How many active entries are COPIED and yet equal to the base's: 0 in a sound image.

    A writer changes an entry's cluster in place only if the L1 entry above it is COPIED, or was
    made by copying the table: so tables that both share through an L1 entry without the flag cannot
    have been written through and are not read.

    Raises DamagedImageError: a table is not whole and inside the file.
    """
    now, then = _pair(image, active, base)
    alike = ((now ^ then) & _REST) == 0
    used = (now & _OFFSET) != 0
    count = int(np.count_nonzero(alike & used & ((now & _COPIED) != 0)))
    tables = _Tables(image)
    for index in map(int, np.flatnonzero(~alike & used & ((then & _OFFSET) != 0))):
        a = tables.read(0, int(now[index] & _OFFSET), 1)
        b = tables.read(1, int(then[index] & _OFFSET), 1)
        count += _count_shared_copied(a, b, (a,), image.header.entry_words)
    return count


class _Tables:
    """Reads L2 tables into two reused buffers, of `batch` tables each. Counts them."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._words = image.header.cluster_size // 8
        self.batch = max(1, _READ_LIMIT // image.header.cluster_size)
        self._buffers: dict[int, _Words] = {}
        self._zeros = np.zeros(0, np.uint64)
        self.count = 0

    def read(self, side: int, offset: int, tables: int) -> _Words:
        """Entries of consecutive tables, as on disk; valid until the next read of that side."""
        if side not in self._buffers:
            self._buffers[side] = np.empty(self.batch * self._words, np.uint64)
        entries = self._buffers[side][: tables * self._words]
        if self._image.read_into(offset, entries.view(np.uint8).data) < entries.nbytes:
            raise self._image.damaged(f"the L2 table at {offset} was cut off while it was read")
        if self._image.header.version == 2 and np.any(
            entries & (_DISK_COMPRESSED | _DISK_ZERO) == _DISK_ZERO
        ):
            raise self._image.damaged(
                f"the L2 table at {offset} has a zero flag, which version 2 does not know"
            )
        self.count += tables
        return entries

    def read_or_zeros(self, side: int, offset: int, tables: int) -> _Words:
        """The same, or for offset 0 as many tables of unallocated entries."""
        if offset:
            return self.read(side, offset, tables)
        if not len(self._zeros):
            self._zeros = np.zeros(self.batch * self._words, np.uint64)
        return self._zeros[: tables * self._words]


def _count_packed(entries: _Words) -> int:
    """How many entries, as on disk, are compressed; mostly none, which costs least to see."""
    if not np.bitwise_or.reduce(entries) & _DISK_COMPRESSED:
        return 0
    return int(np.count_nonzero(entries & _DISK_COMPRESSED))


def _pair(image: Image, one: Point, other: Point) -> tuple[_Words, _Words]:
    """Both L1 tables, the shorter one filled up with unallocated entries."""
    a, b = image.l1(one), image.l1(other)
    length = max(len(a), len(b))
    return _filled(a, length), _filled(b, length)


def _filled(table: _Words, length: int) -> _Words:
    # Tables can take 32 MiB: the longer one is not copied.
    return table if len(table) == length else np.pad(table, (0, length - len(table)))


def _count_shared_copied(a: _Words, b: _Words, marked: tuple[_Words, ...], step: int) -> int:
    """Entries with a host offset, equal in both tables (as on disk) and COPIED in one of `marked`.

    step: words per entry; only the first counts, for subclusters are written in place like clusters.
    """
    marked = tuple(table[::step] for table in marked)
    if not any(np.bitwise_or.reduce(table) & _DISK_COPIED for table in marked):
        return 0  # as it should be between two snapshots, and soon seen
    a, b = a[::step], b[::step]
    alike = ((a ^ b) & ~_DISK_COPIED) == 0
    alike &= np.logical_or.reduce([(table & _DISK_COPIED) != 0 for table in marked])
    return int(np.count_nonzero(alike & ((a & _DISK_OFFSET) != 0)))


def _twin_spans(
    before: _Words, after: _Words, differ: npt.NDArray[np.int64], cluster: int, limit: int
) -> Iterator[tuple[int, int]]:
    """First index and number of L1 entries whose tables are neighbours, or lacking, at both points."""
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


def _spans(
    offsets: _Words, wanted: npt.NDArray[np.int64], cluster: int, limit: int
) -> Iterator[tuple[int, int]]:
    """Runs [first, stop) of wanted L1 entries whose tables are neighbours in the file as well.

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


def _touched(image: Image, within: DirtyMap, tables: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """For each L1 index whether its table covers a block of `within`."""
    span = image.header.table_span
    reach = np.zeros(int(tables[-1]) + 2 if len(tables) else 1, np.int64)
    last = len(reach) - 1
    for runs in within.iter_runs():
        first = np.minimum((runs[:, 0] << BLOCK_BITS) // span, last)
        stop = np.minimum(-(-(runs[:, 1] << BLOCK_BITS) // span), last)
        np.add.at(reach, first, 1)
        np.subtract.at(reach, stop, 1)
    touched: npt.NDArray[np.bool_] = np.cumsum(reach)[tables] > 0
    return touched
