"""Which other processes have an image open, by whatever name: what locks on one inode do not tell.

libvirt gives each of its qemus a /dev of its own. The node there is another inode than the one in /dev, and
so are the locks on it, though the block device is the same.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from island_fast.errors import ImageInUseError

__all__ = ["refuse_held"]

_PROC = Path("/proc")
_PATIENCE = 1.0  # seconds; udev opens every device that changes, for a moment
_STEP = 0.05
_LOG = logging.getLogger(__name__)


def refuse_held(path: Path, fd: int, *, readers: bool) -> None:
    """ImageInUseError if another process has the file or block device of descriptor `fd` open for writing.

    With `readers`, also if one has it open for reading. One that opens it later is not seen. Whose
    descriptors may not be looked at cannot be told: of a block device, where nothing else tells, a warning.
    """
    wanted = os.fstat(fd)
    deadline = time.monotonic() + _PATIENCE
    while True:
        found, hidden = _holder(wanted, readers)
        if found is None:
            break
        if time.monotonic() > deadline:
            raise ImageInUseError(f"{path} is open in process {found}; stop that process first")
        time.sleep(_STEP)
    if hidden and stat.S_ISBLK(wanted.st_mode):
        _LOG.warning(
            "whether %d processes of other users have %s open cannot be told; run as root to be sure",
            hidden,
            path,
        )


def _holder(wanted: os.stat_result, readers: bool) -> tuple[int | None, int]:
    """The first process that has it open, and how many could not be looked at."""
    own, hidden = os.readlink(_PROC / "self"), 0
    for process in _PROC.glob("[0-9]*"):
        if process.name == own:
            continue
        try:
            descriptors = os.listdir(process / "fd")
        except PermissionError:
            hidden += 1
            continue
        except OSError:  # it has ended
            continue
        if any(readers or _writes(process, one) for one in _those_of(process, descriptors, wanted)):
            return int(process.name), hidden
    return None, hidden


def _those_of(process: Path, descriptors: list[str], wanted: os.stat_result) -> Iterator[str]:
    for one in descriptors:
        try:
            there = os.stat(process / "fd" / one)
        except OSError:  # closed meanwhile
            continue
        if _is_same(there, wanted):
            yield one


def _is_same(one: os.stat_result, other: os.stat_result) -> bool:
    if stat.S_ISBLK(other.st_mode):
        return stat.S_ISBLK(one.st_mode) and one.st_rdev == other.st_rdev
    return os.path.samestat(one, other)


def _writes(process: Path, descriptor: str) -> bool:
    """Whether it is open for writing; where that is not told any more, it is closed."""
    try:
        text = (process / "fdinfo" / descriptor).read_text()
    except OSError:
        return False
    flags = next((line.split()[1] for line in text.splitlines() if line.startswith("flags:")), "0")
    return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY
