"""The command `island-vduse`: the steps of a volume's VDUSE disk that need root, for the Cinder driver alone.

    island-vduse create BACKING        make the device, for the daemon of the folder's owner to serve
    island-vduse attach BACKING        make the disk of a device that is served, and print its name
    island-vduse release BACKING       remove disk and device, unless the disk is open (exit status 3)

and for the volume of the self-test alone (`exercise.py`; exit status 4 if data is wrong):

    island-vduse exercise BACKING      write to its disk in every way, and print digests of what it holds
    island-vduse digest BACKING        print the digests of what its disk holds
    island-vduse bench BACKING OPTIONS run qemu-img bench on its disk

BACKING is a path FOLDER/VOLUME/vduse/TOKEN; no link may be part of the way to that volume's folder. The name
of the device is made of the whole path (`vduse_control.py`), so no command takes a name, and none reaches a
device that this command did not make. The distribution's program `vdpa` cannot replace it: it takes any name,
and removes a device whose disk is open.

A disk is removed only when nobody has it open, also if its daemon is dead: a process that has a removed disk
open does not read an error from it but the end of the disk, which qemu makes zeros of. The kernel does not
know who has it open, so this looks at every process. That is why it must be in the host's PID namespace.

Errors go to standard error. Exit status 1: it failed; 2: wrong usage.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from island_fast.cinder.attach.exercise import DAMAGED, TESTS, fits_test, run_test
from island_fast.cinder.attach.fuse_export import open_folder
from island_fast.cinder.attach.openers import find_openers, sees_every_process
from island_fast.cinder.attach.vdpa_netlink import VdpaNetlink
from island_fast.cinder.attach.vduse_control import (
    create,
    destroy,
    device_name,
    disks_over,
    is_on_bus,
    node_of,
)
from island_fast.errors import DamagedError

__all__ = ["HELD", "main"]

HELD = 3
"""The exit status of `release` if the disk is open."""

_BACKING = re.compile(
    r"(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/vduse/[0-9a-f]{16}"
)
_SYSFS = Path("/sys/block")
_BUS = Path("/sys/bus/vdpa")
_DRIVER = "virtio_vdpa"  # makes a virtio disk; vhost_vdpa, which may take the device first, makes none
_RELEASE_TIMEOUT = 3.0  # seconds; udev opens every device that changes, for a moment
_DISK_TIMEOUT = 30.0  # seconds
_STEP = 0.05  # seconds between two looks
_USAGE = """\
usage: island-vduse create|attach|release BACKING
The Cinder driver runs this command as root, through rootwrap; it is not meant for users.
To make and restore snapshots, use the command island (see 'island --help')."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `words` are by default the process's arguments."""
    words = sys.argv[1:] if words is None else words
    if list(words) in (["--help"], ["-h"]):
        print(_USAGE)
        return 0
    command, backing, *more = [*words, "", ""][: max(2, len(words))]
    if not _BACKING.fullmatch(backing) or not _fits(command, more, Path(backing).parts[-3]):
        print(_USAGE, file=sys.stderr)
        return 2
    try:
        with open_folder(Path(backing).parent.parent) as folder:
            owner = os.fstat(folder).st_uid
        name = device_name(Path(backing))
        if command in TESTS:
            return run_test(command, _own_disk(name), more)
        if command == "create":
            create(name, owner)
            return 0
        return _COMMANDS[command](name)
    except DamagedError as error:
        print(error, file=sys.stderr)
        return DAMAGED
    except OSError as error:
        print(f"{error.filename}: {error.strerror}" if error.filename else error.strerror, file=sys.stderr)
        return 1


def _fits(command: str, more: Sequence[str], volume: str) -> bool:
    """Return whether a command takes these words, and may be used on this volume."""
    if command in ("create", "attach", "release"):
        return not more
    return fits_test(command, more, volume)


def _attach(name: str) -> int:
    """Put the device on the bus, and have the driver that makes a disk take it."""
    if not is_on_bus(name):
        _require_served(name)
        with VdpaNetlink() as netlink:
            netlink.add(name)
    driver = _BUS / "devices" / name / "driver"
    if driver.exists() and driver.resolve().name != _DRIVER:
        (_BUS / "devices" / name / "driver_override").write_text(_DRIVER)
        (driver / "unbind").write_text(name)
    if not driver.exists():
        (_BUS / "drivers" / _DRIVER / "bind").write_text(name)
    deadline = time.monotonic() + _DISK_TIMEOUT
    while not disks_over(name):
        if time.monotonic() > deadline:
            raise OSError(errno.ENODEV, f"the kernel made no disk of the VDUSE device {name}")
        time.sleep(_STEP)
    (disk,) = disks_over(name)
    with contextlib.suppress(OSError):  # /sys can be read-only in a container, and this is about speed alone
        (_SYSFS / disk / "queue/rotational").write_text("0")
    print(f"/dev/{disk}")
    return 0


def _require_served(name: str) -> None:
    """Raise OSError unless a process serves the device: if not, the kernel would wait for it, for ever."""
    node = node_of(name)
    if node is None:
        raise OSError(errno.ENODEV, f"there is no VDUSE device {name}")
    if not find_openers(node):
        raise OSError(errno.ENOTCONN, f"no process serves the VDUSE device {name}")


def _release(name: str) -> int:
    """Remove the disk if nobody has it open. The device goes too, or with the process that serves it."""
    if not sees_every_process():
        raise OSError(errno.EPERM, "this is not the host's PID namespace, so openers cannot be seen")
    if is_on_bus(name):
        _require_served(name)
        with contextlib.ExitStack() as held:
            for disk in disks_over(name):
                deadline = time.monotonic() + _RELEASE_TIMEOUT
                while not _claim(disk, held):
                    if time.monotonic() > deadline:
                        return HELD
                    time.sleep(_STEP)
            with VdpaNetlink() as netlink:
                netlink.delete(name)
    if node_of(name) is not None:
        destroy(name)
    return 0


def _claim(disk: str, held: contextlib.ExitStack) -> bool:
    """Keep everybody from mounting a disk until `held` ends; return False if somebody uses it."""
    try:
        fd = os.open(f"/dev/{disk}", os.O_RDONLY | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise
    number = os.fstat(fd).st_rdev
    own = f"{os.major(number)}:{os.minor(number)}" == (_SYSFS / disk / "dev").read_text().strip()
    if not own or any((_SYSFS / disk / "holders").iterdir()) or _is_below_loop(disk) or _is_open(disk):
        os.close(fd)
        if not own:
            raise OSError(errno.ENODEV, f"the node /dev/{disk} leads to another device")
        return False
    held.callback(os.close, fd)
    return True


def _is_open(disk: str) -> bool:
    return bool(find_openers(Path("/dev", disk)))


def _is_below_loop(disk: str) -> bool:
    """Return whether a loop device stands on the disk: the kernel has it open then, and no process."""
    for file in _SYSFS.glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # it went meanwhile
            if file.read_text().strip() == f"/dev/{disk}":
                return True
    return False


@contextlib.contextmanager
def _own_disk(name: str) -> Iterator[tuple[Path, int]]:
    """Yield the self-test's disk, and a descriptor of it; while that is open, the disk is not removed."""
    for disk in disks_over(name):
        device = os.open(f"/dev/{disk}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if disk in disks_over(name):
                yield Path("/dev", disk), device
                return
        finally:
            os.close(device)
    raise OSError(errno.ENODEV, "the volume of the self-test has no device")


_COMMANDS: dict[str, Callable[[str], int]] = {"attach": _attach, "release": _release}


if __name__ == "__main__":
    sys.exit(main())
