"""Comparing blocks on the host with what a snapshot should hold, without its stored blocks.

Every block that may hold data is read and hashed, and its digest compared with the one that the pack indexes
give; a block that the manifest does not name must be zero. What differs in the pinned base that a snapshot
was taken from is what the snapshot's own scan, or table diff, missed.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from island_fast import _diff
from island_fast.arrays import Bools, Bytes2D, Int64s
from island_fast.dirtymap import BLOCK_SIZE, DirtyMap
from island_fast.errors import DamagedImageError, DamagedObjectError, NotFoundError, RefusedError
from island_fast.formats.manifest import Manifest
from island_fast.formats.pack import Index, digest_blocks
from island_fast.formats.runs import Runs
from island_fast.images.backing import Backing
from island_fast.images.qcow2_source import Qcow2Source
from island_fast.images.source import View
from island_fast.operations.parent import keyed
from island_fast.progress import Progress
from island_fast.qemu.image_lock import ImageLock
from island_fast.repository.lineage import Lineage
from island_fast.repository.streams import BATCH, workers

__all__ = ["Compared", "Expected", "compare", "differences"]


_BACKING = "backing.identity"
_READING = 6  # batches that are being compared


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
    with ImageLock(path), Qcow2Source(path, look_only=True, backing=backing) as source:
        internal = source.find(manifest.pin)
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
        data = source.change(view, None, "", progress).data
        runs = keyed(lineage, manifest)
        looked_at = data | DirtyMap.from_runs(view.blocks, runs.intervals())
        found = differences(view, looked_at, Expected(runs, index), lineage, progress)
        source.image.reload()
        if source.find(manifest.pin) is None:
            raise DamagedImageError(f"the pin was dropped from {path} while it was read; run it again")
        return Compared(found[0].runs(), found[1].runs(), view.bytes_read)


class Expected:
    """What blocks should be, by the pack indexes; `runs` hold pack keys. Thread-safe.

    `index(key)` gives the index of a pack, None if it cannot be read; it is called by one thread at a time.
    """

    def __init__(self, runs: Runs, index: Callable[[int], Index | None]) -> None:
        self.runs = runs
        self._index = index
        self._lock = threading.Lock()

    def of(self, blocks: Int64s) -> tuple[Bytes2D, Bools, Bools]:
        """Digests of `blocks`, uint8[n, 16]; which have one; and which have one that cannot be read."""
        digests = np.zeros((blocks.size, 16), np.uint8)
        known, unknown = np.zeros(blocks.size, np.bool_), np.zeros(blocks.size, np.bool_)
        named, row, offset = self.runs.locate(blocks)
        keys, slots = self.runs.pack[row], self.runs.slot[row] + offset
        for key in np.unique(keys).tolist():
            mine = keys == key
            with self._lock:
                index = self._index(key)
            if index is None or int(slots[mine].max()) >= len(index.rows):
                unknown[named[mine]] = True
            else:
                digests[named[mine]] = index.rows["digest"][slots[mine]]
                known[named[mine]] = True
        return digests, known, unknown


def differences(
    view: View, looked_at: DirtyMap, expected: Expected, lineage: Lineage, progress: Progress
) -> tuple[DirtyMap, DirtyMap]:
    """Read the blocks in `looked_at`, and see which are not as they should be, and which cannot be compared.

    A block of which nothing is expected should be zero. They are read and hashed by several workers, in
    bounded memory; progress is told in the calling thread.
    """
    differing, unknown = DirtyMap(view.blocks), DirtyMap(view.blocks)
    waiting: deque[Future[tuple[Int64s, Int64s, int]]] = deque()
    buffers = deque(np.empty((BATCH, BLOCK_SIZE), np.uint8) for _ in range(_READING))
    done, total = 0, looked_at.count()

    def take() -> None:
        nonlocal done
        other, unread, read = waiting.popleft().result()
        differing.set_indices(other)
        unknown.set_indices(unread)
        done += read
        progress("compare", done * BLOCK_SIZE, total * BLOCK_SIZE)

    with workers(min(lineage.store.readers, _READING), "compare") as pool:
        for blocks in looked_at.batches(BATCH):
            if len(waiting) == _READING:
                take()
            rows = buffers[0][: blocks.size]  # of the batch that was taken just now
            buffers.rotate(-1)
            waiting.append(pool.submit(_compared, view, blocks, rows, expected, lineage.seed))
        while waiting:
            take()
    return differing, unknown


def _compared(
    view: View, blocks: Int64s, rows: Bytes2D, expected: Expected, seed: int
) -> tuple[Int64s, Int64s, int]:
    """Of some blocks, those that differ, those that cannot be compared, and how many were read."""
    view.read(blocks, rows)
    zero = np.empty(blocks.size, np.uint8)
    _diff.zero_blocks(rows.reshape(-1), BLOCK_SIZE, zero)
    digests, known, unread = expected.of(blocks)
    equal = (digest_blocks(rows, seed) == digests).all(axis=1)
    return blocks[np.where(known, ~equal, zero == 0) & ~unread], blocks[unread], blocks.size
