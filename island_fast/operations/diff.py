"""Finding what changed between two snapshots of a lineage from their manifests; no pack is read."""

from __future__ import annotations

import numpy as np

from island_fast.arrays import Bools, Int64s
from island_fast.dirtymap import BLOCK_SIZE
from island_fast.formats.keys import SnapshotNumbers
from island_fast.formats.manifest import Manifest
from island_fast.formats.runs import NOT_NAMED
from island_fast.results import Difference

__all__ = ["diff_snapshots"]


def diff_snapshots(since: Manifest, snapshot: Manifest, numbers: SnapshotNumbers) -> Difference:
    """Return the extents of `snapshot` whose content can differ from that of `since`.

    Both are of the lineage that `numbers` belongs to; either can be the older one. `since` counts as resized
    to the size of `snapshot`: what is past that end is ignored, and what is past its own end is zero. Blocks
    in the same slot are equal, and so are zeros. Blocks in different slots are reported as changed, although
    their content can be equal.
    """
    end = snapshot.blocks
    bounds = [np.array([0, end]), since.runs.intervals().ravel(), snapshot.runs.intervals().ravel()]
    edges = np.unique(np.concatenate(bounds))
    edges = edges[edges <= end]
    start, stop = edges[:-1], edges[1:]  # runs begin and end at edges only, so first blocks decide
    now = snapshot.runs_by_key(numbers).slot_keys(start)
    changed = np.flatnonzero(now != since.runs_by_key(numbers).slot_keys(start))
    start, stop, data = _join_neighbours(start[changed], stop[changed], now[changed] != NOT_NAMED)
    stop = np.minimum(stop * BLOCK_SIZE, snapshot.volume_size)
    start = start * BLOCK_SIZE
    length = stop - start
    return Difference(
        volume=snapshot.lineage,
        since=since.snapshot,
        snapshot=snapshot.snapshot,
        since_size=since.volume_size,
        volume_size=snapshot.volume_size,
        bytes_changed=int(length.sum()),
        bytes_data=int(length[data].sum()),
        bytes_zero=int(length[~data].sum()),
        start=start,
        length=length,
        data=data,
    )


def _join_neighbours(start: Int64s, stop: Int64s, data: Bools) -> tuple[Int64s, Int64s, Bools]:
    """Join intervals that touch and have the same value in `data`."""
    if not start.size:
        return start, stop, data
    begins = np.append(True, (start[1:] != stop[:-1]) | (data[1:] != data[:-1]))
    ends = np.append(begins[1:], True)
    return start[begins], stop[ends], data[begins]
