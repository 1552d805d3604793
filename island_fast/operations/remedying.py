"""From findings to what a person is told: whom damage touches, what was mended, and what else can be done."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from island_fast.arrays import Int64s
from island_fast.errors import UNREADABLE, IslandError, NotFoundError
from island_fast.images.backing import Backing
from island_fast.images.qcow2_source import Qcow2Source
from island_fast.images.raw_source import RawSource
from island_fast.images.source import Source, View
from island_fast.operations.heal import mend_catalog, mend_manifest, mend_packs, views_in
from island_fast.progress import Progress
from island_fast.repository.integrity.lineage import record_findings, touched
from island_fast.repository.integrity.objects import CONTRADICTION, LOST_BLOCKS, ROT, Finding
from island_fast.repository.lineage import Lineage
from island_fast.results import Damage, Touched

__all__ = ["CATALOG_LOST", "INCOMPLETE", "Mender", "damage", "remedied"]


_LOG = logging.getLogger(__name__)

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


@dataclass(frozen=True, slots=True)
class Mender:
    """Who mends, and an image, with its backing files, to take lost blocks from beside the volume's own."""

    repository: str
    writer: str
    image: Path | None
    backing: Sequence[Backing]

    def views(self, lineage: Lineage, stack: ExitStack) -> list[View]:
        """What the images hold, the named one first; one that cannot be used is told."""
        known = lineage.files.image()
        paths = [self.image] if self.image else []
        if known and all(os.path.realpath(path) != known for path in paths):
            paths.append(Path(known))
        views: list[View] = []
        for path in paths:
            try:
                backing = self.backing if path == self.image else ()
                source = stack.enter_context(_source(path, lineage, backing))
                views += views_in(source, lineage)
            except (IslandError, OSError) as error:
                _LOG.warning("%s cannot be used to mend anything: %s", path, error)
        return views


def _source(path: Path, lineage: Lineage, backing: Sequence[Backing]) -> Source:
    """An image in the format that the newest snapshot says; what is taken of it is proved by digests."""
    newest, image_format = lineage.state.newest(), "qcow2"
    if newest is not None:
        try:
            image_format = lineage.manifest(newest).properties.get("format", image_format)
        except (NotFoundError, *UNREADABLE):
            pass
    if image_format == "raw":
        return RawSource(path)
    return Qcow2Source(path, look_only=True, backing=backing)


@dataclass(slots=True)
class _Outcome:
    """What was mended: the catalog, manifests by snapshot, packs by key with what they still lack."""

    catalog: bool = False
    manifests: set[str] = field(default_factory=set)
    packs: dict[int, Int64s] = field(default_factory=dict)
    refusal: str = ""

    def mended(self, finding: Finding) -> bool:
        """Whether nothing is left of a finding."""
        if finding.key is not None:
            return finding.key in self.packs and not len(self.packs[finding.key])
        if finding.kind == CONTRADICTION:
            return False
        return finding.snapshot in self.manifests if finding.snapshot else self.catalog

    def left(self, finding: Finding) -> Finding:
        """What is left of a finding that was not mended."""
        if finding.key is None:
            return finding
        return replace(finding, lost=self.packs.get(finding.key, finding.lost))


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
    return Damage(volume, finding.name, finding.kind, finding.told, whom, mended, remedy)


def _mend(lineage: Lineage, findings: Sequence[Finding], mender: Mender, progress: Progress) -> _Outcome:
    """Mend what can be mended; a refusal is kept, to be told with what it left."""
    outcome = _Outcome()
    clear = [finding for finding in findings if finding.kind != CONTRADICTION]
    try:
        if any(f.key is None and f.snapshot is None for f in clear):
            mend_catalog(lineage, mender.writer)
            left = [name for name in lineage.ended if lineage.store.head(name) is None]
            outcome.catalog = not left and not record_findings(lineage, lineage.needed_records)[0]
        for snapshot in [f.snapshot for f in clear if f.snapshot]:
            if mend_manifest(lineage, mender.writer, snapshot):
                outcome.manifests.add(snapshot)
        with ExitStack() as stack:
            packs = [f for f in findings if f.key is not None]
            views = mender.views(lineage, stack) if packs else []
            outcome.packs = mend_packs(lineage, mender.writer, packs, views, progress)
    except IslandError as error:
        outcome.refusal = f"it was not mended: {error}"
    return outcome


def _remedy(lineage: Lineage, finding: Finding, *, tried: bool) -> str:
    """What can be done about a finding; `tried` if mending it was in vain."""
    where = f"'island verify --heal' on host {lineage.owner_host}, which owns the volume,"
    if finding.key is not None:
        if tried:
            known = finding.kind in (ROT, LOST_BLOCKS) or lineage.files.cached(finding.name) is not None
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
