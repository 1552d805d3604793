"""A qcow2 image as a snapshot's source.

A table diff is used only where it is sound (docs/format.md, "Pinned base"); in every other case all
allocated blocks are read and compared by digest, and the reason is told. One snapshot at a time per image,
under a lock on the image itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from island_fast.arrays import Bytes2D, Int64s
from island_fast.dirtymap import DirtyMap
from island_fast.errors import DamagedImageError, ImageInUseError, IslandError, RefusedError
from island_fast.images.backing import Backing, Chain, Layer, refuse_mismatch, with_below
from island_fast.images.pins import pinned_snapshot
from island_fast.images.source import END, TABLE_DIFF, Base, Change, Source, View, scanned, scanning
from island_fast.progress import Progress
from island_fast.qcow2.block_reader import PointReader
from island_fast.qcow2.changes import allocated, changed, find_shared_copied
from island_fast.qcow2.image import Image, Point
from island_fast.qcow2.snapshots import InternalSnapshot, PinnedBase
from island_fast.qemu.image_lock import ImageLock, writer_present
from island_fast.qemu.qemu_img import QemuImg

if TYPE_CHECKING:
    from island_fast.qemu.monitor import Monitor

__all__ = ["PointView", "Qcow2Source"]

_BACKING = "backing.identity"


class PointView(View):
    """A point of a qcow2 image."""

    def __init__(self, image: Image, point: Point, below: Layer | None) -> None:
        self.point = point
        self.volume_size = point.disk_size
        self._below = below
        self._reader = PointReader(image, point, below)

    @property
    def bytes_read(self) -> int:
        """See View.bytes_read."""
        return self._reader.bytes_read + (self._below.bytes_read if self._below else 0)

    def read(self, blocks: Int64s, out: Bytes2D) -> None:
        """See View.read."""
        self._reader.read(blocks, out)


class Qcow2Source(Source):
    """An image held for one snapshot; a context manager.

    With `qmp`, the process behind that socket owns the image and takes the internal snapshots; so does the
    one behind `monitor`, which stays the caller's; it calls the image `node`. Without, nobody may have it
    open for writing, and qemu-img takes them. With `as_it_is`, or if the image cannot be pinned, writers are
    kept out as long as the source is open, for a scan of the active table. With `look_only` nothing is
    locked: such a source may be asked what it would do, and do nothing. `backing` are the image's backing
    files, nearest first; without them an image that has one is refused.
    """

    def __init__(
        self,
        path: Path,
        qmp: Path | None = None,
        *,
        monitor: Monitor | None = None,
        as_it_is: bool = False,
        look_only: bool = False,
        backing: Sequence[Backing] = (),
    ) -> None:
        self.path = path
        with ExitStack() as stack:
            self.image = stack.enter_context(Image.open(path, backed=bool(backing)))
            refuse_mismatch(self.image, bool(backing))
            self._chain = stack.enter_context(closing(Chain(backing, self.image.header.backing_name)))
            self._monitor: Monitor | None = None
            if look_only:
                self._stack = stack.pop_all()
                return
            if (qmp or monitor) and (why := self.unpinnable):
                raise RefusedError(f"{path} cannot be read while it is in use: {why}; stop its user first")
            hold = as_it_is or self.unpinnable is not None
            lock = stack.enter_context(ImageLock(path, hold_off_writers=hold))
            if not os.path.samestat(os.fstat(lock.fd), os.fstat(self.image.fd)):
                raise RefusedError(f"{path} was replaced by another file just now; try again")
            self._monitor = stack.enter_context(_connected(qmp)) if qmp else monitor
            self.node = self._monitor.find_node(path) if self._monitor else ""
            if not self._monitor and writer_present(self.image.fd):
                raise ImageInUseError(
                    f"{path} is open for writing in another process; name that process's QMP socket "
                    "with --qmp, snapshot a libvirt guest with --domain, or stop it first"
                )
            self.image.reload()
            self._stack = stack.pop_all()

    def reload(self) -> None:
        """See Source.reload."""
        self.image.reload()

    @property
    def facts(self) -> Mapping[str, str]:
        """See Source.facts."""
        header = self.image.header
        facts = {
            "format": "qcow2",
            "qcow2.version": str(header.version),
            "qcow2.cluster_bits": str(header.cluster_bits),
        }
        return facts | ({_BACKING: self._chain.identity} if self._chain.identity else {})

    @property
    def internals(self) -> tuple[InternalSnapshot, ...]:
        """See Source.internals."""
        return self.image.snapshots

    def find(self, pin: PinnedBase) -> InternalSnapshot | None:
        """See Source.find."""
        return self.image.find(pin)

    @property
    def unpinnable(self) -> str | None:
        """Why no internal snapshot of ours may be left in the image; None if one may."""
        if self.image.header.version < 3:
            return "a version 2 image cannot be resized while it holds an internal snapshot"
        return None

    def pin(self, name: str) -> InternalSnapshot:
        """Take an internal snapshot; on disk when this returns. IslandError if it may not be written."""
        if self._monitor:
            self._monitor.snapshot_create(self.node, name)
        elif not os.access(self.path, os.W_OK):
            raise IslandError(
                f"{self.path} cannot be written, so it can hold no pin; run as its owner, or give --no-pin"
            )
        else:
            QemuImg().snapshot_create(self.path, name)
        self.image.reload()
        return self.named(name)

    def unpin(self, internal: InternalSnapshot) -> None:
        """Drop an internal snapshot of ours."""
        if self._monitor:
            self._monitor.snapshot_delete(self.node, internal.id, internal.name)
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
        """See Source.named."""
        return self.image.named(name)

    def evidence(self, base: Base, facts: Mapping[str, str]) -> str | None:
        """Why a table diff from `base` would not be sound; None if nothing speaks against it.

        To be asked before the new internal snapshot is taken: taking it recomputes the COPIED flags.
        """
        if self.image.header.corrupt:
            return "the image is marked corrupt"
        if facts.get(_BACKING, "") != self._chain.identity:
            return "the backing files are others than at the parent, or were written to since"
        active, then = self.image.active(), self.image.at(base.internal)
        try:
            shared = find_shared_copied(self.image, active, then)
        except DamagedImageError:
            if self._monitor is None:
                raise
            return "the active tables changed while they were looked at"
        if shared:
            return "clusters that the pinned base shares are marked as writable in place"
        return None

    def view(self, internal: InternalSnapshot | None) -> View:
        """See Source.view."""
        point = self.image.at(internal) if internal else self.image.active()
        return PointView(self.image, point, self._chain.top)

    def change(self, view: View, base: Base | None, why_not: str, progress: Progress) -> Change:
        """See Source.change."""
        if not isinstance(view, PointView):
            raise TypeError("a view of another source")
        if base is None:
            return self._scanned(view.point, why_not, progress)
        diff = changed(self.image, self.image.at(base.internal), view.point, scanning(progress))
        if diff.shared_copied:
            return self._scanned(view.point, "the pinned base's clusters were written in place", progress)
        candidates = diff.map | DirtyMap.from_runs(view.blocks, np.minimum(base.extra, view.blocks))
        data = allocated(self.image, view.point, within=candidates)
        if self._chain.top is not None:
            data = with_below(data, self._chain.top, progress) & candidates
        return Change(TABLE_DIFF, _compared(base), candidates, data, _to_the_end(candidates))

    def _scanned(self, point: Point, why: str, progress: Progress) -> Change:
        own = allocated(self.image, point, progress=scanning(progress))
        return scanned(with_below(own, self._chain.top, progress), why)


def _connected(socket: Path) -> Monitor:
    from island_fast.qemu.qmp import Qmp  # with sockets, which only images in use need

    return Qmp(socket)


def _compared(base: Base) -> str:
    pinned = pinned_snapshot(base.internal.name)
    whose = f"the pinned base of snapshot {pinned}" if pinned else f"'{base.internal.name}'"
    return f"compared with {whose}"


def _to_the_end(candidates: DirtyMap) -> Int64s:
    return np.concatenate([candidates.runs(), [[candidates.blocks, END]]]).astype(np.int64)
