"""What this host knows of the health of a lineage's objects: when each was verified, and what is damaged.

It is kept in local state; what is lost of it is read and found again. Objects are known by their names below
the lineage, so a pack that was written again is another object, of which nothing is known yet. Each place of
a repository has its own notes: of a copy that was made file by file, nothing is known by its original.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np
import xxhash

from island_fast.arrays import Bools, Int64s
from island_fast.dirtymap import NO_INTERVALS, merge_intervals
from island_fast.formats.keys import SLOT_BITS
from island_fast.formats.pack import MAX_SLOTS
from island_fast.repository.lineage import Lineage

__all__ = ["Health", "has_known_damage"]

# Names of notes, which are older than the words used here. Earlier versions had one of each for all places.
_VERIFIED, _DAMAGED = "proved", "damaged"


class Health:
    """The notes on one lineage. Not thread-safe; if two processes save, those of the later one stay."""

    def __init__(self, lineage: Lineage) -> None:
        self._lineage = lineage
        self._verified: dict[str, float] | None = None
        self._damaged = {name: _parse_slots(rows) for name, rows in self._read(_DAMAGED).items()}

    def verified_at(self, name: str) -> float:
        """Return when the object was last read in full and was intact: seconds since 1970; 0.0 for never."""
        return self._times().get(self._short(name), 0.0)

    def is_damaged(self, name: str) -> bool:
        """Return whether the object was damaged when it was last read."""
        return self._short(name) in self._damaged

    def note_verified(self, name: str, at: float) -> None:
        """Note that the object was read in full at time `at` and found intact."""
        self._times()[self._short(name)] = at
        self._damaged.pop(self._short(name), None)

    def note_damaged(self, name: str, lost: Bools) -> None:
        """Note that the object is damaged; of a pack, `lost` says which slots cannot be read."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], lost, [False]])))
        self._damaged[self._short(name)] = edges.reshape(-1, 2)

    def lost(self) -> Int64s:
        """Return the slots of live packs that cannot be read: merged intervals of slot keys, int64[n, 2]."""
        if not self._damaged:
            return NO_INTERVALS
        packs, found = self._lineage.state.packs, [NO_INTERVALS]
        for key, name in zip(packs.key.tolist(), self._lineage.pack_names(packs), strict=True):
            found.append(self._damaged.get(self._short(name), NO_INTERVALS) + (key << SLOT_BITS))
        return merge_intervals(np.concatenate(found))

    def save(self) -> None:
        """Keep what is known of the objects that the state names, and forget all others."""
        names = {self._short(name) for name in self._current_names()}
        self._write(_VERIFIED, {name: at for name, at in self._times().items() if name in names})
        damaged = {name: rows.tolist() for name, rows in self._damaged.items() if name in names}
        self._write(_DAMAGED, damaged)

    def _current_names(self) -> Iterator[str]:
        """Yield the names of the manifests of live snapshots, and of all packs."""
        yield from map(self._lineage.manifest_name, self._lineage.state.live.values())
        yield from self._lineage.pack_names(self._lineage.state.packs)

    def _times(self) -> dict[str, float]:
        if self._verified is None:  # read late: a snapshot need not know
            self._verified = {name: _parse_time(at) for name, at in self._read(_VERIFIED).items()}
        return self._verified

    def _short(self, name: str) -> str:
        return name.removeprefix(self._lineage.name + "/")

    def _read(self, note: str) -> dict[str, object]:
        notes = self._lineage.files.notes
        try:
            value = json.loads(notes.read(_at_place(self._lineage, note)) or notes.read(note) or b"{}")
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def _write(self, note: str, value: Mapping[str, object]) -> None:
        notes, mine = self._lineage.files.notes, _at_place(self._lineage, note)
        if value:
            notes.write(mine, json.dumps(value).encode())
        else:
            notes.remove(mine)
        notes.remove(note)


def has_known_damage(lineage: Lineage) -> bool:
    """Return whether this host knows of any damage in the lineage."""
    notes = lineage.files.notes
    return any(notes.read(note) is not None for note in (_at_place(lineage, _DAMAGED), _DAMAGED))


def _at_place(lineage: Lineage, note: str) -> str:
    """Return the name of a note on the objects at the place of the lineage's store."""
    return f"{note}-{xxhash.xxh3_64_hexdigest(lineage.store.place.encode())}"


def _parse_time(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _parse_slots(value: object) -> Int64s:
    """Parse noted intervals of slots; none if they make no sense."""
    try:
        rows = np.array(value, np.int64).reshape(-1, 2)
    except (ValueError, TypeError, OverflowError):
        rows = NO_INTERVALS
    return rows if ((rows >= 0) & (rows <= MAX_SLOTS)).all() else rows[:0]
