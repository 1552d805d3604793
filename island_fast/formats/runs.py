"""Runs: in which slot of which pack each block of a snapshot is stored.

There can be as many runs as a volume has blocks, so columns are narrow, and large ones are worked on a window
of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from island_fast.arrays import Int64s
from island_fast.dirtymap import NO_INTERVALS, clip_rows, distinct, merge_intervals, subtract_intervals
from island_fast.errors import DamagedObjectError
from island_fast.formats.columns import Integers
from island_fast.formats.keys import slot_intervals
from island_fast.formats.pack import MAX_SLOTS

__all__ = ["NOT_NAMED", "Runs", "merge"]

NOT_NAMED = -1
"""Stands for the slot key of a block that no run names: the block is zero."""

_WINDOW = 1 << 16
_END = 1 << 62  # after every block


@dataclass(frozen=True, slots=True)
class Runs:
    """Columns of runs: blocks [start, start + length) are in the slots of `pack` from `slot` on.

    Runs are in ascending order and do not overlap. `pack` is a row of the manifest's PackTable, or a pack key
    or pack number where a docstring says so. `length`, `slot` and rows are int32; `start` and keys are int64.
    """

    start: Int64s
    length: Integers
    pack: Integers
    slot: Integers

    @classmethod
    def narrow(cls, start: Int64s, length: Integers, pack: Integers, slot: Integers) -> Runs:
        """Return runs of these columns, `length` and `slot` as int32; `pack` stays as it is."""
        return cls(start, length.astype(np.int32, copy=False), pack, slot.astype(np.int32, copy=False))

    @classmethod
    def join(cls, parts: Sequence[Runs]) -> Runs:
        """Return the rows of all `parts`, which have no block in common, in ascending order."""
        if not parts:
            return cls.empty()
        start = np.concatenate([part.start for part in parts])
        order = None if (start[1:] > start[:-1]).all() else np.argsort(start, kind="stable")
        joined = (np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__)
        return cls(*(column if order is None else column[order] for column in joined))

    @classmethod
    def empty(cls) -> Runs:
        """Return no runs: a volume of zeros."""
        none = np.zeros(0, np.int64)
        return cls(none, none, none, none)

    def __len__(self) -> int:
        return int(self.start.size)

    @property
    def blocks(self) -> int:
        """The number of blocks that the runs name."""
        return int(self.length.sum())

    def intervals(self) -> Int64s:
        """Return the blocks as intervals [start, stop), int64[n, 2]."""
        return np.stack([self.start, self.start + self.length], axis=1)

    def rows(self, first: int, stop: int | None) -> Runs:
        """Return the rows [first, stop), as views."""
        return Runs(*(getattr(self, name)[first:stop] for name in self.__slots__))

    def windows(self) -> Iterator[Runs]:
        """Yield all rows, a window at a time, as views."""
        return (self.rows(first, first + _WINDOW) for first in range(0, len(self), _WINDOW))

    def around(self, low: int, high: int) -> Runs:
        """Return the rows that have blocks in [low, high), and perhaps the one before, as views."""
        first, stop = np.searchsorted(self.start, [low, high])
        return self.rows(max(int(first) - 1, 0), int(stop))

    def slots(self) -> Int64s:
        """Return the slots of runs that hold pack keys, as intervals of slot keys, int64[n, 2]."""
        return slot_intervals(self.pack, self.slot, self.length)

    def locate(self, blocks: Int64s) -> tuple[Int64s, Int64s, Int64s]:
        """Return which of `blocks` are named (as indices), and for each of these its row and offset there."""
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
        """Return the blocks that two runs with pack keys of one numbering name differently, int64[n, 2]."""
        edges = distinct(np.concatenate([self.intervals().ravel(), other.intervals().ravel()]))
        if not edges.size:
            return NO_INTERVALS
        spans = np.stack([edges[:-1], edges[1:]], axis=1)  # runs end at edges only: first blocks decide
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
        """Return pieces of runs: `length[i]` blocks of row `rows[i]` from `offset[i]` on."""
        return Runs.narrow(self.start[rows] + offset, length, self.pack[rows], self.slot[rows] + offset)

    def within(self, keep: Int64s) -> Runs:
        """Return the pieces of runs that lie in `keep`: blocks, int64[n, 2], sorted and disjoint."""
        return self.take(*clip_rows(self.start, self.length, keep))

    def among(self, slots: Int64s) -> Runs:
        """Return the pieces of runs with pack keys whose slots are in `slots`, intervals of slot keys."""
        return self.take(*clip_rows(self.slots()[:, 0], self.length, slots))


def merge(parent: Runs, replaced: Int64s, fresh: Runs) -> Runs:
    """Return `parent` with the runs `fresh` instead of its own in the blocks `replaced`, int64[n, 2].

    Both hold pack keys, and `fresh` lies within `replaced`. Runs that continue one another are joined. This
    works on a window at a time, which bounds the memory that it needs in addition to the runs.
    """
    replaced = merge_intervals(replaced)
    parts: list[Runs] = []
    lows = distinct(np.concatenate([[0], parent.start[::_WINDOW], fresh.start[::_WINDOW]]))
    for low, high in zip(lows.tolist(), [*lows[1:].tolist(), _END], strict=True):
        touched = slice(*np.searchsorted(replaced[:, 0], [low, high]) - [1, 0])
        keep = subtract_intervals(np.array([[low, high]]), replaced[max(touched.start, 0) : touched.stop])
        kept = parent.around(low, high).within(keep)
        first, stop = np.searchsorted(fresh.start, [low, high])
        _append(parts, _join_neighbours(Runs.join([kept, fresh.rows(first, stop)])))
    return Runs.join(parts)


def _append(parts: list[Runs], runs: Runs) -> None:
    """Add `runs`, which come after all `parts`; if they continue the last run of `parts`, that run grows."""
    if parts and len(runs):
        edge = Runs.join([parts[-1].rows(-1, None), runs.rows(0, 1)])
        if len(_join_neighbours(edge)) == 1:
            parts[-1].length[-1] += runs.length[0]
            runs = runs.rows(1, None)
    if len(runs):
        parts.append(runs)


def _join_neighbours(runs: Runs) -> Runs:
    """Join runs that follow each other in both blocks and slots of one pack."""
    if not len(runs):
        return runs
    continues = runs.pack[1:] == runs.pack[:-1]
    continues &= runs.start[1:] - runs.start[:-1] == runs.length[:-1]
    continues &= runs.slot[1:] - runs.slot[:-1] == runs.length[:-1]
    if not continues.any():
        return runs
    first = np.flatnonzero(np.append(True, ~continues))
    last = np.append(first[1:], len(runs)) - 1
    length = runs.start[last] + runs.length[last] - runs.start[first]
    return Runs.narrow(runs.start[first], length, runs.pack[first], runs.slot[first])
