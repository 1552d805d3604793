"""Open an image read-only: its header, its internal snapshots and its L1 tables.

Nothing here starts a program or opens a second file. QEMU can have the image open at the same time. Then the
content of an internal snapshot still does not change, but the active tables may not be on disk yet.
"""

from __future__ import annotations

import os
import shlex
import stat
from dataclasses import dataclass
from typing import Self

import numpy as np

from island_fast.arrays import Int64s, Uint64s
from island_fast.dirtymap import BLOCK_SIZE
from island_fast.errors import (
    DamagedImageError,
    IslandError,
    NotFoundError,
    RefusedError,
    UnsupportedImageError,
)
from island_fast.qcow2.header import (
    MAX_VOLUME_SIZE,
    Header,
    check_l1_span,
    header_span,
    parse_header,
)
from island_fast.qcow2.overlap import overlaps, table_spans
from island_fast.qcow2.snapshots import InternalSnapshot, PinnedBase, find_pinned, read_snapshots
from island_fast.qcow2.vectored_io import Transfer, read_transfer

__all__ = ["L1_OFFSET_MASK", "Image", "Point"]

L1_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
_L1_RESERVED = 0x7F00_0000_0000_01FF
_FIRST_READ = 64 << 10
_WINDOW = 1 << 16


@dataclass(frozen=True, slots=True)
class Point:
    """One tree of tables in an image: the active one (`name` is None), or an internal snapshot's.

    `l1_offset` is in bytes, `l1_size` in entries, `disk_size` in bytes (a multiple of 512).
    """

    l1_offset: int
    l1_size: int
    disk_size: int
    name: str | None

    @property
    def blocks(self) -> int:
        """Number of blocks of the volume at this point; the last one can be partial."""
        return -(-self.disk_size // BLOCK_SIZE)

    @property
    def title(self) -> str:
        """What a message calls this point."""
        return "the volume" if self.name is None else f"internal snapshot '{self.name}'"


class Image:
    """A qcow2 image opened read-only; a context manager. Several threads can use it at once.

    It owns the file descriptor `fd`. `header` and `snapshots` are as of `open` or the last `reload`.
    """

    def __init__(self, path: str, fd: int, backed: bool = False) -> None:
        """Take over `fd`, an open regular file; use `Image.open`."""
        self.path = path
        self.fd = fd
        self._backed = backed
        self.header: Header
        self.snapshots: tuple[InternalSnapshot, ...]
        self.reload()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, backed: bool = False) -> Self:
        """Open an image read-only. `backed` allows it to name a backing file, which is not followed.

        Raises NotFoundError: no such file.
        Raises RefusedError: not a regular file.
        Raises UnsupportedImageError, DamagedImageError: see `parse_header` and `read_snapshots`.
        """
        name = os.fspath(path)
        try:
            # O_NONBLOCK: a pipe named by mistake must be refused below, not wait for a writer.
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no image '{name}'; check the path") from error
        except PermissionError as error:
            raise IslandError(f"permission denied at '{name}'; run as a user who may read it") from error
        except OSError as error:
            raise IslandError(f"cannot open the image '{name}': {error.strerror}; check the path") from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise RefusedError(f"'{name}' is not a regular file; name the qcow2 file itself")
            return cls(name, fd, backed)
        except BaseException:
            os.close(fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def file_size(self) -> int:
        """Bytes in the file now; an image in use can grow."""
        return os.fstat(self.fd).st_size

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the file without its holes; its size if the file system does not report them."""
        status = os.fstat(self.fd)
        return min(status.st_blocks * 512 or status.st_size, status.st_size)

    def reload(self) -> None:
        """Read the header and the snapshot table again, after another process took or deleted a snapshot."""
        size = self.file_size
        try:
            data = self.read(0, min(size, _FIRST_READ))
            span = header_span(data)
            if span > len(data):
                data = self.read(0, min(size, span))
            header = parse_header(data, size, backed=self._backed)
            snapshots = read_snapshots(self.read, header, size)
        except (DamagedImageError, UnsupportedImageError) as error:
            raise type(error)(f"'{self.path}': {error}") from error
        self.header, self.snapshots = header, snapshots

    def active_point(self) -> Point:
        """Return the point of the volume as it is now, as far as a writer has flushed it."""
        header = self.header
        return Point(header.l1_offset, header.l1_size, header.size, None)

    def point_at(self, snapshot: InternalSnapshot) -> Point:
        """Return the point of an internal snapshot, whose volume can have another size.

        Raises DamagedImageError: its L1 table is not inside the file.
        Raises UnsupportedImageError: its volume is over the limit of 64 TiB.
        """
        title = f"internal snapshot '{snapshot.name}'"
        check_l1_span(snapshot.l1_offset, snapshot.l1_size, self.header.cluster_size, self.file_size, title)
        if snapshot.disk_size > MAX_VOLUME_SIZE:
            raise UnsupportedImageError(
                f"{title} has a volume of {snapshot.disk_size} bytes, over the limit of 64 TiB"
            )
        size = snapshot.disk_size // 512 * 512
        return Point(snapshot.l1_offset, snapshot.l1_size, size, snapshot.name)

    def find_pinned(self, base: PinnedBase) -> InternalSnapshot | None:
        """Return the internal snapshot with exactly this identity; None if there is not exactly one."""
        return find_pinned(self.snapshots, base)

    def find_named(self, name: str) -> InternalSnapshot:
        """Return the only internal snapshot with this name.

        Raises NotFoundError: there is none.
        Raises RefusedError: there are several.
        """
        found = [s for s in self.snapshots if s.name == name]
        if not found:
            image = shlex.quote(str(self.path))
            raise NotFoundError(f"{self.path} has no internal snapshot '{name}'; see 'island info {image}'")
        if len(found) > 1:
            raise RefusedError(f"{self.path} has several internal snapshots '{name}'; delete one")
        return found[0]

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes of the file, fewer at its end. The caller limits `length`."""
        data = bytearray(length)
        return bytes(data[: self.read_into(offset, memoryview(data))])

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from the file; return the bytes read, fewer only at the end of the file."""
        return read_transfer(self.fd, Transfer(offset, len(buffer), [buffer]))

    def read_l1(self, point: Point) -> Uint64s:
        """Read and check the L1 table of a point.

        Returns native uint64[n]: each entry is the offset of an L2 table or 0, plus the COPIED flag. n is at
        most what the disk size needs: entries past it (VM state, an earlier larger size) are left out. A
        table shorter than that is valid; what it lacks is unallocated.

        Raises DamagedImageError: a reserved bit, or an offset that is unaligned, outside the file, over
            another table or used twice.
        """
        count = min(self.header.l1_entries(point.disk_size), point.l1_size)
        entries = np.empty(count, np.uint64)
        if count and self.read_into(point.l1_offset, entries.view(np.uint8).data) < 8 * count:
            raise self.damage_error(f"the L1 table of {point.title} was cut off while it was read")
        entries.byteswap(inplace=True)
        spans = table_spans(self.header, point.l1_offset, point.l1_size)
        # In windows, because a hostile table can have 32 MiB, and each step of the checks takes as much.
        for begin in range(0, count, _WINDOW):
            self._check_l1(entries[begin : begin + _WINDOW], begin, spans, point)
        used = entries[entries & np.uint64(L1_OFFSET_MASK) != 0]
        used &= np.uint64(L1_OFFSET_MASK)
        used.sort()
        if np.any(used[1:] == used[:-1]):
            raise self.damage_error(f"two L1 entries of {point.title} share one L2 table")
        return entries

    def _check_l1(self, entries: Uint64s, first: int, spans: Int64s, point: Point) -> None:
        """Check each of these L1 entries by itself; `first` is the number of the first, for messages."""
        cluster = self.header.cluster_size
        offsets = entries & np.uint64(L1_OFFSET_MASK)
        # No wrap: masked offsets are below 2^56. A file shorter than a cluster holds no table.
        last = np.uint64(max(self.file_size - cluster, 0))
        wrong = (offsets & np.uint64(cluster - 1)) != 0
        wrong |= (entries & np.uint64(_L1_RESERVED)) != 0
        wrong |= offsets > last
        bad = np.flatnonzero(wrong)
        if len(bad):
            raise self.damage_error(
                f"L1 entry {first + bad[0]} of {point.title} ({int(entries[bad[0]]):#018x}) is not the"
                " offset of a table inside the file, which may have been cut off"
            )
        places = offsets.astype(np.int64)
        if np.any(overlaps(places, cluster, spans) & (places != 0)):
            raise self.damage_error(f"an L2 table of {point.title} lies over another table of the image")

    def damage_error(self, what: str) -> DamagedImageError:
        """Return the error for an image that contradicts its own format."""
        return DamagedImageError(f"'{self.path}': damaged qcow2 image: {what}; restore it from a good copy")
