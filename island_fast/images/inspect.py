"""Show an image without changing it: `map_image` for `island map`, `read_image_info` for `island info`.

Nothing here locks, writes or needs a store. The caller names the format; it is never probed. What the map of
a qcow2 does not need is imported where it is used, because those imports take longer than most maps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from island_fast.errors import ImageInUseError, UsageError
from island_fast.qcow2.extents import DATA, HOLE, Extents, iter_extents
from island_fast.qcow2.image import Image
from island_fast.qemu.image_lock import writer_present

if TYPE_CHECKING:
    from island_fast.results import ImageInfo

__all__ = ["map_image", "read_image_info"]


def map_image(
    path: Path, *, snapshot: str | None = None, since: str | None = None, image_format: str = "qcow2"
) -> Iterator[Extents]:
    """Yield the extents of an image's volume, in windows: now, or at the internal snapshot `snapshot`.

    With `since`, each extent says whether it may have changed since that internal snapshot; without,
    `changed` is false. While a process has the image open for writing, its active tables are not all on disk,
    so only an internal snapshot can be shown then; ImageInUseError otherwise. UsageError for `snapshot` or
    `since` with a raw image.
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
        point = image.point_at(image.find_named(snapshot)) if snapshot else image.active_point()
        then = image.point_at(image.find_named(since)) if since else None
        yield from iter_extents(image, point, then)


def _raw_map(path: Path) -> Iterator[Extents]:
    """Yield data and holes of a raw image, as its file system reports them."""
    from island_fast.files import find_extents
    from island_fast.images.raw_source import open_raw

    fd, size = open_raw(path)
    try:
        at = 0
        for start, stop in find_extents(fd, size):
            if start > at:
                yield _single_extent(at, start, HOLE)
            yield _single_extent(start, stop, DATA)
            at = stop
        if at < size:
            yield _single_extent(at, size, HOLE)
    finally:
        os.close(fd)


def _single_extent(start: int, stop: int, kind: int) -> Extents:
    """Return [start, stop) as the only row."""
    return Extents(
        np.array([start]), np.array([stop - start]), np.array([kind], np.uint8), np.zeros(1, np.bool_)
    )


def read_image_info(path: Path) -> ImageInfo:
    """Return what a qcow2 image says about itself.

    An image in use is read as it is on disk, that is as of its writer's last flush.
    """
    from island_fast.images.pins import pinned_snapshot
    from island_fast.qcow2.bitmaps import read_bitmaps
    from island_fast.qcow2.names import escape
    from island_fast.results import BitmapInfo, ImageInfo, InternalInfo, timestamp

    with Image.open(path, backed=True) as image:
        header = image.header
        features = {
            "lazy refcounts": header.lazy_refcounts,
            "dirty": header.dirty,
            "corrupt": header.corrupt,
            "extended L2": header.entry_words == 2,
        }
        internal_snapshots = tuple(
            InternalInfo(
                name=one.name,
                id=one.id,
                created=timestamp(one.seconds * 10**9 + one.nanoseconds),
                volume_size=one.disk_size,
                pin_of=pinned_snapshot(one.name),
            )
            for one in image.snapshots
        )
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
            internal_snapshots=internal_snapshots,
            bitmaps=tuple(BitmapInfo(b.name, b.granularity, str(b.state)) for b in bitmaps.listed),
            bitmap_trouble=bitmaps.trouble,
        )
