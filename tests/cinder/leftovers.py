"""What a user's programs left on the machine: found by the user and by folders that nobody else has."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path


def clear(user: int, folders: Sequence[Path]) -> None:
    """End all processes of `user`; take away mounts below `folders`, and loop devices of files there."""
    devices = loops(folders)
    for place in mounts(folders, devices):
        subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)
    for device in devices:
        subprocess.run(["losetup", "--detach", device], check=False, capture_output=True)
    if user:
        _end(user)
    for place in mounts(folders, []):  # a file system in user space whose program has ended
        subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)


def remove(folder: Path) -> None:
    """Remove a folder with all it holds, nothing of which is a mount."""
    left = mounts([folder], [])
    assert not left, f"still mounted: {left}"
    shutil.rmtree(folder)


def mounts(folders: Sequence[Path], devices: Sequence[str]) -> list[str]:
    """Where something is mounted below `folders`, or from one of `devices`; the latest first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words, _, rest = line.partition(" - ")
        place = words.split()[4].encode().decode("unicode_escape")
        if rest.split()[1] in devices or _below(place, folders):
            found.append(place)
    return found[::-1]


def loops(folders: Sequence[Path]) -> list[str]:
    """The loop devices over files below `folders`."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # gone in between
            if _below(entry.read_text().rstrip("\n"), folders):
                found.append(f"/dev/{entry.parts[3]}")
    return found


def processes(user: int) -> list[int]:
    """The processes of a user that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == user and (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def _end(user: int) -> None:
    end = time.monotonic() + 30
    while left := processes(user):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < end, f"processes do not end: {left}"
        time.sleep(0.05)


def _below(path: str, folders: Sequence[Path]) -> bool:
    return any(path.startswith(f"{folder}/") for folder in folders)
