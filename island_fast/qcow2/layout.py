"""Plan where everything in a new qcow2 image goes, from the runs of its data alone.

Clusters of the file, in order: header, refcount table, refcount blocks, snapshot table, active L1, the pin's
L1, L2 tables, data clusters in volume order. The layout is known before the first byte of data, so any number
of writers can write blocks to their final place in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from island_fast.arrays import Int64s
from island_fast.dirtymap import BLOCK_BITS, merge_intervals
from island_fast.errors import UnsupportedImageError
from island_fast.qcow2.header import L1_ENTRIES_LIMIT, MAX_VOLUME_SIZE

__all__ = ["Layout", "RankedRuns", "plan_layout"]

REFCOUNT_BITS = 16


@dataclass(frozen=True, slots=True)
class RankedRuns:
    """Sorted, disjoint runs of numbers, and for each run its rank: how many numbers the runs before it hold.

    `starts`, `stops` and `ranks` are int64[k]; `total` is how many numbers all runs hold.
    """

    starts: Int64s
    stops: Int64s
    ranks: Int64s
    total: int

    @classmethod
    def from_runs(cls, runs: Int64s) -> RankedRuns:
        """Make them from int64[k, 2] (start, stop) in any order; runs that touch or overlap are joined."""
        merged = merge_intervals(runs)
        starts, stops = merged[:, 0].copy(), merged[:, 1].copy()
        sums = np.cumsum(stops - starts)
        ranks = np.concatenate(([0], sums[:-1])) if len(sums) else sums
        return cls(starts, stops, ranks, int(sums[-1]) if len(sums) else 0)

    def rank(self, numbers: Int64s) -> Int64s:
        """Return for each number how many smaller numbers the runs hold.

        Raises ValueError: a number is in no run.
        """
        run = np.searchsorted(self.starts, numbers, side="right") - 1
        if len(numbers) and (run.min() < 0 or np.any(numbers >= self.stops[run])):
            raise ValueError("a block outside the data runs that the image was laid out for")
        ranks: Int64s = self.ranks[run] + (numbers - self.starts[run])
        return ranks

    def within(self, start: int, stop: int) -> tuple[Int64s, int]:
        """Return the numbers of the runs in [start, stop), ascending, and the rank of the first of them."""
        first = int(np.searchsorted(self.stops, start, side="right"))
        last = int(np.searchsorted(self.starts, stop, side="left"))
        if first >= last:
            return np.empty(0, np.int64), 0
        begins = np.maximum(self.starts[first:last], start)
        lengths = np.minimum(self.stops[first:last], stop) - begins
        before = np.cumsum(lengths) - lengths
        numbers = np.arange(int(lengths.sum())) + np.repeat(begins - before, lengths)
        return numbers, int(self.ranks[first] + begins[0] - self.starts[first])


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each part begins, in clusters of the file, which has `clusters` in all.

    `l1_size` and `pin_l1_size` are in entries. `table_runs` are the L2 tables that exist, by L1 index;
    `data_runs` the clusters of the volume with data.
    """

    cluster_bits: int
    refcount_table: int
    refcount_table_clusters: int
    refcount_blocks: int
    refcount_block_count: int
    snapshots: int
    l1: int
    l1_size: int
    pin_l1: int
    pin_l1_size: int
    tables: int
    data: int
    clusters: int
    table_runs: RankedRuns
    data_runs: RankedRuns

    @property
    def cluster_size(self) -> int:
        """Bytes of one cluster."""
        return 1 << self.cluster_bits

    def offsets(self, blocks: Int64s) -> Int64s:
        """Return the offset of each block in the file, in bytes.

        Raises ValueError: a block outside the data runs.
        """
        shift = self.cluster_bits - BLOCK_BITS
        place = (self.data + self.data_runs.rank(blocks >> shift)) << self.cluster_bits
        offsets: Int64s = place + ((blocks & ((1 << shift) - 1)) << BLOCK_BITS)
        return offsets


def plan_layout(
    volume_size: int, data_runs: Int64s, cluster_bits: int, pin: tuple[int, int] | None
) -> Layout:
    """Plan the layout of a new image.

    volume_size: bytes, a multiple of 512.
    data_runs: int64[k, 2], runs (start, stop) of blocks that hold data, inside the volume.
    cluster_bits: 16 to 21.
    pin: (disk size, bytes of the snapshot table), or None for no pinned base.

    Raises UnsupportedImageError: the volume is too large for any qcow2 image.
    Raises ValueError: the arguments contradict each other.
    """
    _check_arguments(volume_size, data_runs, cluster_bits, pin)
    cluster = 1 << cluster_bits
    table_bits = cluster_bits - 3
    shift = cluster_bits - BLOCK_BITS
    data = RankedRuns.from_runs(_coarsen(data_runs, shift))
    tables = RankedRuns.from_runs(_coarsen(np.stack([data.starts, data.stops], 1), table_bits))
    l1_size = max(1, -(-volume_size // (cluster << table_bits)))
    pin_size, table_bytes = pin if pin is not None else (0, 0)
    pin_l1_size = max(1, -(-pin_size // (cluster << table_bits))) if pin is not None else 0
    snapshots = -(-table_bytes // cluster)
    l1, pin_l1 = -(-8 * l1_size // cluster), -(-8 * pin_l1_size // cluster)
    rest = 1 + snapshots + l1 + pin_l1 + tables.total + data.total
    table_clusters, blocks = _count_refcount_clusters(rest, cluster)
    begin = 1 + table_clusters + blocks
    return Layout(
        cluster_bits=cluster_bits,
        refcount_table=1,
        refcount_table_clusters=table_clusters,
        refcount_blocks=1 + table_clusters,
        refcount_block_count=blocks,
        snapshots=begin,
        l1=begin + snapshots,
        l1_size=l1_size,
        pin_l1=begin + snapshots + l1,
        pin_l1_size=pin_l1_size,
        tables=begin + snapshots + l1 + pin_l1,
        data=begin + snapshots + l1 + pin_l1 + tables.total,
        clusters=rest + table_clusters + blocks,
        table_runs=tables,
        data_runs=data,
    )


def _check_arguments(
    volume_size: int, data_runs: Int64s, cluster_bits: int, pin: tuple[int, int] | None
) -> None:
    if not BLOCK_BITS <= cluster_bits <= 21:
        raise ValueError("cluster_bits must be 16 to 21")
    if volume_size < 0 or volume_size % 512:
        raise UnsupportedImageError(
            f"a qcow2 volume must be a multiple of 512 bytes and this one has {volume_size};"
            " restore it to a raw image"
        )
    size_limit = min(MAX_VOLUME_SIZE, L1_ENTRIES_LIMIT << (2 * cluster_bits - 3))
    if volume_size > size_limit:
        raise UnsupportedImageError(
            f"a volume of {volume_size} bytes is over the limit of {size_limit >> 40} TiB"
        )
    end = volume_size if pin is None else pin[0]
    if end > volume_size:
        raise ValueError("the pinned base is larger than the volume")
    if data_runs.ndim != 2 or data_runs.shape[1] != 2:
        raise ValueError("data_runs must be int64[k, 2]")
    if len(data_runs) and (
        data_runs.min() < 0
        or data_runs[:, 1].max() > -(-end // (1 << BLOCK_BITS))
        or np.any(data_runs[:, 0] >= data_runs[:, 1])
    ):
        raise ValueError("data_runs must be non-empty and inside the volume (and its pinned base)")


def _coarsen(runs: Int64s, shift: int) -> Int64s:
    """Return the runs in units of 2^shift, each with every unit that it overlaps."""
    return np.stack([runs[:, 0] >> shift, -(-runs[:, 1] >> shift)], axis=1)


def _count_refcount_clusters(rest: int, cluster: int) -> tuple[int, int]:
    """Return the numbers (table clusters, blocks) needed to count `rest` clusters and themselves."""
    per_block = cluster * 8 // REFCOUNT_BITS
    table = blocks = 0
    while True:
        need = -(-(rest + table + blocks) // per_block)
        table_need = -(-8 * need // cluster)
        if (table_need, need) == (table, blocks):
            return table, blocks
        table, blocks = table_need, need
