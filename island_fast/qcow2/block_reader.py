"""The content of blocks at one point of an image.

One call turns ascending block numbers into rows of a buffer: L2 entries are looked up with numpy,
decoded and checked by a kernel, and the host ranges they name are read in as few preadv calls as
they allow, straight into the rows.
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
    """What shows through where an image has nothing: the volume of its backing file."""

    @property
    def blocks(self) -> int:
        """Blocks of that volume; behind them are zeros."""

    def read(self, blocks: Int64s, out: Bytes2D) -> None:
        """As `PointReader.read`."""


class PointReader:
    """Reads blocks at a point. The image stays the caller's; several threads may call `read`.

    Where the point has nothing, `below` shows, or zeros without one.

    The point's L1 table is read once, here: read an internal snapshot (immutable), or be sure that
    nobody writes. `bytes_read` counts the bytes of data clusters read from the file, no tables.
    """

    def __init__(self, image: Image, point: Point, below: LowerLayer | None = None) -> None:
        """Load the L1 table of the point.

        Raises DamagedImageError: see `Image.l1`.
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
        self._packed = CompressedReader(image, self._count)
        self._lock = threading.Lock()
        self.bytes_read = 0

    def read(self, blocks: Int64s, out: Bytes2D) -> None:
        """Fill row i of `out` with block `blocks[i]`; zeros where it has none and past the volume.

        blocks: int64[n], strictly ascending, inside the volume.
        out: uint8[n, 65536], C-contiguous, writable.

        Raises DamagedImageError: an entry that is invalid, names bytes outside the file or a table as data,
        or a compressed cluster that does not decode.
        """
        self._check(blocks, out)
        if not len(blocks):
            return
        clusters, rows = self._layout(blocks, out)
        entries = self._entries(clusters)
        kinds, offsets, lengths = self._decode(entries, clusters)
        stored, packed = kinds == _NORMAL, np.flatnonzero(kinds == _COMPRESSED)
        mixed = np.flatnonzero(kinds == _MIXED)
        parts = self._stored_parts(blocks, entries, mixed)
        stored[mixed] = parts.any(axis=1)
        self._read_normal(np.flatnonzero(stored), blocks, offsets, rows)
        if len(packed):
            places, limits = offsets[packed].astype(np.int64), lengths[packed].astype(np.int64)
            self._packed.read(places, limits, self._inner(blocks, packed), packed, rows)
        rows[~stored & (kinds != _COMPRESSED)] = 0
        if len(mixed):
            row, part = np.nonzero(~parts)
            rows.reshape(len(rows), parts.shape[1], -1)[mixed[row], part] = 0
        if self._below is not None:
            self._show_through(self._below, blocks, entries, kinds, rows)
        # Only the last row can reach past the volume.
        tail = self._point.disk_size - (int(blocks[-1]) << BLOCK_BITS)
        out[-1, max(tail, 0) :] = 0

    def _check(self, blocks: Int64s, out: Bytes2D) -> None:
        if blocks.ndim != 1 or out.shape != (len(blocks), BLOCK_SIZE) or not out.flags.c_contiguous:
            raise ValueError("PointReader.read wants int64[n] and contiguous uint8[n, 65536]")
        if len(blocks) and (
            blocks[0] < 0 or blocks[-1] >= self._point.blocks or np.any(np.diff(blocks) <= 0)
        ):
            raise ValueError("blocks must ascend inside the volume")

    def _layout(self, blocks: Int64s, out: Bytes2D) -> tuple[Int64s, Bytes2D]:
        """`out` as rows of min(block, cluster) bytes, and the cluster that each row comes from."""
        bits = self._image.header.cluster_bits
        if bits >= BLOCK_BITS:
            return blocks >> (bits - BLOCK_BITS), out
        per_block = 1 << (BLOCK_BITS - bits)
        clusters = (blocks[:, None] * per_block + np.arange(per_block)).reshape(-1)
        return clusters, out.reshape(-1, 1 << bits)

    def _entries(self, clusters: Int64s) -> Uint64s:
        """The L2 entry of each cluster as on disk, uint64[n, words]; 0 where there is no table or volume."""
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
                entries[first:stop] = self._table_slice(table, inner)
        return entries

    def _table_slice(self, table: int, inner: Int64s) -> Uint64s:
        """Some entries (ascending numbers) of one L2 table, by one read that spans them."""
        low, high = int(inner[0]), int(inner[-1]) + 1
        words = self._image.header.entry_words
        part = np.empty((high - low, words), np.uint64)
        into = part.reshape(-1).view(np.uint8).data
        if self._image.read_into(table + 8 * words * low, into) < part.nbytes:
            raise self._image.damage_error(f"the L2 table at {table} was cut off while it was read")
        entries: Uint64s = part[inner - low]
        return entries

    def _decode(self, entries: Uint64s, clusters: Int64s) -> tuple[Uint8s, Uint64s, npt.NDArray[np.uint32]]:
        """Kind, host offset and compressed length of each entry, all checked."""
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
            raise self._image.damage_error(
                f"the entry {_text(entries[bad])} of cluster {clusters[bad]} in"
                f" {self._point.title} is invalid or points outside the file of"
                f" {self._file_size} bytes, which may have been cut off"
            )
        self._check_places(kinds, offsets, clusters)
        return kinds, offsets, lengths

    def _check_places(self, kinds: Uint8s, offsets: Uint64s, clusters: Int64s) -> None:
        """No data may begin in a cluster of the file that holds a table."""
        # Subclusters that are zeros or nothing need no place.
        placed = (kinds == _NORMAL) | (kinds == _COMPRESSED) | ((kinds == _MIXED) & (offsets != 0))
        data = np.flatnonzero(placed)
        size = self._image.header.cluster_size
        places = offsets[data].astype(np.int64) & -size
        wrong = overlaps(places, size, self._spans)
        if len(self._tables):
            nearest = np.minimum(np.searchsorted(self._tables, places), len(self._tables) - 1)
            wrong |= self._tables[nearest] == places
        bad = np.flatnonzero(wrong)
        if len(bad):
            raise self._image.damage_error(
                f"cluster {clusters[data[bad[0]]]} in {self._point.title} claims the bytes at"
                f" {places[bad[0]]}, where the image keeps its tables"
            )

    def _stored_parts(self, blocks: Int64s, entries: Uint64s, mixed: Int64s) -> Bools:
        """Which subclusters of some rows are stored, bool[rows, subclusters in a row]; others are zeros."""
        return self._parts(blocks, entries[mixed, -1].byteswap(), mixed)

    def _parts(self, blocks: Int64s, bitmaps: Uint64s, mixed: Int64s) -> Bools:
        """The lower half of some rows' bitmaps, bool[rows, subclusters in a row]."""
        size = self._image.header.cluster_size
        unit = min(size, BLOCK_SIZE)
        count = _SUBCLUSTERS * unit // size
        if not len(mixed):
            return np.zeros((0, count), np.bool_)
        first = self._inner(blocks, mixed) // (size // _SUBCLUSTERS)
        bits = (first[:, None] + np.arange(count)).astype(np.uint64)
        found: Bools = bitmaps[:, None] >> bits & np.uint64(1) != 0
        return found

    def _show_through(
        self, below: LowerLayer, blocks: Int64s, entries: Uint64s, kinds: Uint8s, rows: Bytes2D
    ) -> None:
        """Put what lies below into rows and parts of rows that have nothing of their own."""
        mixed = np.flatnonzero(kinds == _MIXED)
        bitmaps = entries[mixed, -1].byteswap()
        empty = self._parts(blocks, ~(bitmaps | bitmaps >> np.uint64(32)), mixed)
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
        """Read rows that lie in normal clusters."""
        if not len(rows):
            return
        unit = target.shape[1]
        hosts = offsets[rows].astype(np.int64) + self._inner(blocks, rows)
        done = 0
        for transfer in plan_transfers(hosts, rows, unit, target.reshape(-1).data):
            got = read_transfer(self._image.fd, transfer)
            if got < transfer.length:
                self._fill_tail(transfer, got, unit)
            done += got
        self._count(done)

    def _inner(self, blocks: Int64s, rows: Int64s) -> Int64s:
        """Where in its cluster each of some rows begins, in bytes; 0 where clusters are within blocks."""
        size = self._image.header.cluster_size
        if size <= BLOCK_SIZE:
            return np.zeros(len(rows), np.int64)
        inner: Int64s = (blocks[rows] << BLOCK_BITS) & (size - 1)
        return inner

    def _fill_tail(self, transfer: Transfer, got: int, unit: int) -> None:
        """Zero what the file's end cut from a cluster; one that begins past the end is damage."""
        end = transfer.offset + got
        # The last row of an ascending transfer lies in its last cluster.
        last = transfer.offset + transfer.length - unit
        if last & -self._image.header.cluster_size >= end:
            raise self._image.damage_error(f"the cluster at {last} is outside the file, which was cut")
        at = 0
        for buffer in transfer.buffers:
            keep = min(max(got - at, 0), len(buffer))
            buffer[keep:] = bytes(len(buffer) - keep)
            at += len(buffer)

    def _count(self, done: int) -> None:
        with self._lock:
            self.bytes_read += done


def _text(entry: Uint64s) -> str:
    return " ".join(f"{int(word):#018x}" for word in entry.byteswap())
