"""Manifests: one write-once object per snapshot, flat and complete.

A manifest maps every block of the volume to (pack, slot), as runs; a block that no run names is zero.
Packs are named through a table of (lineage, snapshot, number). Digests are in the packs.
Bytes <-> values only. Layout: docs/format.md, "Manifest".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from island_fast import columns
from island_fast.dirtymap import BLOCK_SIZE, clip_rows, subtract_intervals
from island_fast.errors import DamagedObjectError, UnsupportedObjectError, UsageError
from island_fast.frame import Buffer, Kind, Section, integer, json_bytes, open_frame, read_json, seal
from island_fast.pack import DIGEST_XXH3_128, MAX_SLOTS
from island_fast.qcow2.names import unescape
from island_fast.qcow2.snapshots import PinnedBase
from island_fast.slots import MAX_PACK_NUMBER, PACK_BITS, SnapshotNumbers, pack_keys, slot_intervals

__all__ = [
    "LINEAGE_PATTERN",
    "SNAPSHOT_PATTERN",
    "Manifest",
    "PackTable",
    "Runs",
    "check_properties",
    "decode",
    "encode",
    "merge",
    "pin_from_json",
    "tabulate",
]

Int64s = NDArray[np.int64]

LINEAGE_PATTERN = re.compile(r"(?!\.\.?$)[A-Za-z0-9._-]{1,128}")
SNAPSHOT_PATTERN = re.compile(r"[0-9a-f]{32}")
MAX_PROPERTIES = 256
MAX_PROPERTIES_BYTES = 64 << 10
_MAX_BLOCKS = 1 << 38  # 16 PiB
_MAX_META = 64 << 20

_META = 1
_PACK_LINEAGE, _PACK_SNAPSHOT, _PACK_NUMBER = 16, 17, 18
_RUN_GAP, _RUN_LENGTH, _RUN_PACK, _RUN_SLOT = 32, 33, 34, 35


@dataclass(frozen=True, slots=True)
class PackTable:
    """The packs that a manifest names, in order of their first block: columns of equal length.

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
        """Pack key of each row, in the numbering of `numbers`."""
        return pack_keys(numbers.numbers(self.snapshots)[self.snapshot], self.number)


@dataclass(frozen=True, slots=True)
class Runs:
    """Columns of runs, ascending and disjoint: blocks [start, start + length) are in `pack` from `slot` on.

    `pack` is an index into the manifest's PackTable, or a pack key where the text says so.
    """

    start: Int64s
    length: Int64s
    pack: Int64s
    slot: Int64s

    @classmethod
    def empty(cls) -> Runs:
        """No runs: a volume of zeros."""
        none = np.zeros(0, np.int64)
        return cls(none, none, none, none)

    def __len__(self) -> int:
        return int(self.start.size)

    @property
    def blocks(self) -> int:
        """Number of blocks that the runs name."""
        return int(self.length.sum())

    def intervals(self) -> Int64s:
        """Blocks as int64[n, 2] of start and stop."""
        return np.stack([self.start, self.start + self.length], axis=1)

    def locate(self, blocks: Int64s) -> tuple[Int64s, Int64s, Int64s]:
        """Which of `blocks` are named (indices into it), and for each of those its row and offset there."""
        if not len(self):
            none = np.zeros(0, np.int64)
            return none, none, none
        row = np.searchsorted(self.start, blocks, side="right") - 1
        offset = blocks - self.start[row]
        named = np.flatnonzero((row >= 0) & (offset < self.length[row]))
        return named, row[named], offset[named]

    def take(self, rows: Int64s, offset: Int64s, length: Int64s) -> Runs:
        """Pieces of runs: of row `rows[i]`, `length[i]` blocks from `offset[i]` on."""
        start, slot = self.start[rows] + offset, self.slot[rows] + offset
        return Runs(start, length, self.pack[rows], slot)

    def within(self, keep: Int64s) -> Runs:
        """The pieces of runs that lie in `keep`, int64[n, 2], sorted and disjoint."""
        return self.take(*clip_rows(self.start, self.length, keep))

    def among(self, slots: Int64s) -> Runs:
        """The pieces of runs, which hold pack keys, whose slots are in `slots`, as intervals of slot keys."""
        keys = slot_intervals(self.pack, self.slot, self.length)
        return self.take(*clip_rows(keys[:, 0], self.length, slots))


@dataclass(frozen=True, slots=True)
class Manifest:
    """One snapshot, whole. `created` is in nanoseconds since 1970 UTC; `volume_size` in bytes.

    `pin` identifies the internal snapshot that holds the same content in the image (and in every image
    restored from it); `seed` is the digest seed of the lineage; unknown `properties` are kept.
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
        """Number of blocks of the volume, the last one perhaps partial."""
        return -(-self.volume_size // BLOCK_SIZE)

    def slot_intervals(self, numbers: SnapshotNumbers) -> Int64s:
        """Every slot that the snapshot needs, as intervals of slot keys, int64[n, 2]."""
        keys = self.packs.keys(numbers)
        return slot_intervals(keys[self.runs.pack], self.runs.slot, self.runs.length)


def merge(parent: Runs, replaced: Int64s, fresh: Runs) -> Runs:
    """`parent` with the blocks in `replaced` taken out and `fresh` put in.

    Both hold pack keys; `replaced` is int64[n, 2] of block intervals; `fresh` lies within it. Neighbours
    that continue one another are joined.
    """
    ends = parent.intervals()
    kept = parent.within(subtract_intervals(ends, replaced)) if len(parent) else parent
    start = np.concatenate([kept.start, fresh.start])
    order = np.argsort(start, kind="stable")
    columns_ = (
        np.concatenate([getattr(kept, name), getattr(fresh, name)])[order]
        for name in ("start", "length", "pack", "slot")
    )
    return _joined(Runs(*columns_))


def _joined(runs: Runs) -> Runs:
    """`runs` with neighbours joined where block and slot both go on in the same pack."""
    if not len(runs):
        return runs
    ends, slot_ends = runs.start + runs.length, runs.slot + runs.length
    goes_on = (runs.start[1:] == ends[:-1]) & (runs.slot[1:] == slot_ends[:-1])
    goes_on &= runs.pack[1:] == runs.pack[:-1]
    first = np.flatnonzero(np.append(True, ~goes_on))
    last = np.append(first[1:], len(runs)) - 1
    return Runs(runs.start[first], ends[last] - runs.start[first], runs.pack[first], runs.slot[first])


def tabulate(runs: Runs, lineage: str, numbers: SnapshotNumbers) -> tuple[PackTable, Runs]:
    """A pack table in order of first use, and `runs` (which hold pack keys) as indices into it."""
    keys, first, inverse = np.unique(runs.pack, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(order.size, np.int64)
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
    return table, replace(runs, pack=rank[inverse])


def encode(name: str, manifest: Manifest) -> tuple[bytes, bytes]:
    """The manifest as object `name`: its bytes and its checksum."""
    table, runs = manifest.packs, manifest.runs
    newest = np.zeros(len(runs), np.int64)  # packs are numbered by first use: each new one is max + 1
    if len(runs):
        newest[1:] = np.maximum.accumulate(runs.pack)[:-1] + 1
    ends = np.append(0, (runs.start + runs.length)[:-1]) if len(runs) else runs.start
    values = {
        _PACK_LINEAGE: table.lineage,
        _PACK_SNAPSHOT: table.snapshot,
        _PACK_NUMBER: columns.zigzag(table.number - columns.grouped_ends(table.snapshot, table.number + 1)),
        _RUN_GAP: runs.start - ends,
        _RUN_LENGTH: runs.length - 1,
        _RUN_PACK: newest - runs.pack,
        _RUN_SLOT: columns.zigzag(runs.slot - columns.grouped_ends(runs.pack, runs.slot + runs.length)),
    }
    sections = [Section(_META, [json_bytes(_meta(manifest))])]
    sections += [Section(kind, [columns.encode(column)]) for kind, column in values.items()]
    parts, checksum = seal(Kind.MANIFEST, name, sections)
    return b"".join(parts), checksum


def _meta(manifest: Manifest) -> dict[str, Any]:
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
    """`properties` as they may be stored: few and short, else UsageError."""
    kept = {str(key): str(value) for key, value in properties.items()}
    if len(kept) > MAX_PROPERTIES or len(json_bytes(kept)) > MAX_PROPERTIES_BYTES:
        raise UsageError(
            f"a snapshot carries at most {MAX_PROPERTIES} properties of {MAX_PROPERTIES_BYTES} bytes "
            "in all; give fewer or shorter ones"
        )
    return kept


def decode(name: str, data: Buffer) -> tuple[Manifest, bytes]:
    """The manifest in object `name`, every field checked, and the object's checksum.

    DamagedObjectError if anything contradicts itself, UnsupportedObjectError for what is not known.
    """
    frame = open_frame(Kind.MANIFEST, name, data)
    meta = read_json(name, frame.section(_META, _MAX_META))
    try:
        header, packs, rows = _header(meta)
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
        number=columns.undo_grouped(
            snapshot, columns.unzigzag(column(_PACK_NUMBER, packs)), np.ones(packs, np.int64)
        ),
    )
    gap, length = column(_RUN_GAP, rows), column(_RUN_LENGTH, rows)
    if float(gap.sum(dtype=float) + length.sum(dtype=float)) + rows > header.blocks:
        raise DamagedObjectError(f"manifest {name} names blocks past the volume's end")
    back, slot = column(_RUN_PACK, rows), columns.unzigzag(column(_RUN_SLOT, rows))
    length += 1
    pack = np.cumsum(back == 0) - (back == 0) - back
    runs = Runs(np.cumsum(gap + length) - length, length, pack, columns.undo_grouped(pack, slot, length))
    _check(name, table, runs)
    return replace(header, packs=table, runs=runs), frame.checksum


def _header(meta: dict[str, Any]) -> tuple[Manifest, int, int]:
    """The metadata as a manifest without runs, and the numbers of packs and runs."""
    pin = meta["pin"]
    header = Manifest(
        lineage=_matching(LINEAGE_PATTERN, meta["lineage"]),
        snapshot=_matching(SNAPSHOT_PATTERN, meta["snapshot"]),
        attempt=integer(meta["attempt"]),
        parent=meta["parent"] and _matching(SNAPSHOT_PATTERN, meta["parent"]),
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
            tuple(_matching(LINEAGE_PATTERN, x) for x in meta["lineages"]),
            tuple(_matching(SNAPSHOT_PATTERN, x) for x in meta["snapshots"]),
        ),
        runs=Runs.empty(),
    )
    if not (header.volume_size >= 0 and 0 <= header.seed < 1 << 64 and header.attempt >= 0):
        raise ValueError(header.volume_size)
    return header, integer(meta["packs"]), integer(meta["runs"])


def pin_from_json(value: Mapping[str, Any]) -> PinnedBase:
    """The pinned base's identity from its JSON; ValueError, KeyError or TypeError if it is not one."""
    return PinnedBase(
        _pin_text(value["name"]),
        _pin_text(value["id"]),
        integer(value["seconds"], 1 << 32),
        integer(value["nanoseconds"], 1 << 32),
        integer(value["disk_size"]),
    )


def _pin_text(value: object) -> str:
    """An escaped name or id that a snapshot table can hold: at most 65535 bytes; else ValueError."""
    if not isinstance(value, str) or len(unescape(value)) >= 1 << 16:
        raise ValueError("pin")
    return value


def _matching(pattern: re.Pattern[str], value: object) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(value)
    return value


def _check(name: str, table: PackTable, runs: Runs) -> None:
    """Refuse a table or runs with an index, number or slot outside its range."""
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
