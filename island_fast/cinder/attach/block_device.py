"""Every way in which a guest or a file system can read and change a block device.

The ioctl numbers are from linux/fs.h.
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
_MAX_REQUEST = 1 << 20  # bytes of one direct request


class BlockDevice:
    """A device that is open twice, through the page cache and past it (O_DIRECT). A context manager.

    Offsets and lengths are in bytes; except in `read` and `write` they are whole sectors. Errors are OSError.

    `discard` and `punch` flush first: the kernel drops the range from the page cache before it asks the
    device, and if the device then refuses, writes that had not reached it would be lost.
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
        for at in range(begin, begin + length, _MAX_REQUEST):
            with _allocate_aligned(min(_MAX_REQUEST, begin + length - at)) as buffer:
                _require_whole(os.preadv(self._direct, [buffer], at), len(buffer))
                parts.append(buffer[:])
        return b"".join(parts)

    def write_direct(self, begin: int, data: bytes) -> None:
        """Write past the page cache."""
        for at in range(0, len(data), _MAX_REQUEST):
            part = data[at : at + _MAX_REQUEST]
            with _allocate_aligned(len(part)) as buffer:
                buffer[:] = part
                _require_whole(os.pwritev(self._direct, [buffer], begin + at), len(buffer))

    def zero(self, begin: int, length: int) -> None:
        """Zero the range with BLKZEROOUT."""
        fcntl.ioctl(self._fd, _BLKZEROOUT, _RANGE.pack(begin, length))

    def discard(self, begin: int, length: int) -> bool:
        """Discard the range with BLKDISCARD; return False, with nothing changed, if the device cannot."""
        self.flush()
        try:
            fcntl.ioctl(self._fd, _BLKDISCARD, _RANGE.pack(begin, length))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return False
        return True

    def punch(self, begin: int, length: int) -> bool:
        """Punch a hole with fallocate; return False, with nothing changed, if the device cannot do that."""
        self.flush()
        return punch_hole(self._fd, begin, length)

    def flush(self) -> None:
        """Flush everything that was written to the disk."""
        os.fsync(self._fd)


def _allocate_aligned(length: int) -> mmap.mmap:
    """Allocate memory that O_DIRECT accepts: it begins on a page."""
    return mmap.mmap(-1, length)


def _require_whole(done: int, wanted: int) -> None:
    if done != wanted:
        raise OSError(errno.EIO, f"{done} of {wanted} bytes of a direct request were done")
