"""Slow twins of the kernels in `island_fast._diff`, written from the qcow2 specification.

They give new objects back in place of filling buffers, and look at one entry, bit or byte at a time.
"""

from __future__ import annotations

import numpy as np
import xxhash

BLOCK = 65536
COPIED = 1 << 63

Marks = tuple[int, set[int]]


def numbers(entries: np.ndarray) -> list[int]:
    """Entries as the integers that the file's big-endian bytes stand for."""
    return [int.from_bytes(entries[i : i + 1].tobytes(), "big") for i in range(len(entries))]


def raw(values: list[int]) -> np.ndarray:
    """Inverse of `numbers`: an L2 table as it lies in the file, viewed as native uint64."""
    return np.frombuffer(b"".join(v.to_bytes(8, "big") for v in values), np.uint64).copy()


def kind_of(entry: int) -> int:
    if entry >> 62 & 1:
        return 4
    offset = entry & 0x00FF_FFFF_FFFF_FE00
    if entry & 1:
        return 3 if offset else 2
    return 1 if offset else 0


def _marks(chosen: list[bool], first_cluster: int, cluster_bits: int, blocks: int) -> Marks:
    found: set[int] = set()
    count = 0
    for i, wanted in enumerate(chosen):
        start = (first_cluster + i) << cluster_bits
        if not wanted or start >= blocks * BLOCK:
            continue
        count += 1
        last = (start + (1 << cluster_bits) - 1) // BLOCK
        found.update(b for b in range(start // BLOCK, last + 1) if b < blocks)
    return count, found


def mark_allocated(entries: np.ndarray, first_cluster: int, cluster_bits: int, blocks: int) -> Marks:
    chosen = [kind_of(e) in (1, 4) for e in numbers(entries)]
    return _marks(chosen, first_cluster, cluster_bits, blocks)


def mark_changed(a: np.ndarray, b: np.ndarray, first_cluster: int, cluster_bits: int, blocks: int) -> Marks:
    chosen = [x & ~COPIED != y & ~COPIED for x, y in zip(numbers(a), numbers(b), strict=True)]
    return _marks(chosen, first_cluster, cluster_bits, blocks)


def decode_entry(entry: int, cluster_bits: int, version: int, file_size: int) -> tuple[int, int, int] | None:
    """Kind, offset and length of one entry; None if it is invalid."""
    kind = kind_of(entry)
    if kind == 4:
        x = 62 - (cluster_bits - 8)
        offset = entry % (1 << x)
        sectors = entry // (1 << x) % (1 << (cluster_bits - 8))
        length = (sectors + 1) * 512 - offset % 512
        return (kind, offset, length) if offset < file_size else None
    if entry & 1 and version == 2:
        return None
    offset = entry & 0x00FF_FFFF_FFFF_FE00
    if offset and (offset % (1 << cluster_bits) or offset >= file_size):
        return None
    return kind, offset, 0


def decode_l2(
    entries: np.ndarray, cluster_bits: int, version: int, file_size: int
) -> tuple[int, list[tuple[int, int, int]]]:
    rows: list[tuple[int, int, int]] = []
    for i, entry in enumerate(numbers(entries)):
        row = decode_entry(entry, cluster_bits, version, file_size)
        if row is None:
            return i, rows
        rows.append(row)
    return -1, rows


def bits(words: np.ndarray) -> list[bool]:
    """Bit by bit, from the integers alone."""
    return [bool(int(word) >> i & 1) for word in words for i in range(64)]


def bitmap_runs(words: np.ndarray, first: int, stop: int) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    flags = bits(words)
    for i in range(first, stop):
        if not flags[i]:
            continue
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs


def hash_blocks(data: np.ndarray, block_size: int, seed: int) -> list[bytes]:
    raw_bytes = data.tobytes()
    starts = range(0, len(raw_bytes), block_size)
    return [xxhash.xxh3_128_digest(raw_bytes[at : at + block_size], seed) for at in starts]


def zero_blocks(data: np.ndarray, block_size: int) -> list[int]:
    return [int(not any(data[at : at + block_size])) for at in range(0, len(data), block_size)]


def copy_ranges(
    source: bytes, source_offsets: list[int], lengths: list[int], target: bytes, target_offsets: list[int]
):
    out = bytearray(target)
    for start, length, to in zip(source_offsets, lengths, target_offsets, strict=True):
        out[to : to + length] = source[start : start + length]
    return bytes(out)
