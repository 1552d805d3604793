"""Measure the speed of the formats: packs, and the manifests and catalog records of a large volume.

    pytest benchmarks/test_bench_formats.py --benchmark-enable --benchmark-columns=min,median,rounds

A row about packs has `bytes`, the size of the blocks that one call handles: bytes / min is the speed. A row
about manifests or records has `rows`. In ordinary test runs each body runs once and its result is checked.
"""

from __future__ import annotations

import numpy as np
import pytest

from island_fast.dirtymap import BLOCK_SIZE
from island_fast.formats.catalog import (
    ObjectsSwept,
    Packs,
    Record,
    SnapshotsDeleted,
    State,
    decode_record,
    encode_record,
)
from island_fast.formats.keys import SnapshotNumbers, pack_keys
from island_fast.formats.manifest import Manifest, build_pack_table, decode, encode
from island_fast.formats.names import catalog_name
from island_fast.formats.pack import (
    PackHeader,
    compress_blocks,
    digest_blocks,
    open_pack,
    read_front,
    seal_pack,
    stored_ranges,
    unpack_blocks,
)
from island_fast.formats.runs import Runs, merge
from island_fast.qcow2.snapshots import PinnedBase

BLOCKS = 128
RUNS = 200_000
PACKS = 20_000
NAME = "vol/packs/0123/0-00000000"
HEADER = PackHeader("vol", 32 * "1", 0, 7)
PIN = PinnedBase("pin", "1", 1, 1, 1 << 40)


@pytest.fixture(scope="module", params=["random", "text"])
def blocks(request) -> np.ndarray:
    draw = np.random.default_rng(1)
    data = draw.integers(0, 256, (BLOCKS, BLOCK_SIZE), np.uint8)
    return data if request.param == "random" else data % 16


def sealed(blocks: np.ndarray) -> bytes:
    stored, lengths, codecs = compress_blocks(blocks, np.arange(BLOCKS))
    parts, _ = seal_pack(NAME, HEADER, stored, lengths, codecs, digest_blocks(blocks, HEADER.seed))
    return b"".join(parts)


def test_compress(benchmark, blocks):
    benchmark.extra_info["bytes"] = blocks.nbytes
    stored, lengths, _ = benchmark(compress_blocks, blocks, np.arange(BLOCKS))
    assert [len(one) for one in stored] == lengths.tolist()


def test_digest(benchmark, blocks):
    benchmark.extra_info["bytes"] = blocks.nbytes
    assert len(np.unique(benchmark(digest_blocks, blocks, 7), axis=0)) == BLOCKS


def test_seal(benchmark, blocks):
    stored, lengths, codecs = compress_blocks(blocks, np.arange(BLOCKS))
    digests = digest_blocks(blocks, HEADER.seed)
    benchmark.extra_info["bytes"] = int(lengths.sum())
    _, size = benchmark(seal_pack, NAME, HEADER, stored, lengths, codecs, digests)
    assert size > lengths.sum()


def test_open(benchmark, blocks):
    data = sealed(blocks)
    benchmark.extra_info["bytes"] = len(data)
    index, _ = benchmark(open_pack, NAME, data)
    assert len(index.rows) == BLOCKS


def test_read_the_index_alone(benchmark, blocks):
    data = sealed(blocks)
    assert benchmark(read_front, NAME, data[: 64 << 10]).header == HEADER


def test_unpack(benchmark, blocks):
    data = memoryview(sealed(blocks))
    index, _ = open_pack(NAME, data)
    slots = np.arange(BLOCKS)
    offsets, lengths = stored_ranges(index, slots)
    stored = [data[a : a + n] for a, n in zip(offsets.tolist(), lengths.tolist(), strict=True)]
    out = np.empty_like(blocks)
    benchmark.extra_info["bytes"] = out.nbytes
    benchmark(unpack_blocks, index, slots, stored, out)
    assert np.array_equal(out, blocks)


def runs_of(snapshots: int, count: int) -> tuple[Runs, SnapshotNumbers]:
    """Make runs of one block each, four blocks apart, in the packs of many snapshots."""
    numbers = SnapshotNumbers(f"{n:032x}" for n in range(snapshots))
    owner = np.random.default_rng(2).integers(0, snapshots, count)
    order = np.argsort(owner, kind="stable")
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count) - np.searchsorted(owner[order], owner[order])
    start = np.arange(count) * 4
    return Runs(start, np.ones(count, np.int64), pack_keys(owner, rank // 256), rank % 256), numbers


def manifest_of(runs: Runs, numbers: SnapshotNumbers) -> Manifest:
    table, stored = build_pack_table(runs, "vol", numbers)
    size = int(runs.start[-1] + 1) * BLOCK_SIZE
    return Manifest(
        "vol", 32 * "f", 0, None, size, 1, "", "full-scan", "it is the first", 7, PIN, table, stored
    )


def test_tabulate(benchmark):
    runs, numbers = runs_of(30, RUNS)
    benchmark.extra_info["rows"] = RUNS
    table, _ = benchmark(build_pack_table, runs, "vol", numbers)
    assert len(table) == len(np.unique(runs.pack))


def test_encode_a_manifest(benchmark):
    manifest = manifest_of(*runs_of(30, RUNS))
    benchmark.extra_info["rows"] = RUNS
    data, _ = benchmark(encode, "vol/manifests/f-0", manifest)
    assert len(data) < 2 * RUNS


def test_decode_a_manifest(benchmark):
    manifest = manifest_of(*runs_of(30, RUNS))
    data, _ = encode("vol/manifests/f-0", manifest)
    benchmark.extra_info["rows"] = RUNS
    found, _ = benchmark(decode, "vol/manifests/f-0", data)
    assert np.array_equal(found.runs.slot, manifest.runs.slot)


def test_merge(benchmark):
    """Merge an increment of 1 % into a manifest of many runs."""
    parent, numbers = runs_of(30, RUNS)
    start = parent.start[::100]
    owner = np.full(start.size, numbers.number(32 * "e"))
    rank = np.arange(start.size)
    fresh = Runs(start, np.ones(start.size, np.int64), pack_keys(owner, rank // 256), rank % 256)
    benchmark.extra_info["rows"] = RUNS
    merged = benchmark(merge, parent, np.stack([start, start + 1], axis=1), fresh)
    assert merged.blocks == RUNS
    assert int((merged.pack >= fresh.pack[0]).sum()) == start.size


def state_of(packs: int) -> tuple[State, SnapshotNumbers]:
    """Make the state of a lineage with `packs` packs; every second one has a few dead slots."""
    numbers = SnapshotNumbers(f"{n:032x}" for n in range(100))
    key = pack_keys(np.arange(packs) % 100, np.arange(packs) // 100)
    key.sort()
    none = np.zeros(packs, np.int64)
    first = (key[::2] << 16) + 8
    columns = (key, none, none, np.full(packs, 16 << 20), np.full(packs, 256), none)
    return State(packs=Packs(*columns), dead=np.stack([first, first + 4], axis=1)), numbers


def record_of(state: State | None) -> Record:
    return Record("vol", 0, 32, 32 * "a", "host", 32 * "b", 1, 7, SnapshotsDeleted((32 * "d",)), state)


def test_encode_a_checkpoint(benchmark):
    state, numbers = state_of(PACKS)
    benchmark.extra_info["rows"] = PACKS
    data, _ = benchmark(encode_record, catalog_name("vol", 0, 32), record_of(state), numbers)
    assert len(data) < 10 * PACKS


def test_decode_a_checkpoint(benchmark):
    state, numbers = state_of(PACKS)
    name = catalog_name("vol", 0, 32)
    data, _ = encode_record(name, record_of(state), numbers)
    benchmark.extra_info["rows"] = PACKS
    record, _ = benchmark(decode_record, name, data, numbers)
    assert np.array_equal(record.state.dead, state.dead)


def test_decode_a_record(benchmark):
    """Decode one of the up to 31 records that every command reads."""
    name, numbers = catalog_name("vol", 0, 33), SnapshotNumbers()
    data, _ = encode_record(name, record_of(None), numbers)
    record, _ = benchmark(decode_record, name, data, numbers)
    assert record.number == 32


def test_follow_a_record(benchmark):
    """Apply a record that adds packs to a state with many."""
    state, numbers = state_of(PACKS)
    keys = pack_keys(np.full(50, numbers.number(32 * "c")), np.arange(50))
    none = np.zeros(50, np.int64)
    packs = Packs(keys, none, none, np.full(50, 16 << 20), np.full(50, 256), none)
    event = ObjectsSwept(packs=packs)
    assert len(benchmark(state.after, event).packs) == PACKS + 50
