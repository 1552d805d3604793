"""Measuring the space that volumes use, from catalogs and manifests: nothing is listed, no pack is read."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import fields

from island_fast.arrays import Int64s
from island_fast.dirtymap import BLOCK_SIZE, merge_intervals, total
from island_fast.errors import NotFoundError
from island_fast.progress import Progress
from island_fast.repository.lineage import Lineage
from island_fast.repository.liveness import only_needed_by
from island_fast.results import Usage, VolumeUsage

__all__ = ["add_up", "measure_usage"]

_NEIGHBOURS = 4  # snapshots whose slots are kept: enough to read each once in a lineage without branches


def measure_usage(lineage: Lineage, progress: Progress) -> VolumeUsage:
    """Return how much data the snapshots of `lineage` hold, and how much space they use.

    The lineage must have been refreshed. Manifests that are not in the local cache are fetched; progress
    counts the bytes of all of them. If a snapshot is deleted meanwhile, everything is counted again.
    """
    while True:
        with contextlib.suppress(NotFoundError):
            return _measure(lineage, progress)


def _measure(lineage: Lineage, progress: Progress) -> VolumeUsage:
    state, numbers = lineage.state, lineage.numbers
    done, sizes = 0, sum(row.manifest_size for row in state.live.values())
    logical = alone = 0  # slots

    @functools.lru_cache(maxsize=_NEIGHBOURS)
    def slots(snapshot: str) -> Int64s:
        return merge_intervals(lineage.manifest(state.live[snapshot]).slot_intervals(numbers))

    for row in state.live.values():
        logical += total(slots(row.id))
        alone += total(only_needed_by(row, state, numbers, lambda one: slots(one.id)))
        done += row.manifest_size
        progress("usage", done, sizes)
    distinct = int(state.packs.slots.sum()) - total(state.dead)
    dropped = sum(row.manifest_size for row in state.dropped.values())
    return _make_row(
        lineage.name,
        snapshots=len(state.live),
        bytes_logical=logical * BLOCK_SIZE,
        bytes_distinct=distinct * BLOCK_SIZE,
        bytes_shared=(distinct - alone) * BLOCK_SIZE,
        bytes_stored=int(state.packs.size.sum()) + sizes + dropped,
        bytes_dead=int(state.packs.dead.sum()) + dropped,
        bytes_freed=state.reclaimable_bytes(),
    )


def add_up(volumes: Sequence[VolumeUsage]) -> Usage:
    """Return the usage of these volumes, with the total."""
    counted = [f.name for f in fields(VolumeUsage) if f.name not in ("volume", "compression")]
    sums = {name: sum(getattr(one, name) for one in volumes) for name in counted}
    return Usage(tuple(volumes), _make_row(None, **sums))


def _make_row(volume: str | None, **figures: int) -> VolumeUsage:
    """Return a row of the answer, with the compression that its figures give."""
    needed = figures["bytes_stored"] - figures["bytes_dead"]
    return VolumeUsage(volume, **figures, compression=figures["bytes_distinct"] / needed if needed else None)
