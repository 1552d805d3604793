"""Dirty maps (packed bitmaps of blocks), and set algebra on columns of intervals.

An interval is a row [start, stop) of an int64[k, 2] array; one with stop <= start is empty. Rows
may come in any order and overlap unless a function says otherwise. Results are sorted, disjoint,
not empty and, except for `clip_rows`, as long as they can be. Everything runs in numpy or in a
kernel, never row by row.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from island_fast import _diff
from island_fast.arrays import Int64s

__all__ = [
    "BLOCK_BITS",
    "BLOCK_SIZE",
    "NO_INTERVALS",
    "DirtyMap",
    "clip_rows",
    "distinct",
    "intersect_intervals",
    "merge_intervals",
    "subtract_intervals",
    "total",
]

Words = NDArray[np.uint64]

BLOCK_BITS = 16
"""log2 of BLOCK_SIZE."""

BLOCK_SIZE = 1 << BLOCK_BITS
"""Bytes in a block, the unit of change, hashing and storage."""

NO_INTERVALS = np.zeros((0, 2), np.int64)
NO_INTERVALS.flags.writeable = False
"""No intervals at all; read-only, so that nobody fills what everybody shares."""

_MAPPED = 1 << 17
"""From so many words on: 1 MiB."""

_ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_INT64 = np.iinfo(np.int64)


class DirtyMap:
    """The set of blocks, out of a fixed number, that may have changed.

    Block i is bit `i & 63` of `words[i >> 6]`; the bits past the last block are always 0. The words
    are the map's own, come from zeroed pages and cost memory only where something was set. `|`,
    `&`, `-` and `^` need two maps of equal `blocks`. Not thread-safe for writing.
    """

    __slots__ = ("_blocks", "_words")
    __hash__: ClassVar[None]  # type: ignore[assignment]

    def __init__(self, blocks: int) -> None:
        if blocks < 0:
            raise ValueError(f"a map cannot have {blocks} blocks")
        self._blocks = int(blocks)
        self._words: Words = _zeroed((self._blocks + 63) >> 6)

    @classmethod
    def full(cls, blocks: int) -> Self:
        """A map of `blocks` blocks, all set."""
        new = cls(blocks)
        new.set_range(0, blocks)
        return new

    @classmethod
    def from_runs(cls, blocks: int, runs: Int64s) -> Self:
        """A map with the blocks of every interval in `runs` set; all within [0, blocks)."""
        new = cls(blocks)
        runs = merge_intervals(runs)
        if runs.size:
            new._check(int(runs[0, 0]), int(runs[-1, 1]))
            new._set_runs(runs)
        return new

    @classmethod
    def from_indices(cls, blocks: int, indices: Int64s) -> Self:
        """A map with the blocks in `indices` set, int64[n] in any order; each in [0, blocks)."""
        new = cls(blocks)
        new.set_indices(indices)
        return new

    @property
    def blocks(self) -> int:
        """How many blocks the map is about."""
        return self._blocks

    @property
    def words(self) -> Words:
        """The bitmap itself, uint64[ceil(blocks / 64)], for kernels to read and mark."""
        return self._words

    def copy(self) -> Self:
        """An independent map with the same blocks set."""
        new = type(self).__new__(type(self))
        new._blocks = self._blocks
        new._words = self._words.copy()
        return new

    def set_range(self, start: int, stop: int) -> None:
        """Set every block in [start, stop)."""
        first, last, head, tail = self._edges(start, stop)
        if start == stop:
            return
        if first == last:
            self._words[first] |= head & tail
            return
        self._words[first] |= head
        self._words[first + 1 : last] = _ALL
        self._words[last] |= tail

    def set_indices(self, indices: Int64s) -> None:
        """Set the blocks in `indices`, int64[n] in any order; costs by their number, not the map's size."""
        indices = np.asarray(indices, np.int64)
        if indices.size:
            self._check(int(indices.min()), int(indices.max()) + 1)
            bits = np.uint64(1) << (indices & 63).astype(np.uint64)
            np.bitwise_or.at(self._words, indices >> 6, bits)

    def clear_range(self, start: int, stop: int) -> None:
        """Clear every block in [start, stop)."""
        first, last, head, tail = self._edges(start, stop)
        if start == stop:
            return
        if first == last:
            self._words[first] &= ~(head & tail)
            return
        self._words[first] &= ~head
        self._words[first + 1 : last] = 0
        self._words[last] &= ~tail

    def runs(self) -> Int64s:
        """The maximal runs of set blocks as intervals, int64[k, 2], in order."""
        windows = list(self.iter_runs())
        return np.concatenate(windows) if windows else NO_INTERVALS

    def iter_runs(self, max_rows: int = 65536) -> Iterator[Int64s]:
        """The maximal runs of set blocks, in order, in arrays of 1 to `max_rows` rows.

        The arrays are the caller's. The map must not change meanwhile.
        """
        return self._runs_within(0, self._blocks, max_rows)

    def indices(self, start: int = 0, stop: int | None = None) -> Int64s:
        """The set blocks within [start, stop), by default all, in order, int64[n]."""
        stop = self._blocks if stop is None else stop
        self._check(start, stop)
        parts = [_expand(runs[:, 0], runs[:, 1]) for runs in self._runs_within(start, stop)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def batches(self, max_blocks: int) -> Iterator[Int64s]:
        """The set blocks in order, in arrays of 1 to `max_blocks`, with bounded memory."""
        if max_blocks < 1:
            raise ValueError(f"a batch of {max_blocks} blocks cannot hold any")
        for runs in self.iter_runs():
            ends = np.cumsum(runs[:, 1] - runs[:, 0])
            for done in range(0, int(ends[-1]), max_blocks):
                yield _expand(*_pick(runs, ends, done, done + max_blocks))

    def count(self) -> int:
        """How many blocks are set."""
        return sum(total(runs) for runs in self.iter_runs())

    def __contains__(self, block: int) -> bool:
        """Whether `block` is set; false for one that the map does not have."""
        if not 0 <= block < self._blocks:
            return False
        return bool(int(self._words[block >> 6]) >> (block & 63) & 1)

    def holds(self, blocks: Int64s) -> NDArray[np.bool_]:
        """Which of `blocks`, int64[n], each in [0, self.blocks), are set."""
        bits = self._words[blocks >> 6] >> (blocks & 63).astype(np.uint64)
        return np.asarray(bits & np.uint64(1), np.bool_)

    def __bool__(self) -> bool:
        return bool(self._words.any())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DirtyMap):
            return NotImplemented
        return self._blocks == other._blocks and bool(np.array_equal(self._words, other._words))

    def __or__(self, other: DirtyMap) -> Self:
        return self._combined(np.bitwise_or, other)

    def __and__(self, other: DirtyMap) -> Self:
        return self._combined(np.bitwise_and, other)

    def __xor__(self, other: DirtyMap) -> Self:
        return self._combined(np.bitwise_xor, other)

    def __sub__(self, other: DirtyMap) -> Self:
        new = self.copy()
        new -= other
        return new

    def __ior__(self, other: DirtyMap) -> Self:
        self._words |= self._words_of(other)
        return self

    def __iand__(self, other: DirtyMap) -> Self:
        self._words &= self._words_of(other)
        return self

    def __ixor__(self, other: DirtyMap) -> Self:
        self._words ^= self._words_of(other)
        return self

    def __isub__(self, other: DirtyMap) -> Self:
        self._words &= ~self._words_of(other)
        return self

    def __repr__(self) -> str:
        return f"DirtyMap({self.count()} of {self._blocks} blocks)"

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self._blocks:
            raise ValueError(f"[{start}, {stop}) is not within a map of {self._blocks} blocks")

    def _edges(self, start: int, stop: int) -> tuple[int, int, np.uint64, np.uint64]:
        """First and last word of a range that is within the map, and the range's bits in each."""
        self._check(start, stop)
        head = _ALL << np.uint64(start & 63)
        tail = _ALL >> np.uint64(-stop & 63)
        return start >> 6, (stop - 1) >> 6, head, tail

    def _words_of(self, other: DirtyMap) -> Words:
        if other._blocks != self._blocks:
            raise ValueError(f"maps of {self._blocks} and {other._blocks} blocks do not combine")
        return other._words

    def _combined(self, operation: Callable[[Words, Words], Any], other: DirtyMap) -> Self:
        new = type(self).__new__(type(self))
        new._blocks = self._blocks
        new._words = operation(self._words, self._words_of(other))
        return new

    def _set_runs(self, runs: Int64s) -> None:
        """Set disjoint runs: their first and last words by mask, all words between them at once."""
        first, last = runs[:, 0] >> 6, (runs[:, 1] - 1) >> 6
        head = _ALL << (runs[:, 0] & 63).astype(np.uint64)
        tail = _ALL >> (-runs[:, 1] & 63).astype(np.uint64)
        single = first == last
        np.bitwise_or.at(self._words, first, np.where(single, head & tail, head))
        np.bitwise_or.at(self._words, last[~single], tail[~single])
        self._words[_expand(first + 1, np.maximum(last, first + 1))] = _ALL

    def _runs_within(self, start: int, stop: int, max_rows: int = 65536) -> Iterator[Int64s]:
        window = np.empty((max_rows, 2), np.int64)
        while start < stop:
            rows, start = _diff.bitmap_runs(self._words, start, stop, window)
            if rows:
                yield window[:rows].copy()


def _zeroed(count: int) -> Words:
    """Words of zeros that take memory where they are set; numpy's own would take it in huge pages."""
    if count < _MAPPED:
        return np.zeros(count, np.uint64)
    words = mmap.mmap(-1, 8 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        words.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(words, np.uint64)


def distinct(values: Int64s) -> Int64s:
    """The distinct values, ascending.

    Asked for them alone, np.unique imports numpy.ma, a good part of the time that a small verb takes.
    """
    return np.unique(values, return_index=True)[0]


def merge_intervals(iv: Int64s) -> Int64s:
    """The union of the intervals, int64[m, 2]; those that touch are joined."""
    iv = _not_empty(iv)
    if len(iv) < 2:
        return iv
    if not bool(np.all(iv[1:, 0] > iv[:-1, 1])):
        iv = iv[np.argsort(iv[:, 0], kind="stable")]
    reach = np.maximum.accumulate(iv[:, 1])
    heads = np.flatnonzero(np.concatenate(([True], iv[1:, 0] > reach[:-1])))
    tails = np.append(heads[1:], len(iv)) - 1
    return np.stack([iv[heads, 0], reach[tails]], axis=1)


def subtract_intervals(a: Int64s, b: Int64s) -> Int64s:
    """The points of `a` that are not in `b`, int64[m, 2]."""
    a, b = merge_intervals(a), merge_intervals(b)
    gaps = np.empty((len(b) + 1, 2), np.int64)
    gaps[0, 0], gaps[-1, 1] = _INT64.min, _INT64.max
    gaps[1:, 0], gaps[:-1, 1] = b[:, 1], b[:, 0]
    return _intersect(a, gaps)


def intersect_intervals(a: Int64s, b: Int64s) -> Int64s:
    """The points that `a` and `b` share, int64[m, 2]."""
    return _intersect(merge_intervals(a), merge_intervals(b))


def clip_rows(starts: Int64s, lengths: Int64s, keep: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """The pieces of rows [start, start + length) that lie within `keep`, in order.

    starts, lengths: int64[k], rows sorted and disjoint. keep: int64[m, 2], sorted, disjoint, none
    empty.

    Returns (source_row, offset, length), int64[n] each: the row that a piece is of, where in that
    row it begins, and how long it is, never 0. A row gives one piece for each interval of `keep`
    that it meets.
    """
    stops = starts + lengths
    rows, kept = _meetings(starts, stops, keep)
    offset = np.maximum(keep[kept, 0] - starts[rows], 0)
    length = np.minimum(keep[kept, 1], stops[rows]) - starts[rows] - offset
    real = length > 0
    return rows[real], offset[real], length[real]


def total(iv: Int64s) -> int:
    """The sum of the lengths of intervals, none of which has stop < start."""
    return int((iv[:, 1] - iv[:, 0]).sum())


def _not_empty(iv: Int64s) -> Int64s:
    """Its own array of the rows that are not empty."""
    iv = np.asarray(iv, np.int64).reshape(-1, 2)
    return np.asarray(iv[iv[:, 1] > iv[:, 0]], np.int64)


def _expand(starts: Int64s, stops: Int64s) -> Int64s:
    """All numbers of all intervals, one interval after the other."""
    lengths = stops - starts
    ends = np.cumsum(lengths)
    if not ends.size:
        return np.zeros(0, np.int64)
    numbers = np.repeat(starts - (ends - lengths), lengths)
    numbers += np.arange(ends[-1])
    return numbers


def _pick(runs: Int64s, ends: Int64s, first: int, stop: int) -> tuple[Int64s, Int64s]:
    """The parts of `runs` that hold their numbers first .. stop - 1, counted from the first run.

    ends: the running sum of the runs' lengths.
    """
    top = min(int(np.searchsorted(ends, stop, "left")), len(ends) - 1)
    low = int(np.searchsorted(ends, first, "right"))
    starts, stops = runs[low : top + 1, 0].copy(), runs[low : top + 1, 1].copy()
    starts[0] = stops[0] - (int(ends[low]) - first)
    stops[-1] -= max(int(ends[top]) - stop, 0)
    return starts, stops


def _meetings(starts: Int64s, stops: Int64s, keep: Int64s) -> tuple[Int64s, Int64s]:
    """Every overlapping pair (row, interval of `keep`), in order; both sorted and disjoint."""
    low = np.searchsorted(keep[:, 1], starts, "right")
    high = np.searchsorted(keep[:, 0], stops, "left")
    high = np.maximum(low, high)
    return np.repeat(np.arange(len(starts)), high - low), _expand(low, high)


def _intersect(a: Int64s, b: Int64s) -> Int64s:
    """Intersection of two merged columns."""
    rows, other = _meetings(a[:, 0], a[:, 1], b)
    low = np.maximum(a[rows, 0], b[other, 0])
    high = np.minimum(a[rows, 1], b[other, 1])
    return np.stack([low, high], axis=1)
