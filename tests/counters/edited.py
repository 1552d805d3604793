"""A volume in memory that is edited and snapshotted, for histories too long to have qemu make them.

Only the image is a stand-in: packs, manifests, records and local state are what real snapshots write.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from island_fast.dirtymap import BLOCK_SIZE, DirtyMap
from island_fast.progress import Progress, silent
from island_fast.qcow2 import InternalSnapshot, PinnedBase
from island_fast.repository import Repository
from island_fast.results import SnapshotTaken
from island_fast.source import TABLE_DIFF, Base, Change, Source, View
from island_fast.source.base import END, scanned
from island_fast.taking import Request, take

MOST = 16
"""Blocks of the longest edit; the shortest has 1."""


class EditedVolume(Source):
    """`content` is uint8[blocks, BLOCK_SIZE]; what was edited since the last pin is known, as tables know it."""

    def __init__(self, path: Path, blocks: int, seed: int) -> None:
        self.path = path
        self._stack = ExitStack()
        self._draw = np.random.default_rng(seed)
        self.content = self._draw.integers(0, 256, (blocks, BLOCK_SIZE), np.uint8)
        self.edited = DirtyMap(blocks)
        self._pins: list[InternalSnapshot] = []

    def edit(self, blocks: int) -> None:
        """Write other bytes over `blocks` blocks, in pieces of 1 to MOST that lie anywhere and never touch."""
        while blocks:
            length = min(int(self._draw.integers(1, MOST + 1)), blocks)
            start = int(self._draw.integers(0, len(self.content) - length))
            self.content[start : start + length] = self._draw.integers(0, 256, (length, BLOCK_SIZE), np.uint8)
            self.edited.set_range(start, start + length)
            blocks -= length

    def snapshot(self, repository: Repository, volume: str = "vol") -> SnapshotTaken:
        """A snapshot of it as it is now."""
        lineage = repository.lineage(volume)
        lineage.refresh()
        return take(lineage, self, Request(repository.id, repository.state.writer), silent)

    @property
    def facts(self) -> Mapping[str, str]:
        return {"format": "qcow2"}

    @property
    def internals(self) -> tuple[InternalSnapshot, ...]:
        return tuple(self._pins)

    @property
    def unpinnable(self) -> str | None:
        return None

    def find(self, pin: PinnedBase) -> InternalSnapshot | None:
        return next((one for one in self._pins if one.identity == pin), None)

    def named(self, name: str) -> InternalSnapshot:
        return next(one for one in self._pins if one.name == name)

    def pin(self, name: str) -> InternalSnapshot:
        now = time.time_ns()
        self._pins.append(
            InternalSnapshot(
                id="1", name=name, seconds=now // 10**9, nanoseconds=now % 10**9,
                disk_size=self.content.nbytes, l1_offset=0, l1_size=0, vm_state_size=0,
            )
        )  # fmt: skip
        return self._pins[-1]

    def unpin(self, internal: InternalSnapshot) -> None:
        self._pins.remove(internal)

    def discard(self, name: str) -> None:
        self._pins = [one for one in self._pins if one.name != name]

    def evidence(self, base: Base, facts: Mapping[str, str]) -> str | None:
        return None

    def view(self, internal: InternalSnapshot | None) -> View:
        return _Now(self.content)

    def change(self, view: View, base: Base | None, why_not: str, progress: Progress) -> Change:
        edited, self.edited = self.edited, DirtyMap(view.blocks)
        if base is None:
            return scanned(DirtyMap.from_runs(view.blocks, np.array([[0, view.blocks]])), why_not)
        replaced = np.concatenate([edited.runs(), [[view.blocks, END]]]).astype(np.int64)
        return Change(TABLE_DIFF, "edited since", edited, edited, replaced)


class _Now(View):
    def __init__(self, content: NDArray[np.uint8]) -> None:
        self.volume_size = content.nbytes
        self._content = content
        self._read = 0

    @property
    def bytes_read(self) -> int:
        return self._read

    def read(self, blocks: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        np.take(self._content, blocks, axis=0, out=out)
        self._read += out.nbytes
