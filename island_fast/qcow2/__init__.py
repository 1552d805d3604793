"""qcow2 images: which blocks changed, what is in them, and new images; no qemu in the path.

`Image` opens one read-only, `changed` and `allocated` look at its tables, `PointReader` reads
blocks; `island_fast.qcow2.writer` makes new images. Everything in an image is hostile input.
"""

from island_fast.qcow2.clusters import PointReader
from island_fast.qcow2.header import MAX_VOLUME_SIZE, Header, parse_header
from island_fast.qcow2.reader import Image, Point
from island_fast.qcow2.snapshots import InternalSnapshot, PinnedBase, find_pinned
from island_fast.qcow2.tables import Changed, allocated, changed, find_shared_copied

__all__ = [
    "MAX_VOLUME_SIZE",
    "Changed",
    "Header",
    "Image",
    "InternalSnapshot",
    "PinnedBase",
    "Point",
    "PointReader",
    "allocated",
    "changed",
    "find_pinned",
    "find_shared_copied",
    "parse_header",
]
