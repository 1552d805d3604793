"""Manifests: one write-once object for each snapshot, complete by itself.

A manifest says in which slot of which pack every block of the volume is stored, as runs; a block that no run
names is zero. Runs refer to a table of packs. Digests are in the packs. Layout: docs/format.md, "Manifest".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from island_fast.arrays import Buffer, Int64s
from island_fast.dirtymap import BLOCK_SIZE, distinct
from island_fast.errors import DamagedObjectError, UnsupportedObjectError, UsageError
from island_fast.formats import columns
from island_fast.formats.frame import (
    Frame,
    Kind,
    Section,
    bounded_time,
    integer,
    json_bytes,
    open_frame,
    seal,
)
from island_fast.formats.keys import MAX_PACK_NUMBER, PACK_BITS, SnapshotNumbers, pack_keys
from island_fast.formats.names import LINEAGE_PATTERN, SNAPSHOT_PATTERN
from island_fast.formats.pack import DIGEST_XXH3_128, MAX_SLOTS
from island_fast.formats.runs import Runs
from island_fast.memory import require_memory
from island_fast.qcow2.names import unescape
from island_fast.qcow2.snapshots import PinnedBase

__all__ = [
    "Manifest",
    "PackTable",
    "build_pack_table",
    "check_properties",
    "decode",
    "encode",
    "pin_from_json",
]


MAX_PROPERTIES = 256
MAX_PROPERTIES_BYTES = 64 << 10
_MAX_BLOCKS = 1 << 38  # 16 PiB
_ROW_MEMORY = 48  # bytes for each run while a manifest is decoded

_META = 1
_PACK_LINEAGE, _PACK_SNAPSHOT, _PACK_NUMBER = 16, 17, 18
_RUN_GAP, _RUN_LENGTH, _RUN_PACK, _RUN_SLOT = 32, 33, 34, 35


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


def decode(name: str, data: Buffer, most_packs: int | None = None) -> tuple[Manifest, bytes]:
    """Return the manifest in object `name`, every field checked, and the object's checksum.

    DamagedObjectError if a field is wrong, or if it names more than `most_packs` packs, which is how many the
    catalog has; UnsupportedObjectError for what this reader does not know; MemoryBudgetError for more runs
    than this host has memory for.
    """
    frame = open_frame(Kind.MANIFEST, name, data)
    meta = frame.json()
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
    # What a run names was paid for: each pack is an object that the catalog names, of at most 4096 slots.
    if not (packs <= rows <= min(header.blocks, packs * MAX_SLOTS) and header.blocks <= _MAX_BLOCKS):
        raise DamagedObjectError(f"manifest {name} claims more runs than its volume and its packs can have")
    if most_packs is not None and packs > most_packs:
        raise DamagedObjectError(f"manifest {name} names more packs than its catalog has")
    require_memory(f"manifest {name}", rows * _ROW_MEMORY)
    table = _decode_packs(frame, header.packs, packs)
    return replace(header, packs=table, runs=_decode_runs(frame, table, rows, header.blocks)), frame.checksum


def _column(frame: Frame, kind: int, rows: int) -> columns.Column:
    return columns.Column(frame.name, frame.section(kind, 8 * rows), rows)


def _decode_packs(frame: Frame, names: PackTable, rows: int) -> PackTable:
    """Return `names` with its `rows` rows; DamagedObjectError for an index or number out of range."""
    lineage, snapshot, number = (
        _column(frame, kind, rows).part(0, rows) for kind in (_PACK_LINEAGE, _PACK_SNAPSHOT, _PACK_NUMBER)
    )
    _require_below(frame.name, lineage, len(names.lineages))
    _require_below(frame.name, snapshot, len(names.snapshots))
    starts = columns.GroupedStarts(len(names.snapshots))
    number = starts.restore(snapshot, columns.unzigzag(number), np.ones(rows, np.int64))
    _require_below(frame.name, number, MAX_PACK_NUMBER + 1)
    return replace(names, lineage=lineage, snapshot=snapshot, number=number)


def _decode_runs(frame: Frame, packs: PackTable, rows: int, blocks: int) -> Runs:
    """Return the runs of a volume of `blocks` blocks, every one within the volume and its pack.

    There can be many: they are decoded a window at a time, into columns that are as narrow as they stay.
    """
    name = frame.name
    gaps, lengths, backs, slots = (
        _column(frame, kind, rows) for kind in (_RUN_GAP, _RUN_LENGTH, _RUN_PACK, _RUN_SLOT)
    )
    start = np.empty(rows, np.int64)
    length, pack, slot = (np.empty(rows, np.int32) for _ in range(3))
    starts = columns.GroupedStarts(len(packs))
    end = named = 0  # where the runs so far end, and how many packs they name
    for first, stop in columns.windows(rows):
        gap, size = gaps.part(first, stop), lengths.part(first, stop)
        _require_below(name, size, MAX_SLOTS)
        size += 1
        if end + float(gap.sum(dtype=float)) + float(size.sum(dtype=float)) > blocks:
            raise DamagedObjectError(f"manifest {name} names blocks past the volume's end")
        ends = end + np.cumsum(gap + size)
        end = int(ends[-1])
        back = backs.part(first, stop)
        newest = named + np.cumsum(back == 0)
        row = newest - (back == 0) - back
        named = int(newest[-1])
        _require_below(name, row, len(packs))
        at = starts.restore(row, columns.unzigzag(slots.part(first, stop)), size)
        _require_below(name, at, MAX_SLOTS)
        _require_below(name, at + size, MAX_SLOTS + 1)
        start[first:stop], length[first:stop], pack[first:stop], slot[first:stop] = ends - size, size, row, at
    return Runs(start, length, pack, slot)


def _require_below(name: str, values: Int64s, top: int) -> None:
    """Raise DamagedObjectError unless all `values` are in [0, top)."""
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < top:
        raise DamagedObjectError(f"manifest {name} points outside its packs")


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
        created=bounded_time(meta["created"]),
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
        integer(value["seconds"]),  # more than 32 bits if a clock was wrong; no image has such a pin
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
