"""The backing files of an image, as the caller lists them: nearest first, each with its format.

No name that stands in an image is ever followed. A file is opened by the caller's path, once, never through a
symbolic link in its last component, and qemu is kept from writing to it as long as the chain is open. What
the whole chain is made of is told as one identity, so that a later snapshot knows whether it changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import xxhash

from island_fast.arrays import Bytes2D, Int64s
from island_fast.dirtymap import DirtyMap
from island_fast.errors import RefusedError, UsageError, refuse_one_text
from island_fast.images.raw_source import RawView, open_raw, raw_data
from island_fast.images.source import scanning
from island_fast.progress import Progress
from island_fast.qcow2.block_reader import PointReader
from island_fast.qcow2.changes import allocated
from island_fast.qcow2.image import Image
from island_fast.qemu.image_lock import hold_off_writers

__all__ = ["Backing", "Chain", "Layer"]

_MOST = 64
_HASHED = 64 << 10


@dataclass(frozen=True, slots=True)
class Backing:
    """One backing file: its format, "qcow2" or "raw", and its path."""

    format: str
    path: Path

    @classmethod
    def parse(cls, text: str) -> Backing:
        """From FORMAT:FILE, such as qcow2:base.qcow2; UsageError for anything else."""
        image_format, colon, path = text.partition(":")
        if image_format not in ("qcow2", "raw") or not colon or not path:
            raise UsageError(f"{text!r} is no backing file; write qcow2:FILE or raw:FILE")
        return cls(image_format, Path(path))

    @classmethod
    def parsed(cls, texts: Sequence[str]) -> list[Backing]:
        """From several of them; UsageError for a single text, too."""
        refuse_one_text(texts, 'backing files, such as ["qcow2:base.qcow2"]')
        return [cls.parse(text) for text in texts]


class Layer(Protocol):
    """What a layer shows to the one above it."""

    @property
    def blocks(self) -> int:
        """Blocks of its volume."""

    @property
    def bytes_read(self) -> int:
        """Bytes of data that it and those below took from files."""

    def read(self, blocks: Int64s, out: Bytes2D) -> None:
        """Fill row i of `out` with block `blocks[i]` (ascending)."""

    def data(self, progress: Progress) -> DirtyMap:
        """Its blocks that may hold data, of its own or from below."""


class _Qcow2Layer:
    """The active tables of a qcow2 file over the layer below it."""

    def __init__(self, image: Image, below: Layer | None) -> None:
        self._image = image
        self._below = below
        self._point = image.active()
        self._reader = PointReader(image, self._point, below)

    @property
    def blocks(self) -> int:
        return self._point.blocks

    @property
    def bytes_read(self) -> int:
        return self._reader.bytes_read + (self._below.bytes_read if self._below else 0)

    def read(self, blocks: Int64s, out: Bytes2D) -> None:
        self._reader.read(blocks, out)

    def data(self, progress: Progress) -> DirtyMap:
        own = allocated(self._image, self._point, progress=scanning(progress))
        return with_below(own, self._below, progress)


class _RawLayer(RawView):
    """A raw file at the end of a chain."""

    def data(self, progress: Progress) -> DirtyMap:
        return raw_data(self._fd, self.volume_size, progress)


def with_below(own: DirtyMap, below: Layer | None, progress: Progress) -> DirtyMap:
    """`own`, and the blocks that may show data from below; blocks behind the lower volume's end are zeros."""
    if below is not None:
        shown = below.data(progress)
        runs = shown.runs()
        own = own | DirtyMap.from_runs(own.blocks, runs.clip(max=own.blocks))
    return own


class Chain:
    """The open backing files of one image, until `close`; `top` is the nearest, None without any.

    `named` is the backing file's name in the image above, as bytes, which only counts for the identity.
    """

    def __init__(self, files: Sequence[Backing], named: bytes | None) -> None:
        self.top: Layer | None = None
        self._seen: set[tuple[int, int]] = set()
        self._facts: list[object] = [named.hex() if named else None]
        if len(files) > _MOST:
            raise UsageError(f"{len(files)} backing files are more than the {_MOST} that are read")
        with ExitStack() as stack:
            for number in reversed(range(len(files))):
                self.top = self._opened(files[number], self.top, stack)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Close every file."""
        self._stack.close()

    @property
    def identity(self) -> str:
        """Which files the chain is made of, in which state: 32 hex digits; "" for no chain."""
        if self.top is None:
            return ""
        return xxhash.xxh3_128_hexdigest(json.dumps(self._facts).encode())

    def _opened(self, file: Backing, below: Layer | None, stack: ExitStack) -> Layer:
        if file.format == "raw":
            if below is not None:
                raise UsageError(
                    f"{file.path} is raw and so the last of its chain; check the order of --backing"
                )
            fd, size = open_raw(file.path)
            stack.callback(os.close, fd)
            self._checked(file.path, fd)
            return _RawLayer(file.path, fd, size)
        image = stack.enter_context(Image.open(file.path, backed=True))
        self._checked(file.path, image.fd)
        self._facts.append(xxhash.xxh3_128_hexdigest(image.read(0, _HASHED)))
        refuse_mismatch(image, below is not None)
        return _Qcow2Layer(image, below)

    def _checked(self, path: Path, fd: int) -> None:
        """Keep writers off, refuse a file that is in the chain twice, and note what identifies it."""
        status = os.fstat(fd)
        if not os.path.samestat(status, os.lstat(path)):  # after the open, so that nobody can swap it
            raise RefusedError(f"{path} is a symbolic link; name the backing file itself")
        hold_off_writers(fd, str(path))
        place = (status.st_dev, status.st_ino)
        if place in self._seen:
            raise RefusedError(f"{path} is listed twice as a backing file; check the order of --backing")
        self._seen.add(place)
        self._facts.append([*place, status.st_size, status.st_mtime_ns])


def refuse_mismatch(image: Image, backed: bool) -> None:
    """RefusedError unless the image names a backing file exactly when the caller lists one for it."""
    named = image.header.backing_name is not None
    if named and not backed:
        raise RefusedError(f"{image.path} has a backing file that is not listed; add it with --backing")
    if backed and not named:
        raise RefusedError(f"{image.path} has no backing file; leave out the --backing behind it")
