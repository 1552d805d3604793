"""Read the content of blocks at one point of an image.

One call turns ascending block numbers into rows of a buffer. L2 entries are looked up with numpy and decoded
and checked by a kernel; then the ranges of the file that they name are read straight into the rows, in as few
preadv calls as possible.
"""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from island_fast import _diff
from island_fast.arrays import Bools, Bytes2D, Int64s, Uint8s, Uint64s
from island_fast.dirtymap import BLOCK_BITS, BLOCK_SIZE
from island_fast.qcow2.compressed import CompressedReader
from island_fast.qcow2.image import L1_OFFSET_MASK, Image, Point
from island_fast.qcow2.overlap import overlaps, table_spans
from island_fast.qcow2.vectored_io import Transfer, plan_transfers, read_transfer

__all__ = ["LowerLayer", "PointReader"]

_OFFSET = np.uint64(L1_OFFSET_MASK)
_UNALLOCATED, _NORMAL, _COMPRESSED, _MIXED = 0, 1, 4, 5
_SUBCLUSTERS = 32


class LowerLayer(Protocol):
    """The volume of the backing file, which shows where an image has nothing."""

    @property
    def blocks(self) -> int:
        """Number of blocks of that volume; past them are zeros."""

    def read(self, blocks: Int64s, out: Bytes2D) -> None:
        """Read blocks; see `PointReader.read`."""


class PointReader:
    """Reads blocks at a point. The image stays the caller's. Several threads can call `read` at once.

    Where the point has nothing, `below` shows, or zeros without it.

    The L1 table is read once, when the reader is made. So the point must be an internal snapshot, which does
    not change, or the caller must be sure that no process writes. `bytes_read` counts the bytes of data
    clusters, without tables, that were read from the file.
    """

    def __init__(self, image: Image, point: Point, below: LowerLayer | None = None) -> None:
        """Read the L1 table of the point.

        Raises DamagedImageError: see `Image.read_l1`.
        """
        self._image = image
        self._point = point
        self._below = below
        self._l1 = image.read_l1(point)
        self._l1 &= _OFFSET
        self._tables = self._l1[self._l1 != 0].view(np.int64)
        self._tables.sort()
        self._spans = table_spans(image.header, point.l1_offset, point.l1_size)
        self._file_size = image.file_size
        self._compressed = CompressedReader(image, self._count_bytes)
        self._lock = threading.Lock()
        self.bytes_read = 0

    def read(self, blocks: Int64s, out: Bytes2D) -> None:
        """Fill row i of `out` with block `blocks[i]`; zeros where it has none and past the volume.

        blocks: int64[n], strictly ascending, inside the volume.
        out: uint8[n, 65536], C-contiguous, writable.

        Raises DamagedImageError: an entry that is invalid, or points outside the file or to a table; or a
            compressed cluster that does not decode.
        """
        self._check(blocks, out)
        if not len(blocks):
            return
        clusters, rows = self._split_rows(blocks, out)
        entries = self._read_entries(clusters)
        kinds, offsets, lengths = self._decode(entries, clusters)
        stored, compressed = kinds == _NORMAL, np.flatnonzero(kinds == _COMPRESSED)
        mixed = np.flatnonzero(kinds == _MIXED)
        parts = self._subcluster_bits(blocks, entries[mixed, -1].byteswap(), mixed)  # which are stored
        stored[mixed] = parts.any(axis=1)
        self._read_normal(np.flatnonzero(stored), blocks, offsets, rows)
        if len(compressed):
            streams, limits = offsets[compressed].astype(np.int64), lengths[compressed].astype(np.int64)
            self._compressed.read(
                streams, limits, self._offset_in_cluster(blocks, compressed), compressed, rows
            )
        rows[~stored & (kinds != _COMPRESSED)] = 0
        if len(mixed):
            row, part = np.nonzero(~parts)
            rows.reshape(len(rows), parts.shape[1], -1)[mixed[row], part] = 0
        if self._below is not None:
            self._fill_from_below(self._below, blocks, entries, kinds, rows)
        # Only the last row can reach past the end of the volume.
        tail = self._point.disk_size - (int(blocks[-1]) << BLOCK_BITS)
        out[-1, max(tail, 0) :] = 0

    def _check(self, blocks: Int64s, out: Bytes2D) -> None:
        """Raise ValueError unless the arguments of `read` are as it says."""
        if blocks.ndim != 1 or out.shape != (len(blocks), BLOCK_SIZE) or not out.flags.c_contiguous:
            raise ValueError("PointReader.read needs int64[n] and contiguous uint8[n, 65536]")
        if len(blocks) and (
            blocks[0] < 0 or blocks[-1] >= self._point.blocks or np.any(np.diff(blocks) <= 0)
        ):
            raise ValueError("blocks must ascend inside the volume")

    def _split_rows(self, blocks: Int64s, out: Bytes2D) -> tuple[Int64s, Bytes2D]:
        """Return the cluster that each row comes from, and `out` as rows of min(block, cluster) bytes."""
        bits = self._image.header.cluster_bits
        if bits >= BLOCK_BITS:
            return blocks >> (bits - BLOCK_BITS), out
        per_block = 1 << (BLOCK_BITS - bits)
        clusters = (blocks[:, None] * per_block + np.arange(per_block)).reshape(-1)
        return clusters, out.reshape(-1, 1 << bits)

    def _read_entries(self, clusters: Int64s) -> Uint64s:
        """Read the L2 entry of each cluster as on disk, uint64[n, words]; 0 where there is none."""
        header = self._image.header
        entries = np.zeros((len(clusters), header.entry_words), np.uint64)
        end = -(-self._point.disk_size // header.cluster_size)
        inside = int(np.searchsorted(clusters, min(end, len(self._l1) * header.table_entries)))
        tables = clusters[:inside] // header.table_entries
        bounds = [*np.flatnonzero(np.diff(tables, prepend=-1)).tolist(), inside]
        for first, stop in pairwise(bounds):
            table = int(self._l1[tables[first]])
            if table:
                inner = clusters[first:stop] & (header.table_entries - 1)
                entries[first:stop] = self._read_table(table, inner)
        return entries

    def _read_table(self, table: int, inner: Int64s) -> Uint64s:
        """Read some entries (ascending numbers) of one L2 table, by one read that spans them."""
        low, high = int(inner[0]), int(inner[-1]) + 1
        words = self._image.header.entry_words
        part = np.empty((high - low, words), np.uint64)
        into = part.reshape(-1).view(np.uint8).data
        if self._image.read_into(table + 8 * words * low, into) < part.nbytes:
            raise self._image.damage_error(f"the L2 table at {table} was cut off while it was read")
        entries: Uint64s = part[inner - low]
        return entries

    def _decode(self, entries: Uint64s, clusters: Int64s) -> tuple[Uint8s, Uint64s, npt.NDArray[np.uint32]]:
        """Decode and check entries; return the kind, offset in the file and compressed length of each."""
        count, words = entries.shape
        kinds = np.empty(count, np.uint8)
        offsets = np.empty(count, np.uint64)
        lengths = np.empty(count, np.uint32)
        header = self._image.header
        bad = _diff.decode_l2(
            entries.reshape(-1), header.cluster_bits, header.version, self._file_size, kinds, offsets,
            lengths, words,
        )  # fmt: skip
        if bad >= 0:
            entry = " ".join(f"{int(word):#018x}" for word in entries[bad].byteswap())
            raise self._image.damage_error(
                f"the entry {entry} of cluster {clusters[bad]} in"
                f" {self._point.title} is invalid or points outside the file of"
                f" {self._file_size} bytes, which may have been cut off"
            )
        self._check_offsets(kinds, offsets, clusters)
        return kinds, offsets, lengths

    def _check_offsets(self, kinds: Uint8s, offsets: Uint64s, clusters: Int64s) -> None:
        """Raise DamagedImageError if data begins in a cluster of the file that holds a table."""
        # Subclusters that are zeros or nothing have no offset.
        placed = (kinds == _NORMAL) | (kinds == _COMPRESSED) | ((kinds == _MIXED) & (offsets != 0))
        data = np.flatnonzero(placed)
        size = self._image.header.cluster_size
        starts = offsets[data].astype(np.int64) & -size
        wrong = overlaps(starts, size, self._spans)
        if len(self._tables):
            nearest = np.minimum(np.searchsorted(self._tables, starts), len(self._tables) - 1)
            wrong |= self._tables[nearest] == starts
        bad = np.flatnonzero(wrong)
        if len(bad):
            raise self._image.damage_error(
                f"cluster {clusters[data[bad[0]]]} in {self._point.title} claims the bytes at"
                f" {starts[bad[0]]}, where the image keeps its tables"
            )

    def _subcluster_bits(self, blocks: Int64s, bitmaps: Uint64s, mixed: Int64s) -> Bools:
        """Return the low half of the bitmaps as far as it belongs to these rows: bool[rows, subclusters]."""
        size = self._image.header.cluster_size
        unit = min(size, BLOCK_SIZE)
        count = _SUBCLUSTERS * unit // size
        if not len(mixed):
            return np.zeros((0, count), np.bool_)
        first = self._offset_in_cluster(blocks, mixed) // (size // _SUBCLUSTERS)
        bits = (first[:, None] + np.arange(count)).astype(np.uint64)
        found: Bools = bitmaps[:, None] >> bits & np.uint64(1) != 0
        return found

    def _fill_from_below(
        self, below: LowerLayer, blocks: Int64s, entries: Uint64s, kinds: Uint8s, rows: Bytes2D
    ) -> None:
        """Fill the rows, and the parts of rows, that have nothing here with what `below` has there."""
        mixed = np.flatnonzero(kinds == _MIXED)
        bitmaps = entries[mixed, -1].byteswap()
        empty = self._subcluster_bits(blocks, ~(bitmaps | bitmaps >> np.uint64(32)), mixed)
        holes = np.zeros((len(rows), empty.shape[1]), np.bool_)
        holes[kinds == _UNALLOCATED] = True
        holes[mixed] = empty
        whole = holes.reshape(len(blocks), -1)
        wanted = np.flatnonzero(whole.any(axis=1) & (blocks < below.blocks))
        if len(wanted):
            shown = np.empty((len(wanted), BLOCK_SIZE), np.uint8)
            below.read(blocks[wanted], shown)
            parts = rows.reshape(*whole.shape, -1)
            row, part = np.nonzero(whole[wanted])
            parts[wanted[row], part] = shown.reshape(len(wanted), whole.shape[1], -1)[row, part]

    def _read_normal(self, rows: Int64s, blocks: Int64s, offsets: Uint64s, target: Bytes2D) -> None:
        """Read the rows that are in normal clusters."""
        if not len(rows):
            return
        unit = target.shape[1]
        starts = offsets[rows].astype(np.int64) + self._offset_in_cluster(blocks, rows)
        done = 0
        for transfer in plan_transfers(starts, rows, unit, target.reshape(-1).data):
            got = read_transfer(self._image.fd, transfer)
            if got < transfer.length:
                self._fill_tail(transfer, got, unit)
            done += got
        self._count_bytes(done)

    def _offset_in_cluster(self, blocks: Int64s, rows: Int64s) -> Int64s:
        """Return where in its cluster each row begins, in bytes; 0 if clusters are not larger than blocks."""
        size = self._image.header.cluster_size
        if size <= BLOCK_SIZE:
            return np.zeros(len(rows), np.int64)
        inner: Int64s = (blocks[rows] << BLOCK_BITS) & (size - 1)
        return inner

    def _fill_tail(self, transfer: Transfer, got: int, unit: int) -> None:
        """Zero what the end of the file cuts off a cluster; a cluster that begins past it is damage."""
        end = transfer.offset + got
        # The last row of an ascending transfer lies in its last cluster.
        last = transfer.offset + transfer.length - unit
        if last & -self._image.header.cluster_size >= end:
            raise self._image.damage_error(f"the cluster at {last} is outside the file, which was cut off")
        at = 0
        for buffer in transfer.buffers:
            keep = min(max(got - at, 0), len(buffer))
            buffer[keep:] = bytes(len(buffer) - keep)
            at += len(buffer)

    def _count_bytes(self, done: int) -> None:
        with self._lock:
            self.bytes_read += done
