"""Compressed clusters of an image: read together, each decoded once, put into every row that shows it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from island_fast.qcow2.codecs import Codec, CodecError, codec_for
from island_fast.qcow2.image import Image

__all__ = ["PackedReader"]

_READ_LIMIT = 4 << 20
_GAP_LIMIT = 4096
_KEPT_CLUSTERS = 4

_Ints = npt.NDArray[np.int64]
_Bytes = npt.NDArray[np.uint8]


class PackedReader:
    """Reads compressed clusters. Several threads may call `read`.

    The last few clusters that are larger than a row are kept decoded, up to 8 MiB: the next rows in order
    are other parts of them.
    """

    def __init__(self, image: Image, count: Callable[[int], None]) -> None:
        """Read from `image`, which stays the caller's; `count` is told of bytes read from the file."""
        self._image = image
        self._count = count
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], _Bytes] = OrderedDict()

    def read(self, offsets: _Ints, lengths: _Ints, inner: _Ints, rows: _Ints, target: _Bytes) -> None:
        """Put a part of a compressed cluster into each of some rows of `target`.

        offsets, lengths, inner, rows: int64[n]: where the stream begins in the file, the upper bound of its
        bytes, where in the cluster the part begins, and the row it goes to.

        Raises DamagedImageError: a stream does not decode to one cluster.
        """
        streams, which = np.unique(np.stack([offsets, lengths], axis=1), axis=0, return_inverse=True)
        which = which.reshape(-1)
        uses = np.argsort(which, kind="stable")
        bounds = np.searchsorted(which[uses], np.arange(len(streams) + 1)).tolist()
        unit = target.shape[1]
        for number, cluster in self._clusters(streams, unit):
            for use in uses[bounds[number] : bounds[number + 1]].tolist():
                at = int(inner[use])
                target[rows[use]] = cluster[at : at + unit]

    def _clusters(self, streams: _Ints, unit: int) -> Iterator[tuple[int, _Bytes]]:
        """(number, content) of each stream; the content is valid until the next one."""
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
        codec = codec_for(self._image.header.compression)
        cluster = np.empty(size, np.uint8)
        for number, stream in self._streams(streams):
            offset, length = streams[number].tolist()
            self._decode(codec, stream, cluster, offset)
            if unit < size:
                yield missing[number], cluster
                self._keep((offset, length), cluster)
                cluster = np.empty(size, np.uint8)
            else:
                yield number, cluster

    def _keep(self, key: tuple[int, int], cluster: _Bytes) -> None:
        with self._lock:
            self._kept[key] = cluster
            while len(self._kept) > _KEPT_CLUSTERS:
                self._kept.popitem(last=False)

    def _decode(self, codec: Codec, stream: memoryview, cluster: _Bytes, offset: int) -> None:
        try:
            codec.decode(stream, cluster.data)
        except CodecError as error:
            raise self._image.damaged(
                f"the compressed cluster at {offset} does not decode: {error}"
            ) from error

    def _streams(self, streams: _Ints) -> Iterator[tuple[int, memoryview]]:
        """(number, its bytes) of each compressed range; the ranges are sorted.

        Ranges are upper bounds: they overlap the next stream and may pass the end of the file by
        the padding of the last sector. Near ones are read together.
        """
        group: list[tuple[int, int, int]] = []
        end = 0
        for number, (offset, length) in enumerate(streams.tolist()):
            stop = offset + length
            if group and (offset > end + _GAP_LIMIT or stop - group[0][1] > _READ_LIMIT):
                yield from self._stream_group(group, end)
                group = []
            group.append((number, offset, length))
            end = max(end, stop)
        if group:
            yield from self._stream_group(group, end)

    def _stream_group(self, group: list[tuple[int, int, int]], end: int) -> Iterator[tuple[int, memoryview]]:
        begin = group[0][1]
        data = np.empty(end - begin, np.uint8)
        got = self._image.read_into(begin, data.data)
        self._count(got)
        view = data[:got].data
        for number, offset, length in group:
            yield number, view[offset - begin : offset - begin + length]
