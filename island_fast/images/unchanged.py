"""Files that nobody may write to while they are read: that nobody did is asked again after the last read.

Locks keep only QEMU away, and `refuse_held` answers for a moment. A file that was changed since shows it in
its size, or in the time of its last change (ctime), which no program can set. That time is counted in steps:
of a tick of the kernel, or of a second or two in file systems with small inodes. So a file that was changed
within the last step is first left to grow older, or a later change would have the same time.
"""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from island_fast.errors import ImageInUseError
from island_fast.qemu.open_files import refuse_held

__all__ = ["Unchanged"]

_TICK = 25_000_000  # nanoseconds; a tick takes 10 ms at most
_COARSE = 2_100_000_000  # nanoseconds; where times are whole seconds


class Unchanged:
    """A file or block device that is about to be read, by a descriptor that stays the caller's.

    `status` is its status now. `settled` is whether each later change will show in it. It is not if the time
    is in the future, or is always the present one, as QEMU's FUSE exports give it; nor for a block device.
    """

    def __init__(self, path: Path, fd: int) -> None:
        """Wait until the last change is older than the step of the times; at most two seconds."""
        self._path, self._fd = path, fd
        self.status, self.settled = _settle(fd)

    def require(self) -> None:
        """Raise ImageInUseError if it was changed since, or if something can write to it now."""
        refuse_held(self._path, self._fd, to_write=False)
        before, now = self.status, os.fstat(self._fd)
        changed = now.st_size != before.st_size
        if self.settled:
            times = (now.st_mtime_ns, now.st_ctime_ns)
            changed = changed or times != (before.st_mtime_ns, before.st_ctime_ns)
        if changed:
            raise ImageInUseError(
                f"{self._path} was changed while it was read, so this snapshot is not stored; stop what "
                "writes to it, then run this again"
            )


def _settle(fd: int) -> tuple[os.stat_result, bool]:
    """Return the status as soon as a later change must show in it, and whether that is so."""
    waited = False
    while True:
        status = os.fstat(fd)
        step = _TICK if status.st_ctime_ns % 1_000_000_000 else _COARSE
        left = step - (time.time_ns() - status.st_ctime_ns)
        if left <= 0 or stat.S_ISBLK(status.st_mode):
            return status, left <= 0 and not stat.S_ISBLK(status.st_mode)
        if left > step or waited:
            return status, False
        time.sleep(left / 1e9)
        waited = True
