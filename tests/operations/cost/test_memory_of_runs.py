"""The memory that a manifest takes for each of its runs, of which there can be as many as blocks."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from island_fast.formats.keys import SnapshotNumbers, pack_keys
from island_fast.formats.manifest import Manifest, build_pack_table, decode, encode
from island_fast.formats.pack import PackHeader
from island_fast.formats.runs import Runs, merge
from island_fast.qcow2.snapshots import PinnedBase
from island_fast.repository.pack_reader import group_by_pack
from island_fast.repository.pack_writer import BlockBatch, PackWriter
from tests.support.memory_store import MemoryStore

RUNS = 400_000
PIN = PinnedBase("island-01234567.vol-" + 32 * "0", "1", 1, 1, 1 << 40)
NAME = f"vol/manifests/{32 * 'f'}-0"
NUMBERS = SnapshotNumbers(f"{n:032x}" for n in range(30))


@pytest.fixture(scope="module")
def runs() -> Runs:
    """Return runs of one block, two blocks apart, in slots of many packs in random order, with pack keys."""
    rank = np.random.default_rng(1).permutation(RUNS)
    keys = pack_keys(rank % 30, rank // 30 // 256)
    return Runs.narrow(np.arange(RUNS) * 2, np.ones(RUNS, np.int64), keys, rank // 30 % 256)


def bytes_per_run(work: Callable[[], object]) -> float:
    """Call `work` and return its peak memory per run, including what it returns."""
    tracemalloc.start()
    try:
        kept = work()
        return tracemalloc.get_traced_memory()[1] / RUNS
    finally:
        tracemalloc.stop()
        del kept


def test_a_manifest_is_made_and_read_in_few_bytes_a_run(runs: Runs) -> None:
    edited = np.arange(0, 2 * RUNS, 200)[:, None] + [0, 1]
    assert bytes_per_run(lambda: merge(runs, edited, runs.within(edited))) < 64
    assert bytes_per_run(lambda: build_pack_table(runs, "vol", NUMBERS)) < 32
    table, stored = build_pack_table(runs, "vol", NUMBERS)
    size = 2 * RUNS * 65536
    manifest = Manifest("vol", 32 * "f", 0, None, size, 1, "", "full-scan", "", 7, PIN, table, stored)
    data, _ = encode(NAME, manifest)
    assert bytes_per_run(lambda: encode(NAME, manifest)) < 56
    assert bytes_per_run(lambda: decode(NAME, data)) < 60
    assert bytes_per_run(lambda: max(len(rows) for _, rows in group_by_pack(runs))) < 24


def test_what_is_sent_is_kept_by_runs_and_not_by_blocks() -> None:
    slots, packs = 2048, 64
    header = PackHeader("vol", 32 * "f", 0, 7)
    store = MemoryStore()
    with PackWriter(store, header, 0, lambda row, blocks, front: None) as writer:
        none = np.zeros(0, np.int64)
        for first in range(0, slots * packs, 32):
            parts = [bytes(32)]
            sizes, codecs = np.ones(32, np.int64), np.zeros(32, np.uint8)
            blocks = np.arange(first, first + 32)
            writer.add(BlockBatch(32, none, none, blocks, parts, sizes, codecs, np.zeros((32, 16), np.uint8)))
    runs = writer.runs()
    assert (len(runs), runs.blocks) == (len(writer.written), slots * packs)
    assert sum(part.start.size for part in writer._runs) == len(writer.written)
