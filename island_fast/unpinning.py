"""Dropping the pins that snapshots left in an image; the next snapshot of it scans in full."""

from __future__ import annotations

import os
from pathlib import Path

from island_fast.results import Unpinned
from island_fast.source import Qcow2Source, pinned_snapshot

__all__ = ["unpin"]


def unpin(image: str | Path, qmp: str | Path | None = None) -> Unpinned:
    """Drop every pin in `image`, of whatever repository; no repository is asked.

    `qmp` is the monitor socket of the process that has the image open. RefusedError while a snapshot of the
    image is being taken. What only the pins held becomes free inside the image, and where that process or
    qemu-img passes discards on, in the file system.
    """
    path = Path(os.path.realpath(image))
    with Qcow2Source(path, Path(qmp) if qmp else None) as source:
        before = source.image.bytes_on_disk
        pins = [internal for internal in source.internals if pinned_snapshot(internal.name)]
        for internal in pins:
            source.unpin(internal)
        freed = max(0, before - source.image.bytes_on_disk)
    return Unpinned(str(path), tuple(internal.name for internal in pins), freed)
