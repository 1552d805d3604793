"""Looking at an image without touching it: where its data lies, and what it is.

Nothing here locks, writes or asks a store, but for what `Repository.outlook` adds. Formats are named by the
caller and never probed. What the map of a qcow2 does not need is imported where it is used, for it takes
longer than most maps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from island_fast.errors import ImageInUseError, UsageError
from island_fast.qcow2.extents import DATA, HOLE, Extents, extents
from island_fast.qcow2.image import Image
from island_fast.qcow2.snapshots import InternalSnapshot
from island_fast.qemu.image_lock import writer_present

if TYPE_CHECKING:
    from island_fast.results import ImageInfo, InternalInfo

__all__ = ["image_info", "image_map"]


def image_map(
    path: Path, *, snapshot: str | None = None, since: str | None = None, image_format: str = "qcow2"
) -> Iterator[Extents]:
    """The extents of an image's volume, in windows: as it is, or at the internal snapshot `snapshot`.

    With `since`, an extent says whether it may have changed since that internal snapshot. The image as it is
    cannot be shown while a process writes to it (ImageInUseError): its tables are not all on disk then.
    """
    if image_format == "raw":
        if snapshot or since:
            raise UsageError("a raw image has no internal snapshots; leave out --snapshot and --since")
        yield from _raw_map(path)
        return
    with Image.open(path, backed=True) as image:
        if snapshot is None and writer_present(image.fd):
            raise ImageInUseError(
                f"{path} is open for writing in another process; name an internal snapshot with --snapshot"
            )
        point = image.at(image.named(snapshot)) if snapshot else image.active()
        then = image.at(image.named(since)) if since else None
        yield from extents(image, point, then)


def _raw_map(path: Path) -> Iterator[Extents]:
    """Data and holes of a raw image, as its file system tells them."""
    from island_fast.images.raw_source import data_extents, open_raw

    fd, size = open_raw(path)
    try:
        at = 0
        for start, stop in data_extents(fd, size):
            if start > at:
                yield _one(at, start, HOLE)
            yield _one(start, stop, DATA)
            at = stop
        if at < size:
            yield _one(at, size, HOLE)
    finally:
        os.close(fd)


def _one(start: int, stop: int, kind: int) -> Extents:
    return Extents(
        np.array([start]), np.array([stop - start]), np.array([kind], np.uint8), np.zeros(1, np.bool_)
    )


def image_info(path: Path) -> ImageInfo:
    """What a qcow2 image says of itself; also of one that is in use, as of its last flush."""
    from island_fast.qcow2.bitmaps import read_bitmaps
    from island_fast.qcow2.names import escape
    from island_fast.results import BitmapInfo, ImageInfo

    with Image.open(path, backed=True) as image:
        header = image.header
        features = {
            "lazy refcounts": header.lazy_refcounts,
            "dirty": header.dirty,
            "corrupt": header.corrupt,
            "extended L2": header.entry_words == 2,
        }
        bitmaps = read_bitmaps(image)
        return ImageInfo(
            image=str(path),
            format="qcow2",
            version=header.version,
            volume_size=header.size,
            file_size=image.file_size,
            cluster_size=header.cluster_size,
            compression=header.compression,
            backing_file=None if header.backing_name is None else escape(header.backing_name),
            features=tuple(name for name, present in features.items() if present),
            in_use=writer_present(image.fd),
            internal_snapshots=tuple(_internal(s) for s in image.snapshots),
            bitmaps=tuple(BitmapInfo(b.name, b.granularity, str(b.state)) for b in bitmaps.listed),
            bitmap_trouble=bitmaps.trouble,
        )


def _internal(internal: InternalSnapshot) -> InternalInfo:
    from island_fast.images.pins import pinned_snapshot
    from island_fast.results import InternalInfo, timestamp

    return InternalInfo(
        name=internal.name,
        id=internal.id,
        created=timestamp(internal.seconds * 10**9 + internal.nanoseconds),
        volume_size=internal.disk_size,
        pin_of=pinned_snapshot(internal.name),
    )
