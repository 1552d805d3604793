"""A store in a directory: one file for each object, at the object's name.

An object is written to a temporary file below `.tmp~` (no object can have that name), flushed, and then
linked to its name, which fails if the name is taken. So a file with an object's name is always complete.
What fails before the link has certainly not stored anything. Files are 0600 and directories 0700. If the
store's directory has the setgid bit and its group may read it, the group may read everything: files are 0640
and directories 2750.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shlex
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

from island_fast.arrays import Buffer
from island_fast.errors import (
    AccessDeniedError,
    ConflictError,
    DamagedObjectError,
    NotFoundError,
    ObjectMissingError,
    RefusedError,
    StoreError,
    StoreFullError,
    StoreRefusedError,
    UsageError,
)
from island_fast.files import FOLDER_FLAGS, link_new, make_folder, open_fd, write_scratch
from island_fast.memory import require_memory
from island_fast.stores.base import (
    MAX_OBJECT,
    ObjectInfo,
    Range,
    Store,
    Views,
    check_name,
    check_prefix,
    check_ranges,
    check_size,
    flat_views,
    is_name,
)
from island_fast.stores.directory_reserve import FULL, Reserve

__all__ = ["DirectoryStore"]

_SCRATCH = ".tmp~"
_LEFTOVER_AGE = 86400.0  # seconds; no put takes this long
_TRIES = 5  # at a put whose folder is removed again and again
_SHARED = stat.S_ISGID | stat.S_IRGRP | stat.S_IXGRP
_COMPARED_AT_ONCE = 1 << 20  # bytes
_MAPPED = 1 << 20  # bytes; buffers from here on are mapped, not allocated
# Errors of link(2) after which the name is not there, on whatever file system; others may come of a network.
_REFUSALS = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOENT)
# O_NONBLOCK: if the file is a pipe, open() would wait for its other end.
_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class DirectoryStore(Store):
    """A store in the directory `path`, which can be relative or begin with `~`.

    A missing directory is a NotFoundError; with `create_ok` the first `put` creates it, and until then the
    store is empty. Ages are by this host's clock. A deletion is not flushed: after a crash of the host the
    object can be back. A name cannot be both an object and a folder. A symbolic link in place of an object is
    refused. `shared` makes a new store that its group may read, see above.
    """

    grace = 0.0
    range_gap = 0
    uploads = 3  # each waits for two fsyncs
    downloads = min(os.cpu_count() or 1, 4)  # these wait for nothing; more would only get in each other's way

    def __init__(self, path: str, *, create_ok: bool = False, shared: bool = False) -> None:
        self.location = path
        place = os.path.expanduser(path)
        if place.startswith("~") and place == path:  # no such user, or no home directory
            raise NotFoundError(f"there is no home directory for {path}; give an absolute path, or ./{path}")
        self._root = os.path.abspath(place)
        self._folders_lock = threading.Lock()
        self._known_folders: set[str] = set()  # folders that exist and are flushed
        self._reserve = Reserve(self._root, os.path.join(self._root, _SCRATCH))
        self._reserve_lent = False
        self._identity = self._identify()  # None until the directory is created
        if self._identity is None and not create_ok:
            raise NotFoundError(
                f"directory {path} does not exist; check the path and whether its disk is mounted"
            )
        self._shared = self._is_shared()
        if shared and not self._shared:
            self._share()

    def _is_shared(self) -> bool:
        """Return whether the directory exists, and its group may read it and what is made in it."""
        return self._identity is not None and os.stat(self._root).st_mode & _SHARED == _SHARED

    def _share(self) -> None:
        """Have the group of a store without objects read what will be in it."""
        if self._identity is not None:
            if any(is_name(entry.name) for entry in self._scan_folder("")):
                where = shlex.quote(self._root)
                raise UsageError(
                    f"{self.location} exists and is not shared; run chmod -R g+rX {where} and "
                    f"find {where} -type d -exec chmod g+s {{}} + instead"
                )
            os.chmod(self._root, 0o2750)
        self._shared = True

    @property
    def place(self) -> str:
        """See Store.place."""
        return os.path.realpath(self._root)

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """See Store.put. Other processes can put the same name meanwhile."""
        path = self._path(name)
        content = flat_views(parts)
        try:
            created = self._publish(path, content)
        except OSError as error:
            if not (error.errno in FULL and self._reserve_lent and self._reserve.release()):
                self._raise_translated(error, StoreRefusedError)
            try:
                created = self._publish(path, content)
            except OSError as again:
                self._raise_translated(again, StoreRefusedError)
        if not created and not self._holds(name, content):
            raise ConflictError(
                f"object {name} in {self.location} already holds other bytes, and none is ever overwritten; "
                "look for another writer of this repository"
            )

    def _publish(self, path: str, content: Views) -> bool:
        """Create the file `path` with `content`, durably; return False if the name is taken.

        An OSError says that it was not created; if that is unknown, it is a StoreError. A deletion can remove
        the folder just before it is used; then everything is done again.
        """
        for _ in range(_TRIES - 1):
            with contextlib.suppress(FileNotFoundError):
                return self._publish_once(path, content)
            self._known_folders.clear()
        return self._publish_once(path, content)

    def _publish_once(self, path: str, content: Views) -> bool:
        # The object's folder comes after the scratch file: a full disk must not leave even an empty folder.
        scratch = write_scratch(
            self._ensure_folder(os.path.join(self._root, _SCRATCH)), content, group_readable=self._shared
        )
        try:
            with open_fd(self._ensure_folder(os.path.dirname(path)), FOLDER_FLAGS) as fd:
                try:
                    created = link_new(scratch, path)
                except OSError as error:
                    if error.errno in _REFUSALS:
                        raise
                    self._raise_translated(error)
                try:
                    os.fsync(fd)  # also if the name was taken: whoever took it may not have flushed yet
                except OSError as error:
                    self._raise_translated(error)
        finally:
            with contextlib.suppress(OSError):  # the first put of a process removes what is left
                os.unlink(scratch)
        return created

    @contextlib.contextmanager
    def use_reserve(self) -> Iterator[None]:
        """See Store.use_reserve. One thread at a time."""
        self._reserve.release_if_short()
        self._reserve_lent = True
        try:
            yield
        finally:
            self._reserve_lent = False
            self._reserve.make()

    def release_reserve(self) -> bool:
        """See Store.release_reserve. The first put of the next process makes it again, as large as it can."""
        return self._reserve.release()

    def _ensure_folder(self, path: str) -> str:
        """Create folder `path` and everything above it, unless it is known; flush; return `path`."""
        if path not in self._known_folders:
            with self._folders_lock:
                self._make_with_parents(path)
        return path

    def _make_with_parents(self, path: str) -> None:
        if path in self._known_folders:
            return
        if path == self._root:
            self._make_root()
            self._clean_scratch()
        else:
            self._make_with_parents(os.path.dirname(path))
            if path == os.path.join(self._root, _SCRATCH):
                _make_first_folder(path, self._shared)
                self._reserve.make()
            else:
                make_folder(path, group_readable=self._shared)
        self._known_folders.add(path)

    def _make_root(self) -> None:
        self._check_root(StoreRefusedError)
        if self._identity is None:
            missing = [self._root]
            while not os.path.isdir(os.path.dirname(missing[-1])):
                missing.append(os.path.dirname(missing[-1]))
            for folder in reversed(missing):
                _make_first_folder(folder, self._shared and folder == self._root)
            self._identity = self._identify()

    def _identify(self) -> tuple[int, int] | None:
        """Return device and inode of the store's directory; None if it does not exist."""
        try:
            status = os.stat(self._root)
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            status = None
        except OSError as error:
            self._raise_translated(error)
        if status is None or not stat.S_ISDIR(status.st_mode):
            raise NotFoundError(f"{self.location} is not a directory; name the directory of a repository")
        return status.st_dev, status.st_ino

    def _check_root(self, kind: type[StoreError] = StoreError) -> None:
        """Raise `kind` if the directory is gone: objects are not absent then, and nothing may be put."""
        if self._identity is not None and self._identify() != self._identity:
            raise kind(
                f"directory {self.location} was replaced or unmounted during this command; check whether its "
                "disk is mounted"
            )

    def _clean_scratch(self) -> None:
        """Remove temporary files that dead processes left."""
        oldest = time.time() - _LEFTOVER_AGE
        for entry in list(self._scan_folder(_SCRATCH)):
            with contextlib.suppress(FileNotFoundError):
                if entry.stat(follow_symlinks=False).st_mtime < oldest:
                    os.unlink(entry.path)

    def _holds(self, name: str, content: Views) -> bool:
        """Return whether the object `name` has exactly the bytes of `content`."""
        with self._open_object(name) as (fd, size):
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

    def get(self, name: str, *, newest: bool = False, limit: int = MAX_OBJECT) -> memoryview:
        """See Store.get. There is one replica."""
        with self._open_object(name) as (fd, size):
            require_memory(f"object {name}", check_size(name, size, limit=limit))
            return _read_ranges(fd, name, [(0, size)])[0]

    def get_ranges(self, name: str, ranges: Sequence[Range]) -> Views:
        """See Store.get_ranges. Exactly the ranges are read."""
        check_ranges(ranges)
        with self._open_object(name) as (fd, size):
            check_size(name, size, max((o + n for o, n in ranges), default=0))
            return _read_ranges(fd, name, ranges)

    @contextlib.contextmanager
    def _open_object(self, name: str) -> Iterator[tuple[int, int]]:
        """Open an object; yield its descriptor and size in bytes. Translates an OSError of the body, too."""
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
            self._raise_translated(error)

    def head(self, name: str) -> ObjectInfo | None:
        """See Store.head. Anything but a regular file counts as absent."""
        try:
            status = os.lstat(self._path(name))
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            return None
        except OSError as error:
            self._raise_translated(error)
        return _object_info(name, status) if stat.S_ISREG(status.st_mode) else None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See Store.list. Files whose names no object can have are skipped."""
        return self._list_objects(check_prefix(prefix))

    def _list_objects(self, prefix: str) -> Iterator[ObjectInfo]:
        for entry in self._scan_folder(prefix):
            name = prefix + entry.name
            if is_name(name) and entry.is_dir(follow_symlinks=False):
                yield from self._list_objects(name + "/")
            elif is_name(name) and entry.is_file(follow_symlinks=False):
                try:
                    yield _object_info(name, entry.stat(follow_symlinks=False))
                except FileNotFoundError:  # deleted just now
                    continue
                except OSError as error:
                    self._raise_translated(error)

    def folders(self, prefix: str) -> Iterator[str]:
        """See Store.folders. One can be empty: its last object was just removed, or its first is coming.

        One that somebody moved away and left a link to is among them: what is below can be read by name, and
        must not be passed over in silence. Nothing is put there.
        """
        entries = self._scan_folder(check_prefix(prefix))
        return (e.name for e in entries if is_name(e.name) and os.path.isdir(e.path))

    def _scan_folder(self, prefix: str) -> Iterator[os.DirEntry[str]]:
        """Yield a folder's entries, as the file system lists them; none if it does not exist."""
        try:
            entries = os.scandir(os.path.join(self._root, prefix))
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            return
        except OSError as error:
            self._raise_translated(error)
        with entries:
            while True:
                try:
                    entry = next(entries, None)
                except OSError as error:
                    self._raise_translated(error)
                if entry is None:
                    return
                yield entry

    def delete(self, name: str) -> None:
        """See Store.delete. Folders that become empty are removed."""
        path = self._path(name)
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            return
        except OSError as error:
            self._raise_translated(error, StoreRefusedError if error.errno in _REFUSALS else StoreError)
        folder = os.path.dirname(path)
        with contextlib.suppress(OSError):  # usually: it is not empty
            while folder != self._root:
                os.rmdir(folder)
                self._known_folders.discard(folder)
                folder = os.path.dirname(folder)

    def _path(self, name: str) -> str:
        return os.path.join(self._root, check_name(name))

    def _raise_translated(self, error: OSError, kind: type[StoreError] = StoreError) -> NoReturn:
        """Raise `error`, the file system's, as an error for the user, in most cases of class `kind`."""
        what, location = error.filename or self.location, self.location
        match error.errno:
            case errno.ELOOP | errno.ENOTDIR | errno.EISDIR:
                raise RefusedError(
                    f"{what} is a link, or a file where a repository has a folder, or the reverse; remove it "
                    "or use another directory"
                ) from error
            case errno.ENOSPC | errno.EDQUOT:
                kind = StoreFullError if kind is StoreRefusedError else kind
                text = f"no space is left for {location}; free some or raise the quota, then try again"
            case errno.EROFS:
                text = f"{location} is on a read-only file system; remount it for writing"
            case errno.EACCES | errno.EPERM:
                kind = AccessDeniedError if kind is StoreError else kind
                text = f"permission denied at {what}; run as the owner of the repository"
            case errno.EOPNOTSUPP:
                text = (
                    f"the file system of {location} has neither hard links nor a rename that refuses to "
                    "overwrite; use another one"
                )
            case _:
                text = f"{what}: {error.strerror or error}; check the disk of {location}"
        raise kind(text) from error


def _make_first_folder(folder: str, group_readable: bool) -> None:
    """Create a folder of a new repository; if that is forbidden, the user chose the wrong directory."""
    try:
        make_folder(folder, group_readable=group_readable)
    except PermissionError as error:
        raise StoreRefusedError(
            f"{os.path.dirname(folder)} cannot be written; use -r to name a directory that you can write to"
        ) from error


def _object_info(name: str, status: os.stat_result) -> ObjectInfo:
    """Describe an object. Age counts from the later of mtime and ctime: copying tools restore only mtime."""
    age = time.time() - max(status.st_mtime, status.st_ctime)
    return ObjectInfo(name, status.st_size, max(0.0, age))


def _read_ranges(fd: int, name: str, ranges: Sequence[Range]) -> Views:
    """Read exactly these ranges into one buffer; return its parts. The file had all of them a moment ago."""
    buffer = _allocate(sum(length for _, length in ranges))
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


def _allocate(length: int) -> memoryview:
    """Allocate memory that the system gets back when its last view is gone; malloc keeps what threads free.

    With huge pages if the kernel has them: otherwise page faults would take as long as reading.
    """
    if length < _MAPPED:
        return memoryview(bytearray(length))
    mapped = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # the kernel has no huge pages
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapped)
