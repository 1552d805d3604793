"""Checking the objects of one lineage: catalog, manifests and packs; what is found, and whom it touches.

Everything is checked that can be, whatever was found before. Nothing is changed but this host's notes on what
it has proved.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from island_fast.arrays import Int64s
from island_fast.dirtymap import intersect_intervals
from island_fast.errors import UNREADABLE, NotFoundError
from island_fast.formats.catalog import SnapshotRow
from island_fast.formats.keys import SLOT_BITS
from island_fast.formats.manifest import Manifest
from island_fast.repository.health import Health
from island_fast.repository.integrity.catalog import record_findings
from island_fast.repository.integrity.objects import (
    CONTRADICTION,
    MISSING,
    Examiner,
    Finding,
    manifest_finding,
)
from island_fast.repository.lineage import Lineage

__all__ = ["Checkup", "Item"]


_LOOKS = 8  # objects asked for at a time


@dataclass(frozen=True, slots=True)
class Item:
    """An object to be checked: a pack, by its key, or the manifest of the snapshot in `row`.

    `size` is in bytes; `proved` tells when this host last read it whole, in seconds since 1970, 0.0 for
    never. What is known to be `damaged` is read whole in any case.
    """

    name: str
    size: int
    proved: float
    key: int | None = None
    row: SnapshotRow | None = None
    damaged: bool = False


class Checkup:
    """The check of one lineage, refreshed, or of those of its objects that the snapshots `rows` need.

    Of `whole` lineages all packs are checked that hold anything that is needed, also where a manifest that
    would name them cannot be read.
    """

    def __init__(self, lineage: Lineage, rows: Sequence[SnapshotRow], *, whole: bool) -> None:
        self.lineage = lineage
        self.rows = list(rows)
        self.findings: list[Finding] = []
        self.objects = 0
        self.objects_read = 0
        self.health = Health(lineage)
        self.packs = Examiner(lineage)
        self._fetched: set[str] = set()  # manifests that were not cached, and came whole
        self._unread: set[str] = set()  # manifests that could not be read
        found, self.bytes_read = record_findings(lineage, lineage.needed_records)
        self.findings += found
        self.findings += self._epoch_findings()
        keys = self._manifest_keys()
        self._keys = self._needed() if whole else keys
        self.objects += len(lineage.needed_records) + len(lineage.ended) + len(self._fetched)
        self.objects_read += len(lineage.needed_records) + len(self._fetched)

    def _epoch_findings(self) -> Iterator[Finding]:
        for name in self.lineage.ended:
            if self.lineage.store.head(name) is None:
                told = f"{name} is missing: a host may take that epoch for the present one"
                yield Finding(name, MISSING, told)

    def _needed(self) -> Int64s:
        """Keys of all packs with a slot that is not dead."""
        packs, dead = self.lineage.state.packs, self.lineage.state.dead
        count = np.zeros(len(packs), np.int64)
        at = packs.find(dead[:, 0] >> SLOT_BITS)
        np.add.at(count, at[at >= 0], (dead[:, 1] - dead[:, 0])[at >= 0])
        return packs.key[count < packs.slots]

    # Manifests.

    def _manifest_keys(self) -> Int64s:
        """Read every manifest, from this host's cache where it is there; keys of the packs that they name."""
        keys = np.zeros(0, np.int64)
        for row in self.rows:
            manifest = self._manifest(row)
            if manifest is not None:
                self.findings += self._contradictions(row, manifest)
                keys = np.union1d(keys, manifest.packs.keys(self.lineage.numbers))
        return keys[self.lineage.state.packs.find(keys) >= 0]

    def _manifest(self, row: SnapshotRow) -> Manifest | None:
        """The manifest; None, and found damaged, or the snapshot deleted meanwhile, if it cannot be read."""
        manifest = self.lineage.cached_manifest(row.id, row.attempt, row.checksum)
        if manifest is not None:
            return manifest
        name = self.lineage.manifest_name(row)
        try:
            manifest = self.lineage.manifest(row)
        except (NotFoundError, *UNREADABLE):
            self._unread.add(name)
            return None
        self.health.note_verified(name, time.time())
        self._fetched.add(name)
        self.bytes_read += row.manifest_size
        return manifest

    def _contradictions(self, row: SnapshotRow, manifest: Manifest) -> Iterator[Finding]:
        """What the manifest and the catalog do not agree on."""
        state, name = self.lineage.state, self.lineage.manifest_name(row)
        if row.id not in state.live:
            return
        runs = manifest.runs_by_key(self.lineage.numbers)
        at = state.packs.find(runs.pack)
        slots = manifest.slot_intervals(self.lineage.numbers)
        if (at < 0).any():
            told = f"manifest {name} names packs that the catalog does not"
        elif (runs.slot + runs.length > state.packs.slots[at]).any():
            told = f"manifest {name} names slots that its packs do not have"
        elif len(intersect_intervals(slots, state.dead)):
            told = f"the catalog counts blocks that manifest {name} names as needed no more; do not sweep"
        else:
            return
        yield Finding(name, CONTRADICTION, told, snapshot=row.id)

    # Everything else.

    def items(self) -> list[Item]:
        """The objects that `run` checks, but for manifests that were read already."""
        state, health = self.lineage.state, self.health
        found = []
        for row in self.rows:
            name = self.lineage.manifest_name(row)
            if name not in self._fetched:
                damaged = name in self._unread or health.is_damaged(name)
                item = Item(name, row.manifest_size, health.verified_at(name), row=row, damaged=damaged)
                found.append(item)
        rows = state.packs.find(self._keys)
        for at in rows[rows >= 0].tolist():
            name = self.lineage.pack_name(state.packs, at)
            size, key = int(state.packs.size[at]), int(state.packs.key[at])
            found.append(Item(name, size, health.verified_at(name), key, damaged=health.is_damaged(name)))
        return found

    def run(self, items: Sequence[Item], whole: bool, told: Callable[[Item], None]) -> None:
        """Read these objects `whole`, or only ask for them; `told` is called after each.

        What was proved is noted, however this ends.
        """
        self.objects += len(items)
        try:
            workers = self.lineage.store.downloads if whole else _LOOKS
            for item, finding in _each(items, lambda item: self._check(item, whole), workers):
                self._note(item, finding, whole)
                told(item)
        finally:
            self.health.save()

    def _check(self, item: Item, whole: bool) -> Finding | None:
        if item.row is not None:
            return manifest_finding(self.lineage, item.row, whole=whole)
        assert item.key is not None
        return self.packs.finding(item.key) if whole else self.packs.look(item.key)

    def _note(self, item: Item, finding: Finding | None, whole: bool) -> None:
        if whole:
            self.objects_read += 1
            self.bytes_read += item.size
        if finding is not None:
            self.findings.append(finding)
            self.health.note_damaged(finding.name, _lost_mask(finding))
        elif whole:
            self.health.note_verified(item.name, time.time())


def _lost_mask(finding: Finding) -> NDArray[np.bool_]:
    """Which slots of a pack are lost, up to the last one that is."""
    if finding.key is None or not len(finding.lost):
        return np.zeros(0, np.bool_)
    slots = finding.lost[:, 0] - (finding.key << SLOT_BITS)
    mask = np.zeros(int(slots.max()) + 1, np.bool_)
    mask[slots] = True
    return mask


def _each(
    items: Sequence[Item], work: Callable[[Item], Finding | None], workers: int
) -> Iterator[tuple[Item, Finding | None]]:
    """`work` of each item by several workers, in order, with a bounded number under way."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="island-verify")
    waiting: deque[tuple[Item, Future[Finding | None]]] = deque()
    try:
        for item in items:
            if len(waiting) == 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
            waiting.append((item, pool.submit(work, item)))
        for first, future in waiting:
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# The catalog.


# Whom it touches.
