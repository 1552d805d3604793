"""An open block device, and every way to change it that guests and file systems have.

The numbers are those of linux/fs.h.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from pathlib import Path
from typing import Self

from island_fast.files import punch_hole

__all__ = ["BlockDevice"]

_BLKDISCARD, _BLKZEROOUT = 0x1277, 0x127F
_RANGE = struct.Struct("QQ")
_MOST = 1 << 20  # bytes of one direct request


class BlockDevice:
    """A device opened twice, with the page cache and without (O_DIRECT). A context manager.

    `discard` and `punch` flush first: the kernel drops what the page cache has of the range before it asks
    the device, and when that cannot do it, writes that were not on the device yet would be lost.

    Offsets and lengths are bytes, and whole sectors but for `read` and `write`. Errors are OSError.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._direct = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._direct)
        os.close(self._fd)

    def read(self, begin: int, length: int) -> bytes:
        """Read through the page cache."""
        parts = []
        while length:
            part = os.pread(self._fd, length, begin)
            if not part:
                raise OSError(errno.EIO, "the device is shorter than its volume")
            parts.append(part)
            begin, length = begin + len(part), length - len(part)
        return b"".join(parts)

    def write(self, begin: int, data: bytes) -> None:
        """Write through the page cache."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, begin)
            begin, view = begin + written, view[written:]

    def read_direct(self, begin: int, length: int) -> bytes:
        """Read past the page cache."""
        parts = []
        for at in range(begin, begin + length, _MOST):
            with _aligned(min(_MOST, begin + length - at)) as buffer:
                _whole(os.preadv(self._direct, [buffer], at), len(buffer))
                parts.append(buffer[:])
        return b"".join(parts)

    def write_direct(self, begin: int, data: bytes) -> None:
        """Write past the page cache."""
        for at in range(0, len(data), _MOST):
            part = data[at : at + _MOST]
            with _aligned(len(part)) as buffer:
                buffer[:] = part
                _whole(os.pwritev(self._direct, [buffer], begin + at), len(buffer))

    def zero(self, begin: int, length: int) -> None:
        """Make zeros by BLKZEROOUT."""
        fcntl.ioctl(self._fd, _BLKZEROOUT, _RANGE.pack(begin, length))

    def discard(self, begin: int, length: int) -> bool:
        """Give the range up by BLKDISCARD; False, and nothing changed, if the device cannot."""
        self.flush()
        try:
            fcntl.ioctl(self._fd, _BLKDISCARD, _RANGE.pack(begin, length))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return False
        return True

    def punch(self, begin: int, length: int) -> bool:
        """Make zeros that take no space, by fallocate; False, and nothing changed, if the device cannot."""
        self.flush()
        return punch_hole(self._fd, begin, length)

    def flush(self) -> None:
        """Bring all that was written to the disk."""
        os.fsync(self._fd)


def _aligned(length: int) -> mmap.mmap:
    """Memory that O_DIRECT takes: it begins on a page."""
    return mmap.mmap(-1, length)


def _whole(done: int, wanted: int) -> None:
    if done != wanted:
        raise OSError(errno.EIO, f"{done} of {wanted} bytes of a direct request were done")
