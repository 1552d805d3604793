"""The backing files of an image, as the caller lists them: nearest first, each with its format.

No name inside an image is followed. Each file is opened once, by the caller's path, whose last component must
not be a symbolic link. What something else can write to is refused, and locks keep QEMU from writing to the
files as long as the chain is open. The chain has one identity, which a snapshot records, so that a later
snapshot can see whether a backing file changed. A block device does not show whether it did.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import xxhash

from island_fast.arrays import Bytes2D, Int64s
from island_fast.dirtymap import DirtyMap
from island_fast.errors import RefusedError, UsageError, refuse_one_text
from island_fast.images.raw_source import RawView, find_raw_data, open_raw
from island_fast.images.source import scan_progress
from island_fast.images.unchanged import Unchanged
from island_fast.progress import Progress
from island_fast.qcow2.block_reader import PointReader
from island_fast.qcow2.changes import find_allocated
from island_fast.qcow2.image import Image
from island_fast.qemu.image_lock import hold_off_writers
from island_fast.qemu.open_files import refuse_held

__all__ = ["Backing", "Chain", "Layer"]

_MAX_FILES = 64
_HASHED_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Backing:
    """One backing file: its format, "qcow2" or "raw", and its path."""

    format: str
    path: Path

    @classmethod
    def parse(cls, text: str) -> Backing:
        """Parse FORMAT:FILE, such as qcow2:base.qcow2; UsageError for anything else."""
        image_format, colon, path = text.partition(":")
        if image_format not in ("qcow2", "raw") or not colon or not path:
            raise UsageError(f"{text!r} is not a valid backing file; write qcow2:FILE or raw:FILE")
        return cls(image_format, Path(path))

    @classmethod
    def parse_all(cls, texts: Sequence[str]) -> list[Backing]:
        """Parse each text; UsageError also if `texts` is one string and not a list."""
        refuse_one_text(texts, 'backing files, such as ["qcow2:base.qcow2"]')
        return [cls.parse(text) for text in texts]


class Layer(Protocol):
    """An image or raw file in a chain, over the layers below it, as the layer above reads it."""

    @property
    def blocks(self) -> int:
        """Number of blocks of its volume."""

    @property
    def bytes_read(self) -> int:
        """Bytes of data that it and the layers below it have read from files."""

    def read(self, blocks: Int64s, out: Bytes2D) -> None:
        """Fill row i of `out` with block `blocks[i]` (ascending)."""

    def find_data(self, progress: Progress) -> DirtyMap:
        """Find the blocks that can hold data, its own or from below."""


class _Qcow2Layer:
    """The active tables of a qcow2 file over the layer below it."""

    def __init__(self, image: Image, below: Layer | None) -> None:
        self._image = image
        self._below = below
        self._point = image.active_point()
        self._reader = PointReader(image, self._point, below)

    @property
    def blocks(self) -> int:
        return self._point.blocks

    @property
    def bytes_read(self) -> int:
        return self._reader.bytes_read + (self._below.bytes_read if self._below else 0)

    def read(self, blocks: Int64s, out: Bytes2D) -> None:
        self._reader.read(blocks, out)

    def find_data(self, progress: Progress) -> DirtyMap:
        own = find_allocated(self._image, self._point, progress=scan_progress(progress), skip_holes=True)
        return with_data_below(own, self._below, progress)


class _RawLayer(RawView):
    """A raw file at the end of a chain."""

    def find_data(self, progress: Progress) -> DirtyMap:
        return find_raw_data(self._fd, self.volume_size, progress)


def with_data_below(own: DirtyMap, below: Layer | None, progress: Progress) -> DirtyMap:
    """Return `own` plus the blocks that can show data from `below`.

    The volume below can be smaller: what lies past its end reads as zeros.
    """
    if below is not None:
        shown = below.find_data(progress)
        runs = shown.runs()
        own = own | DirtyMap.from_runs(own.blocks, runs.clip(max=own.blocks))
    return own


class Chain:
    """The open backing files of one image, until `close`. `top` is the nearest layer, None without files.

    `device` is the path of a block device among them, None if there is none.
    """

    def __init__(self, files: Sequence[Backing], named: bytes | None) -> None:
        """Open and lock all files.

        named: the backing file's name inside the image above. It is never followed; it only counts for the
            identity.

        Raises UsageError: too many files, or a raw file that is not the last.
        Raises RefusedError: a symbolic link, a file listed twice, or a qcow2 file for which a backing file is
            listed and not named, or named and not listed.
        Raises ImageInUseError: something else can write to one of them.
        """
        self.top: Layer | None = None
        self.device: Path | None = None
        self._seen: set[tuple[int, int]] = set()
        self._unchanged: list[Unchanged] = []
        self._facts: list[object] = [named.hex() if named else None]
        if len(files) > _MAX_FILES:
            raise UsageError(
                f"{len(files)} backing files are over the limit of {_MAX_FILES}; merge some (qemu-img rebase)"
            )
        with ExitStack() as stack:
            for number in reversed(range(len(files))):
                self.top = self._open_layer(files[number], self.top, stack)
            self._stack = stack.pop_all()

    def require_unchanged(self) -> None:
        """Raise ImageInUseError if a file was changed since it was opened; call it after the last read.

        What nothing was read of may change: libvirt gives a base that guests share new owners and labels.
        """
        for one in self._unchanged if self.top and self.top.bytes_read else ():
            one.require()

    def close(self) -> None:
        """Close every file."""
        self._stack.close()

    @property
    def identity(self) -> str:
        """Which files form the chain, and in which state: 32 hex digits; "" without backing files."""
        if self.top is None:
            return ""
        return xxhash.xxh3_128_hexdigest(json.dumps(self._facts).encode())

    def _open_layer(self, file: Backing, below: Layer | None, stack: ExitStack) -> Layer:
        """Open one file over `below`, to be closed by `stack`."""
        if file.format == "raw":
            if below is not None:
                raise UsageError(
                    f"{file.path} is raw, so it must be the last of the chain; check the order of --backing"
                )
            fd, size = open_raw(file.path)
            stack.callback(os.close, fd)
            self._admit(file.path, fd)
            return _RawLayer(file.path, fd, size)
        image = stack.enter_context(Image.open(file.path, backed=True))
        self._admit(file.path, image.fd)
        refuse_backing_mismatch(image, below is not None)
        return _Qcow2Layer(image, below)

    def _admit(self, path: Path, fd: int) -> None:
        """Lock the file against writers, refuse one that is in the chain twice, and note its identity."""
        status = os.fstat(fd)
        if not os.path.samestat(status, os.lstat(path)):  # after the open, so nobody can swap it
            raise RefusedError(f"{path} is a symbolic link; name the backing file itself")
        hold_off_writers(fd, str(path))
        refuse_held(path, fd, to_write=False)
        unchanged = Unchanged(path, fd)  # only now, because only now nobody writes
        self._unchanged.append(unchanged)
        status = unchanged.status
        if stat.S_ISBLK(status.st_mode):
            self.device = path
        file = (status.st_dev, status.st_ino)
        if file in self._seen:
            raise RefusedError(f"{path} is listed twice as a backing file; check the order of --backing")
        self._seen.add(file)
        beginning = xxhash.xxh3_128_hexdigest(os.pread(fd, _HASHED_BYTES, 0))
        # Programs can set the time of the last write, but only the kernel the time of the last change.
        times = [status.st_mtime_ns, status.st_ctime_ns]
        # What a later change need not show in is never the same again; of devices, the rule knows (`device`).
        unlike = [] if unchanged.settled or path == self.device else [os.urandom(16).hex()]
        self._facts.append([*file, status.st_size, *times, beginning, *unlike])


def refuse_backing_mismatch(image: Image, backed: bool) -> None:
    """Raise RefusedError unless the image names a backing file exactly if the caller lists one for it."""
    named = image.header.backing_name is not None
    if named and not backed:
        raise RefusedError(f"{image.path} has a backing file that is not listed; add it with --backing")
    if backed and not named:
        raise RefusedError(f"{image.path} has no backing file; leave out the --backing after it")
