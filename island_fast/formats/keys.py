"""Packs and slots as integers: a set of slots is a set of intervals, which numpy can add and subtract.

`SnapshotNumbers` numbers the snapshots of a lineage; it belongs to one process, and none of it is stored. A
pack key is (snapshot number, pack number), and a slot key is (pack key, slot), each in one int64 that orders
as its parts do.
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
    """Numbers of snapshot ids, in the order in which they were first asked for. Not thread-safe."""

    def __init__(self, ids: Iterable[str] = ()) -> None:
        self._ids: list[str] = []
        self._numbers: dict[str, int] = {}
        for snapshot in ids:
            self.number(snapshot)

    def number(self, snapshot: str) -> int:
        """Return the number of `snapshot`, a new one if it has none; it never changes."""
        number = self._numbers.setdefault(snapshot, len(self._ids))
        if number == len(self._ids):
            if number >= _MAX_SNAPSHOTS:
                raise DamagedObjectError("a lineage names more snapshots than can exist")
            self._ids.append(snapshot)
        return number

    def numbers(self, snapshots: Sequence[str]) -> Int64s:
        """Return the number of each of `snapshots`, int64[n]."""
        return np.fromiter((self.number(s) for s in snapshots), np.int64, len(snapshots))

    def id(self, number: int) -> str:
        """Return the snapshot id that has `number`."""
        return self._ids[number]


def pack_keys(snapshots: Int64s, numbers: Int64s) -> Int64s:
    """Return the pack keys of these snapshot numbers and pack numbers, row by row."""
    return np.asarray((snapshots << PACK_BITS) | numbers, np.int64)


def split_pack_key(key: int) -> tuple[int, int]:
    """Return the snapshot number and the pack number of a pack key."""
    return key >> PACK_BITS, key & MAX_PACK_NUMBER


def slot_intervals(packs: Int64s, slots: Int64s, lengths: Int64s) -> NDArray[np.int64]:
    """Return `lengths` slots of `packs` from `slots` on, as intervals of slot keys, int64[n, 2]."""
    starts = (packs << SLOT_BITS) | slots
    return np.stack([starts, starts + lengths], axis=1)
