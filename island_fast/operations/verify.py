"""Verify that every object that snapshots need exists, and that what is read of them is what was written.

All objects are looked up: records, and manifests that are not cached, are read; all others are checked by
name. If a share is asked for, or what was not read for a time, those objects are read in full, each once.
They begin with what has gone unread for longest, so that regular runs get round to everything.

All damage is found before any of it is reported or repaired. Repairing is in `heal.py`: it gets the findings
of a lineage, and returns what is left of each. Nothing else is changed than this host's notes on what it has
verified.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from island_fast.arrays import Int64s
from island_fast.dirtymap import BLOCK_SIZE, NO_INTERVALS, merge_intervals
from island_fast.errors import UNREADABLE, DamagedError, NotFoundError, UsageError
from island_fast.formats.catalog import SnapshotRow
from island_fast.formats.names import catalog_name, is_object_name
from island_fast.formats.pack import Index
from island_fast.images.backing import Backing
from island_fast.operations.compare import compare_with_pin
from island_fast.operations.heal import heal
from island_fast.progress import Progress
from island_fast.repository.integrity.catalog import find_catalog_damage
from island_fast.repository.integrity.lineage import CheckItem, LineageCheck
from island_fast.repository.integrity.objects import (
    CONTRADICTION,
    DIFFERS,
    LOST_BLOCKS,
    MISSING,
    ROT,
    Finding,
)
from island_fast.repository.lineage import Lineage
from island_fast.repository.open import RepositoryBase
from island_fast.results import Damage, Touched, Verified

__all__ = ["VerifyRequest", "select_for_reading", "verify"]

_CATALOG_LOST = (
    "do not delete or sweep anything; the host that owns the volume may hold a copy of its catalog: run "
    "'island verify --all --heal' there; if no host does, restore its snapshots with rescue.py, which comes "
    "with island"
)
_INCOMPLETE = (
    "take a snapshot with --full, which stores what differs; this snapshot, and those taken since, stay wrong"
)
_CONTRADICTION = (
    "do not delete or sweep anything of this volume; check whether two hosts wrote to it, or an older copy "
    "of the repository was put back"
)
_NO_INTACT_COPY = (
    "no image that is known here, and no other pack, holds an intact copy of what is lost; name an image "
    "that may hold it with --against, or delete the snapshots that are listed; the volume's next snapshot "
    "is complete"
)
_NO_INDEX = (
    "its index is lost and this host holds no copy, so nothing can prove what its blocks were; delete the "
    "snapshots that are listed; the volume's next snapshot is complete"
)
_NO_COPY = (
    "this host holds no copy of it; a host that has read the snapshot may hold one: run this command there, "
    "once that host owns the volume; other snapshots are complete"
)

_EXTENTS = 64  # that an answer lists for each snapshot and object


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """What the caller asks for: see `Repository.verify`."""

    sample: float | None = None
    since: float | None = None
    against: Path | None = None
    backing: Sequence[Backing] = ()
    heal: bool = False


def verify(
    repository: RepositoryBase, reference: str | None, request: VerifyRequest, progress: Progress
) -> Verified:
    """Verify the snapshot that `reference` names, or all; repair what can be repaired if that is asked for.

    Afterwards `repository.left_out` has an error for each volume that this version cannot read.
    """
    if request.against is not None and reference is None:
        raise UsageError("an image is compared with one snapshot; name it")
    began = time.monotonic()
    run = _VerifyRun(repository, request, progress)
    run.find_lineages(reference)
    run.check_objects()
    run.compare_with_image()
    damages = run.report()
    return Verified(
        snapshots=sum(len(check.rows) for check in run.checks),
        objects=sum(check.objects for check in run.checks),
        objects_read=sum(check.objects_read for check in run.checks),
        objects_unproved=run.count_never_read(),
        bytes_read=sum(check.bytes_read for check in run.checks),
        bytes_compared=run.bytes_compared,
        damages=tuple(damages),
        seconds=time.monotonic() - began,
    )


def _has_objects(lineage: Lineage) -> bool:
    """Return whether a listing shows an object of the lineage; a folder can be somebody else's."""
    listings = (lineage.store.list(f"{lineage.name}/{kind}/") for kind in ("catalog", "manifests", "packs"))
    return any(is_object_name(lineage.name, info.name) for listing in listings for info in listing)


class _VerifyRun:
    """One run: `checks` are those of the lineages that can be read."""

    def __init__(self, repository: RepositoryBase, request: VerifyRequest, progress: Progress) -> None:
        self.checks: list[LineageCheck] = []
        self.bytes_compared = 0
        self._repository = repository
        self._request = request
        self._progress = progress
        self._unreadable: list[Damage] = []  # catalogs
        self._differing: list[Damage] = []  # snapshots that differ from their pins
        self._items: list[list[CheckItem]] = []

    def find_lineages(self, reference: str | None) -> None:
        """Find what is to be checked; this reads catalogs, and manifests that are not cached."""
        if reference is not None:
            found = self._repository.find(reference)
            self.checks.append(LineageCheck(found.lineage, [found.row], whole=False))
            return
        self._repository.left_out = []
        for lineage, error in self._repository.every_lineage():
            if isinstance(error, DamagedError):
                self._add_unreadable(lineage, find_catalog_damage(lineage, error))
            elif error is not None:
                self._repository.left_out.append(error)
            elif lineage.exists:
                self.checks.append(LineageCheck(lineage, list(lineage.state.live.values()), whole=True))
            elif _has_objects(lineage):
                message = f"volume {lineage.name} has objects, but the first record of its catalog is missing"
                name = catalog_name(lineage.name, 0, 0)
                self._add_unreadable(lineage, [Finding(name, MISSING, message)])

    def _add_unreadable(self, lineage: Lineage, findings: Iterable[Finding]) -> None:
        self._unreadable += [_damage(lineage, finding, (), _CATALOG_LOST) for finding in findings]

    def check_objects(self) -> None:
        """Look up every object, and read those in full that are due."""
        self._items = [check.items() for check in self.checks]
        every = [item for items in self._items for item in items]
        due = select_for_reading(every, self._request.sample, self._request.since, time.time())
        for phase, whole in (("look", False), ("verify", True)):
            count = self._counter(phase, sum(item.size for item in every if (item.name in due) == whole))
            for check, items in zip(self.checks, self._items, strict=True):
                check.run([item for item in items if (item.name in due) == whole], whole, count)

    def _counter(self, phase: str, total: int) -> Callable[[CheckItem], None]:
        """Return a function that counts items as progress of `phase`."""
        done = 0

        def count(item: CheckItem) -> None:
            nonlocal done
            done += item.size
            self._progress(phase, done, total)

        return count

    def count_never_read(self) -> int:
        """Count the objects that this host has never read in full and found undamaged."""
        pairs = zip(self.checks, self._items, strict=True)
        return sum(not check.health.verified_at(item.name) for check, items in pairs for item in items)

    def compare_with_image(self) -> None:
        """Compare the snapshot with its pin, if that is asked for.

        A pack whose index turns out to be damaged becomes a finding.
        """
        if self._request.against is None:
            return
        (check,) = self.checks
        (row,) = check.rows
        lineage, unreadable = check.lineage, set[int]()

        def index(key: int) -> Index | None:
            if key not in unreadable:
                try:
                    return check.packs.reader.read_index(key)
                except UNREADABLE:
                    unreadable.add(key)
            return None

        try:
            manifest = lineage.manifest(row)
        except (NotFoundError, *UNREADABLE):  # a finding already
            return
        image, backing = self._request.against, self._request.backing
        compared = compare_with_pin(lineage, manifest, image, backing, index, self._progress)
        self.bytes_compared = compared.bytes_read
        known = {finding.key for finding in check.findings}
        check.findings += [f for key in sorted(unreadable - known) if (f := check.packs.check(key))]
        if len(compared.differing):
            affected = _affected_blocks(row.id, row.volume_size, compared.differing)
            message = f"snapshot {row.id} differs from its pin in {image}"
            finding = Finding(lineage.manifest_name(row), DIFFERS, message, snapshot=row.id)
            self._differing.append(_damage(lineage, finding, (affected,), _INCOMPLETE))

    def report(self) -> list[Damage]:
        """Report all damage, after repairing what can be repaired if that is asked for."""
        damages: list[Damage] = []
        for check in self.checks:
            damages += _report_findings(check.lineage, check.findings, self._request, self._progress)
        return damages + self._unreadable + self._differing


def select_for_reading(
    items: Iterable[CheckItem], sample: float | None, since: float | None, now: float
) -> set[str]:
    """Select the objects to be read in full, by name: those not read for `since` seconds, up to a share.

    `sample` is a fraction of the bytes of all `items`; what has gone unread for longest comes first. What is
    known to be damaged is read in any case; without `sample` and `since`, only that is read.
    """
    items = list(items)
    names = {item.name for item in items if item.damaged}
    if sample is None and since is None:
        return names
    left = math.inf if sample is None else math.ceil(sample * sum(item.size for item in items))
    for item in sorted(items, key=lambda item: item.verified_at if item.verified_at <= now else 0.0):
        if left <= 0:
            break
        if since is None or not now - since < item.verified_at <= now:
            names.add(item.name)
            left -= item.size
    return names


def _report_findings(
    lineage: Lineage, findings: Sequence[Finding], request: VerifyRequest, progress: Progress
) -> list[Damage]:
    """Report the findings in one lineage; with `request.heal`, after repairing what can be repaired."""
    if not findings:
        return []
    affected = _find_affected(lineage, findings)
    if not request.heal:
        pairs = zip(findings, affected, strict=True)
        return [_damage(lineage, finding, whom, _advice(lineage, finding)) for finding, whom in pairs]
    healed = heal(lineage, findings, request.against, request.backing, progress)
    still_affected = iter(_find_affected(lineage, [finding for finding in healed.left if finding]))
    damages = []
    for finding, whom, left in zip(findings, affected, healed.left, strict=True):
        if left is None:
            damages.append(_damage(lineage, finding, whom, "", mended=True))
        else:
            remedy = healed.refusal or _advice_after_healing(lineage, finding)
            damages.append(_damage(lineage, finding, next(still_affected), remedy))
    return damages


def _find_affected(lineage: Lineage, findings: Sequence[Finding]) -> list[tuple[Touched, ...]]:
    """Find for each finding the live snapshots that need what is lost, and where in their volumes."""
    rows = {row.id: row for row in lineage.state.live.values()}
    found: list[list[Touched]] = [[] for _ in findings]
    for number, finding in enumerate(findings):
        if finding.key is None:
            ids = [finding.snapshot] if finding.snapshot else list(rows)
            found[number] = [_affected_wholly(rows[one]) for one in ids if one in rows]
    by_key = {finding.key: number for number, finding in enumerate(findings) if finding.key is not None}
    lost = merge_intervals(np.concatenate([NO_INTERVALS, *(finding.lost for finding in findings)]))
    for snapshot, size, runs in lineage.live_runs() if len(lost) else ():
        pieces = runs.among(lost)
        for key in np.unique(pieces.pack).tolist():
            mine = pieces.intervals()[pieces.pack == key]
            found[by_key[key]].append(_affected_blocks(snapshot, size, mine))
    return [tuple(one) for one in found]


def _affected_wholly(row: SnapshotRow) -> Touched:
    """Return a snapshot as affected in all of its volume."""
    return Touched(row.id, row.volume_size, ((0, row.volume_size),) if row.volume_size else (), 0)


def _affected_blocks(snapshot: str, volume_size: int, blocks: Int64s) -> Touched:
    """Return a snapshot as affected in these blocks of its volume, int64[n, 2]."""
    spans = np.minimum(merge_intervals(blocks) * BLOCK_SIZE, volume_size)
    listed = [(a, b - a) for a, b in spans[:_EXTENTS].tolist()]
    size = int((spans[:, 1] - spans[:, 0]).sum())
    return Touched(snapshot, size, tuple(listed), max(0, len(spans) - _EXTENTS))


def _damage(
    lineage: Lineage, finding: Finding, whom: tuple[Touched, ...], remedy: str, *, mended: bool = False
) -> Damage:
    return Damage(lineage.name, finding.name, finding.kind, finding.message, whom, mended, remedy)


def _advice(lineage: Lineage, finding: Finding) -> str:
    """Return what can be done about a finding that nobody tried to repair."""
    command = f"'island verify --all --heal' on host {lineage.owner_hostname}, which owns the volume,"
    if finding.key is not None:
        return (
            f"{command} takes what is lost from the volume's image, if that still holds it; snapshots that "
            "are not listed are complete"
        )
    if finding.kind == CONTRADICTION:
        return _CONTRADICTION
    if finding.snapshot:
        return f"{command} puts it back, if that host holds a copy; other snapshots are complete"
    return _CATALOG_LOST


def _advice_after_healing(lineage: Lineage, finding: Finding) -> str:
    """Return what can be done about a finding that could not be repaired here."""
    if finding.key is not None:
        index_known = finding.kind in (ROT, LOST_BLOCKS) or lineage.files.cache.read(finding.name) is not None
        return _NO_INTACT_COPY if index_known else _NO_INDEX
    if finding.kind == CONTRADICTION:
        return _CONTRADICTION
    return _NO_COPY if finding.snapshot else _CATALOG_LOST
