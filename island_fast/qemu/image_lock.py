"""Who may use an image now: our own lock on it, and the locks that qemu keeps on it.

qemu marks its use of a file by open-file-description locks on single bytes (qemu's block/file-posix.c,
RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE): a read lock on byte 100 + p says "I use permission p", one
on byte 200 + p says "nobody else may", with p = 1 for writing. It takes its own locks first and then
looks for those of others, and so does this module: whoever comes second sees the first. Nothing of this
binds programs other than qemu's, nor qemu started with file.locking=off.
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
    """Tell whether a process of qemu's has the file of descriptor `fd` open for writing, right now.

    The descriptor may be read-only. Locks taken through this very descriptor are not seen. Another answer
    may be true a moment later, unless an `ImageLock` holds off writers. IslandError where the file
    system has no such locks.
    """
    try:
        return _byte_is_locked(fd, _WRITE_USED)
    except OSError as error:
        raise IslandError(
            f"whether the image is open for writing cannot be told, because its file system "
            f"answers {_reason(error)} to lock requests; keep it on a local file system"
        ) from error


class ImageLock:
    """One snapshot at a time per image; and, where asked, no new writer meanwhile. A context manager.

    Entered, it holds an exclusive flock on the image itself, through a read-only descriptor of its own
    (`fd`, which the caller may read through and must not close): RefusedError if another snapshot holds
    it, NotFoundError if there is no such file. The lock is on the file and not on its name, and is gone
    when the process is, however it ends. Opening the same image again through another `ImageLock` is
    refused within one process too.

    With `hold_off_writers` qemu cannot open the image for writing until the end: for reading an image's
    active table, where no internal snapshot keeps the clusters still. ImageInUseError if a process
    already has it open for writing. A virtual machine that is started meanwhile fails to start, and
    our own qemu-img is refused as well. Readers are not disturbed.
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
        """The read-only descriptor that holds the locks; -1 while they are not held."""
        return self._fd

    def __enter__(self) -> Self:
        if self._fd >= 0:
            raise RefusedError(f"the lock of image {self.path!r} is already held; leave it first")
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
    """Open a regular file for reading, close-on-exec; the caller owns the descriptor.

    O_NONBLOCK, so that a pipe of that name cannot hold us up. NotFoundError if there is no such file,
    RefusedError if it is no regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no image {path!r}; check the path") from error
    except (OSError, ValueError) as error:
        raise IslandError(
            f"image {path!r} cannot be opened for reading ({_reason(error)}); run as a user who may read it"
        ) from error
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or (devices and stat.S_ISBLK(mode))):
        os.close(fd)
        raise RefusedError(f"{path!r} is not a regular file; name the file that holds the image")
    return fd


def _lock_out_snapshots(fd: int, path: str) -> None:
    """Take the exclusive flock, and make sure that the path still leads to the file it is on."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RefusedError(
            f"another snapshot of image {path!r} is running; try again when it has ended"
        ) from error
    except OSError as error:
        raise _cannot_lock(path, error) from error
    try:
        replaced = not os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        replaced = True
    if replaced:
        raise RefusedError(f"image {path!r} was replaced by another file just now; try again")


def hold_off_writers(fd: int, path: str) -> None:
    """Keep qemu from writing to the file as long as `fd` is open; ImageInUseError if someone already does.

    First writing is forbidden, and only then looked whether someone writes: the other order has a window.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, _WRITE_UNSHARED))
        in_use = _byte_is_locked(fd, _WRITE_USED)
    except BlockingIOError:
        in_use = True
    except OSError as error:
        raise _cannot_lock(path, error) from error
    if in_use:
        raise ImageInUseError(
            f"image {path!r} is open for writing in another process; "
            f"stop that process, or name its QMP socket"
        )


def hold_off_everyone(fd: int, path: str) -> None:
    """Tell qemu's that the file is written to, as long as `fd` is open; ImageInUseError if one has it open.

    That is, one that writes to it, or one that reads and wants nobody to write.
    """
    try:
        for byte in (_WRITE_USED, _WRITE_UNSHARED):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
        in_use = _byte_is_locked(fd, _WRITE_USED) or _byte_is_locked(fd, _WRITE_UNSHARED)
    except BlockingIOError:
        in_use = True
    except OSError as error:
        raise _cannot_lock(path, error) from error
    if in_use:
        raise ImageInUseError(f"{path} is open in another process; stop that process first")


def _byte_is_locked(fd: int, byte: int) -> bool:
    """Ask for a write lock that is not taken: any lock of another descriptor on `byte` is in its way."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def _flock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


def _cannot_lock(path: str, error: OSError) -> IslandError:
    return IslandError(f"image {path!r} cannot be locked ({_reason(error)}); keep it on a local file system")


def _reason(error: Exception) -> str:
    """The system's own words, without the number and the file name that str() adds."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
