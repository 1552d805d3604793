"""A raw image or a block device as a snapshot's source.

It has no tables to compare. Every block that can hold data is read, and a block whose digest is the parent's
is not sent. Holes are found with SEEK_DATA, where the file system reports them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from island_fast.arrays import Bytes2D, Int64s
from island_fast.dirtymap import BLOCK_SIZE, DirtyMap
from island_fast.errors import DamagedImageError, RefusedError, UsageError
from island_fast.files import find_extents
from island_fast.images.source import Base, Change, Source, View, scan_progress
from island_fast.images.unchanged import Unchanged
from island_fast.progress import Progress
from island_fast.qcow2.header import MAX_VOLUME_SIZE
from island_fast.qcow2.snapshots import InternalSnapshot, PinnedBase
from island_fast.qcow2.vectored_io import plan_transfers, read_transfer
from island_fast.qemu.image_lock import ImageLock, open_image
from island_fast.qemu.open_files import refuse_held

__all__ = ["RawSource", "RawView", "find_raw_data", "open_raw"]

_NO_TABLES = "a raw image has no tables to compare"


class RawView(View):
    """The volume in a raw file; its size stays what it was when the file was opened."""

    def __init__(self, path: Path, fd: int, size: int) -> None:
        """Read from `fd`, which stays the caller's and open; `path` is for messages, `size` in bytes."""
        self.volume_size = size
        self._path = path
        self._fd = fd
        self._lock = threading.Lock()
        self._read = 0

    @property
    def bytes_read(self) -> int:
        """See View.bytes_read."""
        return self._read

    def read(self, blocks: Int64s, out: Bytes2D) -> None:
        """See View.read."""
        rows = np.arange(blocks.size)
        for transfer in plan_transfers(blocks * BLOCK_SIZE, rows, BLOCK_SIZE, out.reshape(-1).data):
            wanted = min(transfer.length, self.volume_size - transfer.offset)
            got = min(read_transfer(self._fd, transfer), wanted)
            if got < wanted:
                raise DamagedImageError(
                    f"{self._path} was cut off while it was read; take the snapshot again"
                )
            with self._lock:
                self._read += got
        tail = self.volume_size - int(blocks[-1]) * BLOCK_SIZE if blocks.size else BLOCK_SIZE
        out[-1:, max(tail, 0) :] = 0


class RawSource(Source):
    """A raw image held for one snapshot. As long as it is open, locks keep QEMU from writing to it."""

    def __init__(self, path: Path) -> None:
        """Open and lock the image.

        Raises NotFoundError: no such file.
        Raises ImageInUseError: something else can write to it (`open_files.refuse_held`): a process, a loop
            device over it, or a file system that is mounted from it.
        Raises RefusedError: another snapshot of it is being taken; the volume is over 64 TiB; or it is not a
            regular file or block device.
        """
        self.path = path
        with ExitStack() as stack:
            lock = stack.enter_context(ImageLock(path, hold_off_writers=True, devices=True))
            self._fd = lock.fd
            refuse_held(path, self._fd, to_write=False)
            self._unchanged = Unchanged(path, self._fd)
            self._size = os.lseek(self._fd, 0, os.SEEK_END)
            if self._size > MAX_VOLUME_SIZE:
                raise RefusedError(f"{path} has {self._size} bytes, over the limit of 64 TiB")
            self._stack = stack.pop_all()

    @property
    def fd(self) -> int:
        """See Source.fd."""
        return self._fd

    @property
    def facts(self) -> Mapping[str, str]:
        """See Source.facts."""
        return {"format": "raw"}

    @property
    def internal_snapshots(self) -> tuple[InternalSnapshot, ...]:
        """See Source.internal_snapshots."""
        return ()

    @property
    def reason_not_pinnable(self) -> str | None:
        """See Source.reason_not_pinnable."""
        return _NO_TABLES

    def find_pinned(self, pin: PinnedBase) -> InternalSnapshot | None:
        """See Source.find_pinned."""
        return None

    def find_named(self, name: str) -> InternalSnapshot:
        """See Source.find_named."""
        raise UsageError("a raw image has no internal snapshots; leave out --at, or --format raw")

    def pin(self, name: str) -> InternalSnapshot:
        """See Source.pin."""
        raise UsageError("a raw image cannot hold a pin")

    def unpin(self, internal: InternalSnapshot) -> None:
        """See Source.unpin."""
        raise UsageError("a raw image cannot hold a pin")

    def discard_pin(self, name: str) -> None:
        """Do nothing: no pin can exist."""

    def reason_unsound(self, base: Base, facts: Mapping[str, str]) -> str | None:
        """See Source.reason_unsound."""
        return _NO_TABLES

    def require_unchanged(self, internals: Sequence[InternalSnapshot]) -> None:
        """See Source.require_unchanged."""
        self._unchanged.require()

    def view(self, internal: InternalSnapshot | None) -> View:
        """See Source.view."""
        return RawView(self.path, self._fd, self._size)

    def find_change(self, view: View, base: Base | None, why_not: str, progress: Progress) -> Change:
        """See Source.find_change."""
        return Change.full_scan(find_raw_data(self._fd, self._size, progress), why_not)


def find_raw_data(fd: int, size: int, progress: Progress) -> DirtyMap:
    """Find the blocks of a raw file of `size` bytes that can hold data."""
    found = DirtyMap(-(-size // BLOCK_SIZE))
    report = scan_progress(progress)
    for start, stop in find_extents(fd, size):
        found.set_range(start // BLOCK_SIZE, -(-stop // BLOCK_SIZE))
        report(stop // BLOCK_SIZE, found.blocks)
    return found


def open_raw(path: Path) -> tuple[int, int]:
    """Open a raw image or device read-only; return the descriptor, which the caller closes, and its size."""
    fd = open_image(str(path), devices=True)
    return fd, os.lseek(fd, 0, os.SEEK_END)
