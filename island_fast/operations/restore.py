"""Restoring a snapshot: one manifest, each pack once, straight into a new image.

The target's layout is known before the first block comes, so workers write blocks to their final place. The
image is made under a temporary name beside the target and gets its own only when it is whole and on disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from island_fast.dirtymap import BLOCK_SIZE, DirtyMap
from island_fast.errors import DamagedObjectError, IslandError, UsageError
from island_fast.files import reserve_space
from island_fast.formats.catalog import SnapshotRow
from island_fast.formats.manifest import Manifest
from island_fast.formats.runs import Runs
from island_fast.images.new_file import create_file
from island_fast.images.target import ExistingImage
from island_fast.progress import Progress
from island_fast.qcow2.writer import Qcow2Writer, RawWriter
from island_fast.repository.digests import ExpectedDigests
from island_fast.repository.lineage import Lineage, deletion_told
from island_fast.repository.open import Found
from island_fast.repository.pack_reader import PackReader
from island_fast.repository.streams import compare_blocks, restore_blocks
from island_fast.results import Restored, RestoredOnto, again

__all__ = ["Target", "overwrite", "restore"]

_WINDOW = 1 << 13  # words of a map, 64 blocks each
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """The file to make: where, as "qcow2" or "raw", and whether a qcow2 holds the pinned base.

    With it, the next snapshot of that lineage is incremental. UsageError for any other format.
    """

    path: Path
    image_format: str
    pin: bool

    def __post_init__(self) -> None:
        if self.image_format not in ("qcow2", "raw"):
            raise UsageError(f"{self.image_format!r} is no format that is known; use qcow2 or raw")


def restore(
    lineage: Lineage, row: SnapshotRow, manifest: Manifest, target: Target, progress: Progress
) -> Restored:
    """Write the snapshot's volume to `target`, which must not exist."""
    began = time.monotonic()
    packs = PackReader(lineage)
    keys = manifest.packs.keys(lineage.numbers)
    runs = replace(manifest.runs, pack=keys[manifest.runs.pack])
    with create_file(target.path) as fd:
        writer: Qcow2Writer | RawWriter
        if target.image_format == "qcow2":
            # A pin of another size could not hold what the volume holds: then the next scan is a full one.
            fits = manifest.pin.disk_size == manifest.volume_size
            pin = manifest.pin if target.pin and fits else None
            writer = Qcow2Writer(fd, manifest.volume_size, runs.intervals(), _cluster_bits(manifest), pin)
            reserve_space(fd)  # all of it is about to be written, in the order in which packs come
        else:
            writer = RawWriter(fd, manifest.volume_size)
        with deletion_told(lineage, row, "restored"):
            restore_blocks(runs, packs, writer.write, lineage.store.range_gap, progress)
        writer.finish()
    return Restored(
        snapshot=row.id,
        target=str(target.path),
        format=target.image_format,
        volume_size=manifest.volume_size,
        bytes_read=packs.fetched.bytes + row.manifest_size,
        bytes_written=runs.blocks * BLOCK_SIZE,
        objects_read=packs.fetched.objects + 1,
        seconds=time.monotonic() - began,
    )


def _cluster_bits(manifest: Manifest) -> int:
    """The cluster size of the image that was stored, where a block still fits in one; else 64 KiB."""
    try:
        bits = int(manifest.properties.get("qcow2.cluster_bits", "16"))
    except ValueError:
        return 16
    return bits if 16 <= bits <= 21 else 16


def overwrite(
    found: Found, manifest: Manifest, target: ExistingImage, dry_run: bool, progress: Progress
) -> RestoredOnto:
    """Make `target` the snapshot's volume, followed by zeros where it is larger; or tell what that would do.

    Nothing is written before all of it is compared. An error that leaves it half written is told besides.
    """
    began = time.monotonic()
    packs = PackReader(found.lineage)
    runs = manifest.runs_by_key(found.lineage.numbers)
    with deletion_told(found.lineage, found.row, "restored"):
        plan = _compare(found, runs, packs, target, progress)
        compared = target.view.bytes_read
        if not dry_run:
            target.refuse_if_open()  # comparing may have taken hours
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


def _compare(found: Found, runs: Runs, packs: PackReader, target: ExistingImage, progress: Progress) -> _Plan:
    """What differs. Of blocks that the target does not hold, no digest is asked for: they are zero."""
    held = target.find_data(progress)
    expected = ExpectedDigests(runs, packs.read_index)
    differing, unknown = compare_blocks(target.view.read, held, expected, found.lineage, progress)
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


def _write(plan: _Plan, runs: Runs, packs: PackReader, target: ExistingImage, progress: Progress) -> None:
    """Write what differs, bring it to the disk, and close the target."""
    done, total = 0, plan.zero.count()
    progress("zero", 0, total * BLOCK_SIZE)
    for window in plan.zero.iter_runs():
        for start, stop in window.tolist():
            target.zero(start, stop)
            done += stop - start
            progress("zero", done * BLOCK_SIZE, total * BLOCK_SIZE)
    restore_blocks(runs, packs, target.write, packs.store.range_gap, progress, plan.data)
    target.finish()


@contextmanager
def _half_written_told(target: ExistingImage, snapshot: str) -> Iterator[None]:
    try:
        yield
    except (IslandError, OSError):
        command = again(snapshot, target.path, target.image_format)
        _LOG.warning("%s may be partly what it was and partly the snapshot; run '%s'", target.path, command)
        raise


def _bytes(target: ExistingImage, blocks: DirtyMap) -> int:
    return target.bytes_of(blocks.count(), blocks.blocks - 1 in blocks)
