"""Comparing blocks on the host with what a snapshot should hold, without its stored blocks.

Every block that may hold data is read and hashed, and its digest compared with the one that the pack indexes
give; a block that the manifest does not name must be zero. What differs in the pinned base that a snapshot
was taken from is what the snapshot's own scan, or table diff, missed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from island_fast.arrays import Int64s
from island_fast.dirtymap import DirtyMap
from island_fast.errors import DamagedImageError, DamagedObjectError, NotFoundError, RefusedError
from island_fast.formats.manifest import Manifest
from island_fast.formats.pack import Index
from island_fast.images.backing import Backing
from island_fast.images.qcow2_source import Qcow2Source
from island_fast.progress import Progress
from island_fast.qemu.image_lock import ImageLock
from island_fast.repository.lineage import Lineage
from island_fast.repository.streams import Expected, differences

__all__ = ["Compared", "compare"]


_BACKING = "backing.identity"


@dataclass(frozen=True, slots=True)
class Compared:
    """Blocks that differ, int64[n, 2], those that cannot be compared, and bytes of data read.

    Blocks cannot be compared where the index of their pack is damaged.
    """

    differing: Int64s
    unknown: Int64s
    bytes_read: int


def compare(
    lineage: Lineage,
    manifest: Manifest,
    image: Path,
    backing: Sequence[Backing],
    index: Callable[[int], Index | None],
    progress: Progress,
) -> Compared:
    """Compare the snapshot with its pin in `image`, which may be in use meanwhile.

    `index(key)` gives the index of a pack, None if it cannot be read. NotFoundError if the image does not
    hold the pin, by its whole identity; RefusedError while a snapshot of the image is taken, or if its
    backing files are not what they were.
    """
    path = Path(os.path.realpath(image))
    with ImageLock(path), Qcow2Source(path, lock=False, backing=backing) as source:
        internal = source.find_pinned(manifest.pin)
        if internal is None:
            raise NotFoundError(
                f"{path} does not hold the pin of snapshot {manifest.snapshot}; name the image that it was "
                "taken from, or one restored from it, before the next snapshot"
            )
        if source.facts.get(_BACKING, "") != manifest.properties.get(_BACKING, ""):
            raise RefusedError(
                f"the backing files of {path} are not what they were for snapshot {manifest.snapshot}; list "
                "them as then with --backing"
            )
        view = source.view(internal)
        if view.volume_size != manifest.volume_size:
            raise DamagedObjectError(
                f"snapshot {manifest.snapshot} states another volume size than its pin in {path} has"
            )
        data = source.find_change(view, None, "", progress).data
        runs = manifest.runs_by_key(lineage.numbers)
        looked_at = data | DirtyMap.from_runs(view.blocks, runs.intervals())
        found = differences(view, looked_at, Expected(runs, index), lineage, progress)
        source.image.reload()
        if source.find_pinned(manifest.pin) is None:
            raise DamagedImageError(f"the pin was dropped from {path} while it was read; run it again")
        return Compared(found[0].runs(), found[1].runs(), view.bytes_read)
