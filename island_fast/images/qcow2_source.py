"""A qcow2 image as a snapshot's source.

A table diff is used only where it is sound (docs/format.md, "Pinned base"). In every other case all allocated
blocks are read and compared by digest, and the change says why. A lock on the image allows one snapshot of it
at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from island_fast.arrays import Bytes2D, Int64s
from island_fast.dirtymap import DirtyMap
from island_fast.errors import DamagedImageError, ImageInUseError, IslandError, RefusedError
from island_fast.images.backing import Backing, Chain, Layer, refuse_backing_mismatch, with_data_below
from island_fast.images.pins import pinned_snapshot
from island_fast.images.source import END, TABLE_DIFF, Base, Change, Source, View, scan_progress
from island_fast.images.unchanged import Unchanged
from island_fast.progress import Progress
from island_fast.qcow2.block_reader import PointReader
from island_fast.qcow2.changes import count_shared_copied, find_allocated, find_changed
from island_fast.qcow2.image import Image, Point
from island_fast.qcow2.refcounts import reason_no_room
from island_fast.qcow2.snapshots import InternalSnapshot, PinnedBase
from island_fast.qemu.image_lock import ImageLock, writer_present
from island_fast.qemu.open_files import refuse_held
from island_fast.qemu.programs import descriptor_path
from island_fast.qemu.qemu_img import QemuImg

if TYPE_CHECKING:
    from island_fast.qemu.monitor import Monitor

__all__ = ["PointView", "Qcow2Source"]

_BACKING = "backing.identity"


class PointView(View):
    """The volume at one point of a qcow2 image."""

    def __init__(self, image: Image, point: Point, below: Layer | None) -> None:
        """Read from `image` and, where it has nothing, from `below`; both stay the caller's."""
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
    """A qcow2 image held for one snapshot; a context manager that releases it.

    `image` is the open file. `node` is its name in the QEMU process that has it open; "" without one.
    """

    def __init__(
        self,
        path: Path,
        qmp: Path | None = None,
        *,
        monitor: Monitor | None = None,
        unpinned_scan: bool = False,
        only_unpin: bool = False,
        lock: bool = True,
        backing: Sequence[Backing] = (),
    ) -> None:
        """Open the image and lock it.

        qmp: the QMP socket of the QEMU process that has the image open; that process takes and deletes the
            internal snapshots. It serves one client at a time, so we are connected only for that moment.
            Without `qmp` and `monitor`, qemu-img does, and no process may have the image open for writing.
        monitor: the same process through a connection that stays the caller's, for a libvirt guest.
        unpinned_scan: the snapshot will read the active tables, without a pin. Then locks keep writers out
            as long as the source is open; so they do for an image that cannot be pinned.
        only_unpin: the caller only drops pins, and reads no volume.
        lock: False locks nothing, for a caller that holds an ImageLock or only asks what a snapshot would
            do. Such a source must not pin or unpin.
        backing: the image's backing files, nearest first.

        Raises NotFoundError: no such file.
        Raises ImageInUseError: another process has it open for writing.
        Raises RefusedError: another snapshot of it is being taken; it is not a regular file, was replaced
            meanwhile, or is in use and not pinnable; a backing file is named and not listed, or listed and
            not named.
        Raises UnsupportedImageError, DamagedImageError: see `Image.open`.
        """
        self.path = path
        with ExitStack() as stack:
            self.image = stack.enter_context(Image.open(path, backed=bool(backing)))
            refuse_backing_mismatch(self.image, bool(backing))
            self._chain = stack.enter_context(closing(Chain(backing, self.image.header.backing_name)))
            self._not_pinnable = _reason_not_pinnable(self.image)
            self._connect: Callable[[], Monitor] | None = None
            self._monitor: Monitor | None = None
            self._used_by_qemu = bool(qmp or monitor)
            if not lock:
                self._stack = stack.pop_all()
                return
            why = None if only_unpin else self.reason_not_pinnable
            if self._used_by_qemu and why:
                raise RefusedError(
                    f"{path} cannot be read while it is in use, because {why}; "
                    "stop the process that uses it first"
                )
            held = stack.enter_context(ImageLock(path, hold_off_writers=unpinned_scan or why is not None))
            if not os.path.samestat(os.fstat(held.fd), os.fstat(self.image.fd)):
                raise RefusedError(f"{path} was replaced by another file just now; try again")
            if qmp:
                from island_fast.qemu.qmp import Qmp  # imports sockets, which only images in use need

                self._connect = lambda: Qmp(qmp)
                stack.callback(self._disconnect)
            self._monitor = monitor
            self.node = ""
            if self._used_by_qemu:
                with self._connected() as process:
                    self.node = process.find_node(path, self.image.fd)
            else:
                if writer_present(self.image.fd):
                    raise ImageInUseError(
                        f"{path} is open for writing in another process; name that process's QMP socket "
                        "with --qmp, snapshot a libvirt guest with --domain, or stop it first"
                    )
                refuse_held(path, self.image.fd, to_write=False)
            self.reload()
            as_it_is = unpinned_scan or why is not None
            self._unchanged = Unchanged(path, self.image.fd) if as_it_is else None
            self._stack = stack.pop_all()

    @contextmanager
    def _connected(self) -> Iterator[Monitor]:
        """Yield the monitor of the process that has the image open; then let other clients have it.

        After an error the connection stays for the next use: answers come in order, so the first one shows
        that the failed command has come to its end.
        """
        if self._monitor is None and self._connect is not None:
            self._monitor = self._connect()
        if self._monitor is None:
            raise TypeError("no process has this image open")
        yield self._monitor
        self._disconnect()

    def _disconnect(self) -> None:
        """End a connection of our own."""
        if self._connect is not None and self._monitor is not None:
            monitor, self._monitor = self._monitor, None
            monitor.close()

    def reload(self) -> None:
        """See Source.reload. RefusedError if the image's backing file is not the one of before."""
        named = self.image.header.backing_name
        self.image.reload()
        if self.image.header.backing_name != named:
            raise RefusedError(f"{self.path} was given another backing file just now; try again")

    @property
    def fd(self) -> int:
        """See Source.fd."""
        return self.image.fd

    @property
    def facts(self) -> Mapping[str, str]:
        """See Source.facts."""
        header = self.image.header
        facts = {
            "format": "qcow2",
            "qcow2.version": str(header.version),
            "qcow2.cluster_bits": str(header.cluster_bits),
            "consistency": "crash" if self._used_by_qemu else "offline",
        }
        return facts | ({_BACKING: self._chain.identity} if self._chain.identity else {})

    @property
    def internal_snapshots(self) -> tuple[InternalSnapshot, ...]:
        """See Source.internal_snapshots."""
        return self.image.snapshots

    def find_pinned(self, pin: PinnedBase) -> InternalSnapshot | None:
        """See Source.find_pinned."""
        return self.image.find_pinned(pin)

    @property
    def reason_not_pinnable(self) -> str | None:
        """See Source.reason_not_pinnable. It is as of when the image was opened."""
        return self._not_pinnable

    def pin(self, name: str) -> InternalSnapshot:
        """See Source.pin. IslandError without permission to write to the image, or if QEMU fails."""
        if self._used_by_qemu:
            with self._connected() as process:
                self.node = process.find_node(self.path, self.image.fd)
                process.snapshot_create(self.node, name)
        elif not os.access(descriptor_path(self.image.fd), os.W_OK):
            raise IslandError(
                f"{self.path} cannot be written, so it cannot hold a pin; run as its owner, or give --no-pin"
            )
        else:
            self._qemu_img.snapshot_create(name)
        self.reload()
        return self.find_named(name)

    def unpin(self, internal: InternalSnapshot) -> None:
        """See Source.unpin."""
        if self._used_by_qemu:
            with self._connected() as process:
                node = process.find_node(self.path, self.image.fd)
                process.snapshot_delete(node, internal.id, internal.name)
        elif self.find_named(internal.name).identity == internal.identity:  # qemu-img deletes by name
            self._qemu_img.snapshot_delete(internal.name)
        self.image.reload()

    @property
    def _qemu_img(self) -> QemuImg:
        """The program for an image that no process has open, acting on the very file that we hold."""
        return QemuImg(self.image.fd, self.path)

    def discard_pin(self, name: str) -> None:
        """See Source.discard_pin."""
        if self._used_by_qemu:
            with self._connected() as process:
                process.find_node(self.path, self.image.fd)  # earlier commands are done when it answers
        self.image.reload()
        for internal in self.image.snapshots:
            if internal.name == name:
                self.unpin(internal)

    def find_named(self, name: str) -> InternalSnapshot:
        """See Source.find_named."""
        return self.image.find_named(name)

    def reason_unsound(self, base: Base, facts: Mapping[str, str]) -> str | None:
        """See Source.reason_unsound.

        It must be called before the new internal snapshot is taken, because taking it recomputes the COPIED
        flags.
        """
        if self.image.header.corrupt:
            return "the image is marked corrupt"
        if self._chain.device is not None:
            return f"{self._chain.device} is a block device, which does not show whether it was written to"
        if facts.get(_BACKING, "") != self._chain.identity:
            return "the backing files are not those of the parent, or were written to since"
        active, then = self.image.active_point(), self.image.point_at(base.internal)
        try:
            shared = count_shared_copied(self.image, active, then)
        except DamagedImageError:
            if not self._used_by_qemu:
                raise
            return "the active tables changed while they were read"
        if shared:
            return "clusters that the pinned base shares are marked as writable in place"
        return None

    def require_unchanged(self, internals: Sequence[InternalSnapshot]) -> None:
        """See Source.require_unchanged.

        An internal snapshot that was deleted meanwhile can have been overwritten: its clusters are free then.
        """
        self.reload()
        for internal in internals:
            if internal not in self.image.snapshots:
                raise ImageInUseError(
                    f"internal snapshot {internal.name!r} of {self.path} was deleted or changed while it was "
                    "read, so this snapshot is not stored; find out what did that, then run this again"
                )
        if not internals and self._unchanged is not None:
            self._unchanged.require()
        self._chain.require_unchanged()

    def view(self, internal: InternalSnapshot | None) -> View:
        """See Source.view."""
        point = self.image.point_at(internal) if internal else self.image.active_point()
        return PointView(self.image, point, self._chain.top)

    def find_change(self, view: View, base: Base | None, why_not: str, progress: Progress) -> Change:
        """See Source.find_change."""
        if not isinstance(view, PointView):
            raise TypeError("the view is of another kind of source")
        if base is None:
            return self._scan(view.point, why_not, progress)
        then = self.image.point_at(base.internal)
        diff = find_changed(self.image, then, view.point, scan_progress(progress))
        if diff.shared_copied:
            return self._scan(view.point, "the pinned base's clusters were written in place", progress)
        candidates = diff.map | DirtyMap.from_runs(view.blocks, np.minimum(base.extra, view.blocks))
        data = find_allocated(self.image, view.point, within=candidates)
        if self._chain.top is not None:
            data = with_data_below(data, self._chain.top, progress) & candidates
        replaced = np.concatenate([candidates.runs(), [[view.blocks, END]]]).astype(np.int64)
        pinned = pinned_snapshot(base.internal.name)
        whose = f"the pinned base of snapshot {pinned}" if pinned else f"'{base.internal.name}'"
        return Change(TABLE_DIFF, f"compared with {whose}", candidates, data, replaced)

    def _scan(self, point: Point, why: str, progress: Progress) -> Change:
        """Find all blocks that can hold data, in the image and below it."""
        own = find_allocated(self.image, point, progress=scan_progress(progress), skip_holes=True)
        return Change.full_scan(with_data_below(own, self._chain.top, progress), why)


def _reason_not_pinnable(image: Image) -> str | None:
    """Return why an internal snapshot must not, or cannot, be left in the image; None if it can."""
    if image.header.version < 3:
        return "a version 2 image cannot be resized while it holds an internal snapshot"
    return reason_no_room(image)
