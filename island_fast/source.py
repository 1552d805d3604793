"""The image that a snapshot is taken of: held, pinned, and asked what changed.

Which rule finds the change is decided here. A table diff is used only where it is sound (docs/format.md,
"Pinned base"); in every other case all allocated blocks are read and compared by digest, and the reason is
told. One snapshot at a time per image, under a lock on the image itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from island_fast.dirtymap import BLOCK_SIZE, DirtyMap
from island_fast.errors import ImageInUseError, NotFoundError, RefusedError
from island_fast.host.imagelock import ImageLock, writer_present
from island_fast.host.qemu_img import QemuImg
from island_fast.host.qmp import Qmp
from island_fast.progress import Progress
from island_fast.qcow2 import Image, InternalSnapshot, Point, PointReader
from island_fast.qcow2.tables import allocated, changed, find_shared_copied

__all__ = ["FULL_SCAN", "TABLE_DIFF", "Base", "Change", "Source", "pin_name", "pinned_lineage"]

Int64s = NDArray[np.int64]

TABLE_DIFF = "table-diff"
FULL_SCAN = "full-scan"

_PIN = re.compile(r"island-([0-9a-f]{8})\.([A-Za-z0-9._-]{1,128})-([0-9a-f]{32})")


def pin_name(repository: str, lineage: str, snapshot: str) -> str:
    """Name of the internal snapshot that pins `snapshot`; it tells repository and lineage apart."""
    return f"island-{repository[:8]}.{lineage}-{snapshot}"


def pinned_lineage(repository: str, name: str) -> str | None:
    """The lineage that an internal snapshot's name pins in this repository; None if it is no such pin."""
    match = _PIN.fullmatch(name)
    return match[2] if match and match[1] == repository[:8] else None


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


class Source:
    """An image held for one snapshot; a context manager.

    With `qmp`, the process behind that socket owns the image and takes the internal snapshots; otherwise
    nobody may have it open for writing, and qemu-img takes them. With `as_it_is`, or if the image cannot be
    pinned, writers are kept out as long as the source is open, for a scan of the active table.
    """

    def __init__(self, path: Path, qmp: Path | None = None, *, as_it_is: bool = False) -> None:
        self.path = path
        with ExitStack() as stack:
            self.image = stack.enter_context(Image.open(path))
            if qmp and (why := self.unpinnable):
                raise RefusedError(f"{path} cannot be read while it is in use: {why}; stop its user first")
            hold = as_it_is or self.unpinnable is not None
            lock = stack.enter_context(ImageLock(path, hold_off_writers=hold))
            if not os.path.samestat(os.fstat(lock.fd), os.fstat(self.image.fd)):
                raise RefusedError(f"{path} was replaced by another file just now; try again")
            self._monitor = stack.enter_context(Qmp(qmp)) if qmp else None
            self._node = self._monitor.find_node(path) if self._monitor else ""
            if not self._monitor and writer_present(self.image.fd):
                raise ImageInUseError(
                    f"{path} is open for writing in another process; name that process's QMP socket "
                    "with --qmp, or stop it first"
                )
            self.image.reload()
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def unpinnable(self) -> str | None:
        """Why no internal snapshot of ours may be left in the image; None if one may."""
        if self.image.header.version < 3:
            return "a version 2 image cannot be resized while it holds an internal snapshot"
        return None

    def pin(self, name: str) -> InternalSnapshot:
        """Take an internal snapshot; it is on disk when this returns."""
        if self._monitor:
            self._monitor.snapshot_create(self._node, name)
        else:
            QemuImg().snapshot_create(self.path, name)
        self.image.reload()
        return self.named(name)

    def unpin(self, internal: InternalSnapshot) -> None:
        """Drop an internal snapshot of ours."""
        if self._monitor:
            self._monitor.snapshot_delete(self._node, internal.id, internal.name)
        elif self.named(internal.name).identity == internal.identity:  # qemu-img knows names only
            QemuImg().snapshot_delete(self.path, internal.name)
        self.image.reload()

    def discard(self, name: str) -> None:
        """Drop the internal snapshot of ours with this name, if it is there, as after an interruption."""
        if self._monitor:
            self._monitor.find_node(self.path)  # answered in order: what was asked for before is done then
        self.image.reload()
        for internal in self.image.snapshots:
            if internal.name == name:
                self.unpin(internal)

    def named(self, name: str) -> InternalSnapshot:
        """The only internal snapshot with this name."""
        found = [s for s in self.image.snapshots if s.name == name]
        if not found:
            raise NotFoundError(f"{self.path} has no internal snapshot '{name}'; see qemu-img snapshot -l")
        if len(found) > 1:
            raise RefusedError(f"{self.path} has several internal snapshots '{name}'; rename or drop one")
        return found[0]

    def pins(self, repository: str, lineage: str) -> list[InternalSnapshot]:
        """Internal snapshots that pin `lineage` of this repository."""
        return [s for s in self.image.snapshots if pinned_lineage(repository, s.name) == lineage]

    def evidence(self, base: Base) -> str | None:
        """Why a table diff from `base` would not be sound; None if nothing speaks against it.

        To be asked before the new internal snapshot is taken: taking it recomputes the COPIED flags.
        """
        if self.image.header.corrupt:
            return "the image is marked corrupt"
        active, then = self.image.active(), self.image.at(base.internal)
        if find_shared_copied(self.image, active, then):
            return "clusters that the pinned base shares are marked as writable in place"
        return None

    def reader(self, point: Point) -> PointReader:
        """Reads blocks of `point`."""
        return PointReader(self.image, point)

    def change(self, point: Point, base: Base | None, why_not: str, progress: Progress) -> Change:
        """What may have changed at `point`: since `base` by table diff, or in all, for `why_not`."""
        if base is None:
            return self._scanned(point, why_not, progress)
        diff = changed(self.image, self.image.at(base.internal), point, _scanning(progress))
        if diff.shared_copied:
            return self._scanned(point, "the pinned base's clusters were written in place", progress)
        candidates = diff.map | _clipped(point.blocks, base.extra)
        data = allocated(self.image, point, within=candidates)
        pin = _PIN.fullmatch(base.internal.name)
        whose = f"the pinned base of snapshot {pin[3]}" if pin else f"'{base.internal.name}'"
        reason = f"compared with {whose}"
        return Change(TABLE_DIFF, reason, candidates, data, _to_the_end(candidates))

    def _scanned(self, point: Point, why: str, progress: Progress) -> Change:
        data = allocated(self.image, point, progress=_scanning(progress))
        everything = np.array([[0, _END]], np.int64)
        return Change(FULL_SCAN, why, data, data, everything)


_END = 1 << 40  # past every block: what the parent had behind the volume's end is gone


def _to_the_end(candidates: DirtyMap) -> Int64s:
    return np.concatenate([candidates.runs(), [[candidates.blocks, _END]]]).astype(np.int64)


def _clipped(blocks: int, intervals: Int64s) -> DirtyMap:
    return DirtyMap.from_runs(blocks, np.minimum(intervals, blocks))


def _scanning(progress: Progress) -> Callable[[int, int], None]:
    """Progress of a scan, counted in tables, told in bytes of volume."""

    def tell(done: int, total: int) -> None:
        progress("scan", done * BLOCK_SIZE, total * BLOCK_SIZE)

    return tell
