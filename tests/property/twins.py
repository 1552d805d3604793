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


def pairs(entries: np.ndarray) -> list[tuple[int, int]]:
    """Extended entries: descriptor and bitmap."""
    values = numbers(entries)
    return list(zip(values[::2], values[1::2], strict=True))


def subclusters(entry: int, bitmap: int) -> list[str]:
    """What each of the 32 subclusters is: hole, data, zero, packed or invalid."""
    if entry >> 62 & 1:
        return ["packed"] * 32
    found = []
    for i in range(32):
        stored, zero = bitmap >> i & 1, bitmap >> 32 + i & 1
        if stored and (zero or not entry & 0x00FF_FFFF_FFFF_FE00):
            found.append("invalid")
        else:
            found.append("data" if stored else "zero" if zero else "hole")
    return found


def unaligned(entry: int, cluster_bits: int) -> bool:
    return bool(not entry >> 62 & 1 and (entry & 0x00FF_FFFF_FFFF_FE00) % (1 << cluster_bits))


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


def mark_allocated(
    entries: np.ndarray, first_cluster: int, cluster_bits: int, blocks: int, words: int = 1
) -> Marks:
    if words == 1:
        chosen = [kind_of(e) in (1, 4) or unaligned(e, cluster_bits) for e in numbers(entries)]
    else:
        chosen = [
            bool({"data", "packed", "invalid"} & set(subclusters(e, bitmap))) or unaligned(e, cluster_bits)
            for e, bitmap in pairs(entries)
        ]
    return _marks(chosen, first_cluster, cluster_bits, blocks)


def mark_changed(
    a: np.ndarray, b: np.ndarray, first_cluster: int, cluster_bits: int, blocks: int, words: int = 1
) -> Marks:
    if words == 1:
        chosen = [x & ~COPIED != y & ~COPIED for x, y in zip(numbers(a), numbers(b), strict=True)]
    else:
        both = zip(pairs(a), pairs(b), strict=True)
        chosen = [(x[0] & ~COPIED, x[1]) != (y[0] & ~COPIED, y[1]) for x, y in both]
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


def decode_pair(entry: int, bitmap: int, cluster_bits: int, file_size: int) -> tuple[int, int, int] | None:
    """The same for an extended entry, whose zero flag is ignored."""
    row = decode_entry(entry, cluster_bits, 3, file_size)
    if row is None or row[0] == 4:
        return row
    parts = set(subclusters(entry, bitmap))
    if "invalid" in parts:
        return None
    alike = {"hole": 0, "data": 1, "zero": 3 if row[1] else 2}
    return (alike[parts.pop()] if len(parts) == 1 else 5), row[1], 0


def decode_l2(
    entries: np.ndarray, cluster_bits: int, version: int, file_size: int, words: int = 1
) -> tuple[int, list[tuple[int, int, int]]]:
    if words == 1:
        decoded = [decode_entry(entry, cluster_bits, version, file_size) for entry in numbers(entries)]
    else:
        decoded = [decode_pair(e, bitmap, cluster_bits, file_size) for e, bitmap in pairs(entries)]
    rows: list[tuple[int, int, int]] = []
    for i, row in enumerate(decoded):
        if row is None:
            return i, rows
        rows.append(row)
    return -1, rows


def map_l2(
    entries: np.ndarray,
    other: np.ndarray | None,
    cluster_bits: int,
    version: int,
    file_size: int,
    words: int = 1,
) -> tuple[list[tuple[int, int]], int]:
    """Where something else begins, as (number of the cluster or subcluster, kind); and the invalid entry."""
    bad, rows = decode_l2(entries, cluster_bits, version, file_size, words)
    differ = set() if other is None else _differing(entries, other, words)
    kinds = {"hole": 0, "zero": 1, "data": 2, "packed": 2}
    units: list[int] = []
    for i, row in enumerate(rows):
        change = 4 * (i in differ)
        if words == 1:
            units.append([0, 2, 1, 1, 2][row[0]] + change)
        else:
            units += [kinds[part] + change for part in subclusters(*pairs(entries)[i])]
    return [(i, kind) for i, kind in enumerate(units) if not i or kind != units[i - 1]], bad


def _differing(a: np.ndarray, b: np.ndarray, words: int) -> set[int]:
    if words == 1:
        both = zip(numbers(a), numbers(b), strict=True)
        return {i for i, (x, y) in enumerate(both) if (x ^ y) & ~COPIED}
    both = zip(pairs(a), pairs(b), strict=True)
    return {i for i, (x, y) in enumerate(both) if (x[0] ^ y[0]) & ~COPIED or x[1] != y[1]}


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
