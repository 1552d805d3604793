"""Packs: write-once objects of about 16 MiB that hold stored blocks and an index of them.

A pack's frame has three sections: its metadata, its index (offset, length, codec and digest of each slot),
and the stored blocks back to back. The index comes first, so one ranged read from the start gets it. Layout:
docs/format.md, "Pack".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from island_fast import _diff
from island_fast.arrays import Bools, Buffer, Bytes2D, Int64s
from island_fast.dirtymap import BLOCK_SIZE
from island_fast.errors import UNREADABLE, DamagedObjectError, UnsupportedObjectError
from island_fast.formats.frame import (
    Codec,
    Frame,
    Kind,
    Section,
    integer,
    json_bytes,
    open_damaged,
    open_frame,
    parse_front,
    seal,
)

__all__ = [
    "ABSENT",
    "DIGEST_XXH3_128",
    "INDEX_ROW",
    "MAX_SLOTS",
    "PACK_SIZE",
    "Index",
    "PackHeader",
    "compress_blocks",
    "digest_blocks",
    "find_in_place",
    "front_size",
    "open_pack",
    "plain_blocks",
    "read_damaged_front",
    "read_front",
    "seal_pack",
    "stored_ranges",
    "unpack_blocks",
]


PACK_SIZE = 16 << 20  # the size at which Swift costs least per byte
MAX_SLOTS = 4096
DIGEST_XXH3_128 = 1
ABSENT = 255  # codec of a slot that a repack left out or that was lost before a repair
_META, _INDEX, _DATA = 1, 2, 3
_SECTIONS = 3
_FRONT = 192 + 1024  # frame header, section table and metadata: an upper limit of their size

INDEX_ROW = np.dtype(
    [
        ("offset", "<u4"),
        ("length", "<u4"),
        ("codec", "u1"),
        ("reserved", "u1", (7,)),
        ("digest", "u1", (16,)),
    ]
)


@dataclass(frozen=True, slots=True)
class PackHeader:
    """A pack's metadata. `seed` is the lineage's digest seed; `key` 0 means not encrypted."""

    lineage: str
    snapshot: str
    number: int
    seed: int
    digest: int = DIGEST_XXH3_128
    key: int = 0


@dataclass(frozen=True, slots=True)
class Index:
    """A pack's index: `rows` has one INDEX_ROW for each slot; offsets count from `data_start`.

    `name` is the pack's full name, `length` the size of the object in bytes.
    """

    name: str
    header: PackHeader
    rows: NDArray[np.void]
    data_start: int
    length: int

    @property
    def digests(self) -> Bytes2D:
        """Digest of each slot's block, uint8[slots, 16]."""
        return np.ascontiguousarray(self.rows["digest"])

    @property
    def lengths(self) -> Int64s:
        """Stored bytes of each slot, int64[slots]; 0 for an absent slot."""
        return np.asarray(self.rows["length"], np.int64)


def digest_blocks(data: Bytes2D, seed: int) -> Bytes2D:
    """Return the XXH3-128 of each row of `data`, uint8[n, BLOCK_SIZE], as uint8[n, 16] in canonical order."""
    digests = np.empty((len(data), 16), np.uint8)
    _diff.hash_blocks(np.ascontiguousarray(data).reshape(-1), BLOCK_SIZE, seed, digests)
    return digests


Stored = tuple[list[Buffer], Int64s, NDArray[np.uint8]]
"""Blocks as they are stored: their bytes in order, and the length and codec of each."""


def plain_blocks(data: Bytes2D, rows: Int64s) -> Stored:
    """Return the blocks `rows` (ascending) of `data` to be stored as they are; nothing is copied."""
    view = data.reshape(-1).data if data.size else memoryview(b"")
    breaks = np.flatnonzero(np.diff(rows) > 1) + 1
    runs = [part for part in np.split(rows, breaks) if part.size]
    parts: list[Buffer] = [view[int(run[0]) * BLOCK_SIZE : (int(run[-1]) + 1) * BLOCK_SIZE] for run in runs]
    return parts, np.full(rows.size, BLOCK_SIZE), np.full(rows.size, Codec.PLAIN, np.uint8)


def compress_blocks(data: Bytes2D, rows: Int64s, level: int = 1) -> Stored:
    """Return the blocks `rows` of `data`, each as a zstd frame if that is smaller, else as a view of `data`.

    A Python call for each block costs 1.5 us, zstd itself 15 us and more without the GIL; zstandard's call
    for many blocks at once is no faster.
    """
    zstd = zstandard.ZstdCompressor(level=level)
    view = data.reshape(-1).data if data.size else memoryview(b"")
    plain = [view[at : at + BLOCK_SIZE] for at in (rows * BLOCK_SIZE).tolist()]
    packed = [zstd.compress(row) for row in plain]
    small = [len(p) < BLOCK_SIZE for p in packed]
    stored: list[Buffer] = [p if s else row for p, s, row in zip(packed, small, plain, strict=True)]
    lengths = np.fromiter(map(len, stored), np.int64, len(stored))
    return stored, lengths, np.where(small, Codec.ZSTD, Codec.PLAIN).astype(np.uint8)


def seal_pack(
    name: str,
    header: PackHeader,
    data: Sequence[Buffer],
    lengths: Int64s,
    codecs: NDArray[np.uint8],
    digests: Bytes2D,
) -> tuple[list[Buffer], int]:
    """Frame a pack: `data` holds the stored blocks back to back, and each row of the columns is a slot.

    A slot with codec ABSENT has length 0. Return the object's buffers and its size in bytes.
    """
    rows = np.zeros(lengths.size, INDEX_ROW)
    rows["offset"] = np.cumsum(lengths) - lengths
    rows["length"], rows["codec"], rows["digest"] = lengths, codecs, digests
    meta = {
        "lineage": header.lineage,
        "snapshot": header.snapshot,
        "number": header.number,
        "block_size": BLOCK_SIZE,
        "digest": header.digest,
        "seed": header.seed,
        "key": header.key,
        "slots": len(rows),
    }
    sections = [
        Section(_META, [json_bytes(meta)], compress=False),
        Section(_INDEX, [rows.tobytes()], compress=False),
        Section(_DATA, data, compress=False),
    ]
    parts, _ = seal(Kind.PACK, name, sections)
    return parts, sum(memoryview(part).nbytes for part in parts)


def front_size(slots: int) -> int:
    """Return how many bytes from the start of a pack always contain its whole index."""
    return _FRONT + slots * INDEX_ROW.itemsize


def open_pack(name: str, data: Buffer) -> tuple[Index, memoryview]:
    """Check a whole pack; return its index and the object's bytes."""
    frame = open_frame(Kind.PACK, name, data)
    return _decode_index(frame), frame.data


def read_front(name: str, front: Buffer) -> Index:
    """Return the index in a pack's first bytes: `front_size(slots)` of them, or all if there are fewer."""
    return _decode_index(parse_front(Kind.PACK, name, front))


def read_damaged_front(name: str, data: Buffer, header: PackHeader, slots: int) -> tuple[Index, bool]:
    """Return what is left of the index of pack `name`, whose bytes are `data`, and whether it is intact.

    The pack should have `header` and `slots`; DamagedObjectError if these are not its bytes, or if that
    cannot be known. In an index that is not intact any row can be wrong, or in the place of another: only
    those count that `find_in_place` finds. A row that points outside the object is given as absent.
    """
    frame, front_intact, named = open_damaged(Kind.PACK, name, data, _SECTIONS)
    index, blocks = frame.entries.get(_INDEX), frame.entries.get(_DATA)
    start, first = (entry.offset if entry else 0 for entry in (index, blocks))
    try:
        found = _decode_header(frame)
    except UNREADABLE as error:
        if not named or (front_intact and isinstance(error, UnsupportedObjectError)):
            raise
    else:
        if found != (header, slots):
            raise DamagedObjectError(f"pack {name} is not the one that its catalog record names")
        if not front_intact:  # the table can be wrong, but the writer places sections back to back
            start = frame.entries[_META].offset + frame.entries[_META].stored
            first = start + slots * INDEX_ROW.itemsize
    if max(start, first) > frame.data.nbytes:
        raise DamagedObjectError(f"pack {name} has no bytes of its blocks")
    raw = frame.data[start : start + slots * INDEX_ROW.itemsize]
    intact = index is not None and raw.nbytes == slots * INDEX_ROW.itemsize
    if index is None or xxhash.xxh3_64_intdigest(raw) != index.checksum:
        intact = False
    rows = np.frombuffer(raw[: raw.nbytes - raw.nbytes % INDEX_ROW.itemsize], INDEX_ROW).copy()
    ends = rows["offset"].astype(np.int64) + rows["length"]
    rows["codec"][(ends > frame.data.nbytes - first) | (rows["length"] > BLOCK_SIZE)] = ABSENT
    return Index(name, header, rows, first, frame.data.nbytes), intact


def find_in_place(index: Index, data: memoryview, good: Bools) -> Bools:
    """Return which slots of a damaged index are certainly in their places, of those that are `good`.

    `good` are those whose blocks have their digests. Blocks are stored back to back in the order of their
    slots. So nothing is between two of them if their slots follow each other, and otherwise at most one block
    for each slot between theirs. If that is not so, no place is certain.
    """
    zstd = zstandard.ZstdDecompressor()
    good = good.copy()
    starts = index.rows["offset"].astype(np.int64) + index.data_start
    ends = starts + index.rows["length"]
    for slot in np.flatnonzero(good & (index.rows["codec"] == Codec.ZSTD)).tolist():
        try:  # a length that is too large shows only here
            zstd.decompress(data[starts[slot] : ends[slot]], allow_extra_data=False)
        except zstandard.ZstdError:
            good[slot] = False
    slots = np.flatnonzero(good)
    gaps = starts[slots] - np.append(index.data_start, ends[slots][:-1])
    between = slots - np.append(0, slots[:-1] + 1)
    if not ((gaps >= 0) & (gaps <= between * BLOCK_SIZE)).all():
        good[:] = False
    return good


def _decode_index(frame: Frame) -> Index:
    """Return the index of a pack whose first bytes are in `frame.data`, each field bounded."""
    data = frame.entries.get(_DATA)
    header, slots = _decode_header(frame)
    raw = frame.section(_INDEX, MAX_SLOTS * INDEX_ROW.itemsize)
    if data is None or data.codec != Codec.PLAIN or raw.nbytes != slots * INDEX_ROW.itemsize:
        raise DamagedObjectError(f"pack {frame.name} has a damaged index")
    rows = np.frombuffer(raw, INDEX_ROW)
    ends = rows["offset"].astype(np.int64) + rows["length"]
    if slots and (int(ends.max()) > data.stored or int(rows["length"].max()) > BLOCK_SIZE):
        raise DamagedObjectError(f"pack {frame.name} has a damaged index")
    return Index(frame.name, header, rows, data.offset, frame.length)


def _decode_header(frame: Frame) -> tuple[PackHeader, int]:
    """Return the metadata of a pack and its number of slots; UnsupportedObjectError for what is not known."""
    meta = frame.json()
    try:
        header = PackHeader(
            lineage=str(meta["lineage"]),
            snapshot=str(meta["snapshot"]),
            number=integer(meta["number"]),
            seed=integer(meta["seed"]),
            digest=integer(meta["digest"]),
            key=integer(meta["key"]),
        )
        block_size, slots = integer(meta["block_size"]), integer(meta["slots"], MAX_SLOTS + 1)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedObjectError(f"pack {frame.name} has damaged metadata") from error
    if header.digest != DIGEST_XXH3_128 or header.key or block_size != BLOCK_SIZE:
        raise UnsupportedObjectError(
            f"pack {frame.name} uses digest {header.digest}, key {header.key} and blocks of "
            f"{block_size} bytes, which this island does not know; use a newer one"
        )
    return header, slots


def stored_ranges(index: Index, slots: Int64s) -> tuple[Int64s, Int64s]:
    """Return the offset in the object, and the length, of the stored bytes of each of `slots`.

    A manifest names these slots: DamagedObjectError if one is absent or not in the index.
    """
    if slots.size and not 0 <= int(slots.min()) <= int(slots.max()) < len(index.rows):
        raise DamagedObjectError(f"pack {index.name} lacks a slot that a manifest names")
    rows = index.rows[slots]
    if bool((rows["codec"] == ABSENT).any()):
        raise DamagedObjectError(f"pack {index.name} no longer holds a slot that a manifest names")
    return rows["offset"].astype(np.int64) + index.data_start, rows["length"].astype(np.int64)


def unpack_blocks(index: Index, slots: Int64s, stored: Sequence[memoryview], out: Bytes2D) -> None:
    """Decode `stored`, the stored bytes of each of `slots`, into the rows of `out` and check them.

    `out` is uint8[n, BLOCK_SIZE]. DamagedObjectError names the pack if a block does not decode to exactly
    one block of the digest that the index states.
    """
    zstd = zstandard.ZstdDecompressor()
    view = out.reshape(-1).data
    codecs = index.rows["codec"][slots].tolist()
    for row, (codec, data) in enumerate(zip(codecs, stored, strict=True)):
        target = view[row * BLOCK_SIZE : (row + 1) * BLOCK_SIZE]
        plain = data if codec == Codec.PLAIN else _inflate(index.name, zstd, codec, data)
        if len(plain) != BLOCK_SIZE:
            raise DamagedObjectError(f"pack {index.name} holds a block of the wrong length")
        target[:] = plain
    if not np.array_equal(digest_blocks(out, index.header.seed), index.rows["digest"][slots]):
        raise DamagedObjectError(f"pack {index.name} holds a damaged block (digest differs)")


def _inflate(name: str, zstd: zstandard.ZstdDecompressor, codec: int, stored: memoryview) -> bytes:
    """Decompress a block: one zstd frame, which states its size before any memory is allocated."""
    if codec != Codec.ZSTD:
        raise UnsupportedObjectError(
            f"pack {name} uses block codec {codec}, which this island does not know; use a newer one"
        )
    try:
        if zstandard.frame_content_size(stored) != BLOCK_SIZE:
            return b""
        return zstd.decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamagedObjectError(f"pack {name} holds an unreadable block") from error
