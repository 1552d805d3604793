"""Loop devices in front of volumes' exports: the kind for hosts without kernel NBD.

A loop device is found by the name of the file that it stands on, as the kernel shows it. Its number means
nothing: the kernel gives it to the next caller. The other kind of device is in `nbd_devices.py`.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import time
from pathlib import Path

from island_fast.cinder.attach.loop_root import HELD, devices_over
from island_fast.cinder.attach.mounts import mounted_devices
from island_fast.errors import ImageInUseError, IslandError
from island_fast.qemu.open_files import SYSFS_BLOCK, read_sysfs
from island_fast.qemu.programs import RunProgram, check_run

__all__ = ["LoopDevices", "check_node", "is_mounted", "release_device"]

_NAME = re.compile(r"/dev/(loop\d+)")
_PROGRAM = "island-loop"
_SECTOR = 512  # bytes, the unit of sysfs for every device
_STEP = 0.05  # seconds between two looks


class LoopDevices:
    """The loop devices of this host that stand on volumes' exports. `island-loop` does what needs root."""

    program = _PROGRAM

    def __init__(self, execute: RunProgram) -> None:
        self._execute = execute

    def find(self, file: Path) -> list[Path]:
        """Return the devices over `file`, except those that go as soon as their last user closes them."""
        return [
            Path("/dev", name)
            for name in devices_over(file)
            if read_sysfs(SYSFS_BLOCK / name / "loop/autoclear") == "0"
        ]

    def stands_on(self, device: Path, file: Path) -> bool:
        """Return whether the device of this name stands on `file` now."""
        name = _NAME.fullmatch(str(device))
        return name is not None and name[1] in devices_over(file)

    def attach(self, file: Path, size: int) -> Path:
        """Make a device over `file`, which must have `size` bytes and a live daemon, and return its path.

        Checks the file before and the device after. If a check fails, raises IslandError and leaves no
        device.
        """
        self._check_file(file, size)
        task = f"make a loop device over {str(file)!r}"
        output = self._run_as_root(task, "attach", str(file)).strip()
        try:
            if not _NAME.fullmatch(output):
                raise IslandError(f"{_PROGRAM} made a device over {str(file)!r}, but printed {output[:80]!r}")
            self._check_device(Path(output), file, size)
        except BaseException:
            self.abandon(file)
            raise
        return Path(output)

    def release(self, device: Path, file: Path) -> None:
        """Remove the device; raise ImageInUseError, and leave the device as it was, if it is open."""
        release_device(self._execute, [_PROGRAM, "release", str(file)], device, HELD)

    def abandon(self, file: Path) -> None:
        """Remove every device over a file, now or when its last user closes it."""
        self._run_as_root(f"detach the devices over {str(file)!r}", "abandon", str(file))

    def grow(self, device: Path, file: Path, size: int) -> None:
        """Enlarge the device to its file's new size, `size` bytes; raise IslandError if that fails."""
        self._check_file(file, size, timeout=30.0)
        self._run_as_root(f"let {device} grow", "grow", str(file))
        self._check_device(device, file, size)

    def _run_as_root(self, task: str, *words: str) -> str:
        return check_run(self._execute, [_PROGRAM, *words], task, root=True)

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


def release_device(execute: RunProgram, command: list[str], device: Path, held: int) -> None:
    """Remove a device by a command of root's; raise ImageInUseError if it is in use.

    `held` is the exit status of the command if the device is open.
    """
    if is_mounted(device):
        raise _in_use_error(device, "it is mounted or part of another device")
    try:
        done = execute(command, root=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise IslandError(f"{device} cannot be removed: {error}") from error
    if done.returncode == held:
        raise _in_use_error(device, "a guest or another program has it open")
    if done.returncode:
        raise IslandError(f"{device} cannot be removed: {done.stderr.strip()}")


def _in_use_error(device: Path, why: str) -> ImageInUseError:
    """Return the error that says why a device cannot be removed."""
    return ImageInUseError(f"{device} cannot be removed, because {why}; end that and try again")
