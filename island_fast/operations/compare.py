"""Comparing a snapshot with the pin that it was taken from, without reading its stored blocks.

Every block of the pin that can hold data is read and hashed, and its digest compared with the one in the
index of its pack; a block that the manifest does not name must be zero. A difference is a change that the
snapshot's full scan or table diff missed.
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
from island_fast.repository.digests import ExpectedDigests
from island_fast.repository.lineage import Lineage
from island_fast.repository.streams import compare_blocks

__all__ = ["Comparison", "compare_with_pin"]

_BACKING = "backing.identity"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Blocks that differ, blocks that cannot be compared, both int64[n, 2], and bytes read from the image.

    A block cannot be compared if the index of its pack is damaged.
    """

    differing: Int64s
    unknown: Int64s
    bytes_read: int


def compare_with_pin(
    lineage: Lineage,
    manifest: Manifest,
    image: Path,
    backing: Sequence[Backing],
    index: Callable[[int], Index | None],
    progress: Progress,
) -> Comparison:
    """Compare the snapshot with its pin in `image`, which a process can have open meanwhile.

    `index(key)` returns the index of a pack, or None if it cannot be read. NotFoundError if no internal
    snapshot of the image has the whole identity of the pin; RefusedError if a snapshot of the image is being
    taken, or if its backing files are not those of the snapshot; DamagedImageError if the pin was dropped
    meanwhile.
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
                f"the backing files of {path} differ from those of snapshot {manifest.snapshot}, or were "
                "written to since; list the same files, unchanged, with --backing"
            )
        view = source.view(internal)
        if view.volume_size != manifest.volume_size:
            raise DamagedObjectError(
                f"snapshot {manifest.snapshot} states another volume size than its pin in {path} has"
            )
        data = source.find_change(view, None, "", progress).data
        runs = manifest.runs_by_key(lineage.numbers)
        compared = data | DirtyMap.from_runs(view.blocks, runs.intervals())
        expected = ExpectedDigests(runs, index)
        differing, unknown = compare_blocks(view.read, compared, expected, lineage, progress)
        source.image.reload()
        if source.find_pinned(manifest.pin) is None:
            raise DamagedImageError(f"the pin was dropped from {path} while it was read; run it again")
        return Comparison(differing.runs(), unknown.runs(), view.bytes_read)
