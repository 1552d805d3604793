"""Persistent dirty bitmaps: their names, and whether each is complete.

Source: the qcow2 specification, sections "Bitmaps extension" and "Bitmaps", with QEMU's limits. Bitmaps are
only listed for people; they never decide what changed. QEMU refuses an image with one bad bitmap. Here a
fault in them is reported as a state, because the volume does not depend on them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import StrEnum

from island_fast.errors import IslandError
from island_fast.qcow2.image import Image
from island_fast.qcow2.names import escape

__all__ = ["Bitmap", "BitmapState", "Bitmaps", "read_bitmaps"]

_EXTENSION = 0x23852875
_EXTENSION_FIELDS = struct.Struct(">IIQQ")
_ENTRY = struct.Struct(">QIIBBHI")
_COUNT_LIMIT = 65535
_DIRECTORY_LIMIT = 8 << 20
_TABLE_LIMIT = 1 << 27
_BITS_LIMIT = 512 << 20
_NAME_LIMIT = 1023
_AUTOCLEAR = 1
_IN_USE, _AUTO = 1, 2
_KNOWN_FLAGS = 3
_DIRTY_TRACKING = 1


class BitmapState(StrEnum):
    """What a bitmap's content is worth."""

    USABLE = "usable"
    DISABLED = "disabled"
    """Complete, but not recording: it lacks the writes after it was disabled."""
    IN_USE = "in use"
    """A process has it in memory, or had it when it died: the copy in the file is old."""
    INCONSISTENT = "inconsistent"
    """A program that does not know bitmaps changed the image."""
    DAMAGED = "damaged"
    """Its entry breaks the format or QEMU's limits."""


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One entry of the directory: escaped `name` (see `names`), `granularity` in bytes per bit."""

    name: str
    granularity: int
    state: BitmapState


@dataclass(frozen=True, slots=True)
class Bitmaps:
    """The bitmaps of an image. `trouble` says why the directory could not be read to its end, or None."""

    listed: tuple[Bitmap, ...]
    trouble: str | None


def read_bitmaps(image: Image) -> Bitmaps:
    """Read the directory of persistent bitmaps, in its order; errors become `Bitmaps.trouble`."""
    listed: list[Bitmap] = []
    try:
        for extension in image.header.extensions:
            if extension.kind == _EXTENSION:
                _read_directory(image, extension.data, listed)
    except (_BadDirectoryError, IslandError) as error:
        return Bitmaps(tuple(listed), str(error))
    return Bitmaps(tuple(listed), None)


class _BadDirectoryError(ValueError):
    """The directory breaks the format; the message says how. Does not leave this module."""


def _read_directory(image: Image, fields: bytes, listed: list[Bitmap]) -> None:
    """Append all entries to `listed`, up to the first that cannot be read; `fields` are the extension's."""
    if len(fields) != _EXTENSION_FIELDS.size:
        raise _BadDirectoryError(f"the bitmaps extension has {len(fields)} bytes and not 24")
    count, reserved, size, offset = _EXTENSION_FIELDS.unpack(fields)
    if reserved or not 0 < count <= _COUNT_LIMIT:
        raise _BadDirectoryError(f"the bitmaps extension claims {count} bitmaps")
    if size > _DIRECTORY_LIMIT:
        raise _BadDirectoryError(f"the bitmap directory has {size} bytes, over the limit of 8 MiB")
    if offset % image.header.cluster_size or not 0 < offset <= image.file_size - size:
        raise _BadDirectoryError(f"the bitmap directory ({size} bytes at {offset}) is not inside the file")
    directory = image.read(offset, size)
    at = 0
    for number in range(count):
        at = _read_entry(image, directory, at, number, listed)


def _read_entry(image: Image, directory: bytes, at: int, number: int, listed: list[Bitmap]) -> int:
    """Append the entry that begins at `at`; return where the next one begins."""
    begin = at + _ENTRY.size
    if begin > len(directory):
        raise _BadDirectoryError(f"the bitmap directory ends before entry {number}")
    table_offset, entries, flags, kind, bits, name_length, extra = _ENTRY.unpack_from(directory, at)
    end = begin + extra + name_length
    if end > len(directory):
        raise _BadDirectoryError(f"entry {number} of the bitmap directory runs past its end")
    header = image.header
    size = entries * header.cluster_size
    good = (
        kind == _DIRTY_TRACKING
        and not extra
        and not flags & ~_KNOWN_FLAGS
        and 0 < name_length <= _NAME_LIMIT
        and 9 <= bits <= 31
        and table_offset % header.cluster_size == 0
        and 0 < table_offset <= image.file_size - 8 * entries
        and 0 < entries <= _TABLE_LIMIT
        and size <= _BITS_LIMIT
        and (flags & _IN_USE or size * 8 << bits >= header.size)
    )
    name = escape(directory[end - name_length : end])
    # A granularity like 2^255 bytes is shown as 0.
    listed.append(
        Bitmap(name, 1 << bits if bits <= 63 else 0, _find_state(header.autoclear, flags, bool(good)))
    )
    following: int = at + -(-(end - at) // 8) * 8
    return following


def _find_state(autoclear: int, flags: int, good: bool) -> BitmapState:
    """Return the state of a bitmap from the header's autoclear bits and the flags of its entry, if `good`."""
    if not good:
        return BitmapState.DAMAGED
    if not autoclear & _AUTOCLEAR:
        return BitmapState.INCONSISTENT
    if flags & _IN_USE:
        return BitmapState.IN_USE
    return BitmapState.USABLE if flags & _AUTO else BitmapState.DISABLED
