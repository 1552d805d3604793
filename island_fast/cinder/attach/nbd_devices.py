"""The kernel's NBD device in front of a volume's export: the other kind beside the loop devices.

It is known by its backing, a path FOLDER/VOLUME/nbd/TOKEN that the kernel keeps for us (sysfs, since Linux
5.14). The token is new for each export: a device whose daemon died, and that somebody still has open, is over
an older one, and nobody takes it for the volume's. The kernel owns the connection, so no process must stay.

A device whose daemon died is not connected to the next one, though the kernel could: what was written
and not flushed died with the daemon, and its users, who would not be told, must see errors instead.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from island_fast.cinder.attach.loop_devices import check_node, in_use, is_mounted
from island_fast.cinder.attach.nbd_root import HELD, devices_over
from island_fast.errors import IslandError
from island_fast.qemu.open_files import read_sysfs
from island_fast.qemu.programs import RunProgram, check_run

__all__ = ["NbdDevices", "check_kernel"]

_SYSFS = Path("/sys/block")
_MODULE = Path("/sys/module/nbd")
_NAME = re.compile(r"/dev/(nbd\d+)")
_SECTOR = 512  # bytes, the unit of sysfs whatever the device's own
_PROGRAM = "island-nbd"
_BACKENDS_SINCE = (5, 14)  # Linux that keeps a name with a device


class NbdDevices:
    """The NBD devices of this host that are over our exports. What needs root is done by `nbdroot.py`."""

    def __init__(self, execute: RunProgram) -> None:
        self._execute = execute

    def over(self, backing: Path) -> list[Path]:
        """Return the devices over one export, its daemon alive or dead."""
        return [Path("/dev", name) for name in devices_over(backing)]

    def stands_on(self, device: Path, backing: Path) -> bool:
        """Tell whether a device, by its name alone, is over this export now."""
        name = _NAME.fullmatch(str(device))
        return name is not None and name[1] in devices_over(backing)

    def attach(self, backing: Path, size: int) -> Path:
        """Put a device that is free in front of an export of `size` bytes.

        IslandError, and no device, if the export or the device is not as it should be.
        """
        task = f"put an NBD device on {str(backing.parent)!r}"
        output = self._root(task, "connect", str(backing), str(size)).strip()
        try:
            if not _NAME.fullmatch(output):
                raise IslandError(
                    f"{_PROGRAM} made a device over {str(backing)!r}, but names {output[:80]!r}"
                )
            self._check(Path(output), backing, size)
        except BaseException:
            self._root(f"take {output[:80]} away", "abandon", str(backing))
            raise
        return Path(output)

    def release(self, device: Path, backing: Path) -> None:
        """Take the device away; ImageInUseError, and it stays as it was, if somebody has it open."""
        if is_mounted(device):
            raise in_use(device, "it is mounted or part of another device")
        try:
            done = self._execute([_PROGRAM, "release", str(backing)], root=True)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise IslandError(f"{device} cannot be taken away: {error}") from error
        if done.returncode == HELD:
            raise in_use(device, "a guest or another program has it open")
        if done.returncode:
            raise IslandError(f"{device} cannot be taken away: {done.stderr.strip()}")

    def abandon(self, backing: Path) -> None:
        """Disconnect every device over an export; who has one open gets errors."""
        if devices_over(backing):
            self._root(f"disconnect what is over {str(backing)!r}", "abandon", str(backing))

    def loosen(self, device: Path, backing: Path) -> None:
        """Let requests wait while the connection is broken, as long as an export may be away to grow."""
        self._root(f"let requests of {device} wait", "loosen", str(backing))

    def resume(self, device: Path, backing: Path, size: int) -> None:
        """Connect a device that was loosened to its export, which has `size` bytes by now."""
        self._root(f"connect {device} again", "resume", str(backing), str(size))
        self._check(device, backing, size)

    def has_size(self, device: Path, size: int) -> bool:
        """Tell whether the kernel thinks that the device has `size` bytes."""
        return int(read_sysfs(_SYSFS / device.name / "size") or 0) * _SECTOR == size

    def _root(self, task: str, *words: str) -> str:
        return check_run(self._execute, [_PROGRAM, *words], task, root=True)

    def _check(self, device: Path, backing: Path, size: int) -> None:
        if not self.stands_on(device, backing):
            raise IslandError(f"{device} was put on {str(backing)!r}, but stands on something else now")
        if not self.has_size(device, size) or read_sysfs(_SYSFS / device.name / "ro") != "0":
            raise IslandError(
                f"{device} has not the {size} bytes of its volume, or is read-only; it is of no use"
            )
        check_node(device)


def check_kernel() -> None:
    """IslandError for the first thing that the kernel lacks for NBD devices of ours."""
    if not _MODULE.is_dir():
        raise IslandError("the module nbd is not loaded")
    if read_sysfs(_MODULE / "parameters/max_part") not in ("", "0"):
        raise IslandError(
            "the module nbd looks for partitions in what tenants wrote; load it with max_part=0, "
            "by a line options nbd max_part=0 in /etc/modprobe.d"
        )
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if release is not None and (int(release[1]), int(release[2])) < _BACKENDS_SINCE:
        raise IslandError("Linux before 5.14 does not tell whose an NBD device is")
