"""Read what is mounted, and remove the mounts that dead daemons leave."""

from __future__ import annotations

import os
from pathlib import Path

from island_fast.qemu.programs import RunProgram, check_run

__all__ = ["file_system_type", "is_mounted", "mounted_devices", "unmount_dead"]

_MOUNTS = Path("/proc/self/mountinfo")
_MAX_LAYERS = 8


def is_mounted(path: Path) -> bool:
    """Return whether a FUSE file system is mounted at `path`, with its server alive or dead.

    This reads the kernel's list, because access to a dead or stuck mount fails or waits for ever. The path
    must not contain links, or characters that the list escapes (blanks, backslashes).
    """
    lines = (line.split() for line in _MOUNTS.read_text(errors="surrogateescape").splitlines())
    return any(
        words[4] == str(path) and words[words.index("-") + 1].startswith("fuse")
        for words in lines
        if "-" in words
    )


def mounted_devices() -> set[str]:
    """Return "major:minor" of every device that this process sees mounted."""
    return {line.split()[2] for line in _MOUNTS.read_text(errors="surrogateescape").splitlines()}


def unmount_dead(path: Path, execute: RunProgram) -> None:
    """Unmount what a dead server left mounted at `path`; whoever has it open keeps getting errors."""
    for _ in range(_MAX_LAYERS):
        if not is_mounted(path):
            return
        command = ["fusermount3", "-u", "-z", "-q", "--", str(path)]
        check_run(execute, command, f"unmount {str(path)!r}, whose daemon is gone")


def file_system_type(path: Path) -> str:
    """Return the type of the file system that `path` is on, or would be on if it were made."""
    place, found, kind = os.path.realpath(path), "", "nothing"
    for line in _MOUNTS.read_text(errors="surrogateescape").splitlines():
        words = line.split()
        point = words[4]
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(found):  # of two at one point, the later one is on top
            found, kind = point, words[words.index("-") + 1]
    return kind
