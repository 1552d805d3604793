"""Open the file under which a volume's daemon exports it over FUSE, so that nobody can make it another file.

Root opens it for the user of cinder-volume, who owns every folder on the way. So no link is followed, and
what was opened is looked at by its descriptor: it must be the root of a FUSE mount, of the same user as the
private folder that it is in. Whoever can make such a file serves its content, and gets no other by it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

__all__ = ["find_mounts", "open_export", "open_folder"]

_OPENAT2 = 437  # the same on every architecture; the C library has no function for it
_OPEN_HOW = struct.Struct("QQQ")  # linux/openat2.h: flags, mode, resolve
_RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x04, 0x08
_AT_FDCWD = -100


@contextlib.contextmanager
def open_export(file: Path) -> Iterator[int]:
    """Open the export FOLDER/disk for reading and writing, and close it when the body ends.

    Raises PermissionError if it is not a daemon's export, other OSErrors if it cannot be opened.
    """
    with open_folder(file.parent) as folder:
        # First without any effect: what is opened could be a device or a pipe.
        place = _open(folder, Path(file.name), os.O_PATH, _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH)
        try:
            _check(file, os.fstat(folder), place)
            # The descriptor's own file; no name is looked up again.
            fd = os.open(f"/proc/self/fd/{place}", os.O_RDWR | os.O_CLOEXEC)
        finally:
            os.close(place)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def open_folder(path: Path) -> Iterator[int]:
    """Open a volume's folder, without following links, and close it when the body ends.

    Raises PermissionError if a link is part of the path, or if others than its owner have access to it.
    """
    folder = _open(_AT_FDCWD, path, os.O_PATH | os.O_DIRECTORY, _RESOLVE_NO_SYMLINKS)
    try:
        if stat.S_IMODE(os.fstat(folder).st_mode) & 0o077:
            raise PermissionError(errno.EPERM, f"{path} is not a private folder; give it mode 0700")
        yield folder
    finally:
        os.close(folder)


def find_mounts(file: Path) -> set[tuple[int, int]]:
    """Return the numbers of the FUSE file systems that daemons mounted at FOLDER/disk, also of dead ones.

    Raises PermissionError as `open_folder` does.
    """
    with open_folder(file.parent) as folder:
        owner = os.fstat(folder).st_uid
    lines = (line.split() for line in _read_mounts())
    mounts = (words for words in lines if words[4] == str(file) and _is_export(words, owner))
    return {(int(major), int(minor)) for major, _, minor in (words[2].partition(":") for words in mounts)}


def _open(folder: int, name: Path, flags: int, resolve: int) -> int:
    """Open a path with openat2(2), which follows no links on the way."""
    how = _OPEN_HOW.pack(flags | os.O_CLOEXEC, 0, resolve)
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    arguments = ctypes.c_long(_OPENAT2), ctypes.c_int(folder), ctypes.c_char_p(os.fsencode(name))
    fd = int(call(*arguments, ctypes.c_char_p(how), ctypes.c_size_t(len(how))))
    if fd < 0:
        code = ctypes.get_errno()
        if code == errno.ELOOP:
            raise PermissionError(errno.EPERM, f"{name} is reached by a symbolic link, which is not followed")
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return fd


def _check(file: Path, folder: os.stat_result, place: int) -> None:
    """Raise PermissionError unless `place` is the root of a FUSE mount of its folder's owner."""
    mount = _mount_of(place)
    if not _is_fuse(mount) or not stat.S_ISREG(os.fstat(place).st_mode):
        raise PermissionError(errno.EPERM, f"{file} is not the export of a volume's daemon")
    if mount[4] != str(file):
        raise PermissionError(errno.EPERM, f"{file} is not where its file system is mounted, {mount[4]}")
    if not _is_export(mount, folder.st_uid):
        raise PermissionError(errno.EPERM, f"{file} is exported by another user than the owner of its folder")


def _is_fuse(mount: list[str]) -> bool:
    return mount[mount.index("-") + 1] == "fuse"


def _is_export(mount: list[str], owner: int) -> bool:
    """Return whether a line of mountinfo is of a FUSE file system that this user mounted."""
    return _is_fuse(mount) and f"user_id={owner}" in mount[-1].split(",")


def _mount_of(fd: int) -> list[str]:
    """Return the words of the line of /proc/self/mountinfo for the mount that a descriptor is on."""
    text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    number = next(line.split()[1] for line in text.splitlines() if line.startswith("mnt_id:"))
    for line in _read_mounts():
        words = line.split()
        if words[0] == number:
            return words
    raise PermissionError(errno.EPERM, "the file is on a mount that this process cannot see")


def _read_mounts() -> list[str]:
    return Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
