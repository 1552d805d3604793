"""What this host knows of the health of a lineage's objects: when each was proved, and what was found lost.

Kept in local state: what is lost of it is read and found again. Objects are known by their full names below
the lineage, so a pack that was written anew is another object, of which nothing is known yet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from island_fast.arrays import Int64s
from island_fast.dirtymap import DirtyMap, merge_intervals, subtract_intervals
from island_fast.formats.catalog import manifest_name, pack_full_name
from island_fast.formats.keys import SLOT_BITS
from island_fast.formats.pack import MAX_SLOTS
from island_fast.formats.runs import Runs
from island_fast.images.source import Change
from island_fast.repository.lineage import Lineage

__all__ = ["Health", "knows_damage", "resent"]

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
            return np.zeros((0, 2), np.int64)
        packs, lineage = self._lineage.state.packs, self._lineage
        found = [np.zeros((0, 2), np.int64)]
        for row, key in enumerate(packs.key.tolist()):
            name = pack_full_name(lineage.name, packs, row, lineage.numbers)
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
        yield from (manifest_name(lineage.name, row.id, row.attempt) for row in lineage.state.live.values())
        yield from (pack_full_name(lineage.name, packs, row, lineage.numbers) for row in range(len(packs)))

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
        rows = np.zeros((0, 2), np.int64)
    return rows if ((rows >= 0) & (rows <= MAX_SLOTS)).all() else rows[:0]


def resent(lineage: Lineage, change: Change, parent: Runs) -> tuple[Change, Runs]:
    """`change` with the blocks that the parent has lost, as this host knows, and what of `parent` is proof.

    Such blocks are read from the image and sent again, whatever they hold: an entry that points to a lost
    block is not inherited. `parent` holds pack keys.
    """
    if not knows_damage(lineage):
        return change, parent
    gone = parent.among(Health(lineage).lost()).intervals()
    here = DirtyMap.from_runs(change.candidates.blocks, np.minimum(gone, change.candidates.blocks))
    again = replace(
        change,
        candidates=change.candidates | here,
        data=change.data | here,
        replaced=merge_intervals(np.concatenate([change.replaced, gone])),
    )
    return again, parent.within(subtract_intervals(parent.intervals(), gone))
