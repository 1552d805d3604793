"""Columns of integers as bytes: narrowed to the fewest bytes that hold them, then byte-shuffled.

A column's plain bytes are its values' lowest bytes, then all their second bytes, and so on (the shuffle of
the HDF5 and Blosc filters), so that zstd sees long runs of equal bytes. The width is the byte length
divided by the number of rows, which the object's metadata states. Layout: docs/format.md, "Columns".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from island_fast.arrays import Int64s
from island_fast.errors import DamagedObjectError

__all__ = ["Integers", "decode", "encode", "ends_before", "restore_starts", "unzigzag", "zigzag"]

Integers = NDArray[np.signedinteger[Any]]
"""Signed integers of any width."""


def encode(values: Int64s) -> bytes:
    """Return the shuffled bytes of a column of values in [0, 2**63)."""
    if values.size == 0:
        return b""
    width = max(1, (int(values.max()).bit_length() + 7) // 8)
    rows = np.ascontiguousarray(values, "<i8").view(np.uint8).reshape(-1, 8)
    return rows[:, :width].T.tobytes()


def decode(name: str, data: memoryview | bytes, rows: int) -> Int64s:
    """Return the column of `rows` values, each in [0, 2**63), in `data`, a section of object `name`.

    DamagedObjectError if `data` is not such a column.
    """
    raw = np.frombuffer(data, np.uint8)
    if rows == 0:
        if raw.size:
            raise DamagedObjectError(f"object {name} holds a column that should be empty")
        return np.zeros(0, np.int64)
    width, rest = divmod(raw.size, rows)
    if rest or not 1 <= width <= 8:
        raise DamagedObjectError(f"object {name} holds a column of the wrong length")
    wide = np.zeros((rows, 8), np.uint8)
    wide[:, :width] = raw.reshape(width, rows).T
    values: Int64s = wide.view("<i8").reshape(rows).astype(np.int64, copy=False)
    if int(values.min()) < 0:
        raise DamagedObjectError(f"object {name} holds a number that is too large")
    return values


def zigzag(values: Int64s) -> Int64s:
    """Return signed values as non-negative ones: 0, -1, 1, -2 become 0, 1, 2, 3."""
    return np.asarray((values << 1) ^ (values >> 63), np.int64)


def unzigzag(values: Int64s) -> Int64s:
    """Return the signed values that `zigzag` made non-negative."""
    return np.asarray((values >> 1) ^ -(values & 1), np.int64)


def ends_before(group: Integers, ends: Integers) -> Int64s:
    """Return for each row the value in `ends` of the last earlier row of the same group, or 0."""
    order = np.argsort(group, kind="stable")
    before = np.zeros(group.size, np.int64)
    same = group[order[1:]] == group[order[:-1]]
    before[order[1:][same]] = ends[order[:-1][same]]
    return before


def restore_starts(group: Integers, deltas: Int64s, lengths: Integers) -> Int64s:
    """Return the starts whose `deltas` are `start - ends_before(group, start + lengths)`.

    Within a group, each start is the end of the row before plus the delta.
    """
    order = np.argsort(group, kind="stable")
    total = deltas[order]
    first = np.ones(group.size, bool)
    first[1:] = group[order[1:]] != group[order[:-1]]
    total[1:] += np.where(first[1:], 0, lengths[order[:-1]])
    heads = np.flatnonzero(first)
    steps = total[heads]
    np.cumsum(total, out=total)
    total -= np.repeat(total[heads] - steps, np.diff(np.append(heads, group.size)))
    starts = np.empty(group.size, np.int64)
    starts[order] = total
    return starts
