"""Checks that the tables of an image make sense together: nothing overlaps, and all of it fits in the file.

In a sound image every cluster of the file serves one purpose. Tables that claim otherwise were made to show a
reader other data than a guest sees, or to make a small file cost terabytes of work.
"""

from __future__ import annotations

import numpy as np

from island_fast.arrays import Bools, Int64s
from island_fast.dirtymap import merge_intervals
from island_fast.qcow2.header import Header

__all__ = ["Claims", "overlaps", "table_spans"]

_SNAPSHOT_ENTRY = 40
# RFC 1951: at best, 2 bits stand for 258 bytes.
_MAX_RATIO = 1032
_SLACK = 4 << 20


def table_spans(header: Header, l1_offset: int, l1_size: int) -> Int64s:
    """Return the spans [start, stop) of the file that no L2 table and no data may overlap.

    They are the header, the reference count table, the table of internal snapshots (at its least possible
    size), the volume's L1 table, and the L1 table given, which must be checked (see `check_l1_span`).

    Returns int64[k, 2], bytes, sorted and disjoint.
    """
    cluster = header.cluster_size
    spans = [
        (0, cluster),
        (header.refcount_offset, header.refcount_clusters * cluster),
        (header.l1_offset, 8 * header.l1_size),
        (l1_offset, 8 * l1_size),
        (header.snapshots_offset, _SNAPSHOT_ENTRY * header.snapshot_count),
    ]
    # An empty table can claim to be anywhere, even beyond int64.
    rows = [(start, start + -(-length // cluster) * cluster) for start, length in spans if length]
    return merge_intervals(np.array(rows, np.int64))


def overlaps(offsets: Int64s, length: int, spans: Int64s) -> Bools:
    """Return bool[n]: whether [offset, offset + length) overlaps one of the spans (see `table_spans`)."""
    following = np.minimum(np.searchsorted(spans[:, 1], offsets, "right"), len(spans) - 1)
    found: Bools = (spans[following, 0] < offsets + length) & (spans[following, 1] > offsets)
    return found


class Claims:
    """A running total of what the tables of one point claim to be stored, against what the file can hold.

    No two normal clusters share a place, and no two compressed ones a stream, which deflate makes at most
    1032 times smaller. (zstd does better with data that is all one byte; the slack allows for that.) So the
    work that a file can cause is bounded by its bytes on disk.
    """

    def __init__(self, header: Header, file_size: int, bytes_on_disk: int) -> None:
        """Begin with nothing claimed; `bytes_on_disk` is the size of the file without its holes."""
        self._cluster = header.cluster_size
        # The last cluster can reach past the end of the file.
        self._room = file_size + header.cluster_size + _SLACK
        self._compressed_room = (bytes_on_disk + _SLACK) * _MAX_RATIO

    def add(self, stored: int, compressed: int) -> bool:
        """Add `stored` clusters, `compressed` of them compressed; return whether all claims still fit."""
        self._room -= (stored - compressed) * self._cluster
        self._compressed_room -= compressed * self._cluster
        return self._room >= 0 and self._compressed_room >= 0
