"""What this host knows of the health of a lineage's objects: when each was proved, and what was found lost.

Kept in local state: what is lost of it is read and found again. Objects are known by their full names below
the lineage, so a pack that was written anew is another object, of which nothing is known yet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from island_fast.arrays import Int64s
from island_fast.dirtymap import NO_INTERVALS, merge_intervals
from island_fast.formats.keys import SLOT_BITS
from island_fast.formats.pack import MAX_SLOTS
from island_fast.repository.lineage import Lineage

__all__ = ["Health", "knows_damage"]

_PROVED, _DAMAGED = "/proved", "/damaged"


class Health:
    """The notes on one lineage. Not thread-safe; of two processes that save, the later one's stay."""

    def __init__(self, lineage: Lineage) -> None:
        self._lineage = lineage
        self._proved: dict[str, float] | None = None
        self._damaged = {name: _rows(rows) for name, rows in self._read(_DAMAGED).items()}

    def proved(self, name: str) -> float:
        """When the object was last read whole and found right, in seconds since 1970; 0.0 for never."""
        return self._times().get(self._short(name), 0.0)

    def damaged(self, name: str) -> bool:
        """Whether the object was found damaged when it was last read."""
        return self._short(name) in self._damaged

    def note_proved(self, name: str, at: float) -> None:
        """The object was read whole and found right."""
        self._times()[self._short(name)] = at
        self._damaged.pop(self._short(name), None)

    def note_damaged(self, name: str, lost: NDArray[np.bool_]) -> None:
        """The object was found damaged; of a pack, `lost` tells the slots that cannot be read."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], lost, [False]])))
        self._damaged[self._short(name)] = edges.reshape(-1, 2)

    def lost(self) -> Int64s:
        """Slots of live packs that cannot be read, as merged intervals of slot keys, int64[n, 2]."""
        if not self._damaged:
            return NO_INTERVALS
        packs, lineage = self._lineage.state.packs, self._lineage
        found = [NO_INTERVALS]
        for key, name in zip(packs.key.tolist(), lineage.pack_names(packs), strict=True):
            found.append(self._damaged.get(self._short(name), found[0]) + (key << SLOT_BITS))
        return merge_intervals(np.concatenate(found))

    def save(self) -> None:
        """Keep what is known of the live snapshots' objects, and forget all others."""
        names = {self._short(name) for name in self._there()}
        self._write(_PROVED, {name: at for name, at in self._times().items() if name in names})
        damaged = {name: rows.tolist() for name, rows in self._damaged.items() if name in names}
        self._write(_DAMAGED, damaged)

    def _there(self) -> Iterator[str]:
        """Full names of the manifests of live snapshots, and of all packs."""
        lineage, packs = self._lineage, self._lineage.state.packs
        yield from map(lineage.manifest_name, lineage.state.live.values())
        yield from lineage.pack_names(packs)

    def _times(self) -> dict[str, float]:
        if self._proved is None:  # not read before: a snapshot need not know
            self._proved = {name: _time(at) for name, at in self._read(_PROVED).items()}
        return self._proved

    def _short(self, name: str) -> str:
        return name.removeprefix(self._lineage.name + "/")

    def _read(self, name: str) -> dict[str, object]:
        try:
            value = json.loads(self._lineage.files.cached(name) or b"{}")
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def _write(self, name: str, value: Mapping[str, object]) -> None:
        if value:
            self._lineage.files.cache(name, json.dumps(value).encode())
        else:
            self._lineage.files.uncache(name)


def knows_damage(lineage: Lineage) -> bool:
    """Whether this host knows of any damage in the lineage."""
    return lineage.files.cached(_DAMAGED) is not None


def _time(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _rows(value: object) -> Int64s:
    """Intervals of slots as they were noted; none if they make no sense."""
    try:
        rows = np.array(value, np.int64).reshape(-1, 2)
    except (ValueError, TypeError, OverflowError):
        rows = NO_INTERVALS
    return rows if ((rows >= 0) & (rows <= MAX_SLOTS)).all() else rows[:0]
