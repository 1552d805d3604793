"""Find the processes that have a device open, among all of this host.

Root runs this, so it imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct
from pathlib import Path

__all__ = ["find_openers", "sees_every_process"]

_PROC = Path("/proc")
_HOST_NAMESPACE = 0xEFFFFFFC  # linux/proc_ns.h: PROC_PID_INIT_INO
_AT_FDCWD = -100
_DONT_SYNC = 0x4000  # linux/fcntl.h: ask no server, which could be dead
_TYPE = 1
_STATX = struct.Struct("28x H 98x II 120x")  # struct statx: the mode, and the numbers of a device


def sees_every_process() -> bool:
    """Return whether this process is in the host's PID namespace."""
    return (_PROC / "self/ns/pid").stat().st_ino == _HOST_NAMESPACE


def find_openers(node: Path) -> set[int]:
    """Return the processes, except this one, that have the device of this node open, under any name.

    A process that has it mapped, but not open, is not found.
    """
    wanted = _read_type(node)
    found = set()
    for process in _PROC.iterdir():
        if not process.name.isdecimal() or process.name == str(os.getpid()):
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            if any(_read_type(file) == wanted for file in (process / "fd").iterdir()):
                found.add(int(process.name))
    return found


def _read_type(path: Path) -> tuple[int, int, int] | None:
    """Return a file's type and the numbers of the device that it is, or None if it has gone."""
    answer = ctypes.create_string_buffer(_STATX.size)
    call = ctypes.CDLL(None, use_errno=True).statx
    if call(_AT_FDCWD, os.fsencode(path), _DONT_SYNC, _TYPE, answer):
        return None
    mode, major, minor = _STATX.unpack(answer.raw)
    return stat.S_IFMT(mode), major, minor
