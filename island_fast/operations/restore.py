"""Restoring a snapshot: one manifest, each pack once, straight into a new image.

The target's layout is known before the first block comes, so workers write blocks to their final place. The
image is made under a temporary name beside the target and gets its own only when it is whole and on disk.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from island_fast.dirtymap import BLOCK_SIZE
from island_fast.errors import IslandError, NotFoundError, RefusedError, UsageError
from island_fast.files import link_new, reserve, sync_folder
from island_fast.formats.catalog import SnapshotRow
from island_fast.formats.manifest import Manifest
from island_fast.progress import Progress
from island_fast.qcow2.writer import Qcow2Writer, RawWriter
from island_fast.repository.lineage import Lineage
from island_fast.repository.pack_reader import PackReader, deletion_told
from island_fast.repository.streams import receive
from island_fast.results import Restored

__all__ = ["Target", "restore"]


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
    with new_file(target.path) as fd:
        writer: Qcow2Writer | RawWriter
        if target.image_format == "qcow2":
            # A pin of another size could not hold what the volume holds: then the next scan is a full one.
            fits = manifest.pin.disk_size == manifest.volume_size
            pin = manifest.pin if target.pin and fits else None
            writer = Qcow2Writer(fd, manifest.volume_size, runs.intervals(), _cluster_bits(manifest), pin)
            reserve(fd)  # all of it is about to be written, in the order in which packs come
        else:
            writer = RawWriter(fd, manifest.volume_size)
        with deletion_told(lineage, row, "restored"):
            receive(runs, packs, writer.write, lineage.store.range_gap, progress)
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


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[int]:
    """A descriptor of a new file that becomes `target` when the body ends well, and else disappears.

    The file is on disk before it gets its name; a target that exists is refused, also at the last moment.
    """
    if os.path.lexists(target):
        raise RefusedError(f"{target} exists already; name another target or remove it first")
    temporary = target.with_name(f".{target.name[:200]}.island-{os.urandom(8).hex()}")
    try:  # from before the file is there: a signal may come between its making and the next line
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileNotFoundError as error:
            raise NotFoundError(
                f"{target} cannot be made: there is no folder {target.parent}; make it or name another target"
            ) from error
        except OSError as error:
            raise IslandError(f"{target} cannot be made: {error.strerror}") from error
        with _named(target):
            try:
                yield fd
                os.fsync(fd)
            finally:
                os.close(fd)
            if not link_new(str(temporary), str(target)):
                raise RefusedError(f"{target} was made by someone else meanwhile; it is left alone")
            sync_folder(target.parent)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    """Turn a failure of the target's file system into a sentence."""
    try:
        yield
    except OSError as error:
        raise IslandError(
            f"{target} cannot be written: {error.strerror}; free space or name another place"
        ) from error
