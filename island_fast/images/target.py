"""An existing image that a restore writes onto: a qcow2 through qemu-nbd, a raw file or a block device.

As long as a target is open, no other process can write to it or take a snapshot of it. A restore first
compares all of it and then writes: what `view` reads of a qcow2 is as of when the target was opened.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
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
from island_fast.files import punch_hole
from island_fast.images.qcow2_source import PointView
from island_fast.images.raw_source import RawView, find_raw_data
from island_fast.images.source import View, scan_progress
from island_fast.progress import Progress
from island_fast.qcow2.changes import find_allocated
from island_fast.qcow2.header import MAGIC, MAX_VOLUME_SIZE
from island_fast.qcow2.image import Image
from island_fast.qcow2.vectored_io import plan_transfers, write_all
from island_fast.qcow2.writer import write_rows
from island_fast.qemu.image_lock import ImageLock, hold_off_everyone, writer_present
from island_fast.qemu.open_files import refuse_held
from island_fast.qemu.programs import descriptor_path
from island_fast.qemu.qemu_nbd import open_for_writing

__all__ = ["ExistingImage", "open_target"]

_ZEROED_AT_ONCE = 4096  # blocks: 256 MiB
_ZEROS = memoryview(bytes(1 << 20))
_BLKZEROOUT = 0x127F  # linux/fs.h
_RANGE = struct.Struct("QQ")


def open_target(
    path: Path, image_format: str, volume_size: int, *, read_only: bool, was_raw: bool = False
) -> ExistingImage:
    """Open the image at `path` as the target for a volume of `volume_size` bytes.

    image_format: "qcow2" or "raw"; not probed.
    read_only: the target will be compared and not written.
    was_raw: the snapshot is of a raw volume, whose first bytes can be those of a qcow2. Without it, a raw
        target that begins as a qcow2 is refused, because its snapshots would be lost.

    Raises NotFoundError: it does not exist.
    Raises RefusedError: it is smaller than the volume, or must not be written onto.
    Raises ImageInUseError: another process has it open.
    """
    if image_format == "raw":
        return _Raw(path, volume_size, read_only, was_raw)
    return _Qcow2(path, volume_size, read_only)


class ExistingImage(ABC):
    """An existing image, locked until it is closed; a context manager. `size` is its volume's, in bytes.

    `view` reads the volume; it is valid until the first write. `written` counts the bytes of data that were
    written, `zeroed` those that were made zero; the last block counts only up to `size`.
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
    def find_data(self, progress: Progress) -> DirtyMap:
        """Find the blocks that can hold data; all others are zero."""

    @abstractmethod
    def begin_writing(self) -> None:
        """Make ready for the first write. ImageInUseError if anything else uses the image now.

        No lock keeps others away, and comparing can have taken hours.
        """

    def write(self, blocks: Int64s, rows: Bytes2D) -> None:
        """Write row i of `rows` (uint8[n, BLOCK_SIZE]) to block `blocks[i]`, in any order. Thread-safe."""
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
        """Flush all writes to disk. Call it once, after the last write."""

    def bytes_of(self, blocks: int, with_last: bool) -> int:
        """Return how many bytes `blocks` blocks hold; `with_last` if the last of all is one of them."""
        past_end = self.view.blocks * BLOCK_SIZE - self.size
        return blocks * BLOCK_SIZE - (past_end if with_last else 0)

    @abstractmethod
    def _write(self, blocks: Int64s, rows: Bytes2D) -> None: ...

    @abstractmethod
    def _zero(self, offset: int, length: int) -> None: ...


class _Qcow2(ExistingImage):
    """A qcow2 file, written through qemu-nbd. Its internal snapshots stay as they are."""

    image_format = "qcow2"

    def __init__(self, path: Path, volume_size: int, read_only: bool) -> None:
        super().__init__(path)
        if path.is_block_device():
            raise RefusedError(
                f"{path} is a block device; to write the volume itself to it, give --format raw"
            )
        with ExitStack() as stack:
            self._image = stack.enter_context(Image.open(path))
            lock = stack.enter_context(ImageLock(path))
            if writer_present(lock.fd):
                raise ImageInUseError(f"{path} is open in another process; stop that process first")
            refuse_held(path, lock.fd, to_write=True)
            self._check_header(volume_size)
            if read_only:
                hold_off_everyone(lock.fd, str(path))
            else:
                header = self._image.header
                self._disk = stack.enter_context(
                    open_for_writing(self._image.fd, path, header.size, header.cluster_size)
                )
            _refuse_replaced(path, lock.fd, self._image.fd)
            self._check_header(volume_size)  # again, because only now nobody can change it; QEMU repairs too
            self._point = self._image.active_point()
            self.view = PointView(self._image, self._point, None)
            self._stack = stack.pop_all()

    def _check_header(self, volume_size: int) -> None:
        """Read the header, set `size`, and refuse an image that must not be written onto."""
        self._image.reload()
        self.size = self._image.header.size
        _refuse_smaller(self.path, self.size, volume_size)
        if self._image.header.corrupt:
            raise RefusedError(f"{self.path} is marked corrupt; repair it with 'qemu-img check -r all' first")

    def find_data(self, progress: Progress) -> DirtyMap:
        """See ExistingImage.find_data."""
        return find_allocated(self._image, self._point, progress=scan_progress(progress), skip_holes=True)

    def begin_writing(self) -> None:
        """See ExistingImage.begin_writing. The image is open in our own qemu-nbd."""
        refuse_held(self.path, self._image.fd, to_write=True, ours=frozenset([self._disk.process]))

    def finish(self) -> None:
        """See ExistingImage.finish."""
        self._stack.close()  # flushes, and raises what QEMU reports when it closes the image

    def _write(self, blocks: Int64s, rows: Bytes2D) -> None:
        flat = rows.reshape(-1).data
        parts = plan_transfers(blocks * BLOCK_SIZE, np.arange(blocks.size), BLOCK_SIZE, flat)
        self._disk.write([(part.offset, _cut(part.buffers, self.size - part.offset)) for part in parts])

    def _zero(self, offset: int, length: int) -> None:
        self._disk.zero(offset, length)


class _Raw(ExistingImage):
    """A raw file or a block device."""

    image_format = "raw"

    def __init__(self, path: Path, volume_size: int, read_only: bool, was_raw: bool) -> None:
        super().__init__(path)
        with ExitStack() as stack:
            lock = stack.enter_context(ImageLock(path, devices=True))
            hold_off_everyone(lock.fd, str(path))
            self._fd = lock.fd
            self._device = stat.S_ISBLK(os.fstat(lock.fd).st_mode)
            refuse_held(path, lock.fd, to_write=True)
            opened = _open_raw_target(path, lock.fd, os.O_RDONLY if read_only else os.O_RDWR, self._device)
            if self._device:  # stays open, so that nobody mounts it meanwhile
                self._fd = opened
                stack.callback(os.close, opened)
            else:
                os.close(opened)  # a file that is open for writing gets no lease: see `refuse_held`
            _refuse_replaced(path, lock.fd)
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
            _refuse_smaller(path, self.size, volume_size)
            if not was_raw and os.pread(self._fd, len(MAGIC), 0) == MAGIC:
                # Its internal snapshots would be lost. If the volume was raw, a guest can have written the
                # magic: then it is only data.
                raise RefusedError(
                    f"{path} begins as a qcow2, and the snapshot is not of a raw volume; "
                    "give --format qcow2, or name another target"
                )
            if self.size > MAX_VOLUME_SIZE:
                raise RefusedError(f"{path} has {self.size} bytes, over the limit of 64 TiB")
            self.view = RawView(path, self._fd, self.size)
            self._stack = stack.pop_all()

    def begin_writing(self) -> None:
        """See ExistingImage.begin_writing."""
        refuse_held(self.path, self._fd, to_write=True, claimed=self._device)
        if not self._device:
            self._fd = _open_raw_target(self.path, self._fd, os.O_RDWR, False)
            self._stack.callback(os.close, self._fd)

    def find_data(self, progress: Progress) -> DirtyMap:
        """See ExistingImage.find_data."""
        return find_raw_data(self._fd, self.size, progress)

    def finish(self) -> None:
        """See ExistingImage.finish."""
        with self._explain_os_errors():
            os.fsync(self._fd)

    def _write(self, blocks: Int64s, rows: Bytes2D) -> None:
        write_rows(self._fd, blocks * BLOCK_SIZE, blocks, rows, self.size)

    def _zero(self, offset: int, length: int) -> None:
        with self._explain_os_errors():
            if self._device:
                fcntl.ioctl(self._fd, _BLKZEROOUT, _RANGE.pack(offset, length))
            elif not punch_hole(self._fd, offset, length):
                for at in range(offset, offset + length, len(_ZEROS)):
                    write_all(self._fd, [_ZEROS[: offset + length - at]], at)

    @contextlib.contextmanager
    def _explain_os_errors(self) -> Iterator[None]:
        """Turn an OSError of the body into an IslandError that names the target."""
        try:
            yield
        except OSError as error:
            raise IslandError(f"{self.path} cannot be written: {error.strerror}; check that disk") from error


def _open_raw_target(path: Path, fd: int, flags: int, device: bool) -> int:
    """Open what `fd` is once more; the descriptor of a device keeps it from being mounted or used."""
    try:
        return os.open(descriptor_path(fd), flags | os.O_CLOEXEC | (os.O_EXCL if device else 0))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ImageInUseError(f"{path} is mounted or part of another device; unmount it first") from error
        what = "reading" if flags & os.O_ACCMODE == os.O_RDONLY else "writing"
        raise IslandError(
            f"{path} cannot be opened for {what}: {error.strerror}; run as a user who may do that, "
            "and check that it is not read-only"
        ) from error


def _refuse_replaced(path: Path, *descriptors: int) -> None:
    """Raise RefusedError unless all descriptors, each opened by `path`, are of the file that is there now."""
    if not all(os.path.samestat(os.fstat(fd), os.stat(path)) for fd in descriptors):
        raise RefusedError(f"{path} was replaced by another file just now; try again")


def _refuse_smaller(path: Path, size: int, volume_size: int) -> None:
    if size < volume_size:
        raise RefusedError(
            f"{path} has {size} bytes and the volume {volume_size}; make it larger or name another target"
        )


def _cut(buffers: list[memoryview], length: int) -> list[memoryview]:
    """Return the buffers cut to `length` bytes; only the last one can reach past that."""
    excess = sum(buffer.nbytes for buffer in buffers) - length
    return [*buffers[:-1], buffers[-1][:-excess]] if excess > 0 else buffers
