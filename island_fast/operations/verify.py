"""Verifying: every object that snapshots name is there, and what is read of them is what was written.

All objects are looked for: records and manifests that are not cached are read, everything else is asked for
by name. Asked for a share, or for what was not read for long, those objects are read whole, each once: what
was not proved for the longest comes first, so that regular runs get round. All damage is found before any of
it is told or mended.
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
from island_fast.formats.names import catalog_name
from island_fast.formats.pack import Index
from island_fast.images.backing import Backing
from island_fast.operations.compare import compare_with_pin
from island_fast.operations.heal import Mender, _mend, _Outcome
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

__all__ = ["CATALOG_LOST", "INCOMPLETE", "VerifyRequest", "damage", "remedied", "share", "touched", "verify"]

CATALOG_LOST = (
    "delete and sweep nothing; the host that owns the volume may hold a copy of its catalog: run "
    "'island verify --all --heal' there"
)
INCOMPLETE = (
    "take a snapshot with --full, which stores what differs; this one, and those taken since, stay wrong"
)
_CONTRADICTION = (
    "delete and sweep nothing of this volume; see whether two hosts wrote to it, or an older copy of the "
    "repository was put back"
)
_NOT_MENDED = (
    "what is lost is neither in an image that is known here nor in another pack; name an image that may have "
    "it with --against, or delete the snapshots that are named; the volume's next snapshot is whole"
)
_NO_INDEX = (
    "its index is lost and this host holds no copy, so nothing can prove what its blocks were; delete the "
    "snapshots that are named; the volume's next snapshot is whole"
)
_NO_COPY = (
    "this host holds no copy of it; one that has read the snapshot may: run it there, once it owns the "
    "volume; other snapshots are whole"
)

_EXTENTS = 64  # that an answer lists for each snapshot and object


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """What is asked for: see `Repository.verify`."""

    sample: float | None = None
    since: float | None = None
    against: Path | None = None
    backing: Sequence[Backing] = ()
    heal: bool = False


def verify(
    repository: RepositoryBase, reference: str | None, request: VerifyRequest, progress: Progress
) -> Verified:
    """Verify the snapshot that `reference` names, or all, and mend what can be mended if that is asked for.

    Volumes that cannot be read by this version are in `repository.left_out`.
    """
    if request.against is not None and reference is None:
        raise UsageError("an image is compared with one snapshot; name it")
    began = time.monotonic()
    run = _Run(repository, request, progress)
    run.begin(reference)
    run.check()
    run.compare()
    damages = run.damages()
    return Verified(
        snapshots=sum(len(checkup.rows) for checkup in run.checkups),
        objects=sum(checkup.objects for checkup in run.checkups),
        objects_read=sum(checkup.objects_read for checkup in run.checkups),
        objects_unproved=run.unproved(),
        bytes_read=sum(checkup.bytes_read for checkup in run.checkups),
        bytes_compared=run.bytes_compared,
        damages=tuple(damages),
        seconds=time.monotonic() - began,
    )


def share(items: Iterable[CheckItem], sample: float | None, since: float | None, now: float) -> set[str]:
    """Names of the objects to be read whole: those not proved for `since` seconds, up to a share of all.

    `sample` is a fraction of the bytes of all `items`; what was not proved for the longest comes first. What
    is known to be damaged is read in any case. Without `sample` and `since` that is all.
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


class _Run:
    """One run: the lineages that are checked, and those whose catalogs cannot be read."""

    def __init__(self, repository: RepositoryBase, request: VerifyRequest, progress: Progress) -> None:
        self.checkups: list[LineageCheck] = []
        self.bytes_compared = 0
        self._repository = repository
        self._request = request
        self._progress = progress
        self._broken: list[tuple[Lineage, list[Finding]]] = []
        self._differing: list[Damage] = []
        self._items: list[list[CheckItem]] = []

    def begin(self, reference: str | None) -> None:
        """Find what is to be checked; catalogs and manifests are read."""
        if reference is not None:
            found = self._repository.find(reference)
            self.checkups.append(LineageCheck(found.lineage, [found.row], whole=False))
            return
        self._repository.left_out = []
        for lineage, error in self._repository.every_lineage():
            if isinstance(error, DamagedError):
                self._broken.append((lineage, find_catalog_damage(lineage, error)))
            elif error is not None:
                self._repository.left_out.append(error)
            elif lineage.exists:
                self.checkups.append(LineageCheck(lineage, list(lineage.state.live.values()), whole=True))
            elif next(lineage.store.list(f"{lineage.name}/"), None) is not None:
                told = f"volume {lineage.name} has objects, and the first record of its catalog is missing"
                name = catalog_name(lineage.name, 0, 0)
                self._broken.append((lineage, [Finding(name, MISSING, told)]))

    def check(self) -> None:
        """Look for every object, and read the share that is due."""
        self._items = [checkup.items() for checkup in self.checkups]
        every = [item for items in self._items for item in items]
        deep = share(every, self._request.sample, self._request.since, time.time())
        for phase, whole in (("look", False), ("verify", True)):
            told = self._telling(phase, sum(item.size for item in every if (item.name in deep) == whole))
            for checkup, items in zip(self.checkups, self._items, strict=True):
                checkup.run([item for item in items if (item.name in deep) == whole], whole, told)

    def _telling(self, phase: str, total: int) -> Callable[[CheckItem], None]:
        done = 0

        def told(item: CheckItem) -> None:
            nonlocal done
            done += item.size
            self._progress(phase, done, total)

        return told

    def unproved(self) -> int:
        """How many objects this host has never read whole and found right."""
        pairs = zip(self.checkups, self._items, strict=True)
        return sum(not checkup.health.verified_at(item.name) for checkup, items in pairs for item in items)

    # Against an image.

    def compare(self) -> None:
        """Compare the snapshot with its pin, if that is asked for; packs whose index is damaged are found."""
        if self._request.against is None:
            return
        (checkup,) = self.checkups
        (row,) = checkup.rows
        lineage, unread = checkup.lineage, set[int]()

        def index(key: int) -> Index | None:
            if key not in unread:
                try:
                    return checkup.packs.reader.read_index(key)
                except UNREADABLE:
                    unread.add(key)
            return None

        try:
            manifest = lineage.manifest(row)
        except (NotFoundError, *UNREADABLE):  # found damaged before
            return
        image, backing = self._request.against, self._request.backing
        found = compare_with_pin(lineage, manifest, image, backing, index, self._progress)
        self.bytes_compared = found.bytes_read
        known = {finding.key for finding in checkup.findings}
        checkup.findings += [f for key in sorted(unread - known) if (f := checkup.packs.check(key))]
        if len(found.differing):
            where = extents_of(row.id, row.volume_size, found.differing)
            told = f"snapshot {row.id} is not what its pin in {image} holds"
            finding = Finding(lineage.manifest_name(row), DIFFERS, told, snapshot=row.id)
            self._differing.append(damage(lineage.name, finding, (where,), INCOMPLETE))

    # What is told.

    def damages(self) -> list[Damage]:
        """All damage, after what can be mended was, if that is asked for."""
        ask = self._request
        mender = Mender(ask.against, ask.backing) if ask.heal else None
        found = [
            d for one in self.checkups for d in remedied(one.lineage, one.findings, mender, self._progress)
        ]
        for lineage, findings in self._broken:
            found += [damage(lineage.name, finding, (), CATALOG_LOST) for finding in findings]
        return found + self._differing


def touched(lineage: Lineage, findings: Sequence[Finding]) -> list[tuple[Touched, ...]]:
    """For each finding the live snapshots that need what is lost, and where in their volumes."""
    rows = {row.id: row for row in lineage.state.live.values()}
    found: list[list[Touched]] = [[] for _ in findings]
    for number, finding in enumerate(findings):
        if finding.key is None:
            ids = [finding.snapshot] if finding.snapshot else list(rows)
            found[number] = [_whole(rows[one]) for one in ids if one in rows]
    by_key = {finding.key: n for n, finding in enumerate(findings) if finding.key is not None}
    lost = merge_intervals(np.concatenate([NO_INTERVALS, *(f.lost for f in findings)]))
    for snapshot, size, runs in lineage.live_runs() if len(lost) else ():
        pieces = runs.among(lost)
        for key in np.unique(pieces.pack).tolist():
            mine = pieces.intervals()[pieces.pack == key]
            found[by_key[key]].append(extents_of(snapshot, size, mine))
    return [tuple(one) for one in found]


def _whole(row: SnapshotRow) -> Touched:
    return Touched(row.id, row.volume_size, ((0, row.volume_size),) if row.volume_size else (), 0)


def extents_of(snapshot: str, volume_size: int, blocks: Int64s) -> Touched:
    """Blocks of a snapshot's volume, int64[n, 2], as an answer tells them."""
    spans = np.minimum(merge_intervals(blocks) * BLOCK_SIZE, volume_size)
    listed = [(a, b - a) for a, b in spans[:_EXTENTS].tolist()]
    return Touched(
        snapshot, int((spans[:, 1] - spans[:, 0]).sum()), tuple(listed), max(0, len(spans) - _EXTENTS)
    )


def remedied(
    lineage: Lineage, findings: Sequence[Finding], mender: Mender | None, progress: Progress
) -> list[Damage]:
    """What is told of the findings in one lineage, after `mender` has mended what it can."""
    if not findings:
        return []
    before = touched(lineage, findings)
    outcome = _mend(lineage, findings, mender, progress) if mender else _Outcome()
    after = touched(lineage, [outcome.left(finding) for finding in findings])
    told = []
    for finding, was, now in zip(findings, before, after, strict=True):
        if outcome.mended(finding):
            told.append(damage(lineage.name, finding, was, "", mended=True))
        else:
            remedy = outcome.refusal or _remedy(lineage, finding, tried=mender is not None)
            told.append(damage(lineage.name, finding, now, remedy))
    return told


def damage(
    volume: str, finding: Finding, whom: tuple[Touched, ...], remedy: str, *, mended: bool = False
) -> Damage:
    """A finding as it is told."""
    return Damage(volume, finding.name, finding.kind, finding.message, whom, mended, remedy)


def _remedy(lineage: Lineage, finding: Finding, *, tried: bool) -> str:
    """What can be done about a finding; `tried` if mending it was in vain."""
    where = f"'island verify --heal' on host {lineage.owner_hostname}, which owns the volume,"
    if finding.key is not None:
        if tried:
            known = finding.kind in (ROT, LOST_BLOCKS) or lineage.files.cache.read(finding.name) is not None
            return _NOT_MENDED if known else _NO_INDEX
        return (
            f"{where} takes what is lost from the volume's image, where that still has it; snapshots that "
            "are not named are whole"
        )
    if finding.kind == CONTRADICTION:
        return _CONTRADICTION
    if finding.snapshot:
        return _NO_COPY if tried else f"{where} puts it back, if that holds a copy; other snapshots are whole"
    return CATALOG_LOST
