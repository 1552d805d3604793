"""The content of blocks at one point of an image.

One call turns ascending block numbers into rows of a buffer: L2 entries are looked up with numpy,
decoded and checked by a kernel, and the host ranges they name are read in as few preadv calls as
they allow, straight into the rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from island_fast import _diff
from island_fast.dirtymap import BLOCK_BITS, BLOCK_SIZE
from island_fast.qcow2.codecs import Codec, CodecError, codec_for
from island_fast.qcow2.reader import L1_OFFSET_MASK, Image, Point
from island_fast.qcow2.vectored import Transfer, read_transfer, transfers

__all__ = ["PointReader"]

_OFFSET = np.uint64(L1_OFFSET_MASK)
_NORMAL, _COMPRESSED = 1, 4
_READ_LIMIT = 4 << 20
_GAP_LIMIT = 4096

_Ints = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]
_Bytes = npt.NDArray[np.uint8]


class PointReader:
    """Reads blocks at a point. The image stays the caller's; several threads may call `read`.

    The point's L1 table is read once, here: read an internal snapshot (immutable), or be sure that
    nobody writes. `bytes_read` counts the bytes of data clusters read from the file, no tables.
    """

    def __init__(self, image: Image, point: Point) -> None:
        """Load the L1 table of the point.

        Raises DamagedImageError: see `Image.l1`.
        """
        self._image = image
        self._point = point
        self._l1 = image.l1(point) & _OFFSET
        self._file_size = image.file_size
        self._lock = threading.Lock()
        self.bytes_read = 0

    def read(self, blocks: _Ints, out: _Bytes) -> None:
        """Fill row i of `out` with block `blocks[i]`; zeros where it has none and past the volume.

        blocks: int64[n], strictly ascending, inside the volume.
        out: uint8[n, 65536], C-contiguous, writable.

        Raises DamagedImageError: an entry that is invalid or names bytes outside the file, or a
        compressed cluster that does not decode.
        """
        self._check(blocks, out)
        if not len(blocks):
            return
        clusters, rows = self._layout(blocks, out)
        entries = self._entries(clusters)
        kinds, offsets, lengths = self._decode(entries, clusters)
        self._read_normal(np.flatnonzero(kinds == _NORMAL), blocks, offsets, rows)
        packed = np.flatnonzero(kinds == _COMPRESSED)
        if len(packed):
            self._read_compressed(packed, blocks, entries, offsets, lengths, rows)
        rows[(kinds != _NORMAL) & (kinds != _COMPRESSED)] = 0
        # Only the last row can reach past the volume.
        tail = self._point.disk_size - (int(blocks[-1]) << BLOCK_BITS)
        out[-1, max(tail, 0) :] = 0

    def _check(self, blocks: _Ints, out: _Bytes) -> None:
        if blocks.ndim != 1 or out.shape != (len(blocks), BLOCK_SIZE) or not out.flags.c_contiguous:
            raise ValueError("PointReader.read wants int64[n] and contiguous uint8[n, 65536]")
        if len(blocks) and (
            blocks[0] < 0 or blocks[-1] >= self._point.blocks or np.any(np.diff(blocks) <= 0)
        ):
            raise ValueError("blocks must ascend inside the volume")

    def _layout(self, blocks: _Ints, out: _Bytes) -> tuple[_Ints, _Bytes]:
        """`out` as rows of min(block, cluster) bytes, and the cluster that each row comes from."""
        bits = self._image.header.cluster_bits
        if bits >= BLOCK_BITS:
            return blocks >> (bits - BLOCK_BITS), out
        per_block = 1 << (BLOCK_BITS - bits)
        clusters = (blocks[:, None] * per_block + np.arange(per_block)).reshape(-1)
        return clusters, out.reshape(-1, 1 << bits)

    def _entries(self, clusters: _Ints) -> _Words:
        """The L2 entry of each cluster as on disk; 0 where there is no table or no volume."""
        header = self._image.header
        entries = np.zeros(len(clusters), np.uint64)
        bits = header.cluster_bits - 3
        end = -(-self._point.disk_size // header.cluster_size)
        inside = int(np.searchsorted(clusters, min(end, len(self._l1) << bits)))
        tables = clusters[:inside] >> bits
        bounds = [*np.flatnonzero(np.diff(tables, prepend=-1)).tolist(), inside]
        for first, stop in pairwise(bounds):
            table = int(self._l1[tables[first]])
            if table:
                inner = clusters[first:stop] & (header.table_entries - 1)
                entries[first:stop] = self._table_slice(table, inner)
        return entries

    def _table_slice(self, table: int, inner: _Ints) -> _Words:
        """Some entries (ascending numbers) of one L2 table, by one read that spans them."""
        low, high = int(inner[0]), int(inner[-1]) + 1
        part = np.empty(high - low, np.uint64)
        if self._image.read_into(table + 8 * low, part.view(np.uint8).data) < part.nbytes:
            raise self._image.damaged(f"the L2 table at {table} was cut off while it was read")
        entries: _Words = part[inner - low]
        return entries

    def _decode(self, entries: _Words, clusters: _Ints) -> tuple[_Bytes, _Words, npt.NDArray[np.uint32]]:
        """Kind, host offset and compressed length of each entry, all checked."""
        count = len(entries)
        kinds = np.empty(count, np.uint8)
        offsets = np.empty(count, np.uint64)
        lengths = np.empty(count, np.uint32)
        header = self._image.header
        bad = _diff.decode_l2(
            entries, header.cluster_bits, header.version, self._file_size, kinds, offsets, lengths
        )
        if bad >= 0:
            raise self._image.damaged(
                f"the entry {int(entries[bad].byteswap()):#018x} of cluster {clusters[bad]} in"
                f" {self._point.title} is invalid or points outside the file of"
                f" {self._file_size} bytes, which may have been cut off"
            )
        return kinds, offsets, lengths

    def _read_normal(self, rows: _Ints, blocks: _Ints, offsets: _Words, target: _Bytes) -> None:
        """Read rows that lie in normal clusters."""
        if not len(rows):
            return
        unit = target.shape[1]
        hosts = offsets[rows].astype(np.int64)
        if unit < self._image.header.cluster_size:
            hosts += self._inner(blocks[rows])
        done = 0
        for transfer in transfers(hosts, rows, unit, target.reshape(-1).data):
            got = read_transfer(self._image.fd, transfer)
            if got < transfer.length:
                self._fill_tail(transfer, got, unit)
            done += got
        self._count(done)

    def _inner(self, blocks: _Ints) -> _Ints:
        """Where each block begins inside its cluster, in bytes; for clusters larger than blocks."""
        return (blocks << BLOCK_BITS) & (self._image.header.cluster_size - 1)

    def _fill_tail(self, transfer: Transfer, got: int, unit: int) -> None:
        """Zero what the file's end cut from a cluster; one that begins past the end is damage."""
        end = transfer.offset + got
        # The last row of an ascending transfer lies in its last cluster.
        last = transfer.offset + transfer.length - unit
        if last & -self._image.header.cluster_size >= end:
            raise self._image.damaged(f"the cluster at {last} is outside the file, which was cut")
        at = 0
        for buffer in transfer.buffers:
            keep = min(max(got - at, 0), len(buffer))
            buffer[keep:] = bytes(len(buffer) - keep)
            at += len(buffer)

    def _read_compressed(
        self,
        rows: _Ints,
        blocks: _Ints,
        entries: _Words,
        offsets: _Words,
        lengths: npt.NDArray[np.uint32],
        target: _Bytes,
    ) -> None:
        """Decode each compressed cluster once and put it into every row that shows a part of it."""
        unit, size = target.shape[1], self._image.header.cluster_size
        inner = self._inner(blocks[rows]) if unit < size else np.zeros(len(rows), np.int64)
        _, first, which = np.unique(entries[rows], return_index=True, return_inverse=True)
        uses = np.argsort(which, kind="stable")
        bounds = np.searchsorted(which[uses], np.arange(len(first) + 1)).tolist()
        codec = codec_for(self._image.header.compression)
        cluster = np.empty(size, np.uint8)
        for number, stream in self._streams(
            offsets[rows[first]].astype(np.int64), lengths[rows[first]].astype(np.int64)
        ):
            self._decode_stream(codec, stream, cluster, int(offsets[rows[first[number]]]))
            for use in uses[bounds[number] : bounds[number + 1]].tolist():
                at = int(inner[use])
                target[rows[use]] = cluster[at : at + unit]

    def _decode_stream(self, codec: Codec, stream: memoryview, cluster: _Bytes, offset: int) -> None:
        try:
            codec.decode(stream, cluster.data)
        except CodecError as error:
            raise self._image.damaged(
                f"the compressed cluster at {offset} does not decode: {error}"
            ) from error

    def _streams(self, offsets: _Ints, lengths: _Ints) -> Iterator[tuple[int, memoryview]]:
        """(number, its bytes) of each compressed range, in the order of the file.

        Ranges are upper bounds: they overlap the next stream and may pass the end of the file by
        the padding of the last sector. Near ones are read together.
        """
        order = np.argsort(offsets, kind="stable")
        group: list[int] = []
        begin = end = 0
        for number in order.tolist():
            offset, stop = int(offsets[number]), int(offsets[number] + lengths[number])
            if group and (offset > end + _GAP_LIMIT or stop - begin > _READ_LIMIT):
                yield from self._stream_group(group, offsets, lengths, begin, end)
                group = []
            if not group:
                begin = end = offset
            group.append(number)
            end = max(end, stop)
        if group:
            yield from self._stream_group(group, offsets, lengths, begin, end)

    def _stream_group(
        self, group: list[int], offsets: _Ints, lengths: _Ints, begin: int, end: int
    ) -> Iterator[tuple[int, memoryview]]:
        data = np.empty(end - begin, np.uint8)
        got = self._image.read_into(begin, data.data)
        self._count(got)
        view = data[:got].data
        for number in group:
            at = int(offsets[number]) - begin
            yield number, view[at : at + int(lengths[number])]

    def _count(self, done: int) -> None:
        with self._lock:
            self.bytes_read += done
