"""The check of one lineage: its catalog, its manifests, and its packs.

Damage never ends a check: everything else is checked too. Nothing that is stored is changed; this host notes
which objects it found intact, and which damaged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from island_fast.arrays import Bools, Int64s
from island_fast.dirtymap import intersect_intervals
from island_fast.errors import UNREADABLE, NotFoundError
from island_fast.formats.catalog import SnapshotRow
from island_fast.formats.keys import SLOT_BITS
from island_fast.formats.manifest import Manifest
from island_fast.repository.health import Health
from island_fast.repository.integrity.catalog import check_records
from island_fast.repository.integrity.objects import (
    CONTRADICTION,
    MISSING,
    Finding,
    PackChecker,
    check_manifest,
)
from island_fast.repository.lineage import Lineage
from island_fast.repository.workers import in_order, workers

__all__ = ["CheckItem", "LineageCheck"]

_HEADS_AT_ONCE = 8  # objects whose presence is checked at a time


@dataclass(frozen=True, slots=True)
class CheckItem:
    """An object to be checked: a pack, by its key, or the manifest of the snapshot in `row`.

    `size` is in bytes. `verified_at` is when this host last read the object whole and found it intact, in
    seconds since 1970, or 0.0 for never. An object that is known to be `damaged` is always read whole.
    """

    name: str
    size: int
    verified_at: float
    key: int | None = None
    row: SnapshotRow | None = None
    damaged: bool = False


class LineageCheck:
    """The check of a lineage, which must have been refreshed, or of what its snapshots `rows` need.

    Making it reads the records and the manifests that are not cached; `run` checks the other `items`. If the
    lineage is checked `whole`, these include every pack with a slot that is not dead, even if the manifest
    that names it cannot be read. `findings` grows with each step. `objects` and `bytes_read` count what was
    checked and read, `objects_read` the objects that were read whole.
    """

    def __init__(self, lineage: Lineage, rows: Sequence[SnapshotRow], *, whole: bool) -> None:
        self.lineage = lineage
        self.rows = list(rows)
        self.health = Health(lineage)
        self.packs = PackChecker(lineage)
        self._fetched: set[str] = set()  # manifests that were not cached, and were read whole
        self._unreadable: set[str] = set()  # manifests
        self.findings, self.bytes_read = check_records(lineage, lineage.current_record_names)
        self.findings += self._check_stops()
        keys = self._check_manifests()
        self._keys = self._needed_packs() if whole else keys
        self.objects = len(lineage.current_record_names) + len(lineage.stop_names) + len(self._fetched)
        self.objects_read = len(lineage.current_record_names) + len(self._fetched)

    def _check_stops(self) -> Iterator[Finding]:
        for name in self.lineage.stop_names:
            if self.lineage.store.head(name) is None:
                message = f"{name} is missing: a host may take that epoch for the present one"
                yield Finding(name, MISSING, message)

    # Manifests.

    def _check_manifests(self) -> Int64s:
        """Read every manifest, from this host's cache if it can; return the keys of the packs they name."""
        keys = np.zeros(0, np.int64)
        for row in self.rows:
            manifest = self._read_manifest(row)
            if manifest is not None:
                self.findings += self._find_contradictions(row, manifest)
                keys = np.union1d(keys, manifest.packs.keys(self.lineage.numbers))
        return keys[self.lineage.state.packs.find(keys) >= 0]

    def _read_manifest(self, row: SnapshotRow) -> Manifest | None:
        """Return a manifest, or None if it cannot be read: `run` then finds it damaged or deleted."""
        manifest = self.lineage.read_cached_manifest(row.id, row.attempt, row.checksum)
        if manifest is not None:
            return manifest
        name = self.lineage.manifest_name(row)
        try:
            manifest = self.lineage.manifest(row)
        except (NotFoundError, *UNREADABLE):
            self._unreadable.add(name)
            return None
        self.health.note_verified(name, time.time())
        self._fetched.add(name)
        self.bytes_read += row.manifest_size
        return manifest

    def _find_contradictions(self, row: SnapshotRow, manifest: Manifest) -> Iterator[Finding]:
        """Yield in what the manifest and the catalog contradict each other."""
        state, name = self.lineage.state, self.lineage.manifest_name(row)
        if row.id not in state.live:
            return
        runs = manifest.runs_by_key(self.lineage.numbers)
        at = state.packs.find(runs.pack)
        slots = manifest.slot_intervals(self.lineage.numbers)
        if (at < 0).any():
            message = f"manifest {name} names packs that the catalog does not"
        elif (runs.slot + runs.length > state.packs.slots[at]).any():
            message = f"manifest {name} names slots that its packs do not have"
        elif len(intersect_intervals(slots, state.dead)):
            message = f"the catalog counts blocks as dead that manifest {name} names; do not sweep"
        else:
            return
        yield Finding(name, CONTRADICTION, message, snapshot=row.id)

    def _needed_packs(self) -> Int64s:
        """Return the keys of all packs with a slot that is not dead."""
        packs, dead = self.lineage.state.packs, self.lineage.state.dead
        count = np.zeros(len(packs), np.int64)
        at = packs.find(dead[:, 0] >> SLOT_BITS)
        np.add.at(count, at[at >= 0], (dead[:, 1] - dead[:, 0])[at >= 0])
        return packs.key[count < packs.slots]

    # Packs, and manifests that are cached.

    def items(self) -> list[CheckItem]:
        """Return the objects that `run` is to check: all packs, and the manifests that were not read yet."""
        state, health = self.lineage.state, self.health
        found = []
        for row in self.rows:
            name = self.lineage.manifest_name(row)
            if name not in self._fetched:
                damaged = name in self._unreadable or health.is_damaged(name)
                size, verified_at = row.manifest_size, health.verified_at(name)
                found.append(CheckItem(name, size, verified_at, row=row, damaged=damaged))
        rows = state.packs.find(self._keys)
        for at in rows[rows >= 0].tolist():
            name = self.lineage.pack_name(state.packs, at)
            size, key = int(state.packs.size[at]), int(state.packs.key[at])
            verified_at, damaged = health.verified_at(name), health.is_damaged(name)
            found.append(CheckItem(name, size, verified_at, key, damaged=damaged))
        return found

    def run(self, items: Sequence[CheckItem], whole: bool, on_checked: Callable[[CheckItem], None]) -> None:
        """Read these objects `whole`, or only check that they are stored; call `on_checked` after each.

        What was found intact or damaged is noted, however this ends.
        """
        self.objects += len(items)
        count = self.lineage.store.downloads if whole else _HEADS_AT_ONCE
        jobs = (partial(self._check, item, whole) for item in items)
        try:
            with workers(count, "verify") as pool:
                for item, finding in zip(items, in_order(pool, jobs, 2 * count), strict=True):
                    self._note(item, finding, whole)
                    on_checked(item)
        finally:
            self.health.save()

    def _check(self, item: CheckItem, whole: bool) -> Finding | None:
        if item.row is not None:
            return check_manifest(self.lineage, item.row, whole=whole)
        assert item.key is not None
        return self.packs.check(item.key) if whole else self.packs.check_presence(item.key)

    def _note(self, item: CheckItem, finding: Finding | None, whole: bool) -> None:
        if whole:
            self.objects_read += 1
            self.bytes_read += item.size
        if finding is not None:
            self.findings.append(finding)
            self.health.note_damaged(finding.name, _lost_mask(finding))
        elif whole:
            self.health.note_verified(item.name, time.time())


def _lost_mask(finding: Finding) -> Bools:
    """Return which slots of a pack are lost, up to the last one that is."""
    if finding.key is None or not len(finding.lost):
        return np.zeros(0, np.bool_)
    slots = finding.lost[:, 0] - (finding.key << SLOT_BITS)
    mask = np.zeros(int(slots.max()) + 1, np.bool_)
    mask[slots] = True
    return mask
