"""A qcow2 that consists only of tables: a volume with very many extents, whose data is never read.

Each cluster has its place in the file, and the data is a hole there. The image has two internal snapshots,
"a" and "b", which share the tables that do not differ; the volume itself equals "b".
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

__all__ = ["SyntheticImage", "scatter_clusters"]

CLUSTER = 65536
_PER_TABLE = CLUSTER // 8
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQIIQ")
# Clusters of the file before the L2 tables: header, reference count table and block, snapshots, L1 tables.
_REFCOUNTS, _REFCOUNT_BLOCK, _SNAPSHOTS, _L1 = 1, 2, 3, 4

_Words = NDArray[np.uint64]
_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SyntheticImage:
    """A synthetic image: its file and the size of its volume in bytes.

    `moved` clusters in `tables_moved` L2 tables differ between "a" and "b".
    """

    path: Path
    volume: int
    moved: int
    tables_moved: int

    @classmethod
    def make(
        cls, path: Path, volume: int, data: int, runs: int, seed: int, tables: float = 1.0
    ) -> SyntheticImage:
        """Write an image with `data` bytes in `runs` runs, of which 1 % differs.

        What differs is spread over a share `tables` of the L2 tables.
        """
        draw = np.random.default_rng(seed)
        count = volume // (CLUSTER * _PER_TABLE)
        used = scatter_clusters(draw, volume // CLUSTER, data // CLUSTER, runs)
        near = np.sort(draw.choice(count, max(1, round(tables * count)), replace=False))
        candidates = used[np.isin(used // _PER_TABLE, near)]
        moved = np.sort(draw.choice(candidates, min(candidates.size, used.size // 100), replace=False))
        l1_clusters = -(-count * 8 // CLUSTER)
        first = _L1 + 2 * l1_clusters
        then = np.zeros(count * _PER_TABLE, np.uint64)
        then[used] = _make_offsets(first + 2 * count, used.size)
        now = then.copy()
        now[moved] = _make_offsets(first + 2 * count + used.size, moved.size)
        differ = np.unique(moved // _PER_TABLE)
        old = _make_offsets(first, count)
        new = old.copy()
        new[differ] = _make_offsets(first + count, count)[differ]
        with open(path, "wb") as file:
            file.truncate((first + 2 * count + used.size + moved.size) * CLUSTER)
            _write_cluster(file.fileno(), 0, _make_header(volume, count, l1_clusters))
            _write_cluster(file.fileno(), _REFCOUNTS, struct.pack(">Q", _REFCOUNT_BLOCK * CLUSTER))
            _write_cluster(file.fileno(), _SNAPSHOTS, _make_snapshot_table(volume, count, l1_clusters))
            _write_cluster(file.fileno(), _L1, new.byteswap().tobytes())
            _write_cluster(file.fileno(), _L1 + l1_clusters, old.byteswap().tobytes())
            _write_cluster(file.fileno(), first, then.byteswap().tobytes())
            tables_now = now.byteswap().reshape(count, _PER_TABLE)
            for table in differ.tolist():
                _write_cluster(file.fileno(), first + count + table, tables_now[table].tobytes())
        return cls(path, volume, moved.size, differ.size)


def scatter_clusters(draw: np.random.Generator, room: int, total: int, runs: int) -> _Ints:
    """Return the numbers of about `total` clusters in `runs` separate runs anywhere in `room` clusters."""
    lengths = draw.integers(1, 2 * total // runs, runs)
    cuts = np.sort(draw.choice(room - int(lengths.sum()) - 1, runs, replace=False)) + 1
    return np.arange(int(lengths.sum())) + np.repeat(cuts, lengths)


def _make_offsets(first: int, count: int) -> _Words:
    """Return the offsets of `count` adjacent clusters of the file."""
    return np.arange(first, first + count, dtype=np.uint64) * np.uint64(CLUSTER)


def _write_cluster(fd: int, cluster: int, data: bytes) -> None:
    view = memoryview(data)
    at = cluster * CLUSTER
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


def _make_snapshot_table(volume: int, count: int, l1_clusters: int) -> bytes:
    entries = []
    for number, name in enumerate("ab"):
        l1 = (_L1 + (1 - number) * l1_clusters) * CLUSTER
        entries.append(encode_snapshot(InternalSnapshot(str(number), name, number, 0, volume, l1, count, 0)))
    return b"".join(entries)


def _make_header(volume: int, count: int, l1_clusters: int) -> bytes:
    return _HEADER.pack(
        MAGIC, 3, 0, 0, CLUSTER.bit_length() - 1, volume, 0, count, _L1 * CLUSTER,
        _REFCOUNTS * CLUSTER, 1, 2, _SNAPSHOTS * CLUSTER, 0, 1, 0, 4, 112, 0,
    )  # fmt: skip
