"""Locks on an image: our own, and the locks by which qemu marks that it uses an image.

qemu marks its use of a file by open-file-description locks on single bytes (qemu's block/file-posix.c,
RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE): a read lock on byte 100 + p means "I use permission p", one on
byte 200 + p means "nobody else may use it", with p = 1 for writing. qemu takes its own locks first and then
looks for those of others, and so does this module: of two, the second always sees the first. Programs other
than qemu's, and a qemu that was started with file.locking=off, ignore these locks; `open_files.py` finds
them.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from typing import Self

from island_fast.errors import ImageInUseError, IslandError, NotFoundError, RefusedError

__all__ = ["ImageLock", "hold_off_everyone", "hold_off_writers", "open_image", "writer_present"]

_WRITE_USED = 101
_WRITE_UNSHARED = 201
# struct flock with 64-bit offsets: l_type, l_whence, l_start, l_len, l_pid; "0q" pads the end as C does
_FLOCK = struct.Struct("@hhqqi0q")


def writer_present(fd: int) -> bool:
    """Return whether a qemu process has the file of descriptor `fd` open for writing at this moment.

    The descriptor can be read-only. Locks that were taken through this very descriptor are not seen. The
    answer can change a moment later, unless an `ImageLock` holds off writers. IslandError if the file system
    has no such locks.
    """
    try:
        return _is_byte_locked(fd, _WRITE_USED)
    except OSError as error:
        raise IslandError(
            f"cannot determine whether the image is open for writing, because its file system "
            f"answers {_error_reason(error)} to lock requests; keep it on a local file system"
        ) from error


class ImageLock:
    """A context manager that allows one snapshot at a time per image and, if asked for, no new writer.

    Inside, it holds an exclusive flock on the image, through a read-only descriptor that it owns (`fd`: the
    caller can read through it and must not close it). RefusedError if another snapshot holds the lock,
    NotFoundError if there is no such file. The lock is on the file, not on its name, and ends with the
    process, however it ends. A second `ImageLock` on the same image is refused within one process, too.

    With `hold_off_writers` qemu cannot open the image for writing until the end. This is for reading an
    image's active table, whose clusters no internal snapshot preserves. ImageInUseError if a process already
    has the image open for writing. A virtual machine that is started meanwhile fails to start, and our own
    qemu-img is refused as well. Readers are not affected. With `devices` the image can be a block device.
    """

    def __init__(
        self, path: str | os.PathLike[str], hold_off_writers: bool = False, devices: bool = False
    ) -> None:
        self.path = os.fspath(path)
        self._devices = devices
        self._hold_off_writers = hold_off_writers
        self._fd = -1

    @property
    def fd(self) -> int:
        """Return the read-only descriptor that holds the locks; -1 while none are held."""
        return self._fd

    def __enter__(self) -> Self:
        if self._fd >= 0:
            raise RefusedError(f"the lock of image {self.path!r} is already held; release it first")
        fd = open_image(self.path, self._devices)
        try:
            _lock_out_snapshots(fd, self.path)
            if self._hold_off_writers:
                hold_off_writers(fd, self.path)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return self

    def __exit__(self, *_: object) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)


def open_image(path: str, devices: bool = False) -> int:
    """Open a regular file, or with `devices` a block device, for reading; the caller owns the descriptor.

    Uses O_NONBLOCK, so that opening a pipe of that name does not block. NotFoundError if there is no such
    file, RefusedError if it is something else.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no image {path!r}; check the path") from error
    except (OSError, ValueError) as error:
        raise IslandError(
            f"image {path!r} cannot be opened for reading ({_error_reason(error)}); "
            "run as a user who can read it"
        ) from error
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or (devices and stat.S_ISBLK(mode))):
        os.close(fd)
        raise RefusedError(f"{path!r} is not a regular file; name the file that holds the image")
    return fd


def _lock_out_snapshots(fd: int, path: str) -> None:
    """Take the exclusive flock, and check that the path still leads to the file that is locked."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RefusedError(
            f"another snapshot of image {path!r} is running; run this one again when it has ended"
        ) from error
    except OSError as error:
        raise _lock_error(path, error) from error
    try:
        replaced = not os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        replaced = True
    if replaced:
        raise RefusedError(f"image {path!r} was replaced by another file just now; try again")


def hold_off_writers(fd: int, path: str) -> None:
    """Keep qemu from writing to the file while `fd` is open; ImageInUseError if a process already does.

    First writing is forbidden, and only then looked whether someone writes: the other order has a window.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _pack_flock(fcntl.F_RDLCK, _WRITE_UNSHARED))
        in_use = _is_byte_locked(fd, _WRITE_USED)
    except BlockingIOError:
        in_use = True
    except OSError as error:
        raise _lock_error(path, error) from error
    if in_use:
        raise ImageInUseError(
            f"image {path!r} is open for writing in another process; "
            f"stop that process, or name its QMP socket"
        )


def hold_off_everyone(fd: int, path: str) -> None:
    """Keep qemu from opening the file while `fd` is open, by the locks of a writer.

    ImageInUseError if a qemu process has it open for writing, or for reading without allowing writers.
    """
    try:
        for byte in (_WRITE_USED, _WRITE_UNSHARED):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _pack_flock(fcntl.F_RDLCK, byte))
        in_use = _is_byte_locked(fd, _WRITE_USED) or _is_byte_locked(fd, _WRITE_UNSHARED)
    except BlockingIOError:
        in_use = True
    except OSError as error:
        raise _lock_error(path, error) from error
    if in_use:
        raise ImageInUseError(f"{path} is open in another process; stop that process first")


def _is_byte_locked(fd: int, byte: int) -> bool:
    """Return whether another descriptor has any lock on `byte`: ask if a write lock would fail, take none."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _pack_flock(fcntl.F_WRLCK, byte))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def _pack_flock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


def _lock_error(path: str, error: OSError) -> IslandError:
    return IslandError(
        f"image {path!r} cannot be locked ({_error_reason(error)}); keep it on a local file system"
    )


def _error_reason(error: Exception) -> str:
    """Return the system's message without the number and the file name that str() adds."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
