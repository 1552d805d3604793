"""The frame that every object of a repository is.

A frame is a header, a table of sections, and the bytes of the sections. The header states the kind of object
and the version of the format, the features that a reader and that a writer must understand, an id made from
the object's name (so that a store that returns the wrong object is detected), a checksum of the whole object,
and a checksum of header and table alone, for readers that fetch parts of an object. All integers are
little-endian. Layout: docs/format.md, "Frame".
"""

from __future__ import annotations

import enum
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
import zstandard

from island_fast.arrays import Buffer
from island_fast.errors import DamagedObjectError, RefusedError, UnsupportedObjectError
from island_fast.memory import require_memory

__all__ = [
    "FORMAT_VERSION",
    "LIMITS",
    "Codec",
    "Frame",
    "Kind",
    "Limit",
    "Section",
    "SectionEntry",
    "bounded_time",
    "integer",
    "json_bytes",
    "open_damaged",
    "open_frame",
    "parse_front",
    "seal",
]


FORMAT_VERSION = 1
_KNOWN_FEATURES = 0
_MAX_SECTIONS = 64
_MAX_PLAIN = 1 << 30
_JSON = 1  # the section that holds JSON, in every kind of object

# magic, version, section count, write features, features, total length, object id, front checksum, checksum
_HEADER = struct.Struct("<8sHHIQQ16sQ16s")
_ENTRY = struct.Struct("<IIQQQQ")  # kind, codec, offset, stored length, plain length, checksum
_FRONT_SUM_AT = 48
_CHECKSUM_AT = 56
HEADER_SIZE = _HEADER.size


class Kind(enum.Enum):
    """What an object is; the value is its magic."""

    REPOSITORY = b"ISLANDRP"
    RECORD = b"ISLANDCR"
    STOP = b"ISLANDST"
    CLAIM = b"ISLANDCL"
    MANIFEST = b"ISLANDMF"
    PACK = b"ISLANDPK"


@dataclass(frozen=True, slots=True)
class Limit:
    """The most that an object of a kind may have: bytes in all, and bytes of JSON."""

    size: int
    json: int


LIMITS: Mapping[Kind, Limit] = {
    Kind.REPOSITORY: Limit(size=2 << 20, json=1 << 20),
    Kind.STOP: Limit(size=128 << 10, json=64 << 10),
    Kind.CLAIM: Limit(size=128 << 10, json=64 << 10),
    Kind.RECORD: Limit(size=1 << 30, json=64 << 20),
    Kind.MANIFEST: Limit(size=1 << 30, json=64 << 20),
    Kind.PACK: Limit(size=260 << 20, json=64 << 10),  # 4096 blocks as they are, with all around them
}
"""Every reader asks a store for an object of a kind with this size as its limit, or a smaller one that the
catalog states."""

# Limits of JSON that follow from its size. Our longest texts are labels; each snapshot has random ids, which
# do not compress, and takes more than 16 bytes for each of its values.
_JSON_FREE = 4 << 20  # bytes, whatever they are compressed to
_JSON_PER_BYTE = 1024  # more of them for each stored byte
_JSON_SMALL = 64 << 10  # bytes; not even nothing but values is much
_JSON_VALUE = 16  # bytes for each value
_JSON_DEPTH = 32
_JSON_WINDOW = 1 << 20


_ZSTD_MOST = 1 << 15  # bytes that a byte can stand for: a block of 4 bytes holds 128 KiB at most


class Codec(enum.IntEnum):
    """How a section's bytes are stored. Values from 128 on are reserved for sealed (encrypted) sections."""

    PLAIN = 0
    ZSTD = 1


@dataclass(frozen=True, slots=True)
class Section:
    """A section to be sealed: its number, whose meaning depends on the kind of object, and its plain bytes.

    The bytes are those of `parts`, one after the other; with `compress` there must be one part.
    """

    kind: int
    parts: Sequence[Buffer]
    compress: bool = True


@dataclass(frozen=True, slots=True)
class SectionEntry:
    """A row of the section table. Offsets and lengths are in bytes, from the start of the object."""

    kind: int
    codec: int
    offset: int
    stored: int
    plain: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Frame:
    """A checked object: its section table, and the buffer (not copied) that holds the sections.

    `write_features` are bits that a writer must understand: see `formats/catalog.py`.
    """

    kind: Kind
    name: str
    length: int
    checksum: bytes
    write_features: int
    entries: Mapping[int, SectionEntry]
    data: memoryview

    def stored(self, kinds: Iterable[int]) -> int:
        """Return how many bytes these sections take in the object; a section that it lacks takes none."""
        return sum(self.entries[kind].stored for kind in kinds if kind in self.entries)

    def json(self) -> dict[str, Any]:
        """Return the JSON object in section 1, at most what LIMITS allows; DamagedObjectError for more.

        Its size must also be in proportion to its stored bytes, and the number of its values to its size.
        """
        most = min(LIMITS[self.kind].json, _most_json(self.stored([_JSON])))
        return _read_json(self.name, self.section(_JSON, most))

    def section(self, kind: int, limit: int = _MAX_PLAIN) -> memoryview:
        """Return the plain bytes of a section, checked; DamagedObjectError for more than `limit` bytes.

        MemoryBudgetError if they are more than this host has memory for.
        """
        entry = self.entries.get(kind)
        if entry is None:
            raise DamagedObjectError(f"object {self.name} lacks section {kind}; it is damaged")
        stored = self.data[entry.offset : entry.offset + entry.stored]
        if stored.nbytes != entry.stored or xxhash.xxh3_64_intdigest(stored) != entry.checksum:
            raise DamagedObjectError(f"object {self.name}, section {kind}: checksum differs")
        if entry.plain > min(limit, _MAX_PLAIN) or entry.plain > _ZSTD_MOST * entry.stored:
            raise DamagedObjectError(f"object {self.name}, section {kind} is too large")
        if entry.codec == Codec.PLAIN:
            plain = stored
        elif entry.codec == Codec.ZSTD:
            require_memory(f"section {kind} of object {self.name}", entry.plain)
            plain = memoryview(_inflate(self.name, stored, entry.plain))
        else:
            raise UnsupportedObjectError(
                f"object {self.name} uses section codec {entry.codec}, which this island does not know"
            )
        if plain.nbytes != entry.plain:
            raise DamagedObjectError(f"object {self.name}, section {kind} has the wrong length")
        return plain


def _object_id(name: str) -> bytes:
    return xxhash.xxh3_128_digest(name.encode())


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Return `value` as canonical JSON: sorted keys, no whitespace, ASCII with escapes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _most_json(stored: int) -> int:
    """Return how many bytes of JSON so many stored bytes can be."""
    return _JSON_FREE + _JSON_PER_BYTE * stored


def _read_json(name: str, data: memoryview) -> dict[str, Any]:
    """Return the JSON object in `data`, a section of object `name`."""
    text = bytes(data)
    # Not left to Python's recursion limit: 3.11 stops below 1000 levels, 3.14 reads more than 30 000.
    may_be_deep = text.count(b"[") + text.count(b"{") > _JSON_DEPTH
    if (len(text) > _JSON_SMALL or may_be_deep) and not _is_in_proportion(text):
        raise DamagedObjectError(f"object {name} holds metadata of too many values or levels; it is damaged")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DamagedObjectError(f"object {name} holds unreadable metadata; it is damaged")
    return value


def _is_in_proportion(text: bytes) -> bool:
    """Return whether JSON has at most one value for every few bytes, unless it is small, and is not too deep.

    A value takes up to 100 bytes in memory, however few it has here.
    """
    most = len(text) // _JSON_VALUE if len(text) > _JSON_SMALL else len(text)
    bare = text.replace(rb"\\", b"").replace(rb"\"", b"")  # every quote that is left begins or ends a text
    marks = np.frombuffer(bare, np.uint8)
    values = quotes = depth = 0
    for first in range(0, marks.size, _JSON_WINDOW):
        window = marks[first : first + _JSON_WINDOW]
        ends = np.cumsum(window == ord('"')) + quotes
        outside = window[ends % 2 == 0]
        opens, closes = (np.isin(outside, np.frombuffer(pair, np.uint8)) for pair in (b"[{", b"]}"))
        levels = np.cumsum(opens.astype(np.int64) - closes) + depth
        values += int(np.count_nonzero(outside == ord(",")) + np.count_nonzero(opens))
        if values > most or int(levels.max(initial=0)) > _JSON_DEPTH:
            return False
        quotes, depth = int(ends[-1]), int(levels[-1]) if levels.size else depth
    return True


def integer(value: object, top: int = 1 << 63) -> int:
    """Return `value`, a number from JSON, if it is an integer in [0, top), else raise ValueError."""
    if type(value) is not int or not 0 <= value < top:
        raise ValueError(value)
    return value


def bounded_time(value: object) -> int:
    """Return `value`, a time from JSON in nanoseconds, at most the last one that fits into 63 bits.

    A host whose clock was far in the future may have written a later one. Else ValueError, as `integer`.
    """
    return min(integer(value, 1 << 64), (1 << 63) - 1)


def seal(
    kind: Kind, name: str, sections: Sequence[Section], *, write_features: int = 0
) -> tuple[list[Buffer], bytes]:
    """Frame `sections`, each of another kind, in this order, as object `name`.

    `write_features` are bits that a writer must understand before it appends after this object. Return the
    object as buffers, one after the other (large plain sections are not copied), and its checksum.
    RefusedError for more JSON than a reader of this kind of object accepts: such an object would be lost.
    """
    bodies: list[Buffer] = []
    rows = []
    offset = HEADER_SIZE + _ENTRY.size * len(sections)
    for section in sections:
        if section.kind == _JSON and _size(section.parts) > LIMITS[kind].json:
            raise RefusedError(
                f"object {name} would have more than {LIMITS[kind].json >> 20} MiB of metadata; delete some "
                "snapshots, or use shorter labels"
            )
        parts, codec = _encode_section(section)
        checksum = xxhash.xxh3_64()
        for part in parts:
            checksum.update(part)
        size, plain = _size(parts), _size(section.parts)
        rows.append(_ENTRY.pack(section.kind, codec, offset, size, plain, checksum.intdigest()))
        bodies += parts
        offset += size
    front = bytearray(HEADER_SIZE) + b"".join(rows)
    _HEADER.pack_into(
        front,
        0,
        kind.value,
        FORMAT_VERSION,
        len(sections),
        write_features,
        0,
        offset,
        _object_id(name),
        0,
        b"",
    )
    struct.pack_into("<Q", front, _FRONT_SUM_AT, xxhash.xxh3_64_intdigest(front))
    whole = xxhash.xxh3_128(front)
    for body in bodies:
        whole.update(body)
    front[_CHECKSUM_AT:HEADER_SIZE] = whole.digest()
    return [bytes(front), *bodies], whole.digest()


def _size(parts: Sequence[Buffer]) -> int:
    return sum(memoryview(part).nbytes for part in parts)


def _encode_section(section: Section) -> tuple[Sequence[Buffer], Codec]:
    """Return the stored bytes of a section, compressed if that is wanted and makes it smaller."""
    if section.compress:
        (plain,) = section.parts
        packed = zstandard.ZstdCompressor(level=3).compress(plain)
        size = memoryview(plain).nbytes
        if len(packed) < size and (section.kind != _JSON or size <= _most_json(len(packed))):
            return [packed], Codec.ZSTD
    return section.parts, Codec.PLAIN


def parse_front(kind: Kind, name: str, front: Buffer) -> Frame:
    """Check the header and the section table in the first bytes of object `name`; `data` are those bytes.

    `front` can be longer than header and table. DamagedObjectError if it is shorter or a field is wrong,
    UnsupportedObjectError for a version or feature that this reader does not know.
    """
    view = memoryview(front).cast("B").toreadonly()
    if view.nbytes < HEADER_SIZE:
        raise DamagedObjectError(f"object {name} is truncated; it is damaged")
    magic, version, count, writing, features, length, oid, front_sum, checksum = _HEADER.unpack_from(view)
    if magic != kind.value:
        raise DamagedObjectError(f"object {name} is not a {kind.name.lower()}; it is damaged")
    if version != FORMAT_VERSION or features & ~_KNOWN_FEATURES:
        raise UnsupportedObjectError(
            f"object {name} has format version {version}, features {features:#x}, which this island "
            "does not know; use a newer one"
        )
    end = HEADER_SIZE + count * _ENTRY.size
    if count > _MAX_SECTIONS or view.nbytes < end or length < end:
        raise DamagedObjectError(f"object {name} has a damaged section table")
    head = bytearray(view[:end])
    head[_FRONT_SUM_AT:HEADER_SIZE] = bytes(HEADER_SIZE - _FRONT_SUM_AT)
    if xxhash.xxh3_64_intdigest(head) != front_sum:
        raise DamagedObjectError(f"object {name} has a damaged header (checksum differs)")
    if oid != _object_id(name):
        raise DamagedObjectError(f"object {name} holds another object's bytes")
    rows = (SectionEntry(*row) for row in _ENTRY.iter_unpack(view[HEADER_SIZE:end]))
    entries = {row.kind: row for row in rows}
    if len(entries) != count or any(e.offset < end or e.offset + e.stored > length for e in entries.values()):
        raise DamagedObjectError(f"object {name} has a damaged section table")
    return Frame(kind, name, length, checksum, writing, entries, view)


def open_frame(kind: Kind, name: str, data: Buffer) -> Frame:
    """Check a whole object: its header, its id, its length, and the checksum of all of it."""
    frame = parse_front(kind, name, data)
    view = frame.data
    if view.nbytes != frame.length:
        raise DamagedObjectError(f"object {name} is {view.nbytes} bytes and should be {frame.length}")
    whole = xxhash.xxh3_128(view[:_CHECKSUM_AT])
    whole.update(bytes(HEADER_SIZE - _CHECKSUM_AT))
    whole.update(view[HEADER_SIZE:])
    if whole.digest() != frame.checksum:
        raise DamagedObjectError(f"object {name} is damaged (checksum differs)")
    return frame


def open_damaged(kind: Kind, name: str, data: Buffer, sections: int) -> tuple[Frame, bool, bool]:
    """Open object `name`, which is damaged, so that each section can be read that is not; return its frame.

    Second is whether header and table are intact; then they are checked as by `parse_front`. Otherwise
    nothing of them is, and the table has `sections` rows, as every object of this kind has. Each section is
    still checked when it is read. Third is whether the object's id is that of `name`: if it is not, only the
    object's content can say that it is this object.
    """
    view = memoryview(data).cast("B").toreadonly()
    if view.nbytes < HEADER_SIZE + sections * _ENTRY.size:
        raise DamagedObjectError(f"object {name} is truncated; it is damaged")
    _, _, count, _, _, _, oid, front_sum, checksum = _HEADER.unpack_from(view)
    head = bytearray(view[: HEADER_SIZE + count * _ENTRY.size])
    head[_FRONT_SUM_AT:HEADER_SIZE] = bytes(HEADER_SIZE - _FRONT_SUM_AT)
    if xxhash.xxh3_64_intdigest(head) == front_sum:
        return parse_front(kind, name, view), True, True
    rows = view[HEADER_SIZE : HEADER_SIZE + sections * _ENTRY.size]
    entries = {row[0]: SectionEntry(*row) for row in _ENTRY.iter_unpack(rows)}
    return Frame(kind, name, view.nbytes, checksum, 0, entries, view), False, oid == _object_id(name)


def _inflate(name: str, stored: memoryview, size: int) -> bytes:
    """Decompress one zstd frame, which must state that it holds `size` bytes, and nothing after it.

    It states that before any memory is allocated.
    """
    try:
        if zstandard.frame_content_size(stored) != size:
            raise DamagedObjectError(f"object {name} holds a section of the wrong length")
        return zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamagedObjectError(f"object {name} holds an unreadable section") from error
