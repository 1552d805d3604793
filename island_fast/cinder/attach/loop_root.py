"""The command `island-loop`: the steps of a volume's loop device that need root, for the Cinder driver alone.

    island-loop attach FILE           make a device over the export, and print its name
    island-loop grow FILE             enlarge its device to the export's new size
    island-loop release FILE          remove its device, unless it is open (exit status 3)
    island-loop abandon FILE          remove its device, now or when its last user closes it

and for the volume of the self-test alone (`exercise.py`; exit status 4 if data is wrong):

    island-loop exercise FILE         write to its device in every way, and print digests of what it holds
    island-loop digest FILE           print the digests of what its device holds
    island-loop bench FILE OPTIONS    run qemu-img bench on its device

FILE is a path FOLDER/VOLUME/disk, which no link may be part of: `fuse_export.py` opens it, and the kernel is
given that descriptor and no name. Devices are found by the file that they stand on, which must be a daemon's
export, so no command takes a device's number. losetup cannot replace this command, because it opens what a
name leads to.

A device is buffered, because direct I/O over the FUSE export of QEMU 7.2 corrupts data. The ioctls
are those of linux/loop.h. Errors go to standard error. Exit status 1: it failed; 2: wrong usage.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from island_fast.cinder.attach.exercise import DAMAGED, TESTS, fits_test, run_test
from island_fast.cinder.attach.fuse_export import find_mounts, open_export
from island_fast.errors import DamagedError

__all__ = ["HELD", "devices_over", "main"]

HELD = 3
"""The exit status of `release` if the device is open."""

_FILE = re.compile(r"(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+/([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})/disk")
_SYSFS = Path("/sys/block")
_CONTROL = "/dev/loop-control"
_SET_STATUS64, _GET_STATUS64, _SET_CAPACITY, _CONFIGURE = 0x4C04, 0x4C05, 0x4C07, 0x4C0A
_CLR_FD, _CTL_GET_FREE = 0x4C01, 0x4C82
_INFO = struct.Struct("QQQQQ IIII 64s 64s 32s QQ")  # struct loop_info64
_FLAGS = 8  # which field of it is lo_flags
_CONFIG = struct.Struct(f"II {_INFO.size}s 64x")  # struct loop_config: descriptor, block size, info
_AUTOCLEAR = 4
_ATTEMPTS = 64  # others take free devices too
_RELEASE_TIMEOUT = 3.0  # seconds; udev opens every device that changes, for a moment
_STEP = 0.05  # seconds
_USAGE = """\
usage: island-loop attach|grow|release|abandon FILE
The Cinder driver runs this command as root, through rootwrap; it is not meant for users.
To make and restore snapshots, use the command island (see 'island --help')."""


def devices_over(file: Path) -> list[str]:
    """Return the devices (loopN) that stand on a file of this name, those that are about to go too."""
    found = []
    for entry in sorted(_SYSFS.glob("loop*/loop/backing_file")):
        with contextlib.suppress(OSError):  # the device went meanwhile
            if entry.read_text(errors="surrogateescape").strip("\n") == str(file):
                found.append(entry.parts[-3])
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `words` are by default the process's arguments."""
    words = sys.argv[1:] if words is None else words
    if list(words) in (["--help"], ["-h"]):
        print(_USAGE)
        return 0
    command, file, *more = [*words, "", ""][: max(2, len(words))]
    name = _FILE.fullmatch(file)
    if name is None or not _fits(command, more, name[2]):
        print(_USAGE, file=sys.stderr)
        return 2
    try:
        if command in TESTS:
            return run_test(command, _own_device(Path(file)), more)
        return _COMMANDS[command](Path(file))
    except DamagedError as error:
        print(error, file=sys.stderr)
        return DAMAGED
    except OSError as error:
        print(error.strerror or error, file=sys.stderr)
        return 1


def _fits(command: str, more: Sequence[str], volume: str) -> bool:
    """Return whether a command takes these words, and may be used on this volume."""
    if command in ("attach", "grow", "release", "abandon"):
        return not more
    return fits_test(command, more, volume)


def _attach(file: Path) -> int:
    """Make a device over the export, or keep the one that an interrupted release left open."""
    with open_export(file) as export:
        for name, device in _open_devices(file, os.fstat(export)):
            _set_autoclear(device, False)
            print(f"/dev/{name}")
            return 0
        print(f"/dev/{_make(export, file)}")
    return 0


def _make(export: int, file: Path) -> str:
    """Make a loop device over an open file, and return its name."""
    info = _INFO.pack(*[0] * 9, os.fsencode(file)[:63], b"", b"", 0, 0)
    for _ in range(_ATTEMPTS):
        control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
        try:
            name = f"loop{fcntl.ioctl(control, _CTL_GET_FREE)}"
        finally:
            os.close(control)
        device = _open(name, os.O_RDWR)
        try:
            fcntl.ioctl(device, _CONFIGURE, _CONFIG.pack(export, 0, info))
        except OSError as error:
            if error.errno != errno.EBUSY:  # somebody else was faster
                raise
        else:
            return name
        finally:
            os.close(device)
    raise OSError(errno.EBUSY, "there is no free loop device")


def _open(name: str, flags: int) -> int:
    """Open a loop device by name, which must be the kernel's device of that name."""
    fd = os.open(f"/dev/{name}", flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    number = os.fstat(fd).st_rdev
    wanted = (_SYSFS / name / "dev").read_text().strip()
    if f"{os.major(number)}:{os.minor(number)}" != wanted:
        os.close(fd)
        raise OSError(errno.ENODEV, f"the node /dev/{name} leads to another device")
    return fd


def _open_devices(file: Path, export: os.stat_result) -> Iterator[tuple[str, int]]:
    """Yield the name and a descriptor of each device that stands on the very file that `export` describes.

    Others stand on exports of the same name whose daemons are gone. While a descriptor is open, its device
    cannot become another file's.
    """
    for name in devices_over(file):
        device = _open(name, os.O_RDONLY)
        try:
            if _stands_on(device, export):
                yield name, device
        finally:
            os.close(device)


def _stands_on(device: int, export: os.stat_result) -> bool:
    try:
        found = _read_file(device)
    except OSError:  # its file is dead, or it went meanwhile
        return False
    return found == (os.major(export.st_dev), os.minor(export.st_dev), export.st_ino)


def _read_file(device: int) -> tuple[int, int, int]:
    """Return the file that a device stands on: the numbers of its file system, and its inode."""
    number, inode = _read_info(device)[:2]
    return number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00, inode  # the kernel's huge_encode_dev


def _open_own_devices(file: Path) -> Iterator[tuple[str, int]]:
    """Yield the name and a descriptor of each device over an export of this name, its daemon alive or dead.

    A device over anything else of that name, such as a server's disk in Nova's folder, is not ours to remove.
    """
    mounts = find_mounts(file)
    for name in devices_over(file) if mounts else ():
        device = _open(name, os.O_RDONLY)
        try:
            try:
                own = _read_file(device)[:2] in mounts
            except OSError as error:  # no file system but FUSE loses its files
                own = error.errno != errno.ENXIO
            if own:
                yield name, device
        finally:
            os.close(device)


def _read_info(device: int) -> list[int]:
    return list(_INFO.unpack(fcntl.ioctl(device, _GET_STATUS64, bytes(_INFO.size))))


def _set_autoclear(device: int, wanted: bool) -> None:
    info = _read_info(device)
    info[_FLAGS] = info[_FLAGS] | _AUTOCLEAR if wanted else info[_FLAGS] & ~_AUTOCLEAR
    fcntl.ioctl(device, _SET_STATUS64, _INFO.pack(*info))


def _grow(file: Path) -> int:
    with open_export(file) as export:
        for _, device in _open_devices(file, os.fstat(export)):
            fcntl.ioctl(device, _SET_CAPACITY)
    return 0


def _release(file: Path) -> int:
    """Remove the device if nobody else has it open.

    The kernel does not refuse to detach a device that is open: it detaches it when the last user closes it.
    So this detaches it, looks whether it goes, and if it does not, makes it stay again.
    """
    deadline = time.monotonic() + _RELEASE_TIMEOUT
    names = []
    for name, device in _open_own_devices(file):
        names.append(name)
        while _is_held(device):
            if time.monotonic() > deadline:
                _set_autoclear(device, False)
                return HELD
            time.sleep(_STEP)
    while set(names) & set(devices_over(file)):
        if time.monotonic() > deadline + _RELEASE_TIMEOUT:
            raise OSError(errno.EBUSY, "the kernel does not remove it")
        time.sleep(_STEP)
    return 0


def _is_held(device: int) -> bool:
    """Detach an open device, and return whether others have it open, so that it is still there."""
    try:
        fcntl.ioctl(device, _CLR_FD)
        _read_info(device)
    except OSError as error:
        if error.errno == errno.ENXIO:  # it is gone, or goes when this process closes it
            return False
        raise
    return True


def _abandon(file: Path) -> int:
    for _, device in _open_own_devices(file):
        with contextlib.suppress(OSError):  # it went meanwhile
            fcntl.ioctl(device, _CLR_FD)
    return 0


@contextlib.contextmanager
def _own_device(file: Path) -> Iterator[tuple[Path, int]]:
    """Yield the device that stands on the self-test's export, and a descriptor; OSError if there is none."""
    with open_export(file) as export:
        for name, device in _open_devices(file, os.fstat(export)):
            yield Path("/dev", name), device
            return
    raise OSError(errno.ENODEV, "the volume of the self-test has no device")


_COMMANDS: dict[str, Callable[[Path], int]] = {
    "attach": _attach,
    "grow": _grow,
    "release": _release,
    "abandon": _abandon,
}


if __name__ == "__main__":
    sys.exit(main())
