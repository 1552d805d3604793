"""Who has a file or block device open, by whatever name: processes and loop devices.

The locks of `image_lock.py` are on one inode and do not show everything. A program that is not qemu's takes
none. libvirt gives each of its qemus a /dev of its own: the node there is another inode than the one in /dev,
with its own locks, though the block device is the same. So this module looks at the descriptors of all
processes in /proc, and at the loop devices in /sys. Both are snapshots of a moment: what is opened later is
not seen.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import struct
import time
from pathlib import Path

from island_fast.errors import ImageInUseError

__all__ = ["SYSFS_BLOCK", "find_loop_devices", "read_sysfs", "refuse_if_open"]

SYSFS_BLOCK = Path("/sys/block")
_LOOP_GET_STATUS64, _LOOP_INFO = 0x4C05, 232  # linux/loop.h; bytes of struct loop_info64

_PROC = Path("/proc")
_PATIENCE = 1.0  # seconds to wait for others to close it: udev opens every device that changes, for a moment
_STEP = 0.05  # seconds
_LOG = logging.getLogger(__name__)


def refuse_if_open(path: Path, fd: int, *, readers: bool) -> None:
    """Raise ImageInUseError if another process has the file or device of descriptor `fd` open for writing.

    With `readers`, also if one has it open for reading. The descriptors of other users' processes can be read
    only by root. If some could not be read, a warning is logged for a block device, where no lock shows its
    users.
    """
    wanted = os.fstat(fd)
    deadline = time.monotonic() + _PATIENCE
    while True:
        found, hidden = _find_process(wanted, readers)
        if found is None:
            break
        if time.monotonic() > deadline:
            raise ImageInUseError(f"{path} is open in process {found}; stop that process first")
        time.sleep(_STEP)
    if hidden and stat.S_ISBLK(wanted.st_mode):
        _LOG.warning(
            "cannot determine whether any of %d processes of other users has %s open; run as root to be sure",
            hidden,
            path,
        )


def _find_process(wanted: os.stat_result, readers: bool) -> tuple[int | None, int]:
    """Return the first other process that has it open, and how many before could not be examined."""
    own, hidden = os.readlink(_PROC / "self"), 0
    for process in _PROC.glob("[0-9]*"):
        if process.name == own:
            continue
        try:
            descriptors = os.listdir(process / "fd")
        except PermissionError:
            hidden += 1
            continue
        except OSError:  # the process has ended
            continue
        for descriptor in descriptors:
            if _leads_to(process, descriptor, wanted) and (readers or _is_writable(process, descriptor)):
                return int(process.name), hidden
    return None, hidden


def _leads_to(process: Path, descriptor: str, wanted: os.stat_result) -> bool:
    """Return whether a process's descriptor is of the file, or of any node of the block device, `wanted`."""
    try:
        found = os.stat(process / "fd" / descriptor)
    except OSError:  # closed meanwhile
        return False
    if stat.S_ISBLK(wanted.st_mode):
        return stat.S_ISBLK(found.st_mode) and found.st_rdev == wanted.st_rdev
    return os.path.samestat(found, wanted)


def _is_writable(process: Path, descriptor: str) -> bool:
    """Return whether a process's descriptor is open for writing; False if it was closed meanwhile."""
    try:
        text = (process / "fdinfo" / descriptor).read_text()
    except OSError:
        return False
    flags = next((line.split()[1] for line in text.splitlines() if line.startswith("flags:")), "0")
    return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY


def find_loop_devices(file: Path) -> list[str]:
    """Return the names of all loop devices over a file, by whatever name each of them was given the file."""
    wanted = os.stat(file)
    found = sorted(SYSFS_BLOCK.glob("loop*/loop/backing_file"))
    return [
        str(device)
        for device, backing in ((Path("/dev", entry.parts[-3]), read_sysfs(entry)) for entry in found)
        if _is_file(backing, wanted) or _stands_on_inode(device, wanted)
    ]


def _is_file(path: str, wanted: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), wanted)
    except (OSError, ValueError):
        return False


def _stands_on_inode(device: Path, wanted: os.stat_result) -> bool:
    """Ask a loop device whether its file is `wanted`: its name may be gone, or of another mount namespace.

    Only root can open the device; False without its rights.
    """
    try:
        fd = os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        info = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO))
    except OSError:  # detached meanwhile
        return False
    finally:
        os.close(fd)
    number, inode = struct.unpack_from("QQ", info)
    minor = number & 0xFF | number >> 12 & 0xFFF00  # the kernel's huge_encode_dev
    return (number >> 8 & 0xFFF, minor, inode) == (
        os.major(wanted.st_dev), os.minor(wanted.st_dev), wanted.st_ino,
    )  # fmt: skip


def read_sysfs(path: Path) -> str:
    """Return the value of a file of sysfs; "" if it cannot be read."""
    try:
        return path.read_text(errors="surrogateescape").strip("\n")
    except OSError:
        return ""
