"""A volume without an image, for histories of snapshots that would take qemu too long to make.

Only the image is replaced: packs, manifests, records and local state are written as for every snapshot.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from island_fast import _diff
from island_fast.api import Repository
from island_fast.arrays import Bytes2D, Int64s
from island_fast.dirtymap import BLOCK_SIZE, DirtyMap
from island_fast.images.source import END, TABLE_DIFF, Base, Change, Source, View
from island_fast.operations.snapshot import SnapshotRequest, take_snapshot
from island_fast.progress import Progress, silent
from island_fast.qcow2.snapshots import InternalSnapshot, PinnedBase
from island_fast.results_base import SnapshotTaken

__all__ = ["SyntheticVolume"]


_LONGEST = 16  # blocks of an edit: 1 MiB
_NOISE = 32 << 20


class SyntheticVolume(Source):
    """A volume full of random bytes, which knows what was edited since its last pin, as qcow2 tables would.

    A block's content depends on its number, on how often it was edited, and on the seed. It takes 32 MiB of
    memory, whatever the size of the volume.
    """

    def __init__(self, path: Path, blocks: int, seed: int) -> None:
        self.path = path
        self._stack = ExitStack()
        self._draw = np.random.default_rng(seed)
        self._noise = self._draw.integers(0, 256, _NOISE, np.uint8)
        self._versions = np.zeros(blocks, np.int64)
        self._edited = DirtyMap(blocks)
        self._pins: list[InternalSnapshot] = []

    def edit(self, blocks: int) -> int:
        """Overwrite `blocks` blocks, in pieces of 64 KiB to 1 MiB anywhere in the volume.

        Pieces can overlap. Returns how many blocks differ since the last snapshot.
        """
        while blocks:
            length = min(int(self._draw.integers(1, _LONGEST + 1)), blocks)
            start = int(self._draw.integers(0, self._versions.size - length + 1))
            self._versions[start : start + length] += 1
            self._edited.set_range(start, start + length)
            blocks -= length
        return self._edited.count()

    def snapshot(self, repository: Repository, volume: str = "vol") -> SnapshotTaken:
        """Take a snapshot of the volume as it is now."""
        lineage = repository.lineage(volume)
        lineage.refresh()
        return take_snapshot(lineage, self, SnapshotRequest(repository.id), silent)

    @property
    def facts(self) -> Mapping[str, str]:
        """See Source.facts."""
        return {"format": "qcow2"}

    @property
    def internal_snapshots(self) -> tuple[InternalSnapshot, ...]:
        """See Source.internal_snapshots."""
        return tuple(self._pins)

    @property
    def reason_not_pinnable(self) -> str | None:
        """See Source.reason_not_pinnable."""
        return None

    def find_pinned(self, pin: PinnedBase) -> InternalSnapshot | None:
        """See Source.find_pinned."""
        return next((one for one in self._pins if one.identity == pin), None)

    def find_named(self, name: str) -> InternalSnapshot:
        """See Source.find_named."""
        return next(one for one in self._pins if one.name == name)

    def pin(self, name: str) -> InternalSnapshot:
        """See Source.pin."""
        now = time.time_ns()
        size = self._versions.size * BLOCK_SIZE
        self._pins.append(InternalSnapshot("1", name, now // 10**9, now % 10**9, size, 0, 0, 0))
        return self._pins[-1]

    def unpin(self, internal: InternalSnapshot) -> None:
        """See Source.unpin."""
        self._pins.remove(internal)

    def discard_pin(self, name: str) -> None:
        """See Source.discard_pin."""
        self._pins = [one for one in self._pins if one.name != name]

    def reason_unsound(self, base: Base, facts: Mapping[str, str]) -> str | None:
        """See Source.reason_unsound."""
        return None

    def require_unchanged(self, internals: Sequence[InternalSnapshot]) -> None:
        """Do nothing: nobody else has it."""

    def view(self, internal: InternalSnapshot | None) -> View:
        """See Source.view."""
        return _Now(self._versions, self._noise)

    def find_change(self, view: View, base: Base | None, why_not: str, progress: Progress) -> Change:
        """See Source.find_change."""
        edited, self._edited = self._edited, DirtyMap(view.blocks)
        if base is None:
            return Change.full_scan(DirtyMap.from_runs(view.blocks, np.array([[0, view.blocks]])), why_not)
        replaced = np.concatenate([edited.runs(), [[view.blocks, END]]]).astype(np.int64)
        return Change(TABLE_DIFF, "edited since", edited, edited, replaced)


class _Now(View):
    """The blocks of the volume: pieces of the noise, whose places follow from block numbers and versions."""

    def __init__(self, versions: Int64s, noise: NDArray[np.uint8]) -> None:
        self.volume_size = versions.size * BLOCK_SIZE
        self._versions = versions
        self._noise = noise
        self._read = 0

    @property
    def bytes_read(self) -> int:
        """See View.bytes_read."""
        return self._read

    def read(self, blocks: Int64s, out: Bytes2D) -> None:
        """See View.read."""
        mixed = blocks.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= self._versions[blocks].astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
        mixed ^= mixed >> np.uint64(29)
        places = (mixed % np.uint64(_NOISE - BLOCK_SIZE)).astype(np.int64)
        sizes = np.full(blocks.size, BLOCK_SIZE)
        _diff.copy_ranges(self._noise, places, sizes, out.reshape(-1), np.arange(blocks.size) * BLOCK_SIZE)
        self._read += out.nbytes
