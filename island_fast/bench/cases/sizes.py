"""What a snapshot costs beside its data: its manifest and its record, made as snapshots make them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from island_fast.arrays import Int64s
from island_fast.bench.case import GIB, MIB, Context, Work
from island_fast.bench.report import Counter, Row
from island_fast.dirtymap import merge_intervals
from island_fast.formats.catalog import Packs, Record, SnapshotAdded, SnapshotRow, encode_record
from island_fast.formats.keys import SnapshotNumbers, pack_keys
from island_fast.formats.manifest import Manifest, build_pack_table, encode
from island_fast.formats.names import catalog_name, manifest_name
from island_fast.formats.runs import Runs, merge
from island_fast.qcow2.snapshots import PinnedBase

__all__ = ["WORKS", "beside_the_data"]

BLOCK = 65536
_SLOTS = 256  # in a pack whose blocks do not compress
_PIN = PinnedBase("island-01234567.vol-" + 32 * "0", "1", 1, 1, 1 << 40)


def beside_the_data(volume: int, changed: int, days: int, seed: int) -> float:
    """Bytes of manifest and record of the last of `days` snapshots, for each byte that it changed.

    The volume is full; each day so many bytes change, in single blocks anywhere.
    """
    draw = np.random.default_rng(seed)
    numbers = SnapshotNumbers()
    blocks = np.arange(volume // BLOCK)
    runs = _in_packs(blocks, _name(0, seed), numbers)
    for day in range(1, days + 1):
        blocks = np.unique(draw.integers(0, volume // BLOCK, changed // BLOCK))
        fresh = _in_packs(blocks, _name(day, seed), numbers)
        replaced = merge_intervals(np.stack([blocks, blocks + 1], axis=1))
        runs = merge(runs, replaced, fresh)
    table, stored = build_pack_table(runs, "vol", numbers)
    snapshot, parent = _name(days, seed), _name(days - 1, seed)
    manifest = Manifest(
        "vol", snapshot, 0, parent, volume, time.time_ns(), "", "table-diff", "compared with the pinned base",
        seed, replace(_PIN, disk_size=volume), table, stored,
    )  # fmt: skip
    data, checksum = encode(manifest_name("vol", snapshot, 0), manifest)
    record = _record(manifest, checksum, len(data), np.unique(fresh.pack))
    written, _ = encode_record(catalog_name("vol", 0, days), record, numbers)
    return (len(data) + len(written)) / (blocks.size * BLOCK)


def _name(day: int, seed: int) -> str:
    """A snapshot's id, as random as any."""
    return np.random.default_rng([seed, day]).bytes(16).hex()


def _in_packs(blocks: Int64s, snapshot: str, numbers: SnapshotNumbers) -> Runs:
    """Where a snapshot puts these blocks, as runs with pack keys."""
    order = np.arange(blocks.size)
    pack, slot = order // _SLOTS, order % _SLOTS
    at = np.flatnonzero(np.append(True, (np.diff(blocks) != 1) | (slot[1:] == 0)))
    length = np.diff(np.append(at, blocks.size))
    owner = np.full(at.size, numbers.number(snapshot))
    return Runs(blocks[at], length, pack_keys(owner, pack[at]), slot[at])


def _record(manifest: Manifest, checksum: bytes, size: int, packs: Int64s) -> Record:
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


def _sizes(context: Context) -> Iterator[Row | Counter]:
    volume = 1024 * GIB if not context.quick else 64 * GIB
    for changed, title, reach in ((100 * MIB, "100 MiB", 0.005), (volume // 100, "1 %", 0.002)):
        context.tell(f"manifest of {title} a day")
        share = beside_the_data(volume, changed, 30, context.seed)
        name = f"manifest and record, {volume // GIB} GiB full, {title} a day in single blocks, 30th day"
        yield Counter(name, share, "bytes for each byte changed", reach=None if context.quick else reach)


WORKS = (Work("manifest sizes", _sizes),)
