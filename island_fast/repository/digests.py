"""Digests of blocks that are stored already, found through runs and the indexes of packs.

A digest answers only whether a block has the same content; where the block is stored, the runs say.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from island_fast.arrays import Bools, Bytes2D, Int64s
from island_fast.dirtymap import distinct
from island_fast.errors import UNREADABLE
from island_fast.formats.pack import Index, stored_ranges
from island_fast.formats.runs import Runs

__all__ = ["ExpectedDigests", "KnownBlocks", "KnownDigests"]

_LOG = logging.getLogger(__name__)


class KnownDigests:
    """Digests of the stored blocks that `runs` name. Thread-safe.

    `index(pack)` returns the index of the pack that the runs' column `pack` names, or None if that pack must
    not be relied on; one thread calls it at a time. If an index cannot be read, that is logged once, and no
    block of that pack matches.
    """

    def __init__(self, runs: Runs, index: Callable[[int], Index | None]) -> None:
        self._runs = runs
        self._index = index
        self._unreadable: set[int] = set()
        self._lock = threading.Lock()  # so that no two threads fetch the same index

    def names(self, blocks: Int64s) -> bool:
        """Return whether the runs name any of `blocks`; this reads no index."""
        return self._runs.locate(blocks)[0].size > 0

    def matches(self, blocks: Int64s, digests: Bytes2D) -> Bools:
        """Return which of `blocks` (ascending) are stored with the digest in the same row of `digests`."""
        answer = np.zeros(blocks.size, np.bool_)
        named, row, offset = self._runs.locate(blocks)
        packs, slots = self._runs.pack[row], self._runs.slot[row] + offset
        for pack in distinct(packs):
            mine = packs == pack
            with self._lock:
                index = self._read_index(int(pack), slots[mine])
            if index is None:
                continue
            known = index.rows["digest"][slots[mine]]
            answer[named[mine]] = (known == digests[named[mine]]).all(axis=1)
        return answer

    def _read_index(self, pack: int, slots: Int64s) -> Index | None:
        """Return the index of a pack that holds `slots`, or None if it cannot be relied on."""
        if pack in self._unreadable:
            return None
        try:
            index = self._index(pack)
            if index is not None:
                stored_ranges(index, slots)  # refuses slots that the pack does not hold
            return index
        except UNREADABLE as error:
            _LOG.warning("%s; those of its blocks that are read are sent again", error)
            self._unreadable.add(pack)
            return None


@dataclass(frozen=True, slots=True)
class KnownBlocks:
    """What need not be sent: blocks of the `parent`, and blocks that earlier attempts stored (`kept`)."""

    parent: KnownDigests
    kept: KnownDigests


class ExpectedDigests:
    """Digests that blocks should have, by `runs`, which hold pack keys. Thread-safe.

    `index(key)` returns the index of a pack, or None if it cannot be read; one thread calls it at a time. A
    slot that its pack has lost keeps its digest, which counts here.
    """

    def __init__(self, runs: Runs, index: Callable[[int], Index | None]) -> None:
        self._runs = runs
        self._index = index
        self._lock = threading.Lock()

    def digests_of(self, blocks: Int64s) -> tuple[Bytes2D, Bools, Bools]:
        """Return the digests of `blocks`, uint8[n, 16], which of them are known, and which cannot be read.

        Neither is true of a block that no run names: it should be zero.
        """
        digests = np.zeros((blocks.size, 16), np.uint8)
        known, unreadable = np.zeros(blocks.size, np.bool_), np.zeros(blocks.size, np.bool_)
        named, row, offset = self._runs.locate(blocks)
        keys, slots = self._runs.pack[row], self._runs.slot[row] + offset
        for key in distinct(keys).tolist():
            mine = keys == key
            with self._lock:
                index = self._index(key)
            if index is None or int(slots[mine].max()) >= len(index.rows):
                unreadable[named[mine]] = True
            else:
                digests[named[mine]] = index.rows["digest"][slots[mine]]
                known[named[mine]] = True
        return digests, known, unreadable
