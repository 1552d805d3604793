"""A raw image or a block device as a snapshot's source.

It has no tables to compare: every block that may hold data is read, and those that are what the parent has
are known by their digests and not sent. Holes are found by SEEK_DATA where the file system tells them.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from island_fast.arrays import Bytes2D, Int64s
from island_fast.dirtymap import BLOCK_SIZE, DirtyMap
from island_fast.errors import DamagedImageError, ImageInUseError, IslandError, RefusedError, UsageError
from island_fast.images.source import Base, Change, Source, View, scanned, scanning
from island_fast.progress import Progress
from island_fast.qcow2.header import MAX_VOLUME_SIZE
from island_fast.qcow2.snapshots import InternalSnapshot, PinnedBase
from island_fast.qcow2.vectored_io import read_transfer, transfers
from island_fast.qemu.image_lock import ImageLock, open_image
from island_fast.qemu.open_files import refuse_if_open

__all__ = ["RawSource", "RawView", "data_extents", "open_raw", "raw_data"]

_WHY = "a raw image has no tables to compare"


class RawView(View):
    """The bytes of a file, as long as it was when it was opened."""

    def __init__(self, path: Path, fd: int, size: int) -> None:
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
        for transfer in transfers(blocks * BLOCK_SIZE, rows, BLOCK_SIZE, out.reshape(-1).data):
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
    """A raw image held for one snapshot; qemu is kept from writing to it as long as this is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with ExitStack() as stack:
            lock = stack.enter_context(ImageLock(path, hold_off_writers=True, devices=True))
            self._fd = lock.fd
            _refuse_mounted(path)
            if path.is_block_device():
                refuse_if_open(path, self._fd, readers=False)
            self._size = os.lseek(self._fd, 0, os.SEEK_END)
            if self._size > MAX_VOLUME_SIZE:
                raise RefusedError(f"{path} has {self._size} bytes, over the limit of 64 TiB")
            self._stack = stack.pop_all()

    @property
    def facts(self) -> Mapping[str, str]:
        """See Source.facts."""
        return {"format": "raw"}

    @property
    def internals(self) -> tuple[InternalSnapshot, ...]:
        """See Source.internals."""
        return ()

    @property
    def unpinnable(self) -> str | None:
        """See Source.unpinnable."""
        return _WHY

    def find(self, pin: PinnedBase) -> InternalSnapshot | None:
        """See Source.find."""
        return None

    def named(self, name: str) -> InternalSnapshot:
        """See Source.named."""
        raise UsageError("a raw image has no internal snapshots; leave out --at, or --format raw")

    def pin(self, name: str) -> InternalSnapshot:
        """See Source.pin."""
        raise UsageError("a raw image cannot be pinned")

    def unpin(self, internal: InternalSnapshot) -> None:
        """See Source.unpin."""
        raise UsageError("a raw image cannot be pinned")

    def discard(self, name: str) -> None:
        """Nothing was taken."""

    def evidence(self, base: Base, facts: Mapping[str, str]) -> str | None:
        """See Source.evidence."""
        return _WHY

    def view(self, internal: InternalSnapshot | None) -> View:
        """See Source.view."""
        return RawView(self.path, self._fd, self._size)

    def change(self, view: View, base: Base | None, why_not: str, progress: Progress) -> Change:
        """See Source.change."""
        return scanned(raw_data(self._fd, self._size, progress), why_not)


def raw_data(fd: int, size: int, progress: Progress) -> DirtyMap:
    """The blocks of a raw file of `size` bytes that may hold data."""
    found = DirtyMap(-(-size // BLOCK_SIZE))
    tell = scanning(progress)
    for start, stop in data_extents(fd, size):
        found.set_range(start // BLOCK_SIZE, -(-stop // BLOCK_SIZE))
        tell(stop // BLOCK_SIZE, found.blocks)
    return found


def open_raw(path: Path) -> tuple[int, int]:
    """A read-only descriptor of a raw image or device, which the caller closes, and its size in bytes."""
    fd = open_image(str(path), devices=True)
    return fd, os.lseek(fd, 0, os.SEEK_END)


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Extents [start, stop) in bytes that may hold data, ascending; all of it where holes are not told."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            stop = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is left
                return
            start, stop = at, size
        if start < size:
            yield start, stop
        at = stop


def _refuse_mounted(path: Path) -> None:
    """Refuse a block device that the kernel itself uses: mounted, or part of another device."""
    if path.is_block_device():
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise ImageInUseError(
                    f"{path} is mounted or part of another device; unmount it first"
                ) from error
            raise IslandError(f"{path} cannot be opened: {error.strerror}") from error
