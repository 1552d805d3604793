"""Which other processes have an image open, by whatever name: what locks on one inode do not tell.

libvirt gives each of its qemus a /dev of its own. The node there is another inode than the one in /dev, and
so are the locks on it, though the block device is the same.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from island_fast.errors import ImageInUseError

__all__ = ["loops_over", "read_value", "refuse_held"]

_SYSFS = Path("/sys/block")
_LOOP_GET_STATUS64, _LOOP_INFO = 0x4C05, 232  # linux/loop.h; bytes of struct loop_info64

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


def loops_over(file: Path) -> list[str]:
    """Names of all loop devices that stand on a file, by whatever name they were given it."""
    wanted = os.stat(file)
    found = sorted(_SYSFS.glob("loop*/loop/backing_file"))
    return [
        str(device)
        for device, behind in ((Path("/dev", entry.parts[-3]), read_value(entry)) for entry in found)
        if _is_file(behind, wanted) or _stands_on_inode(device, wanted)
    ]


def _is_file(path: str, wanted: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), wanted)
    except (OSError, ValueError):
        return False


def _stands_on_inode(device: Path, wanted: os.stat_result) -> bool:
    """Ask the device itself: the name may be gone, or one of another mount namespace. Takes root's rights."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        told = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO))
    except OSError:  # detached meanwhile
        return False
    finally:
        os.close(fd)
    number, inode = struct.unpack_from("QQ", told)
    minor = number & 0xFF | number >> 12 & 0xFFF00  # the kernel's huge_encode_dev
    return (number >> 8 & 0xFFF, minor, inode) == (
        os.major(wanted.st_dev), os.minor(wanted.st_dev), wanted.st_ino,
    )  # fmt: skip


def read_value(path: Path) -> str:
    """A value of sysfs; "" where there is none."""
    try:
        return path.read_text(errors="surrogateescape").strip("\n")
    except OSError:
        return ""
