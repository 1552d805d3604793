"""Write new images, several threads at once, each block to its final place.

A qcow2 image is version 3, with 16 bit reference counts, lazy refcounts and no backing file. It can be born
with one internal snapshot, the pinned base, so that its next snapshot is incremental: that shares every table
and cluster with the volume (two references each, COPIED clear). The header is written last, so an interrupted
file is not a qcow2 image. Source: the qcow2 specification.
"""

from __future__ import annotations

import os
import stat
import struct
import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from island_fast.arrays import Bytes2D, Int64s, Uint64s
from island_fast.dirtymap import BLOCK_BITS, BLOCK_SIZE
from island_fast.errors import IslandError
from island_fast.qcow2.header import COPIED, MAGIC
from island_fast.qcow2.layout import REFCOUNT_BITS, Layout, plan_layout
from island_fast.qcow2.snapshots import InternalSnapshot, PinnedBase, encode_snapshot
from island_fast.qcow2.vectored_io import plan_transfers, write_all

__all__ = ["Qcow2Writer", "RawWriter", "write_rows"]

_BATCH = 4 << 20
_FLUSH_EVERY = 16 << 20
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQIIQ")
_HEADER_LENGTH = 112
_LAZY_REFCOUNTS = 1


class RawWriter:
    """Writes a raw image. The file descriptor stays the caller's, who also flushes and names the file."""

    def __init__(self, fd: int, volume_size: int) -> None:
        """Set the size of the file; `fd` is an empty regular file open for writing.

        Raises IslandError: the file system refuses the size.
        """
        _set_size(fd, volume_size)
        self._fd = fd
        self._volume_size = volume_size
        self._writeback = _Writeback(fd)

    def write(self, blocks: Int64s, data: Bytes2D) -> None:
        """Write row i of `data` (uint8[n, 65536]) to block `blocks[i]`, cut at the end of the volume.

        Blocks come in any order, each at most once. Several threads can write at once.

        Raises IslandError: the file system failed or is full.
        """
        _check_rows(blocks, data)
        if len(blocks) and (blocks.min() < 0 or blocks.max() << BLOCK_BITS >= self._volume_size):
            raise ValueError("a block outside the volume")
        offsets = blocks << BLOCK_BITS
        write_rows(self._fd, offsets, blocks, data, self._volume_size)
        self._writeback.note_written(offsets)

    def finish(self) -> None:
        """Do nothing: the file has its size, and holes read as zeros."""


class Qcow2Writer:
    """Writes a qcow2 image. The file descriptor stays the caller's, who also flushes and names the file."""

    def __init__(
        self,
        fd: int,
        volume_size: int,
        data_runs: Int64s,
        cluster_bits: int = 16,
        pin: PinnedBase | None = None,
    ) -> None:
        """Plan the layout and set the size of the file.

        fd: an empty regular file open for writing.
        volume_size: bytes, a multiple of 512.
        data_runs: int64[k, 2], runs (start, stop) of the blocks that will be written.
        cluster_bits: 16 to 21.
        pin: the internal snapshot that the image is born with. Its disk size can be smaller than the volume;
            then all data must be inside it.

        Raises UnsupportedImageError: no qcow2 image can hold a volume of this size.
        Raises IslandError: the file system refuses the size.
        """
        self._fd = fd
        self._volume_size = volume_size
        self._writeback = _Writeback(fd)
        self._pin = pin
        # The entry's length does not depend on where its L1 will be.
        table = len(_encode_pin(pin, 0, 0)) if pin is not None else 0
        self._layout = plan_layout(
            volume_size, data_runs, cluster_bits, None if pin is None else (pin.disk_size, table)
        )
        _set_size(fd, self._layout.clusters << cluster_bits)

    def write(self, blocks: Int64s, data: Bytes2D) -> None:
        """Write row i of `data` (uint8[n, 65536]) to the place of block `blocks[i]`.

        Blocks come in any order, each at most once. Several threads can write at once. A block of the data
        runs that is never written reads as zeros.

        Raises IslandError: the file system failed or is full.
        """
        _check_rows(blocks, data)
        offsets = self._layout.offsets(blocks)
        write_rows(self._fd, offsets, blocks, data, self._volume_size)
        self._writeback.note_written(offsets)

    def finish(self) -> None:
        """Write the tables, then the header; then the file is an image. Does not flush.

        Raises IslandError: the file system failed or is full.
        """
        layout = self._layout
        for cluster, part in _l2_tables(layout, self._flag):
            self._put(cluster, part)
        self._write_l1()
        for cluster, part in _refcount_blocks(layout, 1 if self._pin is None else 2):
            self._put(cluster, part)
        counts = _make_entries(layout.refcount_blocks, layout.refcount_block_count, layout.cluster_bits, 0)
        self._put(layout.refcount_table, counts.astype(">u8"))
        if self._pin is not None:
            entry = _encode_pin(self._pin, layout.pin_l1 << layout.cluster_bits, layout.pin_l1_size)
            self._put(layout.snapshots, np.frombuffer(entry, np.uint8))
        self._put(0, np.frombuffer(self._encode_header(), np.uint8))

    @property
    def _flag(self) -> int:
        """The flag of all entries: COPIED, unless the pinned base shares the clusters."""
        return COPIED if self._pin is None else 0

    def _put(self, cluster: int, part: npt.NDArray[np.generic]) -> None:
        """Write a part of the image at a cluster of the file."""
        data = np.ascontiguousarray(part).view(np.uint8).reshape(-1).data
        write_all(self._fd, [data], cluster << self._layout.cluster_bits)

    def _write_l1(self) -> None:
        layout = self._layout
        numbers, _ = layout.table_runs.within(0, layout.l1_size)
        entries = np.zeros(layout.l1_size, np.uint64)
        entries[numbers] = _make_entries(layout.tables, len(numbers), layout.cluster_bits, self._flag)
        table = entries.astype(">u8")
        self._put(layout.l1, table)
        if self._pin is not None:
            self._put(layout.pin_l1, table[: layout.pin_l1_size])

    def _encode_header(self) -> bytes:
        layout, bits = self._layout, self._layout.cluster_bits
        pins = 0 if self._pin is None else 1
        return _HEADER.pack(
            MAGIC, 3, 0, 0, bits, self._volume_size, 0, layout.l1_size, layout.l1 << bits,
            layout.refcount_table << bits, layout.refcount_table_clusters, pins,
            layout.snapshots << bits if pins else 0, 0, _LAZY_REFCOUNTS, 0,
            REFCOUNT_BITS.bit_length() - 1, _HEADER_LENGTH, 0,
        )  # fmt: skip


class _Writeback:
    """Makes the kernel start writing to disk early, so that the final fsync has little left to wait for.

    By itself the kernel starts when a tenth of the memory is dirty. posix_fadvise is the call that starts it,
    does not wait, and is in Python's library. Thread-safe.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._begin = self._end = self._bytes = 0

    def note_written(self, offsets: Int64s) -> None:
        """Note that blocks were written at `offsets` of the file; every 16 MiB, start writing to disk."""
        if not len(offsets):
            return
        begin, end = int(offsets.min()), int(offsets.max()) + BLOCK_SIZE
        with self._lock:
            if self._bytes:
                begin, end = min(begin, self._begin), max(end, self._end)
            self._begin, self._end = begin, end
            self._bytes += len(offsets) * BLOCK_SIZE
            if self._bytes < _FLUSH_EVERY:
                return
            self._bytes = 0
        os.posix_fadvise(self._fd, begin, end - begin, os.POSIX_FADV_DONTNEED)


def _encode_pin(pin: PinnedBase, l1_offset: int, l1_size: int) -> bytes:
    """Return the snapshot table, with the pinned base as its only entry."""
    return encode_snapshot(
        InternalSnapshot(
            id=pin.id,
            name=pin.name,
            seconds=pin.seconds,
            nanoseconds=pin.nanoseconds,
            disk_size=pin.disk_size,
            l1_offset=l1_offset,
            l1_size=l1_size,
            vm_state_size=0,
        )
    )


def _make_entries(first: int, count: int, cluster_bits: int, flag: int) -> Uint64s:
    """Return the table entries that point to `count` consecutive clusters of the file."""
    clusters = np.arange(first, first + count, dtype=np.uint64)
    return (clusters << np.uint64(cluster_bits)) | np.uint64(flag)


def _l2_tables(layout: Layout, flag: int) -> Iterator[tuple[int, npt.NDArray[np.generic]]]:
    """Yield (cluster of the file, entries) of the L2 tables, a few tables at a time."""
    bits = layout.cluster_bits - 3
    step = max(1, _BATCH >> layout.cluster_bits)
    runs = layout.table_runs
    rows = zip(runs.starts.tolist(), runs.stops.tolist(), runs.ranks.tolist(), strict=True)
    for start, stop, rank in rows:
        for first in range(start, stop, step):
            last = min(first + step, stop)
            clusters, data_rank = layout.data_runs.within(first << bits, last << bits)
            entries = np.zeros((last - first) << bits, ">u8")
            entries[clusters - (first << bits)] = _make_entries(
                layout.data + data_rank, len(clusters), layout.cluster_bits, flag
            )
            yield layout.tables + rank + first - start, entries


def _refcount_blocks(layout: Layout, shared: int) -> Iterator[tuple[int, npt.NDArray[np.generic]]]:
    """Yield (cluster of the file, counts) of refcount blocks: 1 up to the L2 tables, then `shared`."""
    per_block = layout.cluster_size * 8 // REFCOUNT_BITS
    step = max(1, _BATCH >> layout.cluster_bits)
    for block in range(0, layout.refcount_block_count, step):
        count = min(step, layout.refcount_block_count - block) * per_block
        first = block * per_block
        counts = np.full(count, shared, ">u2")
        counts[: max(layout.tables - first, 0)] = 1
        counts[max(layout.clusters - first, 0) :] = 0
        yield layout.refcount_blocks + block, counts


def _set_size(fd: int, size: int) -> None:
    """Extend an empty regular file to `size` bytes, all holes."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size:
        raise ValueError("an image is written to an empty regular file")
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        raise IslandError(
            f"the file system refuses an image of {size} bytes: {error.strerror};"
            " free space or use another file system"
        ) from error


def _check_rows(blocks: Int64s, data: Bytes2D) -> None:
    if data.shape != (len(blocks), BLOCK_SIZE) or not data.flags.c_contiguous:
        raise ValueError("write needs int64[n] and contiguous uint8[n, 65536]")


def write_rows(fd: int, offsets: Int64s, blocks: Int64s, data: Bytes2D, volume_size: int) -> None:
    """Write row i of `data` at byte `offsets[i]` of `fd`, cut at the end of the volume.

    blocks: int64[n], the block of each row, which decides where the volume ends in it.
    volume_size: bytes.

    Raises IslandError: the file system failed, or has no space left.
    """
    whole = (blocks + 1) << BLOCK_BITS <= volume_size
    rows = np.flatnonzero(whole)
    flat = data.reshape(-1).data
    if len(rows):
        for transfer in plan_transfers(offsets[rows], rows, BLOCK_SIZE, flat):
            write_all(fd, transfer.buffers, transfer.offset)
    for row in np.flatnonzero(~whole).tolist():
        length = max(0, volume_size - (int(blocks[row]) << BLOCK_BITS))
        begin = row * BLOCK_SIZE
        write_all(fd, [flat[begin : begin + length]], int(offsets[row]))
