"""Dropping the pins that snapshots left in an image."""

from __future__ import annotations

import os
from pathlib import Path

from island_fast.images.pins import pinned_lineage, pinned_snapshot
from island_fast.images.qcow2_source import Qcow2Source
from island_fast.repository.open import RepositoryBase
from island_fast.results import Unpinned

__all__ = ["unpin"]


def unpin(
    image: str | Path, qmp: str | Path | None = None, *, orphaned_in: RepositoryBase | None = None
) -> Unpinned:
    """Drop every pin in `image`, of whatever repository; the next snapshot of the image scans it in full.

    With `orphaned_in`, drop only those that interrupted snapshots of that repository left and that no table
    diff can use. `qmp` is the monitor socket of the process that has the image open. RefusedError while a
    snapshot of the image is in progress. The space that only the pins held becomes free inside the image. It
    also becomes free in the file system if the program that drops the pins passes discards on.
    """
    path = Path(os.path.realpath(image))
    with Qcow2Source(path, Path(qmp) if qmp else None, only_unpin=True) as source:
        before = source.image.bytes_on_disk
        pins = [internal for internal in source.internal_snapshots if pinned_snapshot(internal.name)]
        if orphaned_in is not None:
            pins = [internal for internal in pins if _is_orphan(internal.name, orphaned_in)]
        for internal in pins:
            source.unpin(internal)
        freed = max(0, before - source.image.bytes_on_disk)
    return Unpinned(str(path), tuple(internal.name for internal in pins), freed)


def _is_orphan(pin: str, repository: RepositoryBase) -> bool:
    """Return whether a pin belongs to `repository`, but is neither a live snapshot's nor still a base."""
    name = pinned_lineage(repository.id, pin)
    if name is None:
        return False
    lineage = repository.lineage(name)
    lineage.refresh()
    retired = {registration.snapshot for registration in lineage.files.deleted_snapshots()}
    return pinned_snapshot(pin) not in lineage.state.live.keys() | retired
