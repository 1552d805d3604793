"""VDUSE disks in front of volumes' exports: the first choice of kinds, where the kernel has it.

The daemon itself answers the kernel's requests, in memory that both share; there is neither a connection nor
a file between them. A disk is found by its backing, a path FOLDER/VOLUME/vduse/TOKEN, of which the name of
the kernel's device is made. Each export has a new token. So a disk whose daemon died, and which is still
open, has an older backing, and is never mistaken for the volume's device.

The kernel waits for a daemon that died. Another one is put in its place, which answers everything with errors
(`stand_in.py`): a disk is never taken over by the next daemon, for what was written and not flushed died with
the last one, and the disk's users must get errors, not silent loss.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from island_fast.cinder.attach.loop_devices import check_node, release_device
from island_fast.cinder.attach.openers import sees_every_process
from island_fast.cinder.attach.vduse_control import device_name, disks_over, node_of
from island_fast.cinder.attach.vduse_root import HELD
from island_fast.errors import IslandError
from island_fast.qemu.open_files import SYSFS_BLOCK, read_sysfs
from island_fast.qemu.programs import RunProgram, check_run

__all__ = ["VduseDevices", "check_vduse_kernel"]

_CONTROL = Path("/dev/vduse/control")
_DRIVERS = ("vdpa/drivers/virtio_vdpa", "virtio/drivers/virtio_blk")
_BUSES = Path("/sys/bus")
_NAME = re.compile(r"/dev/(vd[a-z]+)")
_SECTOR = 512  # bytes, the unit of sysfs for every device
_PROGRAM = "island-vduse"
_RESIZE_TIMEOUT = 30.0  # seconds
_STEP = 0.05  # seconds between two looks


class VduseDevices:
    """The disks of this host that stand on volumes' VDUSE exports. `island-vduse` does what needs root."""

    program = _PROGRAM

    def __init__(self, execute: RunProgram) -> None:
        self._execute = execute

    def find(self, backing: Path) -> list[Path]:
        """Return the disks over one export, with its daemon alive or dead."""
        return [Path("/dev", name) for name in disks_over(device_name(backing))]

    def stands_on(self, device: Path, backing: Path) -> bool:
        """Return whether the disk of this name is over this export now."""
        name = _NAME.fullmatch(str(device))
        return name is not None and name[1] in disks_over(device_name(backing))

    def attach(self, backing: Path, _size: int) -> Path:
        """Make a disk over an export that is served, and return its path. It has no size yet.

        If that fails, raises IslandError and leaves no disk.
        """
        task = f"make a disk over {str(backing)!r}"
        try:
            output = check_run(self._execute, [_PROGRAM, "attach", str(backing)], task, root=True).strip()
            if not _NAME.fullmatch(output) or not self.stands_on(Path(output), backing):
                raise IslandError(
                    f"{_PROGRAM} made a disk over {str(backing)!r}, but printed {output[:80]!r}"
                )
            check_node(Path(output))
        except BaseException:
            check_run(self._execute, [_PROGRAM, "release", str(backing)], f"undo: {task}", root=True)
            raise
        return Path(output)

    def release(self, device: Path, backing: Path) -> None:
        """Remove the disk; raise ImageInUseError, and leave it as it was, if it is open.

        The device below it goes with its daemon's export, or now if it has none.
        """
        release_device(self._execute, [_PROGRAM, "release", str(backing)], device, HELD)

    def remove(self, backing: Path) -> None:
        """Remove whatever the kernel has of a backing, as `release` does; do nothing if it has nothing."""
        name = device_name(backing)
        if node_of(name) is not None:
            self.release(next(iter(self.find(backing)), Path("/dev/vduse", name)), backing)

    def wait_for_size(self, device: Path, size: int) -> None:
        """Wait until the disk has `size` bytes, as its daemon has let the kernel know; IslandError if not."""
        deadline = time.monotonic() + _RESIZE_TIMEOUT
        while not self.has_size(device, size):
            if time.monotonic() > deadline:
                raise IslandError(f"{device} does not have the {size} bytes of its volume; it is not used")
            time.sleep(_STEP)
        if read_sysfs(SYSFS_BLOCK / device.name / "ro") != "0":
            raise IslandError(f"{device} is read-only; it is not used")

    def has_size(self, device: Path, size: int) -> bool:
        """Return whether the kernel gives the disk `size` bytes."""
        return int(read_sysfs(SYSFS_BLOCK / device.name / "size") or 0) * _SECTOR == size


def check_vduse_kernel() -> None:
    """Raise IslandError for the first thing that the kernel, or this container, lacks for these disks."""
    if not _CONTROL.exists():
        raise IslandError(
            f"there is no {_CONTROL}; load the module vduse, and give a container the host's /dev"
        )
    for driver in _DRIVERS:
        if not (_BUSES / driver).is_dir():
            raise IslandError(f"the module {driver.rpartition('/')[2]} is not loaded")
    if not sees_every_process():
        raise IslandError("this is not the host's PID namespace, so it cannot be seen who has a disk open")
