"""What changed between two snapshots of one lineage, by their manifests: no pack is read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from island_fast.arrays import Int64s
from island_fast.dirtymap import BLOCK_SIZE
from island_fast.formats.keys import SnapshotNumbers
from island_fast.formats.manifest import Manifest
from island_fast.formats.runs import NOT_NAMED
from island_fast.results import Difference

__all__ = ["compare"]


def compare(since: Manifest, snapshot: Manifest, numbers: SnapshotNumbers) -> Difference:
    """The extents of `snapshot` whose content may not be what `since` had there.

    Both are of the lineage that `numbers` belongs to, in any order of age. `since` is taken as if its volume
    had been resized to the size of `snapshot`'s: what lay behind is cut off, what is new was zero. Blocks of
    one slot are equal, and so are zeros; different slots are told as changed, and may hold equal content.
    """
    end = snapshot.blocks
    bounds = [np.array([0, end]), since.runs.intervals().ravel(), snapshot.runs.intervals().ravel()]
    edges = np.unique(np.concatenate(bounds))
    edges = edges[edges <= end]
    start, stop = edges[:-1], edges[1:]  # between two edges runs only go on, so their first blocks decide
    now = snapshot.runs_by_key(numbers).slot_keys(start)
    changed = np.flatnonzero(now != since.runs_by_key(numbers).slot_keys(start))
    start, stop, data = _joined(start[changed], stop[changed], now[changed] != NOT_NAMED)
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


def _joined(start: Int64s, stop: Int64s, data: NDArray[np.bool_]) -> tuple[Int64s, Int64s, NDArray[np.bool_]]:
    """Intervals with neighbours that touch and are alike joined."""
    if not start.size:
        return start, stop, data
    begins = np.append(True, (start[1:] != stop[:-1]) | (data[1:] != data[:-1]))
    ends = np.append(begins[1:], True)
    return start[begins], stop[ends], data[begins]
