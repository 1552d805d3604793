"""A store in a directory: one file for each object, at the object's name.

An object is written to a temporary file below `.tmp~` (no object can have that name), flushed, and
then linked to its name, which fails if the name is taken: what stands under a name is always whole.
Files are 0600 and directories 0700.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

from island_fast.arrays import Buffer
from island_fast.errors import (
    ConflictError,
    DamagedObjectError,
    NotFoundError,
    ObjectMissingError,
    RefusedError,
    StoreError,
)
from island_fast.files import FOLDER_FLAGS, link_new, make_folder, open_fd, write_scratch
from island_fast.stores.base import (
    ObjectInfo,
    Range,
    Store,
    Views,
    check_name,
    check_prefix,
    check_ranges,
    check_size,
    is_name,
    views,
)

__all__ = ["DirectoryStore"]

_SCRATCH = ".tmp~"
_LEFTOVER_AGE = 86400.0  # seconds; no put takes this long
_TRIES = 5  # at a folder that keeps vanishing
_COMPARED_AT_ONCE = 1 << 20
_MAPPED = 1 << 20  # bytes
# Not blocking: should the file turn out to be a pipe, open() would wait for its other end.
_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class DirectoryStore(Store):
    """A store in the directory `path`, which may be relative or begin with `~`.

    With `create_ok` a missing directory is made by the first `put`; until then the store is empty.
    The clock is this host's. A deletion is not flushed: after a crash of the host the object may be
    back. A name cannot be both an object and a folder. Symbolic links in place of an object are
    refused.
    """

    grace = 0.0
    range_gap = 0
    uploads = 3  # each waits for two fsyncs
    downloads = min(os.cpu_count() or 1, 4)  # these wait for nothing: more would only be in each other's way

    def __init__(self, path: str, *, create_ok: bool = False) -> None:
        self.location = path
        self._root = os.path.abspath(os.path.expanduser(path))
        self._making = threading.Lock()
        self._made: set[str] = set()  # folders known to be there and on disk
        self._identity = self._identify()  # None until the directory is made
        if self._identity is None and not create_ok:
            raise NotFoundError(
                f"directory {path} does not exist; check the path and whether its disk is mounted"
            )

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """See Store.put; other processes may put the same name meanwhile."""
        path = self._path(name)
        content = views(parts)
        try:
            created = self._publish(path, content)
        except OSError as error:
            self._fail(error)
        if not created and not self._holds(name, content):
            raise ConflictError(
                f"object {name} in {self.location} already holds other bytes, and none is ever overwritten; "
                "look for another writer of this repository"
            )

    def _publish(self, path: str, content: Views) -> bool:
        """Make the file `path` with `content`, durably; False if something has that name.

        A deletion may take the folder away just before it is used; then all is done again.
        """
        for _ in range(_TRIES - 1):
            with contextlib.suppress(FileNotFoundError):
                return self._publish_once(path, content)
            self._made.clear()
        return self._publish_once(path, content)

    def _publish_once(self, path: str, content: Views) -> bool:
        # The folder comes second: where the disk is full, not even that shall appear.
        scratch = write_scratch(self._folder(os.path.join(self._root, _SCRATCH)), content)
        try:
            with open_fd(self._folder(os.path.dirname(path)), FOLDER_FLAGS) as fd:
                created = link_new(scratch, path)
                os.fsync(fd)  # also if the name was taken: its owner may not have come to that yet
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(scratch)
        return created

    def _folder(self, path: str) -> str:
        """`path` itself, made and flushed with everything above it."""
        if path not in self._made:
            with self._making:
                self._make(path)
        return path

    def _make(self, path: str) -> None:
        if path in self._made:
            return
        if path == self._root:
            self._make_root()
            self._clean_scratch()
        else:
            self._make(os.path.dirname(path))
            if path == os.path.join(self._root, _SCRATCH):
                _make_first(path)
            else:
                make_folder(path)
        self._made.add(path)

    def _make_root(self) -> None:
        self._check_root()
        if self._identity is None:
            missing = [self._root]
            while not os.path.isdir(os.path.dirname(missing[-1])):
                missing.append(os.path.dirname(missing[-1]))
            for folder in reversed(missing):
                _make_first(folder)
            self._identity = self._identify()

    def _identify(self) -> tuple[int, int] | None:
        """Device and inode of the directory; None if it is not there."""
        try:
            status = os.stat(self._root)
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            status = None
        except OSError as error:
            self._fail(error)
        if status is None or not stat.S_ISDIR(status.st_mode):
            raise NotFoundError(f"{self.location} is not a directory; name the directory of a repository")
        return status.st_dev, status.st_ino

    def _check_root(self) -> None:
        """StoreError if the directory went away: its objects are not absent then, and nothing is put."""
        if self._identity is not None and self._identify() != self._identity:
            raise StoreError(
                f"directory {self.location} is not the one it was when this began; check whether its disk "
                "is mounted"
            )

    def _clean_scratch(self) -> None:
        """Remove the temporary files that processes left behind when they died."""
        oldest = time.time() - _LEFTOVER_AGE
        for entry in self._entries(_SCRATCH):
            with contextlib.suppress(FileNotFoundError):
                if entry.stat(follow_symlinks=False).st_mtime < oldest:
                    os.unlink(entry.path)

    def _holds(self, name: str, content: Views) -> bool:
        """Whether the object `name` has exactly the bytes of `content`."""
        with self._reading(name) as (fd, size):
            if size != sum(view.nbytes for view in content):
                return False
            offset = 0
            for view in content:
                for start in range(0, view.nbytes, _COMPARED_AT_ONCE):
                    piece = view[start : start + _COMPARED_AT_ONCE]
                    if os.pread(fd, piece.nbytes, offset) != piece:
                        return False
                    offset += piece.nbytes
        return True

    def get(self, name: str, *, newest: bool = False) -> memoryview:
        """See Store.get; there is one replica."""
        with self._reading(name) as (fd, size):
            return _read(fd, name, [(0, check_size(name, size))])[0]

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> Views:
        """See Store.get_ranges; each range is read by itself, exactly."""
        check_ranges(ranges)
        with self._reading(name) as (fd, size):
            check_size(name, size, max((o + n for o, n in ranges), default=0))
            return _read(fd, name, ranges)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[tuple[int, int]]:
        """The object's file descriptor and size in bytes. An OSError in the block is translated, too."""
        try:
            with open_fd(self._path(name), _READ_FLAGS) as fd:
                status = os.fstat(fd)
                if stat.S_ISDIR(status.st_mode):
                    raise NotADirectoryError
                if not stat.S_ISREG(status.st_mode):
                    raise RefusedError(f"{name} in {self.location} is not a file; remove it")
                yield fd, status.st_size
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            raise ObjectMissingError(
                f"object {name} is not in {self.location}; it was deleted or never written"
            ) from None
        except OSError as error:
            self._fail(error)

    def head(self, name: str) -> ObjectInfo | None:
        """See Store.head; anything but a file counts as absent."""
        try:
            status = os.lstat(self._path(name))
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            return None
        except OSError as error:
            self._fail(error)
        return _describe(name, status) if stat.S_ISREG(status.st_mode) else None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See Store.list. Files whose names no object can have are passed over."""
        return self._objects(check_prefix(prefix))

    def _objects(self, prefix: str) -> Iterator[ObjectInfo]:
        for entry in self._entries(prefix):
            name = prefix + entry.name
            if is_name(name) and entry.is_dir(follow_symlinks=False):
                yield from self._objects(name + "/")
            elif is_name(name) and entry.is_file(follow_symlinks=False):
                try:
                    yield _describe(name, entry.stat(follow_symlinks=False))
                except FileNotFoundError:  # deleted just now
                    continue
                except OSError as error:
                    self._fail(error)

    def folders(self, prefix: str) -> Iterator[str]:
        """See Store.folders. One may be empty: its last object is just gone, or its first to come."""
        entries = self._entries(check_prefix(prefix))
        return (e.name for e in entries if is_name(e.name) and e.is_dir(follow_symlinks=False))

    def _entries(self, prefix: str) -> Sequence[os.DirEntry[str]]:
        """What is in a folder, in the order in which whole names ascend; nothing if it is not there."""
        try:
            with os.scandir(os.path.join(self._root, prefix)) as entries:
                found = [*entries]
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            return []
        except OSError as error:
            self._fail(error)
        return sorted(found, key=lambda e: e.name + "/" * e.is_dir(follow_symlinks=False))

    def delete(self, name: str) -> None:
        """See Store.delete. Folders that it empties go too."""
        path = self._path(name)
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            return
        except OSError as error:
            self._fail(error)
        folder = os.path.dirname(path)
        with contextlib.suppress(OSError):  # it is not empty, mostly
            while folder != self._root:
                os.rmdir(folder)
                self._made.discard(folder)
                folder = os.path.dirname(folder)

    def _path(self, name: str) -> str:
        return os.path.join(self._root, check_name(name))

    def _fail(self, error: OSError) -> NoReturn:
        """Translate what the file system said."""
        what = error.filename or self.location
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR):
            raise RefusedError(
                f"{what} is not what a repository has at that place (a link, or a file and folder "
                "exchanged); remove it or use another directory"
            ) from error
        raise StoreError(_sentence(error, what, self.location)) from error


def _make_first(folder: str) -> None:
    """Make what a repository begins with; where that may not be, it is no repository yet."""
    try:
        make_folder(folder)
    except PermissionError as error:
        raise StoreError(
            f"{os.path.dirname(folder)} cannot be written; name a directory that you may write to, with -r"
        ) from error


def _sentence(error: OSError, what: str, location: str) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"no space is left for {location}; free some or raise the quota, then try again"
        case errno.EROFS:
            return f"{location} is on a read-only file system; remount it for writing"
        case errno.EACCES | errno.EPERM:
            return f"permission denied at {what}; run as the owner of the repository"
        case errno.EOPNOTSUPP:
            return (
                f"the file system of {location} has neither hard links nor a rename that refuses to "
                "overwrite; use another one"
            )
    return f"{what}: {error.strerror or error}; check the disk of {location}"


def _describe(name: str, status: os.stat_result) -> ObjectInfo:
    """Its age counts from the later of writing and naming: copying tools put back only the first."""
    age = time.time() - max(status.st_mtime, status.st_ctime)
    return ObjectInfo(name, status.st_size, max(0.0, age))


def _read(fd: int, name: str, ranges: Sequence[Range]) -> Views:
    """Exactly these bytes, in pieces of one buffer; they were within the file a moment ago."""
    buffer = _buffer(sum(length for _, length in ranges))
    parts, at = [], 0
    for offset, length in ranges:
        part = buffer[at : at + length]
        done = 0
        while done < length:  # one call reads 2 GiB at most
            got = os.preadv(fd, [part[done:]], offset + done)
            if not got:
                raise DamagedObjectError(f"object {name} became shorter while it was read; it is damaged")
            done += got
        parts.append(part.toreadonly())
        at += length
    return parts


def _buffer(length: int) -> memoryview:
    """Memory that goes back to the system with its last view; what threads free, malloc keeps.

    Of huge pages, where there are any: else its page faults would take as long as reading.
    """
    if length < _MAPPED:
        return memoryview(bytearray(length))
    mapped = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapped)
