"""The size of a snapshot's manifest and record, which it stores besides its data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from island_fast.arrays import Int64s
from island_fast.bench.case import GIB, MIB, Case, Context
from island_fast.bench.report import Counter, Row
from island_fast.dirtymap import merge_intervals
from island_fast.formats.catalog import Packs, Record, SnapshotAdded, SnapshotRow, encode_record
from island_fast.formats.keys import SnapshotNumbers, pack_keys
from island_fast.formats.manifest import Manifest, build_pack_table, encode
from island_fast.formats.names import catalog_name, manifest_name
from island_fast.formats.runs import Runs, merge
from island_fast.qcow2.snapshots import PinnedBase

__all__ = ["CASES", "compute_metadata_share"]

BLOCK = 65536
_SLOTS = 256  # in a pack whose blocks do not compress
_PIN = PinnedBase("island-01234567.vol-" + 32 * "0", "1", 1, 1, 1 << 40)


def compute_metadata_share(volume: int, changed: int, days: int, seed: int) -> float:
    """Return the bytes of manifest and record for each byte changed, in the last of `days` snapshots.

    The volume is full. Each day `changed` bytes change, in single blocks anywhere. Manifest and record are
    made as a snapshot makes them.
    """
    draw = np.random.default_rng(seed)
    numbers = SnapshotNumbers()
    blocks = np.arange(volume // BLOCK)
    runs = _place_in_packs(blocks, _make_id(0, seed), numbers)
    for day in range(1, days + 1):
        blocks = np.unique(draw.integers(0, volume // BLOCK, changed // BLOCK))
        fresh = _place_in_packs(blocks, _make_id(day, seed), numbers)
        replaced = merge_intervals(np.stack([blocks, blocks + 1], axis=1))
        runs = merge(runs, replaced, fresh)
    table, stored = build_pack_table(runs, "vol", numbers)
    snapshot, parent = _make_id(days, seed), _make_id(days - 1, seed)
    manifest = Manifest(
        "vol", snapshot, 0, parent, volume, time.time_ns(), "", "table-diff", "compared with the pinned base",
        seed, replace(_PIN, disk_size=volume), table, stored,
    )  # fmt: skip
    data, checksum = encode(manifest_name("vol", snapshot, 0), manifest)
    record = _make_record(manifest, checksum, len(data), np.unique(fresh.pack))
    written, _ = encode_record(catalog_name("vol", 0, days), record, numbers)
    return (len(data) + len(written)) / (blocks.size * BLOCK)


def _make_id(day: int, seed: int) -> str:
    """Return a random snapshot id, the same for the same seed."""
    return np.random.default_rng([seed, day]).bytes(16).hex()


def _place_in_packs(blocks: Int64s, snapshot: str, numbers: SnapshotNumbers) -> Runs:
    """Return the runs, with pack keys, of a snapshot that stores these blocks."""
    order = np.arange(blocks.size)
    pack, slot = order // _SLOTS, order % _SLOTS
    at = np.flatnonzero(np.append(True, (np.diff(blocks) != 1) | (slot[1:] == 0)))
    length = np.diff(np.append(at, blocks.size))
    owner = np.full(at.size, numbers.number(snapshot))
    return Runs(blocks[at], length, pack_keys(owner, pack[at]), slot[at])


def _make_record(manifest: Manifest, checksum: bytes, size: int, packs: Int64s) -> Record:
    none = np.zeros(packs.size, np.int64)
    slots = np.full(packs.size, _SLOTS)
    row = SnapshotRow(
        manifest.snapshot, manifest.parent, 0, checksum.hex(), size, manifest.created, "",
        manifest.volume_size, int(slots.sum()) * BLOCK, manifest.pin,
    )  # fmt: skip
    return Record(
        lineage="vol", epoch=0, number=1, writer=32 * "0", host="host", previous=64 * "0",
        time=manifest.created, seed=0,
        event=SnapshotAdded(row, Packs(packs, none, none, slots * (BLOCK + 32), slots, none)),
    )  # fmt: skip


def _measure_sizes(context: Context) -> Iterator[Row | Counter]:
    volume = 1024 * GIB if not context.quick else 64 * GIB
    for changed, title, reach in ((100 * MIB, "100 MiB", 0.005), (volume // 100, "1 %", 0.002)):
        context.show_progress(f"manifest of {title} a day")
        share = compute_metadata_share(volume, changed, 30, context.seed)
        name = f"manifest and record, {volume // GIB} GiB full, {title} a day in single blocks, 30th day"
        yield Counter(name, share, "bytes for each byte changed", reach=context.target_unless_quick(reach))


CASES = (Case("manifest sizes", _measure_sizes),)
