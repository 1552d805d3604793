"""Restoring a snapshot onto an image that is there: compare all of it first, then write what differs.

What differs is told by digests: those of the target's blocks and those in the pack indexes. So a target
that an earlier attempt left half written is gone on with by the next one, and nothing has to be remembered.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from island_fast.dirtymap import BLOCK_SIZE, DirtyMap
from island_fast.errors import DamagedObjectError, IslandError
from island_fast.formats.manifest import Manifest
from island_fast.formats.runs import Runs
from island_fast.images.target import Existing
from island_fast.operations.compare import Expected, differences
from island_fast.operations.parent import keyed
from island_fast.progress import Progress
from island_fast.repository.open import Found
from island_fast.repository.pack_reader import PackReader, deletion_told
from island_fast.repository.streams import receive
from island_fast.results import RestoredOnto, again

__all__ = ["overwrite"]

_WINDOW = 1 << 13  # words of a map, 64 blocks each
_LOG = logging.getLogger(__name__)


def overwrite(
    found: Found, manifest: Manifest, target: Existing, dry_run: bool, progress: Progress
) -> RestoredOnto:
    """Make `target` the snapshot's volume, followed by zeros where it is larger; or tell what that would do.

    Nothing is written before all of it is compared. An error that leaves it half written is told besides.
    """
    began = time.monotonic()
    packs = PackReader(found.lineage)
    runs = keyed(found.lineage, manifest)
    with deletion_told(found.lineage, found.row, "restored"):
        plan = _compare(found, runs, packs, target, progress)
        compared = target.view.bytes_read
        if not dry_run:
            target.refuse_held()  # comparing may have taken hours
            with _half_written_told(target, found.row.id):
                _write(plan, runs, packs, target, progress)
    return RestoredOnto(
        snapshot=found.row.id,
        target=str(target.path),
        format=target.image_format,
        volume_size=manifest.volume_size,
        target_size=target.size,
        bytes_compared=compared,
        bytes_written=_bytes(target, plan.data) if dry_run else target.written,
        bytes_zeroed=_bytes(target, plan.zero) if dry_run else target.zeroed,
        bytes_read=packs.fetched.bytes + found.row.manifest_size,
        objects_read=packs.fetched.objects + 1,
        seconds=time.monotonic() - began,
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """The target's blocks to be written: from the store, and with zeros."""

    data: DirtyMap
    zero: DirtyMap


def _compare(found: Found, runs: Runs, packs: PackReader, target: Existing, progress: Progress) -> _Plan:
    """What differs. Of blocks that the target does not hold, no digest is asked for: they are zero."""
    held = target.data(progress)
    expected = Expected(runs, packs.index)
    differing, unknown = differences(target.view, held, expected, found.lineage, progress)
    if unknown:
        raise DamagedObjectError(f"the manifest of snapshot {found.row.id} names slots that no pack has")
    named = DirtyMap.from_runs(held.blocks, runs.intervals())
    return _planned(differing, named, held)


def _planned(differing: DirtyMap, named: DirtyMap, held: DirtyMap) -> _Plan:
    """Data: what is named and differs or is not held. Zeros: what differs and is not named.

    A window at a time: whole maps have 32 MiB each for 16 TiB, and only what is set in them takes memory.
    """
    plan = _Plan(DirtyMap(held.blocks), DirtyMap(held.blocks))
    for at in range(0, held.words.size, _WINDOW):
        part = slice(at, at + _WINDOW)
        other, name = differing.words[part], named.words[part]
        for found, words in (
            (plan.data, name & (other | ~held.words[part])),
            (plan.zero, other & ~name),
        ):
            if words.any():
                found.words[part] = words
    return plan


def _write(plan: _Plan, runs: Runs, packs: PackReader, target: Existing, progress: Progress) -> None:
    """Write what differs, bring it to the disk, and close the target."""
    done, total = 0, plan.zero.count()
    progress("zero", 0, total * BLOCK_SIZE)
    for window in plan.zero.iter_runs():
        for start, stop in window.tolist():
            target.zero(start, stop)
            done += stop - start
            progress("zero", done * BLOCK_SIZE, total * BLOCK_SIZE)
    receive(runs, packs, target.write, packs.store.range_gap, progress, plan.data)
    target.finish()


@contextmanager
def _half_written_told(target: Existing, snapshot: str) -> Iterator[None]:
    try:
        yield
    except (IslandError, OSError):
        command = again(snapshot, target.path, target.image_format)
        _LOG.warning("%s may be partly what it was and partly the snapshot; run '%s'", target.path, command)
        raise


def _bytes(target: Existing, blocks: DirtyMap) -> int:
    return target.bytes_of(blocks.count(), blocks.blocks - 1 in blocks)
