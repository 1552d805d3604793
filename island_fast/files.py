"""Write files durably: whole, flushed to disk, and under a name that nothing had before."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "FOLDER_FLAGS",
    "birth_time",
    "find_extents",
    "link_new",
    "make_folder",
    "make_folders",
    "open_fd",
    "open_private",
    "punch_hole",
    "reserve_space",
    "sync_folder",
    "write_durably",
    "write_scratch",
]

FOLDER_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY
"""Flags that open a directory, and nothing through a symbolic link in the last component."""

_MAX_BUFFERS = os.sysconf("SC_IOV_MAX")
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_AT_FDCWD = -100  # fcntl.h
_RENAME_NOREPLACE = 1  # linux/fs.h
_EMPTY_PATH = 0x1000  # AT_EMPTY_PATH
_BIRTH, _STATX = 0x800, struct.Struct("I 76x qI 164x")  # linux/stat.h: STATX_BTIME; stx_mask and stx_btime
_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


@contextlib.contextmanager
def open_fd(path: str, flags: int, mode: int = 0o600) -> Iterator[int]:
    """Open a file descriptor and close it at the end."""
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def open_private(path: str, flags: int) -> int:
    """Open a file that, if it is new, only its owner can read; an opener for `open`."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def write_durably(path: Path, data: bytes) -> None:
    """Write `path` so that it is either as before, or whole and on disk."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    with open(temporary, "xb", opener=open_private) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_scratch(folder: str, content: list[memoryview], *, group_readable: bool = False) -> str:
    """Write a new file in `folder` that holds `content`, flush it, and return its path.

    Its mode is 0600, or 0640 if it is `group_readable`. If that fails, no file is left.
    """
    path = os.path.join(folder, f"{os.getpid()}-{os.urandom(8).hex()}")
    try:
        with open_fd(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC) as fd:
            _write_all(fd, content)
            if group_readable:
                os.fchmod(fd, 0o640)  # whatever the umask is
            os.fsync(fd)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        raise
    return path


def _write_all(fd: int, content: list[memoryview]) -> None:
    """Write all buffers, in as many calls as that takes."""
    rest = content
    while rest:
        written = os.writev(fd, rest[:_MAX_BUFFERS])
        done = 0
        while done < len(rest) and written >= rest[done].nbytes:
            written -= rest[done].nbytes
            done += 1
        rest = rest[done:]
        if written:
            rest[0] = rest[0][written:]


def reserve_space(fd: int) -> None:
    """Reserve space on disk for all of a file, if there is enough and its file system supports that.

    Then the file lies in one piece, in whatever order it is written. Otherwise nothing happens. (The C
    library's posix_fallocate would write to each page instead.)
    """
    size, free = os.fstat(fd).st_size, os.fstatvfs(fd)
    if 0 < size <= free.f_bavail * free.f_frsize:
        call = ctypes.CDLL(None).fallocate
        call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        call(fd, 0, 0, size)


def birth_time(fd: int) -> int:
    """Return when the file of a descriptor was created, in nanoseconds since 1970; 0 if that is not known.

    A file system gives the inode of a deleted file to the next one, but not with the same time.
    """
    call = getattr(ctypes.CDLL(None), "statx", None)
    if call is None:
        return 0
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)
    buffer = ctypes.create_string_buffer(_STATX.size)
    if call(fd, b"", _EMPTY_PATH, _BIRTH, buffer):
        return 0
    mask, seconds, nanoseconds = _STATX.unpack(buffer.raw)
    return int(seconds * 10**9 + nanoseconds) if mask & _BIRTH else 0


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Make a range of a file a hole, which reads as zeros.

    Return False, with nothing changed, if the file system has no holes.
    """
    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if call(fd, _PUNCH_HOLE, offset, length) == 0:
        return True
    code = ctypes.get_errno()
    if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
        raise OSError(code, os.strerror(code))
    return False


def link_new(scratch: str, target: str) -> bool:
    """Give the file `scratch` the name `target`; return False if something has that name already.

    The name `scratch` can be gone afterwards: without hard links, the file is renamed.
    """
    try:
        os.link(scratch, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return _rename_new(scratch, target)
    return True


def _rename_new(scratch: str, target: str) -> bool:
    """Do the same by renameat2(2), which the os module lacks."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), target) from None
    paths = os.fsencode(scratch), os.fsencode(target)
    if call(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_NOREPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    if code == errno.EINVAL:  # the file system does not know the flag
        code = errno.EOPNOTSUPP
    raise OSError(code, os.strerror(code), target)


def make_folder(path: str, *, group_readable: bool = False) -> None:
    """Create the directory `path`, unless it exists, and flush its entry to disk.

    Its mode is 0700; if it is `group_readable`, 2750, so that what is made in it has the same group.
    The entry is flushed in either case, because another process may have created it an instant ago.
    """
    try:
        os.mkdir(path, 0o700)
        if group_readable:
            os.chmod(path, 0o2750)  # whatever the umask is
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
    sync_folder(os.path.dirname(path))


def make_folders(path: str | os.PathLike[str], mode: int = 0o700) -> None:
    """Create the directory `path`, and those above it that do not exist, each with this mode at most.

    (The parents that os.makedirs and Path.mkdir create get whatever mode the umask leaves them.)
    """
    for parents_exist in (False, True):
        try:
            os.mkdir(path, mode)
        except FileNotFoundError:
            if parents_exist:  # some file systems answer this where nothing can be made, such as /proc
                raise
            make_folders(os.path.dirname(os.path.abspath(path)), mode)
        except FileExistsError:
            if not os.path.isdir(path):
                raise
            return
        else:
            return


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Flush a directory's entries to disk."""
    with open_fd(os.fspath(path), os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY) as fd:
        os.fsync(fd)


def find_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the extents [start, stop), in bytes, that can hold data, ascending.

    Where the file system does not report holes, that is one extent, the whole file.
    """
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            stop = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            start, stop = at, size
        if start < size:
            yield start, stop
        at = stop
