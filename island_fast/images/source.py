"""What a snapshot is taken of: the same for qcow2 and raw images.

A source holds an image for one snapshot: it locks it, pins it where it can, shows the volume at a point, and
tells which blocks may have changed, by which rule and why. Which parent and base are compared is decided
above (`choosing.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from island_fast.arrays import Bytes2D, Int64s
from island_fast.dirtymap import BLOCK_SIZE, DirtyMap
from island_fast.images.pins import pinned_lineage
from island_fast.progress import Progress
from island_fast.qcow2.snapshots import InternalSnapshot, PinnedBase

__all__ = ["FULL_SCAN", "TABLE_DIFF", "Base", "Change", "Source", "View", "scanned", "scanning"]


TABLE_DIFF = "table-diff"
FULL_SCAN = "full-scan"

END = 1 << 40
"""A block number past every volume: what the parent had behind the volume's end is gone."""


@dataclass(frozen=True, slots=True)
class Base:
    """What the new point is compared with: an internal snapshot, found by its whole identity.

    `extra` are blocks that count as changed besides, int64[n, 2]: those that a deleted snapshot wrote
    after the parent that stands in for it.
    """

    internal: InternalSnapshot
    extra: Int64s


@dataclass(frozen=True, slots=True)
class Change:
    """Which blocks may have changed, by which rule and why.

    `candidates` may have changed; `data` are those among them that hold stored data, which must be read;
    the others are zero now. `replaced` are the block intervals, int64[n, 2], that no entry of the parent
    may be kept for unless its digest proves it.
    """

    rule: str
    reason: str
    candidates: DirtyMap
    data: DirtyMap
    replaced: Int64s


class View(ABC):
    """A volume at one point: its size in bytes, and its blocks. `bytes_read` counts data read from files."""

    volume_size: int

    @property
    def blocks(self) -> int:
        """Number of blocks, the last one perhaps partial."""
        return -(-self.volume_size // BLOCK_SIZE)

    @property
    @abstractmethod
    def bytes_read(self) -> int:
        """Bytes of data, no tables, that `read` took from files so far."""

    @abstractmethod
    def read(self, blocks: Int64s, out: Bytes2D) -> None:
        """Fill row i of `out` (uint8[n, BLOCK_SIZE]) with block `blocks[i]` (ascending). Thread-safe."""


class Source(ABC):
    """An image held for one snapshot; a context manager."""

    path: Path
    _stack: ExitStack

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, str]:
        """What a snapshot's properties tell of the image."""

    @property
    @abstractmethod
    def internals(self) -> tuple[InternalSnapshot, ...]:
        """The internal snapshots that are in the image now."""

    @property
    @abstractmethod
    def unpinnable(self) -> str | None:
        """Why no internal snapshot of ours may be left in the image; None if one may."""

    @abstractmethod
    def find(self, pin: PinnedBase) -> InternalSnapshot | None:
        """The internal snapshot with exactly this identity."""

    @abstractmethod
    def named(self, name: str) -> InternalSnapshot:
        """The only internal snapshot with this name; NotFoundError or RefusedError otherwise."""

    @abstractmethod
    def pin(self, name: str) -> InternalSnapshot:
        """Take an internal snapshot; it is on disk when this returns."""

    @abstractmethod
    def unpin(self, internal: InternalSnapshot) -> None:
        """Drop an internal snapshot of ours."""

    @abstractmethod
    def discard(self, name: str) -> None:
        """Drop the internal snapshot of ours with this name, if it is there, as after an interruption."""

    @abstractmethod
    def evidence(self, base: Base, facts: Mapping[str, str]) -> str | None:
        """Why a table diff from `base` would not be sound; None if nothing speaks against it.

        `facts` are the properties of the parent. To be asked before the new internal snapshot is taken.
        """

    @abstractmethod
    def view(self, internal: InternalSnapshot | None) -> View:
        """The volume at an internal snapshot, or as it is."""

    @abstractmethod
    def change(self, view: View, base: Base | None, why_not: str, progress: Progress) -> Change:
        """What may have changed at `view`: since `base` by table diff, or in all, for `why_not`."""

    def reload(self) -> None:
        """Read the internal snapshots anew, after somebody else took or dropped one; for images with any."""
        raise NotImplementedError

    def pins(self, repository: str, lineage: str) -> list[InternalSnapshot]:
        """Internal snapshots that pin `lineage` of this repository."""
        return [s for s in self.internals if pinned_lineage(repository, s.name) == lineage]


def scanned(data: DirtyMap, why: str) -> Change:
    """The change that a full scan gives: everything that holds data, and nothing inherited unproved."""
    return Change(FULL_SCAN, why, data, data, np.array([[0, END]], np.int64))


def scanning(progress: Progress) -> Callable[[int, int], None]:
    """Progress of a scan, counted in tables or extents, told in their blocks' bytes."""

    def tell(done: int, total: int) -> None:
        progress("scan", done * BLOCK_SIZE, total * BLOCK_SIZE)

    return tell
