"""Dirty maps (packed bitmaps of blocks), and set algebra on arrays of intervals.

An interval is a row [start, stop) of an int64[k, 2] array; with stop <= start it is empty. Unless a function
says otherwise, the rows given to it can be in any order and can overlap. The rows returned are sorted,
disjoint and not empty, and each is as long as possible (except those of `clip_rows`). Everything runs in
numpy or in a kernel, never row by row.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import numpy as np

from island_fast import _diff
from island_fast.arrays import Bools, Int64s, Uint64s

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

BLOCK_BITS = 16
"""log2 of BLOCK_SIZE."""

BLOCK_SIZE = 1 << BLOCK_BITS
"""Bytes in a block, the unit in which changes are found and data is hashed and stored."""

NO_INTERVALS = np.zeros((0, 2), np.int64)
NO_INTERVALS.flags.writeable = False
"""No intervals at all. Read-only, because it is shared."""

_MAPPED = 1 << 17
"""Maps of this many words (1 MiB) or more get their memory from mmap."""

_ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_INT64 = np.iinfo(np.int64)


class DirtyMap:
    """A set of blocks, out of a fixed number; mostly those that may have changed.

    Block i is bit `i & 63` of `words[i >> 6]`; the bits past the last block are always 0. The map owns its
    words. They come from zeroed pages and take memory only where something was set. `|`, `&`, `-` and `^`
    need two maps with the same number of blocks. Not thread-safe for writing.
    """

    __slots__ = ("_blocks", "_words")
    __hash__: ClassVar[None]  # type: ignore[assignment]

    def __init__(self, blocks: int) -> None:
        """Make a map of `blocks` blocks, none of them set."""
        if blocks < 0:
            raise ValueError(f"a map cannot have {blocks} blocks")
        self._blocks = int(blocks)
        self._words: Uint64s = _make_zeros((self._blocks + 63) >> 6)

    @classmethod
    def full(cls, blocks: int) -> Self:
        """Make a map of `blocks` blocks, all of them set."""
        new = cls(blocks)
        new.set_range(0, blocks)
        return new

    @classmethod
    def from_runs(cls, blocks: int, runs: Int64s) -> Self:
        """Make a map with the blocks of all intervals in `runs` set; they must be within [0, blocks)."""
        new = cls(blocks)
        runs = merge_intervals(runs)
        if runs.size:
            new._check(int(runs[0, 0]), int(runs[-1, 1]))
            new._set_runs(runs)
        return new

    @classmethod
    def from_indices(cls, blocks: int, indices: Int64s) -> Self:
        """Make a map with the blocks in `indices` set, int64[n] in any order, each within [0, blocks)."""
        new = cls(blocks)
        new.set_indices(indices)
        return new

    @property
    def blocks(self) -> int:
        """Number of blocks that the map covers."""
        return self._blocks

    @property
    def words(self) -> Uint64s:
        """The bitmap itself, uint64[ceil(blocks / 64)], which kernels read and set bits in."""
        return self._words

    def copy(self) -> Self:
        """Return an independent map with the same blocks set."""
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
        """Set the blocks in `indices`, int64[n] in any order, in time that depends only on their number."""
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
        """Return the maximal runs of set blocks as intervals, int64[k, 2], in order."""
        windows = list(self.iter_runs())
        return np.concatenate(windows) if windows else NO_INTERVALS

    def iter_runs(self, max_rows: int = 65536) -> Iterator[Int64s]:
        """Yield the maximal runs of set blocks, in order, in arrays of 1 to `max_rows` rows.

        The arrays are the caller's. The map must not change during the iteration.
        """
        return self._runs_within(0, self._blocks, max_rows)

    def indices(self, start: int = 0, stop: int | None = None) -> Int64s:
        """Return the set blocks within [start, stop), by default all, in order, int64[n]."""
        stop = self._blocks if stop is None else stop
        self._check(start, stop)
        parts = [_expand(runs[:, 0], runs[:, 1]) for runs in self._runs_within(start, stop)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def batches(self, max_blocks: int) -> Iterator[Int64s]:
        """Yield the set blocks in order, in arrays of 1 to `max_blocks`, with bounded memory."""
        if max_blocks < 1:
            raise ValueError(f"a batch of {max_blocks} blocks cannot hold any")
        for runs in self.iter_runs():
            ends = np.cumsum(runs[:, 1] - runs[:, 0])
            for done in range(0, int(ends[-1]), max_blocks):
                yield _expand(*_select(runs, ends, done, done + max_blocks))

    def count(self) -> int:
        """Count the set blocks."""
        return sum(total(runs) for runs in self.iter_runs())

    def __contains__(self, block: int) -> bool:
        """Return whether `block` is set; False if it is outside of the map."""
        if not 0 <= block < self._blocks:
            return False
        return bool(int(self._words[block >> 6]) >> (block & 63) & 1)

    def holds(self, blocks: Int64s) -> Bools:
        """Return bool[n]: whether each of `blocks`, int64[n] within [0, self.blocks), is set."""
        bits = self._words[blocks >> 6] >> (blocks & 63).astype(np.uint64)
        return np.asarray(bits & np.uint64(1), np.bool_)

    def __bool__(self) -> bool:
        return bool(self._words.any())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DirtyMap):
            return NotImplemented
        return self._blocks == other._blocks and bool(np.array_equal(self._words, other._words))

    def __or__(self, other: DirtyMap) -> Self:
        return self._combine(np.bitwise_or, other)

    def __and__(self, other: DirtyMap) -> Self:
        return self._combine(np.bitwise_and, other)

    def __xor__(self, other: DirtyMap) -> Self:
        return self._combine(np.bitwise_xor, other)

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
        """Return the first and last word of a range, and the bits of the range in each; check the range."""
        self._check(start, stop)
        head = _ALL << np.uint64(start & 63)
        tail = _ALL >> np.uint64(-stop & 63)
        return start >> 6, (stop - 1) >> 6, head, tail

    def _words_of(self, other: DirtyMap) -> Uint64s:
        if other._blocks != self._blocks:
            raise ValueError(f"maps of {self._blocks} and {other._blocks} blocks do not combine")
        return other._words

    def _combine(self, operation: Callable[[Uint64s, Uint64s], Any], other: DirtyMap) -> Self:
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


def _make_zeros(count: int) -> Uint64s:
    """Return zeroed words that take memory only where they are set; numpy's would take it in huge pages."""
    if count < _MAPPED:
        return np.zeros(count, np.uint64)
    words = mmap.mmap(-1, 8 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        words.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(words, np.uint64)


def distinct(values: Int64s) -> Int64s:
    """Return the distinct values, ascending.

    Without another output, np.unique imports numpy.ma, which takes a good part of a small command's time.
    """
    return np.unique(values, return_index=True)[0]


def merge_intervals(iv: Int64s) -> Int64s:
    """Return the union of the intervals, int64[m, 2]; those that touch are joined."""
    iv = np.asarray(iv, np.int64).reshape(-1, 2)
    iv = iv[iv[:, 1] > iv[:, 0]]  # a copy, without empty ones
    if len(iv) < 2:
        return iv
    if not bool(np.all(iv[1:, 0] > iv[:-1, 1])):
        iv = iv[np.argsort(iv[:, 0], kind="stable")]
    reach = np.maximum.accumulate(iv[:, 1])
    heads = np.flatnonzero(np.concatenate(([True], iv[1:, 0] > reach[:-1])))
    tails = np.append(heads[1:], len(iv)) - 1
    return np.stack([iv[heads, 0], reach[tails]], axis=1)


def subtract_intervals(a: Int64s, b: Int64s) -> Int64s:
    """Return the numbers in `a` that are not in `b`, as intervals, int64[m, 2]."""
    a, b = merge_intervals(a), merge_intervals(b)
    gaps = np.empty((len(b) + 1, 2), np.int64)
    gaps[0, 0], gaps[-1, 1] = _INT64.min, _INT64.max
    gaps[1:, 0], gaps[:-1, 1] = b[:, 1], b[:, 0]
    return _intersect(a, gaps)


def intersect_intervals(a: Int64s, b: Int64s) -> Int64s:
    """Return the numbers that are in both `a` and `b`, as intervals, int64[m, 2]."""
    return _intersect(merge_intervals(a), merge_intervals(b))


def clip_rows(starts: Int64s, lengths: Int64s, keep: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """Cut the rows [start, start + length) to what lies within `keep`; return the pieces, in order.

    starts, lengths: int64[k]; the rows are sorted and disjoint.
    keep: int64[m, 2], sorted, disjoint, none empty.

    Returns (source_row, offset, length), int64[n] each: the row that a piece is from, where in that row it
    begins, and how long it is, never 0. A row gives one piece for each interval of `keep` that it overlaps.
    """
    stops = starts + lengths
    rows, kept = _find_overlaps(starts, stops, keep)
    offset = np.maximum(keep[kept, 0] - starts[rows], 0)
    length = np.minimum(keep[kept, 1], stops[rows]) - starts[rows] - offset
    real = length > 0
    return rows[real], offset[real], length[real]


def total(iv: Int64s) -> int:
    """Return the sum of the lengths of the intervals, none of which has stop < start."""
    return int((iv[:, 1] - iv[:, 0]).sum())


def _expand(starts: Int64s, stops: Int64s) -> Int64s:
    """Return all numbers of all intervals, one interval after the other."""
    lengths = stops - starts
    ends = np.cumsum(lengths)
    if not ends.size:
        return np.zeros(0, np.int64)
    numbers = np.repeat(starts - (ends - lengths), lengths)
    numbers += np.arange(ends[-1])
    return numbers


def _select(runs: Int64s, ends: Int64s, first: int, stop: int) -> tuple[Int64s, Int64s]:
    """Return (starts, stops) of the parts of `runs` with the numbers at positions first .. stop - 1.

    Positions count all numbers of the runs, from 0. ends: the running sum of the runs' lengths.
    """
    top = min(int(np.searchsorted(ends, stop, "left")), len(ends) - 1)
    low = int(np.searchsorted(ends, first, "right"))
    starts, stops = runs[low : top + 1, 0].copy(), runs[low : top + 1, 1].copy()
    starts[0] = stops[0] - (int(ends[low]) - first)
    stops[-1] -= max(int(ends[top]) - stop, 0)
    return starts, stops


def _find_overlaps(starts: Int64s, stops: Int64s, keep: Int64s) -> tuple[Int64s, Int64s]:
    """Return all overlapping pairs (row, interval of `keep`), in order; both must be sorted and disjoint."""
    low = np.searchsorted(keep[:, 1], starts, "right")
    high = np.searchsorted(keep[:, 0], stops, "left")
    high = np.maximum(low, high)
    return np.repeat(np.arange(len(starts)), high - low), _expand(low, high)


def _intersect(a: Int64s, b: Int64s) -> Int64s:
    """Return the intersection of two arrays of merged intervals."""
    rows, other = _find_overlaps(a[:, 0], a[:, 1], b)
    low = np.maximum(a[rows, 0], b[other, 0])
    high = np.minimum(a[rows, 1], b[other, 1])
    return np.stack([low, high], axis=1)
