"""Read compressed clusters of an image: nearby ones together, each decoded once for all rows that need it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np

from island_fast.arrays import Bytes2D, Int64s, Uint8s
from island_fast.qcow2.codecs import Codec, CodecError, make_codec
from island_fast.qcow2.image import Image

__all__ = ["CompressedReader"]

_READ_LIMIT = 4 << 20
_GAP_LIMIT = 4096
_MAX_KEPT = 4


class CompressedReader:
    """Reads compressed clusters. Several threads can call `read` at once.

    If clusters are larger than a row, it keeps the last few decoded (up to 8 MiB), because the next rows are
    usually other parts of them.
    """

    def __init__(self, image: Image, count: Callable[[int], None]) -> None:
        """Read from `image`, which stays the caller's; `count(n)` is called for n bytes read from it."""
        self._image = image
        self._count = count
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], Uint8s] = OrderedDict()

    def read(self, offsets: Int64s, lengths: Int64s, inner: Int64s, rows: Int64s, target: Bytes2D) -> None:
        """Fill some rows of `target`, each with a part of a compressed cluster.

        offsets, lengths, inner, rows: int64[n]: where the stream begins in the file, the upper bound of its
            length in bytes, where in the cluster the part begins, and the row that it fills.
        target: uint8[m, bytes of a row].

        Raises DamagedImageError: a stream does not decode to one cluster.
        """
        streams, which = np.unique(np.stack([offsets, lengths], axis=1), axis=0, return_inverse=True)
        which = which.reshape(-1)
        uses = np.argsort(which, kind="stable")
        bounds = np.searchsorted(which[uses], np.arange(len(streams) + 1)).tolist()
        unit = target.shape[1]
        for number, cluster in self._read_clusters(streams, unit):
            for use in uses[bounds[number] : bounds[number + 1]].tolist():
                at = int(inner[use])
                target[rows[use]] = cluster[at : at + unit]

    def _read_clusters(self, streams: Int64s, unit: int) -> Iterator[tuple[int, Uint8s]]:
        """Yield (number, content) of each stream; the content is valid until the next one."""
        size = self._image.header.cluster_size
        missing = []
        for number, key in enumerate(map(tuple, streams.tolist()) if unit < size else ()):
            with self._lock:
                kept = self._kept.get(key)
            if kept is None:
                missing.append(number)
            else:
                yield number, kept
        if unit < size:
            streams = streams[missing]
        codec = make_codec(self._image.header.compression)
        cluster = np.empty(size, np.uint8)
        for number, stream in self._read_streams(streams):
            offset, length = streams[number].tolist()
            self._decode(codec, stream, cluster, offset)
            if unit < size:
                yield missing[number], cluster
                with self._lock:
                    self._kept[offset, length] = cluster
                    while len(self._kept) > _MAX_KEPT:
                        self._kept.popitem(last=False)
                cluster = np.empty(size, np.uint8)
            else:
                yield number, cluster

    def _decode(self, codec: Codec, stream: memoryview, cluster: Uint8s, offset: int) -> None:
        try:
            codec.decode(stream, cluster.data)
        except CodecError as error:
            raise self._image.damage_error(
                f"the compressed cluster at {offset} does not decode: {error}"
            ) from error

    def _read_streams(self, streams: Int64s) -> Iterator[tuple[int, memoryview]]:
        """Yield (number, its bytes) of each compressed range; the ranges are sorted.

        Ranges are upper bounds: they can overlap the next stream, and pass the end of the file by the padding
        of the last sector. Ranges near each other are read together.
        """
        group: list[tuple[int, int, int]] = []
        end = 0
        for number, (offset, length) in enumerate(streams.tolist()):
            stop = offset + length
            if group and (offset > end + _GAP_LIMIT or stop - group[0][1] > _READ_LIMIT):
                yield from self._read_group(group, end)
                group = []
            group.append((number, offset, length))
            end = max(end, stop)
        if group:
            yield from self._read_group(group, end)

    def _read_group(self, group: list[tuple[int, int, int]], end: int) -> Iterator[tuple[int, memoryview]]:
        """Read the ranges (number, offset, length) with one call, up to `end`; yield the bytes of each."""
        begin = group[0][1]
        data = np.empty(end - begin, np.uint8)
        got = self._image.read_into(begin, data.data)
        self._count(got)
        view = data[:got].data
        for number, offset, length in group:
            yield number, view[offset - begin : offset - begin + length]
