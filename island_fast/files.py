"""Files that are written whole, flushed, and given a name that nothing had before."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator

__all__ = ["link_new", "make_folder", "opened", "punch", "reserve", "sync_folder", "write_scratch"]

FOLDER_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY

_MAX_BUFFERS = os.sysconf("SC_IOV_MAX")
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_AT_FDCWD = -100  # fcntl.h
_RENAME_NOREPLACE = 1  # linux/fs.h
_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


@contextlib.contextmanager
def opened(path: str, flags: int, mode: int = 0o600) -> Iterator[int]:
    """A file descriptor, closed at the end."""
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def write_scratch(folder: str, content: list[memoryview]) -> str:
    """A new file in `folder` that holds `content` and is on disk; its path. An error leaves no file."""
    path = os.path.join(folder, f"{os.getpid()}-{os.urandom(8).hex()}")
    try:
        with opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC) as fd:
            _write_all(fd, content)
            os.fsync(fd)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        raise
    return path


def _write_all(fd: int, content: list[memoryview]) -> None:
    """Write every buffer, however little each call takes."""
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


def reserve(fd: int) -> None:
    """Reserve room on disk for all of a file, where its file system has it and can do so by itself.

    Then the file lies in one piece, in whatever order it is written. Where it cannot, nothing happens: the C
    library's posix_fallocate would write to each page instead.
    """
    size, free = os.fstat(fd).st_size, os.fstatvfs(fd)
    if 0 < size <= free.f_bavail * free.f_frsize:
        call = ctypes.CDLL(None).fallocate
        call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        call(fd, 0, 0, size)


def punch(fd: int, offset: int, length: int) -> bool:
    """Make a range of a file a hole, which is zeros; False, and nothing changed, where there are none."""
    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if call(fd, _PUNCH_HOLE, offset, length) == 0:
        return True
    code = ctypes.get_errno()
    if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
        raise OSError(code, os.strerror(code))
    return False


def link_new(scratch: str, target: str) -> bool:
    """Give the file `scratch` the name `target`; False if something has that name already.

    The name `scratch` may be gone afterwards: where there are no hard links, the file is renamed.
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
    """The same by renameat2(2), which os does not have."""
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


def make_folder(path: str) -> None:
    """Make the directory `path` in an existing one, or find it there; on disk on return.

    Another process may have made it an instant ago, so its entry is flushed in either case.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
    sync_folder(os.path.dirname(path))


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Flush a directory's entries to disk."""
    with opened(os.fspath(path), os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY) as fd:
        os.fsync(fd)
