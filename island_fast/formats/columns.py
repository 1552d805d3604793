"""Columns of integers as bytes: narrowed to the fewest bytes that hold them, then byte-shuffled.

A column's plain bytes are its values' lowest bytes, then all their second bytes, and so on (the shuffle of
the HDF5 and Blosc filters), so that zstd sees long runs of equal bytes. The width is the byte length
divided by the number of rows, which the object's metadata states. Layout: docs/format.md, "Columns".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from island_fast.arrays import Int64s
from island_fast.errors import DamagedObjectError

__all__ = [
    "Column",
    "GroupedStarts",
    "Integers",
    "decode",
    "encode",
    "ends_before",
    "unzigzag",
    "windows",
    "zigzag",
]

Integers = NDArray[np.signedinteger[Any]]
"""Signed integers of any width."""

_WINDOW = 1 << 16


def encode(values: Int64s) -> bytes:
    """Return the shuffled bytes of a column of values in [0, 2**63)."""
    if values.size == 0:
        return b""
    width = max(1, (int(values.max()).bit_length() + 7) // 8)
    rows = np.ascontiguousarray(values, "<i8").view(np.uint8).reshape(-1, 8)
    return rows[:, :width].T.tobytes()


class Column:
    """The column of `rows` values, each in [0, 2**63), in `data`, a section of object `name`.

    It is decoded a part at a time, because a column can be as long as a volume has blocks. DamagedObjectError
    if `data` is not such a column.
    """

    def __init__(self, name: str, data: memoryview | bytes, rows: int) -> None:
        raw = np.frombuffer(data, np.uint8)
        width, rest = divmod(raw.size, rows) if rows else (0, raw.size)
        if rest or (rows and not 1 <= width <= 8):
            raise DamagedObjectError(f"object {name} holds a column of the wrong length")
        self._name = name
        self._planes = raw.reshape(width, rows)

    def part(self, first: int, stop: int) -> Int64s:
        """Return the values [first, stop), int64; DamagedObjectError if one is too large."""
        planes = self._planes[:, first:stop]
        wide = np.zeros((planes.shape[1], 8), np.uint8)
        wide[:, : len(planes)] = planes.T
        values: Int64s = wide.view("<i8").reshape(-1).astype(np.int64, copy=False)
        if int(values.min(initial=0)) < 0:
            raise DamagedObjectError(f"object {self._name} holds a number that is too large")
        return values


def decode(name: str, data: memoryview | bytes, rows: int) -> Int64s:
    """Return all values of a `Column`, int64[rows]."""
    return Column(name, data, rows).part(0, rows)


def windows(rows: int) -> Iterator[tuple[int, int]]:
    """Yield the parts [first, stop) in which `rows` rows are worked on."""
    return ((first, min(first + _WINDOW, rows)) for first in range(0, rows, _WINDOW))


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


class GroupedStarts:
    """Restores starts from their deltas, a part of the rows at a time, in order.

    Within a group, each start is the end of the row before plus the delta: `start - ends_before(group,
    start + lengths)`. Groups are numbers below `groups`.
    """

    def __init__(self, groups: int) -> None:
        self._ends = np.zeros(groups, np.int64)

    def restore(self, group: Integers, deltas: Int64s, lengths: Integers) -> Int64s:
        """Return the starts of the next rows, int64."""
        if not group.size:
            return np.zeros(0, np.int64)
        order = np.argsort(group, kind="stable")
        mine = group[order]
        total = deltas[order]
        first = np.ones(group.size, bool)
        first[1:] = mine[1:] != mine[:-1]
        total[1:] += np.where(first[1:], 0, lengths[order[:-1]])
        heads = np.flatnonzero(first)
        steps = total[heads] + self._ends[mine[heads]]
        np.cumsum(total, out=total)
        total -= np.repeat(total[heads] - steps, np.diff(np.append(heads, group.size)))
        last = np.append(heads[1:], group.size) - 1
        self._ends[mine[last]] = total[last] + lengths[order[last]]
        starts = np.empty(group.size, np.int64)
        starts[order] = total
        return starts
