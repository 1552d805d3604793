"""What a lineage takes, by its catalog and its snapshots' manifests: nothing is listed, no pack is read."""

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

__all__ = ["measure", "summed"]

_NEIGHBOURS = 4  # snapshots whose slots are held: in a lineage without branches each is read once


def measure(lineage: Lineage, progress: Progress) -> VolumeUsage:
    """What the snapshots of `lineage`, which was refreshed, hold and take.

    Progress counts the bytes of the manifests, of which those that are not in the local cache are fetched. If
    one goes meanwhile because its snapshot was deleted, all is counted again.
    """
    while True:
        with contextlib.suppress(NotFoundError):
            return _measured(lineage, progress)


def _measured(lineage: Lineage, progress: Progress) -> VolumeUsage:
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
    return _figures(
        lineage.name,
        snapshots=len(state.live),
        bytes_logical=logical * BLOCK_SIZE,
        bytes_distinct=distinct * BLOCK_SIZE,
        bytes_shared=(distinct - alone) * BLOCK_SIZE,
        bytes_stored=int(state.packs.size.sum()) + sizes + dropped,
        bytes_dead=int(state.packs.dead.sum()) + dropped,
        bytes_freed=state.reclaimable_bytes(),
    )


def summed(volumes: Sequence[VolumeUsage]) -> Usage:
    """Volumes, and what they take in all."""
    counted = [f.name for f in fields(VolumeUsage) if f.name not in ("volume", "compression")]
    sums = {name: sum(getattr(one, name) for one in volumes) for name in counted}
    return Usage(tuple(volumes), _figures(None, **sums))


def _figures(volume: str | None, **figures: int) -> VolumeUsage:
    needed = figures["bytes_stored"] - figures["bytes_dead"]
    return VolumeUsage(volume, **figures, compression=figures["bytes_distinct"] / needed if needed else None)
