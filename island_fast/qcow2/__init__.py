"""qcow2 images: which blocks changed, what is in them, and new images; no qemu in the path.

`Image` opens one read-only, `changed` and `allocated` look at its tables, `PointReader` reads
blocks; `island_fast.qcow2.writer` makes new images. Everything in an image is hostile input.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from island_fast.qcow2.header import MAX_VOLUME_SIZE, Header, parse_header
from island_fast.qcow2.reader import Image, Point
from island_fast.qcow2.snapshots import InternalSnapshot, PinnedBase, find_pinned

if TYPE_CHECKING:
    from island_fast.qcow2.clusters import PointReader
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

# To look at an image nothing of these is needed, and they take a while.
_LATE = {"PointReader": "clusters"} | dict.fromkeys(
    ["Changed", "allocated", "changed", "find_shared_copied"], "tables"
)


def __getattr__(name: str) -> object:
    """Import what is asked for the first time."""
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
