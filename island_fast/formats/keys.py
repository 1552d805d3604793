"""Slots as integers, so that sets of them are intervals that numpy can add and subtract.

A lineage numbers the snapshots that ever wrote packs (`SnapshotNumbers`, local to one process: nothing of
it is stored). A pack key is (snapshot number, pack number); a slot key is (pack key, slot). Both order as
their parts do. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from island_fast.arrays import Int64s
from island_fast.errors import DamagedObjectError

__all__ = [
    "MAX_PACK_NUMBER",
    "PACK_BITS",
    "SLOT_BITS",
    "SnapshotNumbers",
    "pack_keys",
    "slot_intervals",
    "split_pack_key",
]


SLOT_BITS = 16
PACK_BITS = 28
MAX_PACK_NUMBER = (1 << PACK_BITS) - 1
_MAX_SNAPSHOTS = 1 << (63 - PACK_BITS - SLOT_BITS)


class SnapshotNumbers:
    """Numbers for snapshot ids, given in order of first sight and never changed. Not thread-safe."""

    def __init__(self, ids: Iterable[str] = ()) -> None:
        self._ids: list[str] = []
        self._numbers: dict[str, int] = {}
        for snapshot in ids:
            self.number(snapshot)

    def number(self, snapshot: str) -> int:
        """The number of `snapshot`, given now if it has none."""
        number = self._numbers.setdefault(snapshot, len(self._ids))
        if number == len(self._ids):
            if number >= _MAX_SNAPSHOTS:
                raise DamagedObjectError("a lineage names more snapshots than can exist")
            self._ids.append(snapshot)
        return number

    def numbers(self, snapshots: Sequence[str]) -> Int64s:
        """`number` of each, int64[n]."""
        return np.fromiter((self.number(s) for s in snapshots), np.int64, len(snapshots))

    def id(self, number: int) -> str:
        """The snapshot id that has `number`."""
        return self._ids[number]


def pack_keys(snapshots: Int64s, numbers: Int64s) -> Int64s:
    """Pack keys from snapshot numbers and pack numbers, column by column."""
    return np.asarray((snapshots << PACK_BITS) | numbers, np.int64)


def split_pack_key(key: int) -> tuple[int, int]:
    """Snapshot number and pack number of one pack key."""
    return key >> PACK_BITS, key & MAX_PACK_NUMBER


def slot_intervals(packs: Int64s, slots: Int64s, lengths: Int64s) -> NDArray[np.int64]:
    """Intervals [start, stop) of slot keys, int64[n, 2], from columns of pack keys and slot runs."""
    starts = (packs << SLOT_BITS) | slots
    return np.stack([starts, starts + lengths], axis=1)
