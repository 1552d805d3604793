"""What a lineage takes, by its catalog and its snapshots' manifests: nothing is listed, no pack is read."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from island_fast.dirtymap import BLOCK_SIZE, intersect_intervals, merge_intervals, subtract_intervals, total
from island_fast.errors import NotFoundError
from island_fast.lineage import Lineage
from island_fast.progress import Progress
from island_fast.reclaim import freeable
from island_fast.results import Usage, VolumeUsage

__all__ = ["measure", "summed"]


def measure(lineage: Lineage, progress: Progress) -> VolumeUsage:
    """What the snapshots of `lineage`, which was refreshed, hold and take.

    Progress counts the bytes of the manifests, of which those that are not in the local cache are fetched. If
    one goes meanwhile because its snapshot was deleted, all is counted again.
    """
    while True:
        with contextlib.suppress(NotFoundError):
            return _measured(lineage, progress)


def _measured(lineage: Lineage, progress: Progress) -> VolumeUsage:
    state = lineage.state
    rows = [*state.live.values()]
    done, sizes = 0, sum(row.manifest_size for row in rows)
    logical = 0
    once = several = np.zeros((0, 2), np.int64)  # slots that one snapshot holds, or more than one
    for row in rows:
        slots = lineage.manifest(row).slot_intervals(lineage.numbers)
        logical += total(slots)
        several = merge_intervals(np.concatenate([several, intersect_intervals(once, slots)]))
        once = subtract_intervals(np.concatenate([once, slots]), several)
        done += row.manifest_size
        progress("usage", done, sizes)
    dropped = sum(row.manifest_size for row in state.dropped.values())
    return _figures(
        lineage.name,
        snapshots=len(rows),
        bytes_logical=logical * BLOCK_SIZE,
        bytes_distinct=(total(once) + total(several)) * BLOCK_SIZE,
        bytes_shared=total(several) * BLOCK_SIZE,
        bytes_stored=int(state.packs.size.sum()) + sizes + dropped,
        bytes_dead=int(state.packs.dead.sum()) + dropped,
        bytes_freed=freeable(state),
    )


def summed(volumes: Sequence[VolumeUsage]) -> Usage:
    """Volumes, and what they take in all."""
    counted = [f.name for f in fields(VolumeUsage) if f.name not in ("volume", "compression")]
    sums = {name: sum(getattr(one, name) for one in volumes) for name in counted}
    return Usage(tuple(volumes), _figures(None, **sums))


def _figures(volume: str | None, **figures: int) -> VolumeUsage:
    needed = figures["bytes_stored"] - figures["bytes_dead"]
    return VolumeUsage(volume, **figures, compression=figures["bytes_distinct"] / needed if needed else None)
