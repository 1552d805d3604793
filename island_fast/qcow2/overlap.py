"""What lies where in an image's file: tables that no data may overlap, and how much data it can hold.

In a sound image every cluster of the file serves one purpose. Tables that claim otherwise were made to
show a reader something else than a guest, or to make a small file cost terabytes of work.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from island_fast.dirtymap import merge_intervals
from island_fast.qcow2.header import Header

__all__ = ["Claims", "meets", "table_spans"]

_SNAPSHOT_ENTRY = 40
# RFC 1951: at best, 2 bits stand for 258 bytes.
_PACKED_RATIO = 1032
_SLACK = 4 << 20

_Ints = npt.NDArray[np.int64]


def table_spans(header: Header, l1_offset: int, l1_size: int) -> _Ints:
    """The spans [start, stop) of the file, int64[k, 2] sorted bytes, that no L2 table and no data may meet.

    They are the header, the reference count table, the table of internal snapshots (as far as its number of
    entries tells), the volume's L1 table and the one given, which must be checked (see `check_l1_span`).
    """
    cluster = header.cluster_size
    spans = [
        (0, cluster),
        (header.refcount_offset, header.refcount_clusters * cluster),
        (header.l1_offset, 8 * header.l1_size),
        (l1_offset, 8 * l1_size),
        (header.snapshots_offset, _SNAPSHOT_ENTRY * header.snapshot_count),
    ]
    # An empty table may claim to be anywhere, beyond int64 too.
    rows = [(start, start + -(-length // cluster) * cluster) for start, length in spans if length]
    return merge_intervals(np.array(rows, np.int64))


def meets(offsets: _Ints, length: int, spans: _Ints) -> npt.NDArray[np.bool_]:
    """For each offset whether [offset, offset + length) meets a span; spans as from `table_spans`."""
    following = np.minimum(np.searchsorted(spans[:, 1], offsets, "right"), len(spans) - 1)
    met: npt.NDArray[np.bool_] = (spans[following, 0] < offsets + length) & (spans[following, 1] > offsets)
    return met


class Claims:
    """Adds up what the tables of one point claim to be stored, against what the file can hold.

    Every normal cluster has a place of its own, and every compressed one a stream of its own, which deflate
    makes 1032 times smaller at most. zstd can go further with data that is all one byte, hence the slack. So
    no file costs more work than that many times its bytes on disk.
    """

    def __init__(self, header: Header, file_size: int, bytes_on_disk: int) -> None:
        """Begin with nothing claimed; `bytes_on_disk` are the file's without its holes."""
        self._cluster = header.cluster_size
        # The last cluster may reach past the end of the file.
        self._room = file_size + header.cluster_size + _SLACK
        self._packed_room = (bytes_on_disk + _SLACK) * _PACKED_RATIO

    def add(self, stored: int, compressed: int) -> bool:
        """Claim `stored` clusters, of them `compressed` such; false once there are more than there can be."""
        self._room -= (stored - compressed) * self._cluster
        self._packed_room -= compressed * self._cluster
        return self._room >= 0 and self._packed_room >= 0
