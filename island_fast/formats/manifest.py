"""Manifests: one write-once object for each snapshot, complete by itself.

A manifest says in which slot of which pack every block of the volume is stored, as runs; a block that no run
names is zero. Runs refer to a table of packs. Digests are in the packs. Layout: docs/format.md, "Manifest".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from island_fast.arrays import Buffer, Int64s
from island_fast.dirtymap import BLOCK_SIZE, distinct
from island_fast.errors import UNREADABLE, DamagedObjectError, UnsupportedObjectError, UsageError
from island_fast.formats import columns
from island_fast.formats.frame import (
    Frame,
    Kind,
    Section,
    SectionEntry,
    integer,
    json_bytes,
    open_damaged,
    open_frame,
    read_json,
    seal,
)
from island_fast.formats.keys import MAX_PACK_NUMBER, PACK_BITS, SnapshotNumbers, pack_keys
from island_fast.formats.names import LINEAGE_PATTERN, SNAPSHOT_PATTERN
from island_fast.formats.pack import DIGEST_XXH3_128, MAX_SLOTS
from island_fast.formats.runs import Runs
from island_fast.qcow2.names import unescape
from island_fast.qcow2.snapshots import PinnedBase

__all__ = [
    "Manifest",
    "PackTable",
    "build_pack_table",
    "check_properties",
    "decode",
    "decode_damaged",
    "encode",
    "pin_from_json",
]


MAX_PROPERTIES = 256
MAX_PROPERTIES_BYTES = 64 << 10
_MAX_BLOCKS = 1 << 38  # 16 PiB
_MAX_META = 64 << 20

_META = 1
_PACK_LINEAGE, _PACK_SNAPSHOT, _PACK_NUMBER = 16, 17, 18
_RUN_GAP, _RUN_LENGTH, _RUN_PACK, _RUN_SLOT = 32, 33, 34, 35
_SECTIONS = 8


@dataclass(frozen=True, slots=True)
class PackTable:
    """The packs that a manifest names, in the order of their first blocks: columns of equal length.

    `lineage` and `snapshot` are indices into `lineages` and `snapshots`.
    """

    lineages: tuple[str, ...] = ()
    snapshots: tuple[str, ...] = ()
    lineage: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    snapshot: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    number: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return int(self.number.size)

    def keys(self, numbers: SnapshotNumbers) -> Int64s:
        """Return the pack key of each row, in the lineage's numbering."""
        return pack_keys(numbers.numbers(self.snapshots)[self.snapshot], self.number)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is stored of a snapshot. `created` is in nanoseconds since 1970 UTC; `volume_size` is in bytes.

    `pin` identifies the internal snapshot that holds the same content, in the image and in every image that
    is restored from it. `seed` is the digest seed of the lineage. Unknown `properties` are kept.
    """

    lineage: str
    snapshot: str
    attempt: int
    parent: str | None
    volume_size: int
    created: int
    label: str
    rule: str
    reason: str
    seed: int
    pin: PinnedBase
    packs: PackTable
    runs: Runs
    group: str | None = None
    digest: int = DIGEST_XXH3_128
    key: int = 0
    properties: Mapping[str, str] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        """The number of blocks of the volume; the last one can be partial."""
        return -(-self.volume_size // BLOCK_SIZE)

    def runs_by_key(self, numbers: SnapshotNumbers) -> Runs:
        """Return the runs with pack keys, in the lineage's numbering, instead of rows of `packs`."""
        return replace(self.runs, pack=self.packs.keys(numbers)[self.runs.pack])

    def slot_intervals(self, numbers: SnapshotNumbers) -> Int64s:
        """Return every slot that the snapshot needs, as intervals of slot keys, int64[n, 2]."""
        return self.runs_by_key(numbers).slots()


def build_pack_table(runs: Runs, lineage: str, numbers: SnapshotNumbers) -> tuple[PackTable, Runs]:
    """Return a table of the packs that `runs` (with pack keys) name, and the runs with rows of it instead."""
    keys = distinct(runs.pack)
    index = np.searchsorted(keys, runs.pack).astype(np.int32)
    first = np.empty(keys.size, np.int64)
    first[index[::-1]] = np.arange(len(runs) - 1, -1, -1)  # of equal indices, the last assignment holds
    order = np.argsort(first)
    rank = np.empty(order.size, np.int32)
    rank[order] = np.arange(order.size)
    keys = keys[order]
    owners, owner = np.unique(keys >> PACK_BITS, return_inverse=True)
    table = PackTable(
        lineages=(lineage,) if keys.size else (),
        snapshots=tuple(numbers.id(int(o)) for o in owners),
        lineage=np.zeros(keys.size, np.int64),
        snapshot=owner.astype(np.int64),
        number=keys & MAX_PACK_NUMBER,
    )
    return table, replace(runs, pack=rank[index])


def encode(name: str, manifest: Manifest) -> tuple[bytes, bytes]:
    """Return the manifest as object `name`: its bytes and its checksum."""
    sections = [Section(_META, [json_bytes(_to_json(manifest))])]
    sections += [Section(kind, [columns.encode(column)]) for kind, column in _stored_columns(manifest)]
    parts, checksum = seal(Kind.MANIFEST, name, sections)
    return b"".join(parts), checksum


def _stored_columns(manifest: Manifest) -> Iterator[tuple[int, Int64s]]:
    """Yield the columns as they are stored, one at a time: each has a value for every run."""
    table, runs = manifest.packs, manifest.runs
    yield _PACK_LINEAGE, table.lineage
    yield _PACK_SNAPSHOT, table.snapshot
    numbers = table.number - columns.ends_before(table.snapshot, table.number + 1)
    yield _PACK_NUMBER, columns.zigzag(numbers)
    gap = runs.start.copy()
    gap[1:] -= runs.start[:-1] + runs.length[:-1]
    yield _RUN_GAP, gap
    del gap
    yield _RUN_LENGTH, runs.length - 1
    newest = np.full(len(runs), -1, np.int64)
    np.maximum.accumulate(runs.pack[:-1], out=newest[1:], dtype=np.int64)
    newest += 1  # rows are in the order of first use: a new one is the highest so far plus 1
    newest -= runs.pack
    yield _RUN_PACK, newest
    del newest
    yield _RUN_SLOT, columns.zigzag(runs.slot - columns.ends_before(runs.pack, runs.slot + runs.length))


def _to_json(manifest: Manifest) -> dict[str, Any]:
    pin = manifest.pin
    return {
        "lineage": manifest.lineage,
        "snapshot": manifest.snapshot,
        "attempt": manifest.attempt,
        "parent": manifest.parent,
        "group": manifest.group,
        "volume_size": manifest.volume_size,
        "block_size": BLOCK_SIZE,
        "created": manifest.created,
        "label": manifest.label,
        "rule": manifest.rule,
        "reason": manifest.reason,
        "digest": manifest.digest,
        "seed": manifest.seed,
        "key": manifest.key,
        "pin": {name: getattr(pin, name) for name in PinnedBase.__slots__},
        "properties": check_properties(manifest.properties),
        "lineages": manifest.packs.lineages,
        "snapshots": manifest.packs.snapshots,
        "packs": len(manifest.packs),
        "runs": len(manifest.runs),
    }


def check_properties(properties: Mapping[str, str]) -> dict[str, str]:
    """Return `properties` as strings; UsageError if they are too many or too long to be stored."""
    kept = {str(key): str(value) for key, value in properties.items()}
    if len(kept) > MAX_PROPERTIES or len(json_bytes(kept)) > MAX_PROPERTIES_BYTES:
        raise UsageError(
            f"a snapshot carries at most {MAX_PROPERTIES} properties of {MAX_PROPERTIES_BYTES} bytes "
            "in all; give fewer or shorter ones"
        )
    return kept


def decode(name: str, data: Buffer) -> tuple[Manifest, bytes]:
    """Return the manifest in object `name`, every field checked, and the object's checksum.

    DamagedObjectError if a field is wrong, UnsupportedObjectError for what this reader does not know.
    """
    frame = open_frame(Kind.MANIFEST, name, data)
    return _decode_sections(frame), frame.checksum


def decode_damaged(name: str, data: Buffer) -> Manifest:
    """Return the manifest in object `name`, which is damaged, if all that it says about blocks is intact.

    Its checksums are those of the sections. DamagedObjectError if a section that is needed is damaged. The
    caller compares what the manifest says it is with what it should be.
    """
    frame, _, _ = open_damaged(Kind.MANIFEST, name, data, _SECTIONS)
    try:
        frame.section(_PACK_LINEAGE)
    except UNREADABLE:  # there is one lineage, so its column is zeros
        meta = read_json(name, frame.section(_META, _MAX_META))
        zeros = (
            bytes(meta["packs"]) if type(meta.get("packs")) is int and 0 <= meta["packs"] < 1 << 28 else b""
        )
        row = SectionEntry(
            _PACK_LINEAGE, 0, frame.data.nbytes, len(zeros), len(zeros), xxhash.xxh3_64_intdigest(zeros)
        )
        whole = memoryview(bytes(frame.data) + zeros)
        frame = replace(frame, data=whole, entries={**frame.entries, _PACK_LINEAGE: row})
    return _decode_sections(frame)


def _decode_sections(frame: Frame) -> Manifest:
    """Return the manifest whose sections are in `frame`, every field checked."""
    name = frame.name
    meta = read_json(name, frame.section(_META, _MAX_META))
    try:
        header, packs, rows = _decode_header(meta)
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise DamagedObjectError(f"manifest {name} has damaged metadata") from error
    if header.digest != DIGEST_XXH3_128 or header.key or meta.get("block_size") != BLOCK_SIZE:
        raise UnsupportedObjectError(
            f"manifest {name} uses a digest, key or block size that this island does not know; "
            "use a newer one"
        )
    if set(header.packs.lineages) - {header.lineage}:
        raise UnsupportedObjectError(
            f"manifest {name} names packs of another lineage, which this island does not know how to read; "
            "use a newer one"
        )
    if not (0 <= packs <= rows <= header.blocks <= _MAX_BLOCKS):
        raise DamagedObjectError(f"manifest {name} has damaged metadata")

    def column(kind: int, count: int) -> Int64s:
        return columns.decode(name, frame.section(kind, 8 * count), count)

    snapshot = column(_PACK_SNAPSHOT, packs)
    table = replace(
        header.packs,
        lineage=column(_PACK_LINEAGE, packs),
        snapshot=snapshot,
        number=columns.restore_starts(
            snapshot, columns.unzigzag(column(_PACK_NUMBER, packs)), np.ones(packs, np.int64)
        ),
    )
    runs = _decode_runs(name, column, rows, header.blocks)
    _check_ranges(name, table, runs)
    return replace(header, packs=table, runs=runs)


def _decode_runs(name: str, column: Callable[[int, int], Int64s], rows: int, blocks: int) -> Runs:
    """Return the runs in the sections that `column(kind, rows)` decodes, of a volume of `blocks` blocks.

    Columns are large: they are changed in place, and narrowed as soon as their values are known to fit.
    """
    start, length = column(_RUN_GAP, rows), column(_RUN_LENGTH, rows)
    if float(start.sum(dtype=float) + length.sum(dtype=float)) + rows > blocks:
        raise DamagedObjectError(f"manifest {name} names blocks past the volume's end")
    length += 1
    start += length
    np.cumsum(start, out=start)
    start -= length
    back = column(_RUN_PACK, rows)
    newest = np.cumsum(back == 0)
    newest -= back == 0
    newest -= back
    pack = _int32(name, newest)
    del back, newest
    lengths = _int32(name, length)
    del length
    slot = columns.restore_starts(pack, columns.unzigzag(column(_RUN_SLOT, rows)), lengths)
    return Runs(start, lengths, pack, _int32(name, slot))


def _int32(name: str, values: Int64s) -> NDArray[np.int32]:
    """Return `values` as int32; DamagedObjectError if one does not fit: no valid run is that large."""
    if values.size and not -(1 << 31) <= int(values.min()) <= int(values.max()) < 1 << 31:
        raise DamagedObjectError(f"manifest {name} points outside its packs")
    return values.astype(np.int32)


def _decode_header(meta: dict[str, Any]) -> tuple[Manifest, int, int]:
    """Return the metadata as a manifest without runs, and the numbers of packs and runs.

    KeyError, TypeError, ValueError, AttributeError or UsageError if a field is wrong.
    """
    pin = meta["pin"]
    header = Manifest(
        lineage=_check_pattern(LINEAGE_PATTERN, meta["lineage"]),
        snapshot=_check_pattern(SNAPSHOT_PATTERN, meta["snapshot"]),
        attempt=integer(meta["attempt"]),
        parent=meta["parent"] and _check_pattern(SNAPSHOT_PATTERN, meta["parent"]),
        group=meta["group"] and str(meta["group"]),
        volume_size=integer(meta["volume_size"]),
        created=integer(meta["created"]),
        label=str(meta["label"]),
        rule=str(meta["rule"]),
        reason=str(meta["reason"]),
        digest=integer(meta["digest"]),
        seed=integer(meta["seed"]),
        key=integer(meta["key"]),
        pin=pin_from_json(pin),
        properties=check_properties(dict(meta["properties"])),
        packs=PackTable(
            tuple(_check_pattern(LINEAGE_PATTERN, x) for x in meta["lineages"]),
            tuple(_check_pattern(SNAPSHOT_PATTERN, x) for x in meta["snapshots"]),
        ),
        runs=Runs.empty(),
    )
    if not (header.volume_size >= 0 and 0 <= header.seed < 1 << 64 and header.attempt >= 0):
        raise ValueError(header.volume_size)
    return header, integer(meta["packs"]), integer(meta["runs"])


def pin_from_json(value: Mapping[str, Any]) -> PinnedBase:
    """Return the identity of a pin from its JSON; ValueError, KeyError or TypeError if it is not valid."""
    return PinnedBase(
        _check_pin_text(value["name"]),
        _check_pin_text(value["id"]),
        integer(value["seconds"], 1 << 32),
        integer(value["nanoseconds"], 1 << 32),
        integer(value["disk_size"]),
    )


def _check_pin_text(value: object) -> str:
    """Return `value` if it is an escaped name or id that a snapshot table can hold, else raise ValueError."""
    if not isinstance(value, str) or len(unescape(value)) >= 1 << 16:
        raise ValueError("pin")
    return value


def _check_pattern(pattern: re.Pattern[str], value: object) -> str:
    """Return `value` if it is a string that matches `pattern`, else raise ValueError."""
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(value)
    return value


def _check_ranges(name: str, table: PackTable, runs: Runs) -> None:
    """Refuse a table or runs with an index, number or slot that is out of range."""
    pairs = [
        (table.lineage, len(table.lineages)),
        (table.snapshot, len(table.snapshots)),
        (table.number, MAX_PACK_NUMBER + 1),
        (runs.pack, len(table)),
        (runs.slot, MAX_SLOTS),
        (runs.slot + runs.length, MAX_SLOTS + 1),
    ]
    if any(c.size and not 0 <= int(c.min()) <= int(c.max()) < top for c, top in pairs):
        raise DamagedObjectError(f"manifest {name} points outside its packs")
