"""Where the file of an image can hold data: what the file system reports as holes reads as zeros.

A preallocated image has clusters for its whole volume, in holes of the file or in extents that nobody has
written. A full scan need not read those.
"""

from __future__ import annotations

from itertools import islice

import numpy as np

from island_fast.arrays import Bools, Int64s, Uint64s
from island_fast.dirtymap import BLOCK_BITS, BLOCK_SIZE, DirtyMap
from island_fast.files import find_extents
from island_fast.qcow2.header import Header
from island_fast.qcow2.image import L1_OFFSET_MASK, Image

__all__ = ["FileData"]

_MOST_EXTENTS = 1 << 18  # two system calls each; what comes after them counts as data
_WINDOW = 1 << 14  # entries at a time
_OFFSET = np.uint64(L1_OFFSET_MASK)
_ZERO, _COMPRESSED = np.uint64(1), np.uint64(1 << 62)
_STORED, _HALF = np.uint64((1 << 32) - 1), np.uint64(32)


class FileData:
    """The extents of an image's file that can hold data, as of when this was made.

    The file system says which they are (`files.find_extents`). It counts an extent that was only reserved as
    a hole, unless pages of it are in memory.
    """

    def __init__(self, image: Image) -> None:
        self._size = image.file_size
        found = list(islice(find_extents(image.fd, self._size), _MOST_EXTENTS))
        if len(found) == _MOST_EXTENTS:
            found.append((found[-1][1], self._size))
        self._starts, self._stops = np.array(found, np.int64).reshape(-1, 2).T.copy()

    @property
    def has_holes(self) -> bool:
        """Whether any part of the file is a hole."""
        return int((self._stops - self._starts).sum()) < self._size

    def holds(self, offsets: Int64s, length: int) -> Bools:
        """Return for each [offset, offset + length) of the file whether it can hold data; int64[...]."""
        if not len(self._starts):
            return np.zeros(offsets.shape, np.bool_)
        next_one = np.searchsorted(self._stops, offsets, "right")
        at = np.minimum(next_one, len(self._stops) - 1)
        found: Bools = (next_one < len(self._stops)) & (self._starts[at] < offsets + length)
        return found

    def take_out(self, entries: Uint64s, first_cluster: int, header: Header, found: DirtyMap) -> int:
        """Clear the entries of normal clusters that lie in holes; return how many there were in the volume.

        entries: a part of an L2 table as on disk, which begins with the cluster `first_cluster`.
        found: where clusters are larger than blocks, the blocks that can hold data are set here, and all
            entries of normal clusters are cleared.

        Entries that are compressed, or that a reader will find invalid, stay.
        """
        size = header.cluster_size
        table = entries.reshape(-1, header.entry_words)
        end = -(-(found.blocks << BLOCK_BITS) // size)  # clusters from here on are past the volume
        taken = 0
        for begin in range(0, len(table), _WINDOW):
            part = table[begin : begin + _WINDOW]
            rows, offsets = self._find_normal(part, size)
            clusters = first_cluster + begin + rows
            if size > BLOCK_SIZE:
                inner = np.arange(size // BLOCK_SIZE)
                blocks = clusters[:, None] * inner.size + inner
                data = self.holds(offsets[:, None] + inner * BLOCK_SIZE, BLOCK_SIZE)
                found.set_indices(blocks[data & (blocks < found.blocks)])
            else:
                hole = ~self.holds(offsets, size)
                rows, clusters = rows[hole], clusters[hole]
            part[rows] = 0
            taken += int(np.count_nonzero(clusters < end))
        return taken

    def _find_normal(self, table: Uint64s, size: int) -> tuple[Int64s, Int64s]:
        """Return the rows of valid entries of normal clusters, and where in the file these are."""
        words = table[:, 0].byteswap()
        offsets = (words & _OFFSET).astype(np.int64)
        normal = (offsets != 0) & (offsets & (size - 1) == 0) & (offsets < self._size)
        normal &= words & _COMPRESSED == 0
        if table.shape[1] == 1:
            normal &= words & _ZERO == 0
        else:
            bits = table[:, 1].byteswap()
            normal &= (bits & _STORED != 0) & (bits & bits >> _HALF == 0)
        rows = np.flatnonzero(normal)
        return rows, offsets[rows]
