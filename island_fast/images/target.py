"""Images that are there already, and are written onto: a qcow2 by way of qemu, a raw file or a block device.

A target is held as long as it is open: nobody else may write to it, nor take a snapshot of it. It is compared
first and written afterwards, for what is read of a qcow2 is as of when it was opened.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from island_fast.arrays import Bytes2D, Int64s
from island_fast.dirtymap import BLOCK_SIZE, DirtyMap
from island_fast.errors import ImageInUseError, IslandError, RefusedError
from island_fast.files import punch
from island_fast.images.qcow2_source import PointView
from island_fast.images.raw_source import RawView, raw_data
from island_fast.images.source import View, scanning
from island_fast.progress import Progress
from island_fast.qcow2.changes import allocated
from island_fast.qcow2.header import MAGIC, MAX_VOLUME_SIZE
from island_fast.qcow2.image import Image
from island_fast.qcow2.vectored_io import transfers, write_all
from island_fast.qcow2.writer import write_rows
from island_fast.qemu.image_lock import ImageLock, hold_off_everyone, writer_present
from island_fast.qemu.open_files import find_loop_devices, refuse_if_open
from island_fast.qemu.qemu_nbd import open_for_writing

__all__ = ["Existing", "open_existing"]


_ZEROED_AT_ONCE = 4096  # blocks: 256 MiB
_ZEROS = memoryview(bytes(1 << 20))
_BLKZEROOUT = 0x127F  # linux/fs.h
_RANGE = struct.Struct("QQ")


def open_existing(
    path: Path, image_format: str, volume_size: int, *, look_only: bool, was_raw: bool = False
) -> Existing:
    """The target at `path`, "qcow2" or "raw", for a volume of so many bytes.

    With `look_only` it is compared and cannot be written. If the volume `was_raw`, its own first bytes may be
    those of a qcow2; a raw target that begins so is refused otherwise. RefusedError if it is smaller or may
    not be written onto, ImageInUseError if somebody has it open, NotFoundError if it is not there.
    """
    if image_format == "raw":
        return _Raw(path, volume_size, look_only, was_raw)
    return _Qcow2(path, volume_size, look_only)


class Existing(ABC):
    """An image that is there, held; a context manager. `size` is its volume's, in bytes.

    `view` shows it as it was when it was opened, until the first write. `written` counts bytes of data that
    were written, `zeroed` those that were made zero; the last block counts only up to `size`.
    """

    image_format: ClassVar[str]
    view: View
    size: int
    _stack: ExitStack

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written = self.zeroed = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    @abstractmethod
    def data(self, progress: Progress) -> DirtyMap:
        """Its blocks that may hold data; all others are zero."""

    def refuse_held(self) -> None:  # noqa: B027  # qemu's own locks do for a qcow2
        """ImageInUseError if somebody has opened it while it was compared, whom no lock keeps away."""

    def write(self, blocks: Int64s, rows: Bytes2D) -> None:
        """Put row i of `rows` (uint8[n, BLOCK_SIZE]) at block `blocks[i]`, in any order. Thread-safe."""
        self._write(blocks, rows)
        with self._lock:
            self.written += self.bytes_of(int(blocks.size), bool((blocks == self.view.blocks - 1).any()))

    def zero(self, start: int, stop: int) -> None:
        """Make the blocks [start, stop) zero."""
        for first in range(start, stop, _ZEROED_AT_ONCE):
            begin, end = first * BLOCK_SIZE, min(min(first + _ZEROED_AT_ONCE, stop) * BLOCK_SIZE, self.size)
            self._zero(begin, end - begin)
            self.zeroed += end - begin

    @abstractmethod
    def finish(self) -> None:
        """Bring all that was written to the disk, and close it."""

    def bytes_of(self, blocks: int, with_last: bool) -> int:
        """The bytes of so many of its blocks, the last of all perhaps partial."""
        beyond = self.view.blocks * BLOCK_SIZE - self.size
        return blocks * BLOCK_SIZE - (beyond if with_last else 0)

    @abstractmethod
    def _write(self, blocks: Int64s, rows: Bytes2D) -> None: ...

    @abstractmethod
    def _zero(self, offset: int, length: int) -> None: ...


class _Qcow2(Existing):
    """A qcow2 file; whatever internal snapshots it holds stay as they are."""

    image_format = "qcow2"

    def __init__(self, path: Path, volume_size: int, look_only: bool) -> None:
        super().__init__(path)
        if path.is_block_device():
            raise RefusedError(f"{path} is a block device, which holds the volume itself with --format raw")
        with ExitStack() as stack:
            self._image = stack.enter_context(Image.open(path))
            lock = stack.enter_context(ImageLock(path))
            if writer_present(lock.fd):
                raise ImageInUseError(f"{path} is open in another process; stop that process first")
            self._look(volume_size)
            if look_only:
                hold_off_everyone(lock.fd, str(path))
            else:
                header = self._image.header
                self._disk = stack.enter_context(open_for_writing(path, header.size, header.cluster_size))
            _refuse_replaced(path, lock.fd, self._image.fd)
            self._look(volume_size)  # again, now that nobody can change it; qemu may have repaired it
            self._point = self._image.active()
            self.view = PointView(self._image, self._point, None)
            self._stack = stack.pop_all()

    def _look(self, volume_size: int) -> None:
        self._image.reload()
        self.size = self._image.header.size
        _refuse_smaller(self.path, self.size, volume_size)
        if self._image.header.corrupt:
            raise RefusedError(f"{self.path} is marked corrupt; repair it with 'qemu-img check -r all' first")

    def data(self, progress: Progress) -> DirtyMap:
        """See Existing.data."""
        return allocated(self._image, self._point, progress=scanning(progress))

    def finish(self) -> None:
        """See Existing.finish."""
        self._stack.close()  # which flushes, and tells what qemu says when it closes the image

    def _write(self, blocks: Int64s, rows: Bytes2D) -> None:
        flat = rows.reshape(-1).data
        moves = transfers(blocks * BLOCK_SIZE, np.arange(blocks.size), BLOCK_SIZE, flat)
        self._disk.write([(move.offset, _cut(move.buffers, self.size - move.offset)) for move in moves])

    def _zero(self, offset: int, length: int) -> None:
        self._disk.zero(offset, length)


class _Raw(Existing):
    """A raw file or a block device."""

    image_format = "raw"

    def __init__(self, path: Path, volume_size: int, look_only: bool, was_raw: bool) -> None:
        super().__init__(path)
        with ExitStack() as stack:
            lock = stack.enter_context(ImageLock(path, devices=True))
            hold_off_everyone(lock.fd, str(path))
            self._device = path.is_block_device()
            if loops := [] if self._device else find_loop_devices(path):
                raise ImageInUseError(f"{path} is in use by {loops[0]}; detach that first")
            self._fd = _opened(path, os.O_RDONLY if look_only else os.O_RDWR, self._device)
            stack.callback(os.close, self._fd)
            _refuse_replaced(path, lock.fd, self._fd)
            self.refuse_held()
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
            _refuse_smaller(path, self.size, volume_size)
            if not was_raw and os.pread(self._fd, len(MAGIC), 0) == MAGIC:
                # All of its snapshots would be lost. What a guest wrote to a raw volume is only its data.
                raise RefusedError(
                    f"{path} begins as a qcow2, and the snapshot is not of a raw volume; "
                    f"give --format qcow2, or name another target"
                )
            if self.size > MAX_VOLUME_SIZE:
                raise RefusedError(f"{path} has {self.size} bytes, over the limit of 64 TiB")
            self.view = RawView(path, self._fd, self.size)
            self._stack = stack.pop_all()

    def refuse_held(self) -> None:
        """See Existing.refuse_held."""
        refuse_if_open(self.path, self._fd, readers=self._device)

    def data(self, progress: Progress) -> DirtyMap:
        """See Existing.data."""
        return raw_data(self._fd, self.size, progress)

    def finish(self) -> None:
        """See Existing.finish."""
        with self._told():
            os.fsync(self._fd)

    def _write(self, blocks: Int64s, rows: Bytes2D) -> None:
        write_rows(self._fd, blocks * BLOCK_SIZE, blocks, rows, self.size)

    def _zero(self, offset: int, length: int) -> None:
        with self._told():
            if self._device:
                fcntl.ioctl(self._fd, _BLKZEROOUT, _RANGE.pack(offset, length))
            elif not punch(self._fd, offset, length):
                for at in range(offset, offset + length, len(_ZEROS)):
                    write_all(self._fd, [_ZEROS[: offset + length - at]], at)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise IslandError(f"{self.path} cannot be written: {error.strerror}; check that disk") from error


def _opened(path: Path, flags: int, device: bool) -> int:
    """A descriptor; that of a device keeps mounts and other devices away."""
    try:
        return os.open(path, flags | os.O_CLOEXEC | (os.O_EXCL if device else 0))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ImageInUseError(f"{path} is mounted or part of another device; unmount it first") from error
        what = "reading" if flags & os.O_ACCMODE == os.O_RDONLY else "writing"
        raise IslandError(
            f"{path} cannot be opened for {what}: {error.strerror}; run as a user who may do that, "
            "and see that it is not read-only"
        ) from error


def _refuse_replaced(path: Path, *descriptors: int) -> None:
    """RefusedError unless the path, by which it was opened several times, leads to one file."""
    if not all(os.path.samestat(os.fstat(fd), os.stat(path)) for fd in descriptors):
        raise RefusedError(f"{path} was replaced by another file just now; try again")


def _refuse_smaller(path: Path, size: int, volume_size: int) -> None:
    if size < volume_size:
        raise RefusedError(
            f"{path} has {size} bytes and the volume {volume_size}; make it larger or name another target"
        )


def _cut(buffers: list[memoryview], length: int) -> list[memoryview]:
    """The buffers up to so many bytes; only the last one can be beyond."""
    beyond = sum(buffer.nbytes for buffer in buffers) - length
    return [*buffers[:-1], buffers[-1][:-beyond]] if beyond > 0 else buffers
