"""`restore`: into a new file, or with `--onto` onto an existing image.

A new file: one manifest is read and each pack once, straight into the file. Its layout is known before the
first block arrives, so workers write blocks to their final place. The file has a temporary name in the
target's folder, and gets its own name only when it is complete and on disk.

Onto an existing image: all of it is compared first, then what differs is written. The digests of the target's
blocks are compared with those in the pack indexes. So the next attempt resumes a half-written target, and
nothing needs to be remembered for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from island_fast.dirtymap import BLOCK_SIZE, DirtyMap
from island_fast.errors import DamagedObjectError, IslandError, UsageError
from island_fast.files import reserve_space
from island_fast.formats.manifest import Manifest
from island_fast.formats.runs import Runs
from island_fast.images.new_file import create_file
from island_fast.images.target import ExistingImage
from island_fast.progress import Progress
from island_fast.qcow2.writer import Qcow2Writer, RawWriter
from island_fast.repository.digests import ExpectedDigests
from island_fast.repository.open import FoundSnapshot
from island_fast.repository.pack_reader import PackReader
from island_fast.repository.streams import compare_blocks, restore_blocks
from island_fast.results import Restored, RestoredOnto, command_to_resume

__all__ = ["RestoreTarget", "restore", "restore_onto"]

_WINDOW = 1 << 13  # words of a map, 64 blocks each
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RestoreTarget:
    """The file to create: its path, its format, "qcow2" or "raw", and whether a qcow2 file holds the pin.

    With the pin, the next snapshot of the file is incremental. UsageError for any other format.
    """

    path: Path
    image_format: str
    pin: bool

    def __post_init__(self) -> None:
        if self.image_format not in ("qcow2", "raw"):
            raise UsageError(f"{self.image_format!r} is not a known format; use qcow2 or raw")


def restore(found: FoundSnapshot, manifest: Manifest, target: RestoreTarget, progress: Progress) -> Restored:
    """Write the volume of a snapshot to the new file `target`; see `Repository.restore`."""
    began = time.monotonic()
    lineage = found.lineage
    packs = PackReader(lineage)
    runs = manifest.runs_by_key(lineage.numbers)
    with create_file(target.path) as fd:
        writer: Qcow2Writer | RawWriter
        if target.image_format == "qcow2":
            # A pin of another size cannot hold what the volume holds, and one of a wrong clock does not fit
            # into an image; the next snapshot is then a full scan.
            fits = manifest.pin.disk_size == manifest.volume_size and manifest.pin.seconds < 1 << 32
            pin = manifest.pin if target.pin and fits else None
            writer = Qcow2Writer(fd, manifest.volume_size, runs.intervals(), _cluster_bits(manifest), pin)
            reserve_space(fd)  # all of it is about to be written, in the order in which packs arrive
        else:
            writer = RawWriter(fd, manifest.volume_size)
        restore_blocks(runs, packs, writer.write, lineage.store.range_gap, progress)
        writer.finish()
    return Restored(
        snapshot=found.row.id,
        target=str(target.path),
        format=target.image_format,
        volume_size=manifest.volume_size,
        bytes_read=packs.fetched.bytes + found.row.manifest_size,
        bytes_written=runs.blocks * BLOCK_SIZE,
        objects_read=packs.fetched.objects + 1,
        seconds=time.monotonic() - began,
    )


def _cluster_bits(manifest: Manifest) -> int:
    """Return the cluster size of the image that was stored, if a block fits into a cluster; else 64 KiB."""
    try:
        bits = int(manifest.properties.get("qcow2.cluster_bits", "16"))
    except ValueError:
        return 16
    return bits if 16 <= bits <= 21 else 16


def restore_onto(
    found: FoundSnapshot, manifest: Manifest, target: ExistingImage, dry_run: bool, progress: Progress
) -> RestoredOnto:
    """Turn the open `target` into the volume of a snapshot; see `Repository.restore_onto`.

    If the target is larger than the volume, the rest of it becomes zeros. Nothing is written before
    everything is compared. With `dry_run` nothing is written. An error that leaves the target half written is
    preceded by a warning that says how to resume.
    """
    began = time.monotonic()
    packs = PackReader(found.lineage)
    runs = manifest.runs_by_key(found.lineage.numbers)
    todo = _compare_target(found, runs, packs, target, progress)
    compared = target.view.bytes_read
    if not dry_run:
        target.begin_writing()
        with _warn_if_half_written(target, found.row.id):
            _overwrite(todo, runs, packs, target, progress)
    return RestoredOnto(
        snapshot=found.row.id,
        target=str(target.path),
        format=target.image_format,
        volume_size=manifest.volume_size,
        target_size=target.size,
        bytes_compared=compared,
        bytes_written=_bytes(target, todo.data) if dry_run else target.written,
        bytes_zeroed=_bytes(target, todo.zero) if dry_run else target.zeroed,
        bytes_read=packs.fetched.bytes + found.row.manifest_size,
        objects_read=packs.fetched.objects + 1,
        seconds=time.monotonic() - began,
    )


@dataclass(frozen=True, slots=True)
class _BlocksToWrite:
    """The blocks of the target to be written: with data from the store, and with zeros."""

    data: DirtyMap
    zero: DirtyMap


def _compare_target(
    found: FoundSnapshot, runs: Runs, packs: PackReader, target: ExistingImage, progress: Progress
) -> _BlocksToWrite:
    """Compare the target with the snapshot.

    Blocks that the target does not hold are zero, so they are not read and no digest is fetched for them.
    """
    held = target.find_data(progress)
    expected = ExpectedDigests(runs, packs.read_index)
    differing, unknown = compare_blocks(target.view.read, held, expected, found.lineage, progress)
    if unknown:
        raise DamagedObjectError(f"the manifest of snapshot {found.row.id} names slots that its packs lack")
    named = DirtyMap.from_runs(held.blocks, runs.intervals())
    return _select_blocks(differing, named, held)


def _select_blocks(differing: DirtyMap, named: DirtyMap, held: DirtyMap) -> _BlocksToWrite:
    """Select the blocks to write.

    Data: blocks that the manifest names and that differ or are not held. Zeros: blocks that differ and that
    the manifest does not name. This is done a window at a time: whole maps have 32 MiB each for 16 TiB, and
    only what is set in them takes memory.
    """
    todo = _BlocksToWrite(DirtyMap(held.blocks), DirtyMap(held.blocks))
    for at in range(0, held.words.size, _WINDOW):
        part = slice(at, at + _WINDOW)
        other, name = differing.words[part], named.words[part]
        for blocks, words in (
            (todo.data, name & (other | ~held.words[part])),
            (todo.zero, other & ~name),
        ):
            if words.any():
                blocks.words[part] = words
    return todo


def _overwrite(
    todo: _BlocksToWrite, runs: Runs, packs: PackReader, target: ExistingImage, progress: Progress
) -> None:
    """Write what differs, flush it to disk, and close the target."""
    done, total = 0, todo.zero.count()
    progress("zero", 0, total * BLOCK_SIZE)
    for window in todo.zero.iter_runs():
        for start, stop in window.tolist():
            target.zero(start, stop)
            done += stop - start
            progress("zero", done * BLOCK_SIZE, total * BLOCK_SIZE)
    restore_blocks(runs, packs, target.write, packs.store.range_gap, progress, todo.data)
    target.finish()


@contextmanager
def _warn_if_half_written(target: ExistingImage, snapshot: str) -> Iterator[None]:
    """Log how to resume if the body fails."""
    try:
        yield
    except (IslandError, OSError):
        command = command_to_resume(snapshot, target.path, target.image_format)
        _LOG.warning("%s can be a mix of old and new; run '%s'", target.path, command)
        raise


def _bytes(target: ExistingImage, blocks: DirtyMap) -> int:
    """Return the size of `blocks` in bytes, of which the last one can be partial."""
    return target.bytes_of(blocks.count(), blocks.blocks - 1 in blocks)
