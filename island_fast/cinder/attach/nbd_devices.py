"""Kernel NBD devices in front of volumes' exports: the other kind besides loop devices.

A device is found by its backing, a path FOLDER/VOLUME/nbd/TOKEN that the kernel keeps with it and shows in
sysfs (since Linux 5.14). Each export has a new token. So a device whose daemon died, and which is still open,
has an older backing, and is never mistaken for the volume's device. The kernel holds the connection: no
process of ours stays.

A device whose daemon died is not connected to the next daemon, although the kernel could do that: what was
written and not flushed died with the daemon, and the device's users must get errors, not silent loss.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from island_fast.cinder.attach.loop_devices import check_node, release_device
from island_fast.cinder.attach.nbd_root import HELD, devices_over
from island_fast.errors import IslandError
from island_fast.qemu.open_files import read_sysfs
from island_fast.qemu.programs import RunProgram, check_run

__all__ = ["NbdDevices", "check_kernel"]

_SYSFS = Path("/sys/block")
_MODULE = Path("/sys/module/nbd")
_NAME = re.compile(r"/dev/(nbd\d+)")
_SECTOR = 512  # bytes, the unit of sysfs for every device
_PROGRAM = "island-nbd"
_MIN_KERNEL = (5, 14)  # the first Linux that keeps a name with a device


class NbdDevices:
    """The NBD devices of this host that stand on volumes' exports. `island-nbd` does what needs root."""

    program = _PROGRAM

    def __init__(self, execute: RunProgram) -> None:
        self._execute = execute

    def find(self, backing: Path) -> list[Path]:
        """Return the devices over one export, with its daemon alive or dead."""
        return [Path("/dev", name) for name in devices_over(backing)]

    def stands_on(self, device: Path, backing: Path) -> bool:
        """Return whether the device of this name is over this export now."""
        name = _NAME.fullmatch(str(device))
        return name is not None and name[1] in devices_over(backing)

    def attach(self, backing: Path, size: int) -> Path:
        """Make a device over an export of `size` bytes, and return its path.

        If a check of the export or of the device fails, raises IslandError and leaves no device.
        """
        task = f"make an NBD device over {str(backing.parent)!r}"
        output = self._run_as_root(task, "connect", str(backing), str(size)).strip()
        try:
            if not _NAME.fullmatch(output):
                raise IslandError(
                    f"{_PROGRAM} made a device over {str(backing)!r}, but printed {output[:80]!r}"
                )
            self._check_device(Path(output), backing, size)
        except BaseException:
            self._run_as_root(f"remove {output[:80]}", "abandon", str(backing))
            raise
        return Path(output)

    def release(self, device: Path, backing: Path) -> None:
        """Remove the device; raise ImageInUseError, and leave the device as it was, if it is open."""
        release_device(self._execute, [_PROGRAM, "release", str(backing)], device, HELD)

    def abandon(self, backing: Path) -> None:
        """Disconnect every device over an export; whoever has one open gets errors."""
        if devices_over(backing):
            self._run_as_root(f"disconnect the devices over {str(backing)!r}", "abandon", str(backing))

    def loosen(self, device: Path, backing: Path) -> None:
        """Make requests wait while the connection is broken, long enough for an export to grow."""
        self._run_as_root(f"make requests of {device} wait", "loosen", str(backing))

    def resume(self, device: Path, backing: Path, size: int) -> None:
        """Reconnect a loosened device to its export, which has `size` bytes now."""
        self._run_as_root(f"reconnect {device}", "resume", str(backing), str(size))
        self._check_device(device, backing, size)

    def has_size(self, device: Path, size: int) -> bool:
        """Return whether the kernel gives the device `size` bytes."""
        return int(read_sysfs(_SYSFS / device.name / "size") or 0) * _SECTOR == size

    def _run_as_root(self, task: str, *words: str) -> str:
        return check_run(self._execute, [_PROGRAM, *words], task, root=True)

    def _check_device(self, device: Path, backing: Path, size: int) -> None:
        """Raise IslandError unless the device is over the export, with `size` bytes and the right node."""
        if not self.stands_on(device, backing):
            raise IslandError(f"{device} was made over {str(backing)!r}, but stands on something else now")
        if not self.has_size(device, size) or read_sysfs(_SYSFS / device.name / "ro") != "0":
            raise IslandError(
                f"{device} does not have the {size} bytes of its volume, or is read-only; it is not used"
            )
        check_node(device)


def check_kernel() -> None:
    """Raise IslandError for the first thing that the kernel lacks for these NBD devices."""
    if not _MODULE.is_dir():
        raise IslandError("the module nbd is not loaded")
    if read_sysfs(_MODULE / "parameters/max_part") not in ("", "0"):
        raise IslandError(
            "the module nbd reads the partition tables that tenants wrote; load it with max_part=0, "
            "by a line 'options nbd max_part=0' in /etc/modprobe.d"
        )
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if release is not None and (int(release[1]), int(release[2])) < _MIN_KERNEL:
        raise IslandError("Linux before 5.14 does not show which volume an NBD device belongs to")
