"""Measure the speed of the kernels and of `DirtyMap`, on the tables, bitmap or blocks of a large volume.

    pytest benchmarks/test_bench_kernels.py --benchmark-enable --benchmark-columns=min,median,rounds

Most rows have `bytes`, the size of what one call reads: bytes / min is the speed. Compare it with that of
`test_memory`, which only copies.
In ordinary test runs each body runs once and its result is checked.
"""

from __future__ import annotations

import numpy as np
import pytest

from island_fast import _diff
from island_fast.dirtymap import (
    BLOCK_SIZE,
    DirtyMap,
    intersect_intervals,
    merge_intervals,
    subtract_intervals,
    total,
)

ENTRIES = 1 << 21
"""16 MiB of L2 entries: 128 GiB of volume with 64 KiB clusters."""

BLOCKS = 1 << 24
"""1 TiB in blocks of 64 KiB."""

DATA = 32 << 20
COPIED = 1 << 63


def in_file(values: np.ndarray) -> np.ndarray:
    """Return entries as they are in the file, viewed as native words."""
    return values.astype(np.uint64).byteswap()


@pytest.fixture(scope="module")
def full_table() -> np.ndarray:
    return in_file((np.arange(ENTRIES, dtype=np.uint64) + np.uint64(5) << np.uint64(21)) | np.uint64(COPIED))


def rewritten(table: np.ndarray, share: float) -> tuple[np.ndarray, int]:
    """Return the table with about `share` of its clusters moved, and how many those are."""
    moved = np.random.default_rng(1).random(len(table)) < share
    return np.where(moved, table ^ in_file(np.array([1 << 50])), table), int(moved.sum())


def block_words(cluster_bits: int) -> tuple[np.ndarray, int]:
    blocks = max(ENTRIES << cluster_bits >> 16, 1)
    return DirtyMap(blocks).words, blocks


def test_memory(benchmark, full_table):
    target = np.empty_like(full_table)
    benchmark.extra_info["bytes"] = full_table.nbytes
    benchmark(np.copyto, target, full_table)
    assert target[-1] == full_table[-1]


@pytest.mark.parametrize("cluster_bits", [12, 16, 18])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5])
def test_mark_changed(benchmark, full_table, cluster_bits, share):
    other, moved = rewritten(full_table, share)
    words, blocks = block_words(cluster_bits)
    benchmark.extra_info["bytes"] = 2 * full_table.nbytes
    assert benchmark(_diff.mark_changed, full_table, other, 0, cluster_bits, words, blocks) == moved


@pytest.mark.parametrize("cluster_bits", [12, 16, 18])
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_mark_allocated(benchmark, full_table, cluster_bits, share):
    stored = np.random.default_rng(1).random(ENTRIES) < share
    table = np.where(stored, full_table, np.uint64(0))
    words, blocks = block_words(cluster_bits)
    benchmark.extra_info["bytes"] = table.nbytes
    assert benchmark(_diff.mark_allocated, table, 0, cluster_bits, words, blocks) == int(stored.sum())


@pytest.mark.parametrize("mixed", [False, True])
def test_decode_l2(benchmark, full_table, mixed):
    drawn = np.random.default_rng(1).random(ENTRIES)
    table = np.where(drawn < 0.4 * mixed, in_file(np.array([0, 1]))[(drawn < 0.1).astype(int)], full_table)
    columns = [np.empty(ENTRIES, t) for t in (np.uint8, np.uint64, np.uint32)]
    benchmark.extra_info["bytes"] = table.nbytes
    assert benchmark(_diff.decode_l2, table, 16, 3, 1 << 60, *columns) == -1


def dirty(share: float) -> tuple[DirtyMap, np.ndarray]:
    blocks = np.flatnonzero(np.random.default_rng(1).random(BLOCKS) < share)
    return DirtyMap.from_indices(BLOCKS, blocks), blocks


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5])
def test_runs(benchmark, share):
    changed, blocks = dirty(share)
    benchmark.extra_info["bytes"] = changed.words.nbytes
    runs = benchmark(lambda: sum(len(window) for window in changed.iter_runs()))
    assert runs == (1 + int(np.count_nonzero(np.diff(blocks) > 1)) if blocks.size else 0)


def test_map_from_indices(benchmark):
    blocks = dirty(0.01)[1]
    assert benchmark(DirtyMap.from_indices, BLOCKS, blocks).count() == blocks.size


def test_map_from_runs(benchmark):
    changed, blocks = dirty(0.01)
    assert benchmark(DirtyMap.from_runs, BLOCKS, changed.runs()).count() == blocks.size


def test_batches(benchmark):
    changed, blocks = dirty(0.01)
    assert benchmark(lambda: sum(len(batch) for batch in changed.batches(256))) == blocks.size


def test_interval_algebra(benchmark):
    """Subtract half a million intervals from another half million, like the slots of two manifests."""
    generator = np.random.default_rng(1)
    starts = generator.integers(0, 1 << 40, (2, 500_000))
    a, b = (merge_intervals(np.stack([s, s + 1 + s % 50], axis=1)) for s in starts)
    assert total(benchmark(subtract_intervals, a, b)) == total(a) - total(intersect_intervals(a, b))


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, DATA, np.uint8)


@pytest.mark.parametrize("kernel", [_diff.hash_blocks, _diff._hash_with_package], ids=["kernel", "package"])
def test_hash_blocks(benchmark, noise, kernel):
    digests = np.zeros((DATA // BLOCK_SIZE, 16), np.uint8)
    benchmark.extra_info |= {"bytes": DATA, "kernel": _diff.HASH_KERNEL}
    benchmark(kernel, noise, BLOCK_SIZE, 7, digests)
    assert digests.any(axis=1).all()


def test_zero_blocks_of_zeros(benchmark):
    zeros = np.zeros(DATA, np.uint8)
    zeros.fill(0)
    flags = np.zeros(DATA // BLOCK_SIZE, np.uint8)
    benchmark.extra_info["bytes"] = DATA
    assert benchmark(_diff.zero_blocks, zeros, BLOCK_SIZE, flags) == len(flags)


def test_zero_blocks_of_data(benchmark, noise):
    flags = np.zeros(DATA // BLOCK_SIZE, np.uint8)
    assert benchmark(_diff.zero_blocks, noise, BLOCK_SIZE, flags) == 0


def test_copy_ranges(benchmark, noise):
    starts = np.arange(0, DATA, BLOCK_SIZE)
    sizes = np.full(len(starts), BLOCK_SIZE)
    target = np.empty_like(noise)
    benchmark.extra_info["bytes"] = DATA
    assert benchmark(_diff.copy_ranges, noise, starts, sizes, target, starts[::-1].copy()) == DATA
    assert np.array_equal(target[-BLOCK_SIZE:], noise[:BLOCK_SIZE])
