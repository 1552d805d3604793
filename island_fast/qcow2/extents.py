"""What a guest's disk is made of at a point: extents of data, of zeros and of nothing, from the tables alone.

The kinds are those of `qemu-img map`, as fine as the tables have them: clusters, or subclusters with
extended L2. Nothing is read but tables, and only a window of them is held at a time.
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

__all__ = ["DATA", "HOLE", "KINDS", "ZERO", "Extents", "extents"]

HOLE, ZERO, DATA = 0, 1, 2
KINDS = ("hole", "zero", "data")
"""Names of the kinds. hole: nothing is stored; zero: stored as zeros without data. Both read as zeros."""

_WINDOW_UNITS = 1 << 19
_SUBCLUSTERS = 32
_CHANGED = np.uint8(4)  # added to a kind by map_l2
_OFFSET = np.uint64(L1_OFFSET_MASK)


@dataclass(frozen=True, slots=True)
class Extents:
    """Columns of extents, ascending and without gaps; row i of each belongs to extent i.

    start, length: int64[n], bytes of the volume. kind: uint8[n], HOLE, ZERO or DATA. changed: bool[n],
    whether the tables differ from those of the other point, so that the content may; false without one.
    """

    start: Int64s
    length: Int64s
    kind: Uint8s
    changed: Bools


def extents(image: Image, point: Point, since: Point | None = None) -> Iterator[Extents]:
    """The extents of `point`, from 0 to its disk size, in windows of at least one; memory is bounded.

    An extent is as long as it can be: its neighbours differ in kind or in `changed`, across windows too.
    With `since`, a cluster is changed if its entry differs between the two points, or if it holds the smaller
    of their ends, where the sizes differ, or lies behind that.

    Raises DamagedImageError: a table is not whole and inside the file, or has an invalid entry.
    """
    last: Extents | None = None
    for window in _windows(image, point, since):
        found = _merged(window if last is None else _joined(last, window))
        if len(found.start) > 1:
            yield _rows(found, slice(None, -1))
        last = _rows(found, slice(-1, None))
    if last is not None:
        yield last


def _windows(image: Image, point: Point, since: Point | None) -> Iterator[Extents]:
    """Extents window by window; neighbours may be alike."""
    header, end = image.header, point.disk_size
    count = header.l1_entries(end)
    now = _l1(image, point, count)
    then = now if since is None else _l1(image, since, count)
    tail = end
    if since is not None and since.disk_size != end:
        tail = min(since.disk_size, end) >> header.cluster_bits << header.cluster_bits
    tables = _Tables(image, point)
    for first, stop, used in _groups(now, then, tables.batch):
        begin = first * header.table_span
        if used:
            runs = tables.runs(first, now[first:stop], then[first:stop])
        else:
            runs = Extents(
                np.array([begin]), np.zeros(1, np.int64), np.zeros(1, np.uint8), np.zeros(1, np.bool_)
            )
        yield _bounded(runs, begin, min(stop * header.table_span, end), tail)


def _l1(image: Image, point: Point, count: int) -> Uint64s:
    """The L2 offsets of a point for `count` L1 entries; 0 where it has none."""
    table = image.read_l1(point)[:count]
    table &= _OFFSET
    return table if len(table) == count else np.pad(table, (0, count - len(table)))


def _groups(now: Uint64s, then: Uint64s, limit: int) -> Iterator[tuple[int, int, bool]]:
    """Runs [first, stop) of L1 entries, and whether one of them has a table at one of the points.

    Those are at most `limit` long; runs without a table are not limited.
    """
    firsts = np.arange(0, len(now), limit)
    used = np.logical_or.reduceat((now | then) != 0, firsts) if len(now) else np.zeros(0, np.bool_)
    begins = np.ones(len(used), np.bool_)
    begins[1:] = used[1:] | used[:-1]
    bounds = chain(map(int, firsts[begins]), [len(now)])
    for (first, stop), table in zip(pairwise(bounds), used[begins].tolist(), strict=True):
        yield first, stop, table


class _Tables:
    """Turns L2 tables into extents, `batch` tables at a time. Its buffers are used again and again."""

    def __init__(self, image: Image, point: Point) -> None:
        self._image, self._point = image, point
        header = image.header
        self._parts = _SUBCLUSTERS if header.entry_words == 2 else 1
        self.batch = max(1, _WINDOW_UNITS // (header.table_entries * self._parts))
        self._clusters = -(-point.disk_size // header.cluster_size)
        self._now, self._then = (np.empty((self.batch, header.cluster_size // 8), np.uint64) for _ in "ab")
        units = self.batch * header.table_entries * self._parts
        self._starts, self._kinds = np.empty(units, np.int64), np.empty(units, np.uint8)

    def runs(self, first: int, now: Uint64s, then: Uint64s) -> Extents:
        """The runs of equal kind and change under L1 entries `first` and on; lengths are not set."""
        header, size = self._image.header, self._image.file_size
        cluster = first * header.table_entries
        # Entries behind the volume may be anything.
        words = min(len(now) * header.table_entries, self._clusters - cluster) * header.entry_words
        tables, others = self._pair(now, then)
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

    def _pair(self, now: Uint64s, then: Uint64s) -> tuple[Uint64s, Uint64s | None]:
        """The tables at both points, a row each; None for the other ones if all are the same."""
        tables = self._read(now, np.arange(len(now)), self._now[: len(now)])
        moved = np.flatnonzero(now != then)
        if not len(moved):
            return tables, None
        other = self._then[: len(now)]
        np.copyto(other, tables)
        return tables, self._read(then[moved], moved, other)

    def _read(self, offsets: Uint64s, rows: Int64s, tables: Uint64s) -> Uint64s:
        """L2 tables as on disk into these rows of `tables`; unallocated entries for offset 0."""
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


def _bounded(runs: Extents, begin: int, end: int, tail: int) -> Extents:
    """The runs cut to [begin, end), all changed from `tail` on, with their lengths."""
    start, kind, changed = runs.start, runs.kind, runs.changed
    if begin < tail < end:
        at = int(np.searchsorted(start, tail))
        if at == len(start) or start[at] != tail:
            start = np.insert(start, at, tail)
            kind, changed = np.insert(kind, at, kind[at - 1]), np.insert(changed, at, changed[at - 1])
    keep = start < end
    start, kind, changed = start[keep], kind[keep], changed[keep]
    return Extents(start, np.diff(start, append=end), kind, changed | (start >= tail))


def _turns(kind: Uint8s, changed: Bools) -> Bools:
    """For each row whether it differs from the row before; true for the first."""
    differ: Bools = np.ones(len(kind), np.bool_)
    differ[1:] = (kind[1:] != kind[:-1]) | (changed[1:] != changed[:-1])
    return differ


def _merged(rows: Extents) -> Extents:
    """Neighbours that are alike become one."""
    firsts = np.flatnonzero(_turns(rows.kind, rows.changed))
    end = int(rows.start[-1] + rows.length[-1])
    start = rows.start[firsts]
    return Extents(start, np.diff(start, append=end), rows.kind[firsts], rows.changed[firsts])


def _joined(one: Extents, other: Extents) -> Extents:
    return Extents(
        np.concatenate([one.start, other.start]),
        np.concatenate([one.length, other.length]),
        np.concatenate([one.kind, other.kind]),
        np.concatenate([one.changed, other.changed]),
    )


def _rows(of: Extents, which: slice) -> Extents:
    return Extents(of.start[which], of.length[which], of.kind[which], of.changed[which])
