"""The block device in front of a volume's export: a loop device, set up and taken away with root's rights.

A loop device is known by the name of the file it stands on, as the kernel tells it. Its number means nothing:
the kernel gives it to whoever asks next. The other kind of device is in `nbd.py`.
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

__all__ = ["LoopDevices", "check_node", "in_use", "is_mounted"]

_NAME = re.compile(r"/dev/(loop\d+)")
_SECTOR = 512  # bytes, the unit of sysfs whatever the device's own
_LETTING_GO = 3.0  # seconds; udev opens every device that changes, for a moment
_STEP = 0.05


class LoopDevices:
    """The loop devices of this host, and those of them that stand on our files.

    Loops are buffered. Direct I/O over the FUSE export of QEMU 7.2 has been seen to corrupt, and
    `selftest.py` finds it.
    """

    def __init__(self, execute: RunProgram) -> None:
        self._execute = execute

    def over(self, file: Path) -> list[Path]:
        """Return the devices that stand on `file` to stay; one that goes when its last user does is none."""
        return [
            Path("/dev", entry.name)
            for entry in sorted(SYSFS_BLOCK.glob("loop*"))
            if read_sysfs(entry / "loop/backing_file") == str(file)
            and read_sysfs(entry / "loop/autoclear") == "0"
        ]

    def stands_on(self, device: Path, file: Path) -> bool:
        """Tell whether a device, by its name alone, stands on `file` now."""
        name = _NAME.fullmatch(str(device))
        return name is not None and read_sysfs(SYSFS_BLOCK / name[1] / "loop/backing_file") == str(file)

    def attach(self, file: Path, size: int) -> Path:
        """Put a new device on `file`, which must be alive and have `size` bytes; checked before and after.

        IslandError, and no device, if either is not as it should be: losetup is content with a dead file.
        """
        self._check_file(file, size)
        device = self._set_up(file)
        try:
            self._check(device, file, size)
        except BaseException:
            self._detach(device)
            raise
        return device

    def release(self, device: Path, file: Path) -> None:
        """Take the device away; ImageInUseError, and it stays as it was, if somebody has it open.

        The kernel does not refuse to detach a device that is open: it detaches it when the last user closes
        it. So it is seen whether it went, and if not, it is made to stay again.
        """
        if is_mounted(device):
            raise in_use(device, "it is mounted or part of another device")
        for _ in range(3):
            self._detach(device)
            if self._is_gone(device, file):
                return
            again = self._set_up(file)
            if again == device:
                raise in_use(device, "a guest or another program has it open")
            device = again  # it went in between, so this is a new one that nobody knows
        raise in_use(device, "it does not go away")

    def abandon(self, device: Path) -> None:
        """Take away a device whose file is dead, now or when its last user closes it."""
        self._detach(device)

    def grow(self, device: Path, file: Path, size: int) -> None:
        """Make the device as big as its file, which has grown to `size` bytes; IslandError if it does not."""
        self._check_file(file, size, patience=30.0)
        command = ["losetup", "--set-capacity", str(device)]
        check_run(self._execute, command, f"let {device} grow", root=True)
        self._check(device, file, size)

    def _set_up(self, file: Path) -> Path:
        command = ["losetup", "--find", "--show", "--nooverlap", "--direct-io=off", str(file)]
        output = check_run(
            self._execute, command, f"make a loop device over {str(file)!r}", root=True
        ).strip()
        if not _NAME.fullmatch(output):
            raise IslandError(f"losetup made a loop device over {str(file)!r}, but names {output[:80]!r}")
        return Path(output)

    def _detach(self, device: Path) -> None:
        check_run(self._execute, ["losetup", "--detach", str(device)], f"detach {device}", root=True)

    def _is_gone(self, device: Path, file: Path) -> bool:
        deadline = time.monotonic() + _LETTING_GO
        while self.stands_on(device, file):
            if time.monotonic() > deadline:
                return False
            time.sleep(_STEP)
        return True

    def _check_file(self, file: Path, size: int, patience: float = 0.0) -> None:
        """The kernel remembers a file's size for a second, hence the patience after it has grown."""
        deadline = time.monotonic() + patience
        while (seen := _file_size(file)) != size:
            if time.monotonic() >= deadline:
                raise IslandError(
                    f"the export {str(file)!r} has {seen} bytes and the volume {size}; "
                    f"no device was put on it"
                )
            time.sleep(_STEP)

    def _check(self, device: Path, file: Path, size: int) -> None:
        """See that the device is ours and as big as the volume, and that its node is the device's."""
        entry = SYSFS_BLOCK / device.name
        number = int(read_sysfs(entry / "size") or 0) * _SECTOR
        if not self.stands_on(device, file):
            raise IslandError(f"{device} was put on {str(file)!r}, but stands on another file now")
        if number != size:
            raise IslandError(f"{device} has {number} bytes and the volume {size}; it is of no use")
        if read_sysfs(entry / "loop/dio") != "0" or read_sysfs(entry / "ro") != "0":
            raise IslandError(f"{device} came with direct I/O or read-only; it is of no use")
        check_node(device)


def _file_size(file: Path) -> int:
    try:
        return os.stat(file).st_size
    except OSError as error:
        raise IslandError(f"the export {str(file)!r} does not answer: {error.strerror}") from error


def is_mounted(device: Path) -> bool:
    """Tell whether the device, or another on top of it, is mounted as this process sees it."""
    entry = SYSFS_BLOCK / device.name
    return read_sysfs(entry / "dev") in mounted_devices() or any((entry / "holders").glob("*"))


def check_node(device: Path) -> None:
    """See that a device's node is the device of that name."""
    status = os.stat(device)
    found = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    if not stat.S_ISBLK(status.st_mode) or found != read_sysfs(SYSFS_BLOCK / device.name / "dev"):
        raise IslandError(f"the node {device} is not the device of that name; let udev or devtmpfs make it")


def in_use(device: Path, why: str) -> ImageInUseError:
    """The error that says why a device stays."""
    return ImageInUseError(f"{device} cannot be taken away, because {why}; end that and try again")
