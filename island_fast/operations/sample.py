"""A sample against the unknown: a few blocks that a table diff calls unchanged, read and compared.

A table diff is sound only as long as nobody changes clusters, or tables, behind qemu's back. Repairs,
programs that write into the file, and parts of it that were put back leave no trace in the tables. So each
table diff is tested: some blocks that it would inherit unread are read, and must have the parent's digests. A
change that touched much of the volume is found at once, a small one sooner or later, because each snapshot
draws others.

Digests come from indexes of packs that this host has in its cache: a sample makes no request.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from island_fast.dirtymap import BLOCK_SIZE
from island_fast.formats.pack import Index
from island_fast.formats.runs import Runs
from island_fast.images.source import Change, View
from island_fast.repository.digests import ExpectedDigests
from island_fast.repository.streams import find_differing

__all__ = ["Sample", "compare_sample"]

_SPREAD = 16  # stored blocks, one from each part of the volume
_ENDS = 16  # blocks at the ends of what changed, and of what is stored together
_TRIES = 4  # for each block of the spread: those that changed, or whose index is not here, do not count


@dataclass(frozen=True, slots=True)
class Sample:
    """How many blocks were compared, and the first that differs from the parent; None if none does."""

    blocks: int
    differing: int | None


def compare_sample(
    view: View, change: Change, parent: Runs, index: Callable[[int], Index | None], seed: int, draw: str
) -> Sample:
    """Compare blocks of `view` that are not in `change` with the digests of the parent's.

    `parent` are the parent's runs, with pack keys; a block that they do not name should be zero. `index(key)`
    returns the index of a pack, or None if it is not at hand; blocks in such packs are not compared. `seed`
    is that of the digests. The same `draw` draws the same blocks.
    """
    chance = random.Random(draw)
    expected = ExpectedDigests(parent, cache(index))
    chosen: set[int] = set()
    for tries in _draw_spread(view.blocks, parent, chance):
        for block in tries:
            if _is_comparable(block, chosen, change, expected):
                chosen.add(block)
                break
    for block in _draw_ends(view.blocks, change, parent, chance):
        if _is_comparable(block, chosen, change, expected):
            chosen.add(block)
    blocks = np.array(sorted(chosen), np.int64)
    if not blocks.size:
        return Sample(0, None)
    rows = np.empty((blocks.size, BLOCK_SIZE), np.uint8)
    differing, _ = find_differing(view.read, blocks, rows, expected, seed)
    return Sample(int(blocks.size), int(differing[0]) if differing.size else None)


def _is_comparable(block: int, chosen: set[int], change: Change, expected: ExpectedDigests) -> bool:
    """Return whether a block would be inherited unread, and what it should be is known here."""
    if block in chosen or block in change.candidates:
        return False
    _, _, unreadable = expected.digests_of(np.array([block], np.int64))
    return not unreadable[0]


def _draw_spread(blocks: int, parent: Runs, chance: random.Random) -> Iterator[list[int]]:
    """Yield for each part of the volume a few blocks, of which one is wanted; named ones, where there are."""
    for part in range(_SPREAD):
        low, high = blocks * part // _SPREAD, blocks * (part + 1) // _SPREAD
        if low < high:
            yield [_nearest_named(chance.randrange(low, high), blocks, parent, chance) for _ in range(_TRIES)]


def _nearest_named(block: int, blocks: int, parent: Runs, chance: random.Random) -> int:
    """Return `block` if the parent names it, else one of the run that follows it, or of the last one."""
    if not len(parent):
        return block
    row = max(int(np.searchsorted(parent.start, block, "right")) - 1, 0)
    if block >= int(parent.start[row]) + int(parent.length[row]):
        row = min(row + 1, len(parent) - 1)
    start = int(parent.start[row])
    stop = min(start + int(parent.length[row]), blocks)
    return block if start <= block < stop or start >= stop else chance.randrange(start, stop)


def _draw_ends(blocks: int, change: Change, parent: Runs, chance: random.Random) -> list[int]:
    """Return blocks beside what changed, and the first, the last and the next block of runs of the parent."""
    beside = change.replaced[:-1]
    found: list[int] = []
    for row in _draw_rows(len(beside), _ENDS // 4, chance):
        found += [int(beside[row, 0]) - 1, int(beside[row, 1])]
    for row in _draw_rows(len(parent), _ENDS // 4, chance):
        stop = int(parent.start[row]) + int(parent.length[row])
        found += [int(parent.start[row]), stop - 1, stop]
    inside = [block for block in dict.fromkeys(found) if 0 <= block < blocks]
    return inside[:_ENDS]


def _draw_rows(rows: int, most: int, chance: random.Random) -> list[int]:
    """Return at most `most` numbers of rows, spread over all of them."""
    count = min(rows, most)
    return sorted({chance.randrange(rows * n // count, rows * (n + 1) // count) for n in range(count)})
