"""Runs: which slot of which pack each block of a snapshot is in, as columns.

There can be as many as a volume has blocks, so columns are narrow, and what is made of them is made a window
of rows at a time. Values only; no I/O.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from island_fast.arrays import Int64s
from island_fast.dirtymap import NO_INTERVALS, clip_rows, distinct, merge_intervals, subtract_intervals
from island_fast.errors import DamagedObjectError
from island_fast.formats.keys import slot_intervals
from island_fast.formats.pack import MAX_SLOTS

__all__ = ["NOT_NAMED", "Runs", "merge"]

NOT_NAMED = -1
"""In the place of the slot key of a block that no run names: it is zero."""

Integers = NDArray[np.signedinteger[Any]]

_WINDOW = 1 << 16
_END = 1 << 62  # behind every block


@dataclass(frozen=True, slots=True)
class Runs:
    """Columns of runs, ascending and disjoint: blocks [start, start + length) are in `pack` from `slot` on.

    `pack` is an index into the manifest's PackTable, or a pack key where the text says so. There can be as
    many as the volume has blocks, so `length`, `slot` and indices are int32; `start` and keys are int64.
    """

    start: Int64s
    length: Integers
    pack: Integers
    slot: Integers

    @classmethod
    def narrow(cls, start: Int64s, length: Integers, pack: Integers, slot: Integers) -> Runs:
        """Runs of these columns, in as few bytes as their kind of number needs; `pack` stays as it is."""
        return cls(start, length.astype(np.int32, copy=False), pack, slot.astype(np.int32, copy=False))

    @classmethod
    def together(cls, parts: Sequence[Runs]) -> Runs:
        """All rows of `parts`, which have no block in common, ascending."""
        if not parts:
            return cls.empty()
        start = np.concatenate([part.start for part in parts])
        order = None if (start[1:] > start[:-1]).all() else np.argsort(start, kind="stable")
        columns_ = (np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__)
        return cls(*(column if order is None else column[order] for column in columns_))

    @classmethod
    def empty(cls) -> Runs:
        """No runs: a volume of zeros."""
        none = np.zeros(0, np.int64)
        return cls(none, none, none, none)

    def __len__(self) -> int:
        return int(self.start.size)

    @property
    def blocks(self) -> int:
        """Number of blocks that the runs name."""
        return int(self.length.sum())

    def intervals(self) -> Int64s:
        """Blocks as int64[n, 2] of start and stop."""
        return np.stack([self.start, self.start + self.length], axis=1)

    def rows(self, first: int, stop: int | None) -> Runs:
        """The rows of a slice, as views."""
        return Runs(*(getattr(self, name)[first:stop] for name in self.__slots__))

    def windows(self) -> Iterator[Runs]:
        """All rows in turn, some at a time, as views."""
        return (self.rows(first, first + _WINDOW) for first in range(0, len(self), _WINDOW))

    def around(self, low: int, high: int) -> Runs:
        """The rows that meet blocks [low, high), as views; perhaps one before them, too."""
        first, stop = np.searchsorted(self.start, [low, high])
        return self.rows(max(int(first) - 1, 0), int(stop))

    def slots(self) -> Int64s:
        """Slots, of runs that hold pack keys, as intervals of slot keys, int64[n, 2]."""
        return slot_intervals(self.pack, self.slot, self.length)

    def locate(self, blocks: Int64s) -> tuple[Int64s, Int64s, Int64s]:
        """Which of `blocks` are named (indices into it), and for each of those its row and offset there."""
        if not len(self):
            none = np.zeros(0, np.int64)
            return none, none, none
        row = np.searchsorted(self.start, blocks, side="right") - 1
        offset = blocks - self.start[row]
        named = np.flatnonzero((row >= 0) & (offset < self.length[row]))
        return named, row[named], offset[named]

    def slot_keys(self, blocks: Int64s) -> Int64s:
        """Return the slot key of each of `blocks`, or NOT_NAMED, of runs that hold pack keys."""
        keys = np.full(blocks.size, NOT_NAMED, np.int64)
        named, row, offset = self.locate(blocks)
        keys[named] = slot_intervals(self.pack[row], self.slot[row] + offset, offset)[:, 0]
        return keys

    def differing(self, other: Runs) -> Int64s:
        """Return the blocks that the two, of one numbering, name differently, int64[n, 2]."""
        edges = distinct(np.concatenate([self.intervals().ravel(), other.intervals().ravel()]))
        if not edges.size:
            return NO_INTERVALS
        spans = np.stack([edges[:-1], edges[1:]], axis=1)  # runs go on between edges: first blocks decide
        unequal = np.flatnonzero(self.slot_keys(spans[:, 0]) != other.slot_keys(spans[:, 0]))
        return np.asarray(spans[unequal], np.int64)

    def expand(self) -> tuple[Int64s, Int64s]:
        """Return block numbers and slots of one pack's runs, one row a block, slots ascending.

        DamagedObjectError for more blocks than a pack can have slots.
        """
        if self.blocks > MAX_SLOTS:
            raise DamagedObjectError("a manifest names more slots of a pack than a pack can have")
        before = np.repeat(np.cumsum(self.length) - self.length, self.length)
        within = np.arange(self.blocks) - before
        blocks = np.repeat(self.start, self.length) + within
        slots = np.repeat(self.slot, self.length) + within
        order = np.argsort(slots, kind="stable")
        return blocks[order], slots[order]

    def take(self, rows: Int64s, offset: Int64s, length: Int64s) -> Runs:
        """Pieces of runs: of row `rows[i]`, `length[i]` blocks from `offset[i]` on."""
        return Runs.narrow(self.start[rows] + offset, length, self.pack[rows], self.slot[rows] + offset)

    def within(self, keep: Int64s) -> Runs:
        """The pieces of runs that lie in `keep`, int64[n, 2], sorted and disjoint."""
        return self.take(*clip_rows(self.start, self.length, keep))

    def among(self, slots: Int64s) -> Runs:
        """The pieces of runs, which hold pack keys, whose slots are in `slots`, as intervals of slot keys."""
        return self.take(*clip_rows(self.slots()[:, 0], self.length, slots))


def merge(parent: Runs, replaced: Int64s, fresh: Runs) -> Runs:
    """`parent` with the blocks in `replaced` taken out and `fresh` put in.

    Both hold pack keys; `replaced` is int64[n, 2] of block intervals; `fresh` lies within it. Neighbours
    that continue one another are joined. It is done a window at a time, which bounds what it takes beside
    the runs themselves.
    """
    replaced = merge_intervals(replaced)
    parts: list[Runs] = []
    lows = distinct(np.concatenate([[0], parent.start[::_WINDOW], fresh.start[::_WINDOW]]))
    for low, high in zip(lows.tolist(), [*lows[1:].tolist(), _END], strict=True):
        touched = slice(*np.searchsorted(replaced[:, 0], [low, high]) - [1, 0])
        keep = subtract_intervals(np.array([[low, high]]), replaced[max(touched.start, 0) : touched.stop])
        kept = parent.around(low, high).within(keep)
        first, stop = np.searchsorted(fresh.start, [low, high])
        _append(parts, _joined(Runs.together([kept, fresh.rows(first, stop)])))
    return Runs.together(parts)


def _append(parts: list[Runs], runs: Runs) -> None:
    """Add `runs`, which are behind all `parts`; where they go on with the last run of these, it grows."""
    if parts and len(runs):
        edge = Runs.together([parts[-1].rows(-1, None), runs.rows(0, 1)])
        if len(_joined(edge)) == 1:
            parts[-1].length[-1] += runs.length[0]
            runs = runs.rows(1, None)
    if len(runs):
        parts.append(runs)


def _joined(runs: Runs) -> Runs:
    """`runs` with neighbours joined where block and slot both go on in the same pack."""
    if not len(runs):
        return runs
    goes_on = runs.pack[1:] == runs.pack[:-1]
    goes_on &= runs.start[1:] - runs.start[:-1] == runs.length[:-1]
    goes_on &= runs.slot[1:] - runs.slot[:-1] == runs.length[:-1]
    if not goes_on.any():
        return runs
    first = np.flatnonzero(np.append(True, ~goes_on))
    last = np.append(first[1:], len(runs)) - 1
    length = runs.start[last] + runs.length[last] - runs.start[first]
    return Runs.narrow(runs.start[first], length, runs.pack[first], runs.slot[first])
