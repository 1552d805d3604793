"""The reserve of a directory store: a file that keeps room on its disk for what frees room.

A delete and a sweep each need a new record, so on a disk that is full to the last byte neither could be done.
The reserve is given up for such a record, and made again afterwards. No object can have its name.
"""

from __future__ import annotations

import contextlib
import errno
import os

from island_fast.files import write_scratch

__all__ = ["FULL", "RESERVE", "Reserve"]

RESERVE = ".reserve~"
"""Name of the file in the store's directory."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a file system, or a quota, that has no room."""

_SIZE = 1 << 20  # bytes; a record has a few KB, but one with a checkpoint of a large lineage has hundreds
_LEAST = 16 << 10  # bytes; a file of one record, and a folder, take some of these
_FILES = 8  # files that the disk must be able to take besides, if it limits their number
_SHARE = 16  # the reserve takes at most this part of a small disk


class Reserve:
    """The reserve of the store in directory `root`, whose temporary files are in the folder `scratch`."""

    def __init__(self, root: str, scratch: str) -> None:
        self._path = os.path.join(root, RESERVE)
        self._scratch = scratch

    def make(self) -> None:
        """Make the reserve, or make it larger, as far as there is room to spare.

        It holds random bytes, because a file system that compresses would keep no room for others.
        """
        with contextlib.suppress(OSError):
            disk = os.statvfs(self._scratch)
            spare = min(disk.f_bavail // 2, disk.f_blocks // _SHARE) * disk.f_frsize
            if disk.f_files and disk.f_favail < _FILES:
                return
            size, has = min(_SIZE, spare), self._size()
            while size >= _LEAST and size >= 2 * has:
                with contextlib.suppress(OSError):
                    os.replace(write_scratch(self._scratch, [memoryview(os.urandom(size))]), self._path)
                    return
                size //= 2  # a quota, which statvfs(3) does not show, leaves less

    def release(self) -> bool:
        """Give the room up; return False if none was kept."""
        try:
            os.unlink(self._path)
        except OSError:
            return False
        return True

    def release_if_short(self) -> None:
        """Give the room up if the disk has less than that besides: what is local may be on it, too."""
        with contextlib.suppress(OSError):
            disk = os.statvfs(self._scratch)
            if disk.f_bavail * disk.f_frsize < self._size():
                self.release()

    def _size(self) -> int:
        try:
            return os.lstat(self._path).st_size
        except OSError:
            return 0
