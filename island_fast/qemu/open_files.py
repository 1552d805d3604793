"""Who uses a file or block device, by whatever name: `refuse_held` asks everything that can show it.

The locks of `image_lock.py` are on one inode and do not show everything. A program that is not qemu's takes
none. libvirt gives each of its qemus a /dev of its own: the node there is another inode than the one in /dev,
with its own locks, though the block device is the same. So this module asks in these ways:

- A lease on the file, for an instant (fcntl(2), F_SETLEASE), shows that nobody at all has a regular file open
  for writing: no process, mapping, loop device or other part of the kernel, in no namespace. It needs the
  file's owner or root, and a local file system.
- /sys/block, and each loop device itself, show loop devices over the file, over the device, or over another
  part of the same disk.
- A device can itself stand on others: a partition on its disk, a loop device on a file or a device, a device
  mapper volume on its slaves. Whoever writes to one of those changes it, too, so they are all asked for.
- An exclusive open (O_EXCL) of a device fails if it is mounted in any namespace, or part of another device.
  /proc/*/mountinfo shows where it is mounted.
- /proc/swaps shows that the system swaps to it.
- /proc/*/fd and /proc/*/map_files show which process has it open, or only mapped.

Of other users' processes only root sees the descriptors. All are answers of a moment: what is opened later is
not seen.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import stat
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from island_fast.errors import ImageInUseError, IslandError
from island_fast.qemu.programs import descriptor_path

__all__ = ["SYSFS_BLOCK", "SYSFS_DEVICES", "read_sysfs", "refuse_held"]

SYSFS_BLOCK = Path("/sys/block")
SYSFS_DEVICES = Path("/sys/dev/block")
_LOOP_GET_STATUS64, _LOOP_INFO = 0x4C05, 232  # linux/loop.h; bytes of struct loop_info64

_PROC = Path("/proc")
_PATIENCE = 1.0  # seconds to wait for others to close it: udev opens every device that changes, for a moment
_STEP = 0.05  # seconds
_SESSION = 3  # field of /proc/PID/stat, counted after the program's name
_LOG = logging.getLogger(__name__)

Device = tuple[int, int]
"""Major and minor number of a block device."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What must not be in use: files by device and inode, block devices by their numbers.

    `devices` are all those that share bytes with the one that was asked for: a disk and its partitions.
    `below` are those that they stand on, however far down, and `files` the file that was asked for, or those
    that the devices stand on. `claimable` are those below that others can use exclusively nevertheless,
    because a loop device does not.
    """

    files: frozenset[tuple[int, int]]
    devices: frozenset[Device]
    below: frozenset[Device] = frozenset()
    claimable: frozenset[Device] = frozenset()

    @classmethod
    def of(cls, status: os.stat_result) -> _Wanted:
        """Return what shares bytes with a regular file or a block device."""
        if not stat.S_ISBLK(status.st_mode):
            return cls(frozenset([(status.st_dev, status.st_ino)]), frozenset())
        files: set[tuple[int, int]] = set()
        devices = _overlapping((os.major(status.st_rdev), os.minor(status.st_rdev)))
        seen, claimable, todo = set(devices), set[Device](), list(devices)
        while todo:
            device = todo.pop()
            file, lower = _loop_target(device)
            if file:
                files.add(file)
            if lower:
                claimable |= _overlapping(lower)
            for one in ([lower] if lower else []) + _slaves(device):
                fresh = _overlapping(one) - seen
                seen |= fresh
                todo += fresh
        below = seen - devices
        return cls(frozenset(files), frozenset(devices), frozenset(below), frozenset(claimable & below))

    def is_hit(self, found: os.stat_result, *, near: bool = False) -> bool:
        """Return whether a file, or any node of a device, that is in use is one of these.

        With `near`, devices that lie below do not count.
        """
        if stat.S_ISBLK(found.st_mode):
            number = (os.major(found.st_rdev), os.minor(found.st_rdev))
            return number in self.devices or (not near and number in self.below)
        return (found.st_dev, found.st_ino) in self.files


def refuse_held(
    path: Path, fd: int, *, to_write: bool, claimed: bool = False, ours: frozenset[int] = frozenset()
) -> None:
    """Raise ImageInUseError if anything else writes to the file or device of descriptor `fd`, or can.

    `path` is for messages alone. With `to_write` the caller is about to write: then a loop device that only
    reads counts, too, and for a block device so does a process that only reads. `claimed`: this process holds
    the device exclusively, by `fd`. `ours` are sessions (setsid(2)) of our own programs, whose use does not
    count. If some processes could not be examined, a warning is logged, unless a lease shows that nobody
    writes to the file.
    """
    status = os.fstat(fd)
    device = stat.S_ISBLK(status.st_mode)
    if device and not claimed:
        _refuse_mounted(path, fd, status)
    wanted = _Wanted.of(status)
    deadline = time.monotonic() + _PATIENCE
    while (held := _find_holder(wanted, fd, device, to_write, ours)) is not None:
        if time.monotonic() > deadline:
            raise ImageInUseError(f"{path} is {held}")
        time.sleep(_STEP)


def _find_holder(wanted: _Wanted, fd: int, device: bool, to_write: bool, ours: frozenset[int]) -> str | None:
    """Return who holds it and what to do, as the end of a sentence; None if nobody does."""
    lease = None if device or ours else _no_writer_by_lease(fd)
    if lease and not to_write:
        return None  # nobody has it open for writing, in whatever way
    if claimed := _find_claim(wanted):
        return claimed
    for loop in _find_loops(wanted):
        if to_write or read_sysfs(SYSFS_BLOCK / loop.name / "ro") != "1":
            where = _find_mount(_overlapping(_numbers(loop)))
            return f"in use by {loop}{f', mounted at {where}' if where else ''}; detach that first"
    if swap := _find_swap(wanted):
        return f"in use as swap space; run 'swapoff {swap}' first"
    if lease:
        return None
    if (own := _find_own_writer(wanted, fd)) is not None:
        return f"open for writing in this process, as descriptor {own}; close that first"
    found, hidden = _find_process(wanted, device and to_write, ours)
    if found is not None:
        return f"open in process {found}; stop that process first"
    if lease is False:
        return (
            "open for writing in a process of another user, or in use by the kernel; find it with "
            "'fuser' as root and stop that first"
        )
    if hidden and lease is None and not ours:
        _LOG.warning(
            "cannot determine whether any of %d processes of other users has %s open; run as root to be sure",
            hidden,
            os.readlink(_PROC / "self/fd" / str(fd)),
        )
    return None


# What the kernel knows.


def _no_writer_by_lease(fd: int) -> bool | None:
    """Return whether nobody has a regular file open for writing; None if that cannot be asked here.

    A read lease is granted only then, and is given back at once. Who opens the file for writing in between
    waits for that instant. The kernel then signals the holder: not by SIGIO, which would end this process,
    but by SIGURG, which is ignored unless somebody handles it.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return False if error.errno == errno.EAGAIN else None
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


def _refuse_mounted(path: Path, fd: int, status: os.stat_result) -> None:
    """Raise ImageInUseError if the block device is mounted or part of another device, in any namespace."""
    try:
        os.close(os.open(descriptor_path(fd), os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise IslandError(f"{path} cannot be opened: {error.strerror}; check the device") from error
        where = _find_mount(_overlapping((os.major(status.st_rdev), os.minor(status.st_rdev))))
        what = f"mounted at {where}" if where else "mounted or part of another device"
        raise ImageInUseError(f"{path} is {what}; unmount it first") from error


def _find_claim(wanted: _Wanted) -> str | None:
    """Return how one of the devices below a loop device is in exclusive use by something else, if one is."""
    if wanted.claimable and (where := _find_mount(set(wanted.claimable))):
        return f"on a device that is mounted at {where}; unmount it first"
    known = wanted.devices | wanted.below
    for device in sorted(wanted.claimable):
        for holder in (SYSFS_DEVICES / f"{device[0]}:{device[1]}" / "holders").glob("*"):
            if _numbers(holder) not in known:
                return f"on a device that /dev/{holder.name} uses, too; remove that first"
    return None


def _find_swap(wanted: _Wanted) -> str | None:
    """Return the file or device of /proc/swaps that is wanted, if one is."""
    with contextlib.suppress(OSError):
        for line in (_PROC / "swaps").read_text(errors="surrogateescape").splitlines()[1:]:
            name = line.split()[0].encode("ascii", "surrogateescape").decode("unicode_escape")
            found = _status(name)
            if found and wanted.is_hit(found):
                return name
    return None


def _find_mount(devices: set[Device]) -> str | None:
    """Return where one of the devices is mounted, as far as the mount namespaces can be read."""
    seen = set()
    for process in ["self", *(one.name for one in _PROC.glob("[0-9]*"))]:
        try:
            space = os.readlink(_PROC / process / "ns/mnt")
            if space in seen:
                continue
            text = (_PROC / process / "mountinfo").read_text(errors="surrogateescape")
        except OSError:  # of another user, or ended
            continue
        seen.add(space)
        for line in text.splitlines():
            words = line.split()
            source = words[words.index("-") + 2] if "-" in words else ""
            found = _status(source) if source.startswith("/dev/") else None  # btrfs has numbers of its own
            rdev = {(os.major(found.st_rdev), os.minor(found.st_rdev))} if found else set()
            if devices & ({_parse_numbers(words[2])} | rdev):
                return words[4] if process == "self" else f"{words[4]} (as process {process} sees it)"
    return None


def _overlapping(device: Device) -> set[Device]:
    """Return the devices that share bytes with one: itself, a disk's partitions, a partition's disk."""
    place = SYSFS_DEVICES / f"{device[0]}:{device[1]}"
    found = {device}
    near = [place / "../dev"] if (place / "partition").exists() else place.glob("*/dev")
    for entry in near:
        if entry.parent.name == ".." or (entry.parent / "partition").exists():
            text = read_sysfs(Path(os.path.realpath(entry)))
            found |= {_parse_numbers(text)} if text else set()
    return found


def _parse_numbers(text: str) -> Device:
    major, _, minor = text.partition(":")
    return int(major), int(minor)


def _numbers(device: Path) -> Device:
    """Return the numbers of a device that /sys lists."""
    return _parse_numbers(read_sysfs(SYSFS_BLOCK / device.name / "dev") or "0:0")


def _status(name: str | Path | None) -> os.stat_result | None:
    """Return the status of what a name leads to; None if that is nothing."""
    try:
        return os.stat(name) if name else None
    except (OSError, ValueError):
        return None


def read_sysfs(path: Path) -> str:
    """Return the value of a file of sysfs; "" if it cannot be read."""
    try:
        return path.read_text(errors="surrogateescape").strip("\n")
    except OSError:
        return ""


# Loop devices.


def _find_loops(wanted: _Wanted) -> Iterator[Path]:
    """Iterate over the loop devices over what is wanted, except those that are wanted themselves."""
    for entry in sorted(SYSFS_BLOCK.glob("loop*/loop/backing_file")):
        device = Path("/dev", entry.parts[-3])
        number = _numbers(device)
        if number in wanted.devices | wanted.below:
            continue
        file, below = _loop_target(number)
        if file in wanted.files or below in wanted.devices | wanted.below:
            yield device


def _loop_target(device: Device) -> tuple[tuple[int, int] | None, Device | None]:
    """Return the file (device and inode) or the block device that a loop device stands on; at most one.

    The device itself is asked: the name that /sys has may be gone, or of another mount namespace. Only root
    can open the device; without its rights, the name must do.
    """
    name = read_sysfs(SYSFS_DEVICES / f"{device[0]}:{device[1]}" / "loop/backing_file")
    if not name:
        return None, None
    try:
        place = f"/dev/{os.path.basename(os.path.realpath(SYSFS_DEVICES / f'{device[0]}:{device[1]}'))}"
        fd = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            info = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO))
        finally:
            os.close(fd)
    except OSError:
        found = _status(name)
        if found is None:
            return None, None
        if stat.S_ISBLK(found.st_mode):
            return None, (os.major(found.st_rdev), os.minor(found.st_rdev))
        return (found.st_dev, found.st_ino), None
    number, inode, below = struct.unpack_from("QQQ", info)
    if below:
        return None, _decode_numbers(below)
    return (os.makedev(*_decode_numbers(number)), inode), None


def _slaves(device: Device) -> list[Device]:
    """Return the devices that a device mapper volume stands on; none for another device.

    Those of a RAID do not count: its monitor has them open for writing.
    """
    place = SYSFS_DEVICES / f"{device[0]}:{device[1]}"
    if not (place / "dm").exists():
        return []
    return [_parse_numbers(read_sysfs(one / "dev") or "0:0") for one in (place / "slaves").glob("*")]


def _decode_numbers(number: int) -> Device:
    """Return major and minor number from the kernel's huge_encode_dev."""
    return number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00


# Processes.


def _find_own_writer(wanted: _Wanted, fd: int) -> str | None:
    """Return another descriptor than `fd` by which this process, or who started it, can write to it."""
    process = _PROC / "self"
    return next(
        (
            one
            for one in os.listdir(process / "fd")
            if one != str(fd) and _leads_to(process / "fd" / one, wanted) and _is_writable(process, one)
        ),
        None,
    )


def _find_process(wanted: _Wanted, readers: bool, ours: frozenset[int]) -> tuple[int | None, int]:
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
        used = any(
            (readers and _leads_to(process / "fd" / one, wanted, near=True))
            or (_leads_to(process / "fd" / one, wanted) and _is_writable(process, one))
            for one in descriptors
        )
        if (used or _is_mapped(process, wanted)) and not (ours and _session(process) in ours):
            return int(process.name), hidden
    return None, hidden


def _leads_to(entry: Path, wanted: _Wanted, *, near: bool = False) -> bool:
    """Return whether an entry of a process's descriptors or mappings is of what is wanted."""
    found = _status(entry)  # None if it was closed meanwhile
    return found is not None and wanted.is_hit(found, near=near)


def _is_writable(process: Path, descriptor: str) -> bool:
    """Return whether a process's descriptor is open for writing; False if it was closed meanwhile."""
    try:
        text = (process / "fdinfo" / descriptor).read_text()
    except OSError:
        return False
    flags = next((line.split()[1] for line in text.splitlines() if line.startswith("flags:")), "0")
    return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY


def _is_mapped(process: Path, wanted: _Wanted) -> bool:
    """Return whether a process can write to it through its memory, whose descriptor may be closed."""
    try:
        lines = (process / "maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return False
    shared = (line.split(None, 1) for line in lines if " rw-s " in line or " -w-s " in line)
    return any(_leads_to(process / "map_files" / place, wanted) for place, _ in shared)


def _session(process: Path) -> int:
    """Return the session of a process; 0 if it has ended."""
    try:
        return int((process / "stat").read_text(errors="replace").rpartition(")")[2].split()[_SESSION])
    except OSError:
        return 0
