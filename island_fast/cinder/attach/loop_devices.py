"""Loop devices in front of volumes' exports, made and removed with root's rights.

A loop device is found by the name of the file that it stands on, as the kernel shows it. Its number means
nothing: the kernel gives it to the next caller. The other kind of device is in `nbd_devices.py`.
"""

from __future__ import annotations

import os
import re
import stat
import time
from pathlib import Path

from island_fast.cinder.attach.mounts import mounted_devices
from island_fast.errors import ImageInUseError, IslandError
from island_fast.qemu.open_files import SYSFS_BLOCK, read_sysfs
from island_fast.qemu.programs import RunProgram, check_run

__all__ = ["LoopDevices", "check_node", "in_use_error", "is_mounted"]

_NAME = re.compile(r"/dev/(loop\d+)")
_SECTOR = 512  # bytes, the unit of sysfs for every device
_RELEASE_TIMEOUT = 3.0  # seconds; udev opens every device that changes, for a moment
_STEP = 0.05


class LoopDevices:
    """The loop devices of this host that stand on volumes' exports.

    They are buffered, because direct I/O over the FUSE export of QEMU 7.2 corrupts data, as `selftest.py`
    shows.
    """

    def __init__(self, execute: RunProgram) -> None:
        self._execute = execute

    def find(self, file: Path) -> list[Path]:
        """Return the devices over `file`, except those that go as soon as their last user closes them."""
        return [
            Path("/dev", entry.name)
            for entry in sorted(SYSFS_BLOCK.glob("loop*"))
            if read_sysfs(entry / "loop/backing_file") == str(file)
            and read_sysfs(entry / "loop/autoclear") == "0"
        ]

    def stands_on(self, device: Path, file: Path) -> bool:
        """Return whether the device of this name stands on `file` now."""
        name = _NAME.fullmatch(str(device))
        return name is not None and read_sysfs(SYSFS_BLOCK / name[1] / "loop/backing_file") == str(file)

    def attach(self, file: Path, size: int) -> Path:
        """Make a device over `file`, which must have `size` bytes and a live daemon, and return its path.

        Checks the file before and the device after, because losetup accepts a dead file. If a check fails,
        raises IslandError and leaves no device.
        """
        self._check_file(file, size)
        device = self._set_up(file)
        try:
            self._check_device(device, file, size)
        except BaseException:
            self._detach(device)
            raise
        return device

    def release(self, device: Path, file: Path) -> None:
        """Remove the device; raise ImageInUseError, and leave the device as it was, if it is open.

        The kernel does not refuse to detach a device that is open: it detaches it when the last user closes
        it. So this waits to see whether the device goes, and if it does not, makes it stay again.
        """
        if is_mounted(device):
            raise in_use_error(device, "it is mounted or part of another device")
        for _ in range(3):
            self._detach(device)
            if self._wait_until_gone(device, file):
                return
            again = self._set_up(file)
            if again == device:
                raise in_use_error(device, "a guest or another program has it open")
            device = again  # the old one went just now, and this new one is unknown to everybody
        raise in_use_error(device, "the kernel does not remove it")

    def abandon(self, device: Path) -> None:
        """Remove a device whose file is dead, now or when its last user closes it."""
        self._detach(device)

    def grow(self, device: Path, file: Path, size: int) -> None:
        """Enlarge the device to its file's new size, `size` bytes; raise IslandError if that fails."""
        self._check_file(file, size, timeout=30.0)
        command = ["losetup", "--set-capacity", str(device)]
        check_run(self._execute, command, f"let {device} grow", root=True)
        self._check_device(device, file, size)

    def _set_up(self, file: Path) -> Path:
        command = ["losetup", "--find", "--show", "--nooverlap", "--direct-io=off", str(file)]
        task = f"make a loop device over {str(file)!r}"
        output = check_run(self._execute, command, task, root=True).strip()
        if not _NAME.fullmatch(output):
            raise IslandError(f"losetup made a loop device over {str(file)!r}, but printed {output[:80]!r}")
        return Path(output)

    def _detach(self, device: Path) -> None:
        check_run(self._execute, ["losetup", "--detach", str(device)], f"detach {device}", root=True)

    def _wait_until_gone(self, device: Path, file: Path) -> bool:
        """Wait until the device is gone, and return whether it is."""
        deadline = time.monotonic() + _RELEASE_TIMEOUT
        while self.stands_on(device, file):
            if time.monotonic() > deadline:
                return False
            time.sleep(_STEP)
        return True

    def _check_file(self, file: Path, size: int, timeout: float = 0.0) -> None:
        """Raise IslandError unless the file has `size` bytes, or has them before the timeout.

        A timeout is needed after growth, because the kernel remembers a file's size for a second.
        """
        deadline = time.monotonic() + timeout
        while (seen := _file_size(file)) != size:
            if time.monotonic() >= deadline:
                raise IslandError(
                    f"the export {str(file)!r} has {seen} bytes and the volume {size}; the device is not used"
                )
            time.sleep(_STEP)

    def _check_device(self, device: Path, file: Path, size: int) -> None:
        """Raise IslandError unless the device stands on `file`, has `size` bytes, and has the right node."""
        entry = SYSFS_BLOCK / device.name
        found = int(read_sysfs(entry / "size") or 0) * _SECTOR
        if not self.stands_on(device, file):
            raise IslandError(f"{device} was made over {str(file)!r}, but stands on another file now")
        if found != size:
            raise IslandError(f"{device} has {found} bytes and the volume {size}; it is not used")
        if read_sysfs(entry / "loop/dio") != "0" or read_sysfs(entry / "ro") != "0":
            raise IslandError(f"{device} has direct I/O or is read-only; it is not used")
        check_node(device)


def _file_size(file: Path) -> int:
    try:
        return os.stat(file).st_size
    except OSError as error:
        raise IslandError(f"the export {str(file)!r} does not respond: {error.strerror}") from error


def is_mounted(device: Path) -> bool:
    """Return whether this process sees the device mounted, or another device on top of it."""
    entry = SYSFS_BLOCK / device.name
    return read_sysfs(entry / "dev") in mounted_devices() or any((entry / "holders").glob("*"))


def check_node(device: Path) -> None:
    """Raise IslandError unless a device's node leads to the device of that name."""
    status = os.stat(device)
    found = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    if not stat.S_ISBLK(status.st_mode) or found != read_sysfs(SYSFS_BLOCK / device.name / "dev"):
        raise IslandError(f"the node {device} leads to another device; let udev or devtmpfs make the nodes")


def in_use_error(device: Path, why: str) -> ImageInUseError:
    """Return the error that says why a device cannot be removed."""
    return ImageInUseError(f"{device} cannot be removed, because {why}; end that and try again")
