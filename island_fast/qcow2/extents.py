"""Find what a volume is made of at a point: extents of data, of zeros and of nothing, from the tables alone.

The kinds are those of `qemu-img map`, as fine as the tables have them: clusters, or subclusters with extended
L2. Only tables are read, and only a window of them is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np

from island_fast import _diff
from island_fast.arrays import Bools, Int64s, Uint8s, Uint64s
from island_fast.qcow2.image import L1_OFFSET_MASK, Image, Point
from island_fast.qcow2.vectored_io import plan_transfers, read_transfer

__all__ = ["DATA", "HOLE", "KINDS", "ZERO", "Extents", "iter_extents"]

HOLE, ZERO, DATA = 0, 1, 2
KINDS = ("hole", "zero", "data")
"""Names of the kinds. hole: nothing is stored; zero: marked as zeros, without data. Both read as zeros."""

_WINDOW_UNITS = 1 << 19
_SUBCLUSTERS = 32
_CHANGED = np.uint8(4)  # added to a kind by map_l2
_OFFSET = np.uint64(L1_OFFSET_MASK)


@dataclass(frozen=True, slots=True)
class Extents:
    """Columns of extents, ascending and without gaps; row i of each column belongs to extent i.

    start, length: int64[n], bytes of the volume. kind: uint8[n], HOLE, ZERO or DATA. changed: bool[n]:
    the tables differ from those of the other point, so that the content can differ; false without one.
    """

    start: Int64s
    length: Int64s
    kind: Uint8s
    changed: Bools


def iter_extents(image: Image, point: Point, since: Point | None = None) -> Iterator[Extents]:
    """Yield the extents of `point`, from 0 to its disk size, in windows of at least one, with bounded memory.

    An extent is as long as it can be: its neighbours differ in kind or in `changed`, across windows too. With
    `since`, a cluster is changed if its entry differs between the two points; if the sizes differ, also the
    cluster that contains the smaller end, and all after it.

    Raises DamagedImageError: a table is not completely inside the file, or has an invalid entry.
    """
    last: Extents | None = None
    for window in _iter_windows(image, point, since):
        found = _merge(window if last is None else _concatenate(last, window))
        if len(found.start) > 1:
            yield _select(found, slice(None, -1))
        last = _select(found, slice(-1, None))
    if last is not None:
        yield last


def _iter_windows(image: Image, point: Point, since: Point | None) -> Iterator[Extents]:
    """Yield extents window by window; neighbours can be alike."""
    header, end = image.header, point.disk_size
    count = header.l1_entries(end)
    now = _read_l2_offsets(image, point, count)
    then = now if since is None else _read_l2_offsets(image, since, count)
    tail = end
    if since is not None and since.disk_size != end:
        tail = min(since.disk_size, end) >> header.cluster_bits << header.cluster_bits
    tables = _Tables(image, point)
    for first, stop, used in _group_tables(now, then, tables.batch):
        begin = first * header.table_span
        if used:
            runs = tables.find_runs(first, now[first:stop], then[first:stop])
        else:
            runs = Extents(
                np.array([begin]), np.zeros(1, np.int64), np.zeros(1, np.uint8), np.zeros(1, np.bool_)
            )
        yield _cut(runs, begin, min(stop * header.table_span, end), tail)


def _read_l2_offsets(image: Image, point: Point, count: int) -> Uint64s:
    """Read the offsets of `count` L2 tables of a point; 0 where it has none."""
    table = image.read_l1(point)[:count]
    table &= _OFFSET
    return table if len(table) == count else np.pad(table, (0, count - len(table)))


def _group_tables(now: Uint64s, then: Uint64s, limit: int) -> Iterator[tuple[int, int, bool]]:
    """Yield runs [first, stop) of L1 entries, and whether any of them has a table at one of the points.

    A run with a table is at most `limit` long; runs without one are not limited.
    """
    firsts = np.arange(0, len(now), limit)
    used = np.logical_or.reduceat((now | then) != 0, firsts) if len(now) else np.zeros(0, np.bool_)
    begins = np.ones(len(used), np.bool_)
    begins[1:] = used[1:] | used[:-1]
    bounds = chain(map(int, firsts[begins]), [len(now)])
    for (first, stop), table in zip(pairwise(bounds), used[begins].tolist(), strict=True):
        yield first, stop, table


class _Tables:
    """Turns L2 tables into extents, `batch` tables at a time, in buffers that it reuses."""

    def __init__(self, image: Image, point: Point) -> None:
        self._image, self._point = image, point
        header = image.header
        self._parts = _SUBCLUSTERS if header.entry_words == 2 else 1
        self.batch = max(1, _WINDOW_UNITS // (header.table_entries * self._parts))
        self._clusters = -(-point.disk_size // header.cluster_size)
        self._now, self._then = (np.empty((self.batch, header.cluster_size // 8), np.uint64) for _ in "ab")
        units = self.batch * header.table_entries * self._parts
        self._starts, self._kinds = np.empty(units, np.int64), np.empty(units, np.uint8)

    def find_runs(self, first: int, now: Uint64s, then: Uint64s) -> Extents:
        """Find runs of equal kind and change below the L1 entries from `first` on; lengths are not set.

        now, then: the offsets of their tables at the two points.
        """
        header, size = self._image.header, self._image.file_size
        cluster = first * header.table_entries
        # Entries past the end of the volume can be anything.
        words = min(len(now) * header.table_entries, self._clusters - cluster) * header.entry_words
        tables, others = self._read_both(now, then)
        rows, bad = _diff.map_l2(
            tables.reshape(-1)[:words],
            None if others is None else others.reshape(-1)[:words],
            header.cluster_bits,
            header.version,
            size,
            self._starts,
            self._kinds,
            header.entry_words,
        )
        if bad >= 0:
            raise self._image.damage_error(
                f"the entry of cluster {cluster + bad} in {self._point.title} is invalid or points"
                f" outside the file of {size} bytes, which may have been cut off"
            )
        starts = first * header.table_span + self._starts[:rows] * (header.cluster_size // self._parts)
        kinds = self._kinds[:rows]
        return Extents(starts, np.zeros(rows, np.int64), kinds % _CHANGED, kinds >= _CHANGED)

    def _read_both(self, now: Uint64s, then: Uint64s) -> tuple[Uint64s, Uint64s | None]:
        """Read the tables at both points, one row each; None for the second point if all are the same."""
        tables = self._read(now, np.arange(len(now)), self._now[: len(now)])
        moved = np.flatnonzero(now != then)
        if not len(moved):
            return tables, None
        other = self._then[: len(now)]
        np.copyto(other, tables)
        return tables, self._read(then[moved], moved, other)

    def _read(self, offsets: Uint64s, rows: Int64s, tables: Uint64s) -> Uint64s:
        """Read L2 tables, as on disk, into these rows of `tables`; unallocated entries for offset 0."""
        tables[rows[offsets == 0]] = 0
        used = np.flatnonzero(offsets)
        if len(used):
            flat = tables.reshape(-1).view(np.uint8).data
            size = self._image.header.cluster_size
            for transfer in plan_transfers(offsets[used].astype(np.int64), rows[used], size, flat):
                if read_transfer(self._image.fd, transfer) < transfer.length:
                    raise self._image.damage_error(
                        f"L2 tables at {transfer.offset} were cut off while they were read"
                    )
        return tables


def _cut(runs: Extents, begin: int, end: int, tail: int) -> Extents:
    """Return the runs cut to [begin, end), with lengths, and all changed from `tail` on."""
    start, kind, changed = runs.start, runs.kind, runs.changed
    if begin < tail < end:
        at = int(np.searchsorted(start, tail))
        if at == len(start) or start[at] != tail:
            start = np.insert(start, at, tail)
            kind, changed = np.insert(kind, at, kind[at - 1]), np.insert(changed, at, changed[at - 1])
    keep = start < end
    start, kind, changed = start[keep], kind[keep], changed[keep]
    return Extents(start, np.diff(start, append=end), kind, changed | (start >= tail))


def _merge(rows: Extents) -> Extents:
    """Return the extents with neighbours that are alike joined."""
    kind, changed = rows.kind, rows.changed
    differ = np.ones(len(kind), np.bool_)
    differ[1:] = (kind[1:] != kind[:-1]) | (changed[1:] != changed[:-1])
    firsts = np.flatnonzero(differ)
    end = int(rows.start[-1] + rows.length[-1])
    start = rows.start[firsts]
    return Extents(start, np.diff(start, append=end), kind[firsts], changed[firsts])


def _concatenate(one: Extents, other: Extents) -> Extents:
    return Extents(
        np.concatenate([one.start, other.start]),
        np.concatenate([one.length, other.length]),
        np.concatenate([one.kind, other.kind]),
        np.concatenate([one.changed, other.changed]),
    )


def _select(of: Extents, which: slice) -> Extents:
    return Extents(of.start[which], of.length[which], of.kind[which], of.changed[which])
