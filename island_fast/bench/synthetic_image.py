"""An image that is all tables: a volume with very many extents, of which no data is ever read.

Its clusters lie in a hole of the file, each at a place of its own. It has two internal snapshots, "a" and
"b", which share the tables that do not differ; the volume itself is as at "b".
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from island_fast.qcow2.header import MAGIC
from island_fast.qcow2.snapshots import InternalSnapshot, encode_snapshot

__all__ = ["MappedImage", "scattered"]

CLUSTER = 65536
_PER_TABLE = CLUSTER // 8
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQIIQ")
# Clusters of the file, before the tables: header, reference count table and block, snapshots.
_REFCOUNTS, _REFCOUNT_BLOCK, _SNAPSHOTS, _L1 = 1, 2, 3, 4

_Words = NDArray[np.uint64]
_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MappedImage:
    """Such an image: its file, its volume's size in bytes, and how many clusters and tables of it differ."""

    path: Path
    volume: int
    moved: int
    tables_moved: int

    @classmethod
    def make(
        cls, path: Path, volume: int, data: int, runs: int, seed: int, tables: float = 1.0
    ) -> MappedImage:
        """Write one with `data` bytes in `runs` runs, of which 1 % differ, in this share of the L2 tables."""
        draw = np.random.default_rng(seed)
        count = volume // (CLUSTER * _PER_TABLE)
        used = scattered(draw, volume // CLUSTER, data // CLUSTER, runs)
        near = np.sort(draw.choice(count, max(1, round(tables * count)), replace=False))
        candidates = used[np.isin(used // _PER_TABLE, near)]
        moved = np.sort(draw.choice(candidates, min(candidates.size, used.size // 100), replace=False))
        l1_clusters = -(-count * 8 // CLUSTER)
        first = _L1 + 2 * l1_clusters
        then = np.zeros(count * _PER_TABLE, np.uint64)
        then[used] = _places(first + 2 * count, used.size)
        now = then.copy()
        now[moved] = _places(first + 2 * count + used.size, moved.size)
        differ = np.unique(moved // _PER_TABLE)
        old = _places(first, count)
        new = old.copy()
        new[differ] = _places(first + count, count)[differ]
        with open(path, "wb") as file:
            file.truncate((first + 2 * count + used.size + moved.size) * CLUSTER)
            _put(file.fileno(), 0, _header(volume, count, l1_clusters))
            _put(file.fileno(), _REFCOUNTS, struct.pack(">Q", _REFCOUNT_BLOCK * CLUSTER))
            _put(file.fileno(), _SNAPSHOTS, _snapshots(volume, count, l1_clusters))
            _put(file.fileno(), _L1, new.byteswap().tobytes())
            _put(file.fileno(), _L1 + l1_clusters, old.byteswap().tobytes())
            _put(file.fileno(), first, then.byteswap().tobytes())
            tables_now = now.byteswap().reshape(count, _PER_TABLE)
            for table in differ.tolist():
                _put(file.fileno(), first + count + table, tables_now[table].tobytes())
        return cls(path, volume, moved.size, differ.size)


def scattered(draw: np.random.Generator, room: int, total: int, runs: int) -> _Ints:
    """Cluster numbers of about `total` clusters in so many runs, anywhere and apart."""
    lengths = draw.integers(1, 2 * total // runs, runs)
    cuts = np.sort(draw.choice(room - int(lengths.sum()) - 1, runs, replace=False)) + 1
    return np.arange(int(lengths.sum())) + np.repeat(cuts, lengths)


def _places(first: int, count: int) -> _Words:
    """Offsets of `count` clusters of the file, one after the other."""
    return np.arange(first, first + count, dtype=np.uint64) * np.uint64(CLUSTER)


def _put(fd: int, cluster: int, data: bytes) -> None:
    view = memoryview(data)
    at = cluster * CLUSTER
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


def _snapshots(volume: int, count: int, l1_clusters: int) -> bytes:
    entries = []
    for number, name in enumerate("ab"):
        l1 = (_L1 + (1 - number) * l1_clusters) * CLUSTER
        entries.append(encode_snapshot(InternalSnapshot(str(number), name, number, 0, volume, l1, count, 0)))
    return b"".join(entries)


def _header(volume: int, count: int, l1_clusters: int) -> bytes:
    return _HEADER.pack(
        MAGIC, 3, 0, 0, CLUSTER.bit_length() - 1, volume, 0, count, _L1 * CLUSTER,
        _REFCOUNTS * CLUSTER, 1, 2, _SNAPSHOTS * CLUSTER, 0, 1, 0, 4, 112, 0,
    )  # fmt: skip
