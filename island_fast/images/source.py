"""What a snapshot reads, the same for qcow2 and raw images: `Source`, `View`, `Base` and `Change`.

A source holds an image for one snapshot: it locks the image, pins it where that is possible, shows the volume
at a point, and finds the blocks that may have changed, with the rule it used and why. Which parent and which
base to compare with is decided above, in `operations/parent.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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

__all__ = ["END", "FULL_SCAN", "TABLE_DIFF", "Base", "Change", "Source", "View", "scan_progress"]

TABLE_DIFF = "table-diff"
FULL_SCAN = "full-scan"

END = 1 << 40
"""A block number past every volume: [blocks, END) in `Change.replaced` drops a larger parent's tail."""


@dataclass(frozen=True, slots=True)
class Base:
    """What the new point is compared with: an internal snapshot, found by its whole identity.

    `extra` are blocks that count as changed too, int64[n, 2]: those that a deleted snapshot wrote after the
    parent that stands in for it.
    """

    internal: InternalSnapshot
    extra: Int64s


@dataclass(frozen=True, slots=True)
class Change:
    """Which blocks may have changed, by which rule and why.

    `candidates` are the blocks that may have changed. `data` are those of them that hold stored data and must
    be read; the other candidates are zero now. `replaced` are block intervals, int64[n, 2]: for a block in
    them, the parent's entry may be kept only if the block's digest proves that it is the same.
    """

    rule: str
    reason: str
    candidates: DirtyMap
    data: DirtyMap
    replaced: Int64s

    @classmethod
    def full_scan(cls, data: DirtyMap, why: str) -> Change:
        """Return the change of a full scan: every block with data, and no entry kept without its digest."""
        return cls(FULL_SCAN, why, data, data, np.array([[0, END]], np.int64))


class View(ABC):
    """A volume at one point: its size in bytes, and its blocks."""

    volume_size: int

    @property
    def blocks(self) -> int:
        """Number of blocks; the last one can be partial."""
        return -(-self.volume_size // BLOCK_SIZE)

    @property
    @abstractmethod
    def bytes_read(self) -> int:
        """Bytes of data, without tables, that `read` has read from files so far."""

    @abstractmethod
    def read(self, blocks: Int64s, out: Bytes2D) -> None:
        """Fill row i of `out` (uint8[n, BLOCK_SIZE]) with block `blocks[i]` (ascending). Thread-safe."""


class Source(ABC):
    """An image held for one snapshot; a context manager that releases it."""

    path: Path
    _stack: ExitStack

    @property
    def fd(self) -> int:
        """The descriptor of the image file or device, which stays the source's; -1 if there is none."""
        return -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, str]:
        """What a snapshot's properties record about the image."""

    @property
    @abstractmethod
    def internal_snapshots(self) -> tuple[InternalSnapshot, ...]:
        """The internal snapshots that are in the image now."""

    @property
    @abstractmethod
    def reason_not_pinnable(self) -> str | None:
        """Why we cannot leave an internal snapshot in the image; None if we can."""

    @abstractmethod
    def find_pinned(self, pin: PinnedBase) -> InternalSnapshot | None:
        """Return the internal snapshot with exactly this identity; None if there is not exactly one."""

    @abstractmethod
    def find_named(self, name: str) -> InternalSnapshot:
        """Return the only internal snapshot with this name; NotFoundError or RefusedError otherwise."""

    @abstractmethod
    def pin(self, name: str) -> InternalSnapshot:
        """Take an internal snapshot; it is on disk when this returns."""

    @abstractmethod
    def unpin(self, internal: InternalSnapshot) -> None:
        """Delete an internal snapshot that we took."""

    @abstractmethod
    def discard_pin(self, name: str) -> None:
        """Delete our internal snapshot with this name, if it exists; for the start after an interruption."""

    @abstractmethod
    def reason_unsound(self, base: Base, facts: Mapping[str, str]) -> str | None:
        """Return why a table diff from `base` would not be sound; None if nothing speaks against it.

        `facts` are the properties of the parent. Call this before the new internal snapshot is taken.
        """

    @abstractmethod
    def require_unchanged(self, internals: Sequence[InternalSnapshot]) -> None:
        """Raise ImageInUseError if anything was changed while it was read; call this after the last read.

        `internals` are the internal snapshots that were read; without any, the volume was read as it is.
        """

    @abstractmethod
    def view(self, internal: InternalSnapshot | None) -> View:
        """Return the volume at an internal snapshot, or with None as it is now."""

    @abstractmethod
    def find_change(self, view: View, base: Base | None, why_not: str, progress: Progress) -> Change:
        """Find what may have changed at `view`: by table diff since `base`, or without one by full scan.

        `why_not` is the reason for the full scan.
        """

    def reload(self) -> None:
        """Read the internal snapshots again, after another process took or deleted one.

        Only for images that can hold internal snapshots.
        """
        raise NotImplementedError

    def pins(self, repository: str, lineage: str) -> list[InternalSnapshot]:
        """Return the internal snapshots that pin `lineage` of this repository."""
        return [s for s in self.internal_snapshots if pinned_lineage(repository, s.name) == lineage]


def scan_progress(progress: Progress) -> Callable[[int, int], None]:
    """Return a callback for a scan that counts blocks; it reports phase "scan" to `progress`, in bytes."""

    def report(done: int, total: int) -> None:
        progress("scan", done * BLOCK_SIZE, total * BLOCK_SIZE)

    return report
