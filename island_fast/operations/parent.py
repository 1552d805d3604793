"""Which lineage and parent a new snapshot gets, and whether the two can be compared by their tables.

The lineage is the one that is named, else the one whose pin the image holds, else the one that this host
remembers for the image. The parent is the newest live snapshot whose pin is in the image; the new snapshot
inherits what the parent's manifest says. The rule is a table diff where that is sound (docs/format.md,
"Pinned base"); otherwise it is a full scan, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from island_fast.dirtymap import NO_INTERVALS
from island_fast.errors import RefusedError
from island_fast.formats.catalog import SnapshotRow
from island_fast.images.pins import pinned_lineage
from island_fast.images.source import Base, Source
from island_fast.repository.lineage import Lineage
from island_fast.repository.local_state import Registration
from island_fast.repository.open import RepositoryBase

__all__ = ["ParentChoice", "SnapshotRequest", "choose_parent", "lineage_for_image"]


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """What the caller asks for: see `Repository.snapshot`."""

    repository: str
    label: str = ""
    pin: bool = True
    at: str | None = None
    full: bool = False
    compress: bool = True
    properties: Mapping[str, str] = field(default_factory=dict)
    group: str | None = None


def lineage_for_image(repository: RepositoryBase, source: Source, volume: str | None) -> Lineage:
    """Return the lineage, refreshed, that a snapshot of `source` goes to; it need not exist yet.

    It is that of `volume` if that is given, else the one whose pin the image holds, else the one that this
    host remembers for the image, else one named after the file. ConflictError if another host owns the
    lineage; RefusedError if it belongs to another image.
    """
    name = volume
    if name is None and repository.exists:
        if pinned := _pinned_lineage(repository, source):
            return pinned
        name = repository.state.lineage_of(repository.id, source.path)
    lineage = repository.refreshed_lineage(name or source.path.stem)
    if lineage.exists:
        lineage.require_owner()
        known = lineage.files.image() in (None, str(source.path))
        if not known and not _holds_pin(source, lineage):
            raise RefusedError(
                f"{repository.store.location} already has a volume {lineage.name}, and {source.path} is not "
                f"known as its image and does not hold its pin; give another name with --volume, or if it is "
                f"that volume, run 'island adopt {lineage.name}'"
            )
    return lineage


def _pinned_lineage(repository: RepositoryBase, source: Source) -> Lineage | None:
    """Return the lineage that this host owns and whose valid pin the image holds, refreshed."""
    pinned = [
        pinned_lineage(repository.id, internal.name) for internal in reversed(source.internal_snapshots)
    ]
    for name in dict.fromkeys(filter(None, pinned)):
        lineage = repository.refreshed_lineage(name)
        if lineage.exists and lineage.owned_here and _holds_pin(source, lineage):
            return lineage
    return None


def _holds_pin(source: Source, lineage: Lineage) -> bool:
    """Return whether the image holds a pin of the lineage, by its whole identity."""
    pins = [row.pin for row in lineage.state.live.values()]
    for deleted in lineage.files.deleted_snapshots():
        manifest = lineage.read_cached_manifest(deleted.snapshot, deleted.attempt)
        pins += [manifest.pin] if manifest else []
    return any(source.find_pinned(pin) for pin in pins)


@dataclass(frozen=True, slots=True)
class ParentChoice:
    """The parent of a new snapshot, and the base of a table diff or, in `why_not`, why there is none."""

    parent: SnapshotRow | None
    base: Base | None
    why_not: str


def choose_parent(lineage: Lineage, source: Source, request: SnapshotRequest) -> ParentChoice:
    """Choose the parent and the base of a snapshot of `source` into `lineage`, refreshed. Changes nothing."""
    parent, base, why = _find_parent_and_base(lineage, source, request)
    if parent is not None and base is not None:
        facts = lineage.manifest(parent).properties
        why = _reason_for_full_scan(source, request) or source.reason_unsound(base, facts) or ""
    return ParentChoice(parent, None if why else base, why)


def _find_parent_and_base(
    lineage: Lineage, source: Source, request: SnapshotRequest
) -> tuple[SnapshotRow | None, Base | None, str]:
    """Find the newest live snapshot whose pin is in the image; else a deleted one's pin and its ancestor.

    Without either, the parent is the newest snapshot, if there is any, and the reason says why it has no
    base. So it is if the image cannot hold a new pin: a full scan gains nothing by an older parent.
    """
    live = lineage.state.live
    usable = source.reason_not_pinnable is None
    for row in reversed(live.values()) if usable else ():  # type: ignore[call-overload]
        if internal := source.find_pinned(row.pin):
            return row, Base(internal, NO_INTERVALS), ""
    for deleted in lineage.files.deleted_snapshots() if usable else ():
        row = live.get(deleted.parent or "")
        if row and (base := _base_of_deleted(lineage, source, deleted, row)):
            return row, base, ""
    newest = lineage.state.newest()
    if newest is None:
        why = "it is the first snapshot of the volume"
    elif _was_taken_without_pin(newest):
        why = f"snapshot {newest.id[:8]} was taken without a pin, so there is no base to compare with"
    else:
        why = f"the pinned base of snapshot {newest.id[:8]} is not in the image"
    return newest, None, _reason_for_full_scan(source, request) or why


def _base_of_deleted(
    lineage: Lineage, source: Source, deleted: Registration, ancestor: SnapshotRow
) -> Base | None:
    """Return a deleted snapshot's pin as base, with the blocks that it wrote after its ancestor."""
    manifest = lineage.read_cached_manifest(deleted.snapshot, deleted.attempt)
    internal = source.find_pinned(manifest.pin) if manifest else None
    if manifest is None or internal is None:
        return None
    inherited = manifest.runs_by_key(lineage.numbers)
    present = lineage.manifest(ancestor).runs_by_key(lineage.numbers)
    return Base(internal, inherited.differing(present))


def _was_taken_without_pin(row: SnapshotRow) -> bool:
    """Return whether the snapshot left no pin: its pin's identity is then made from its own time."""
    return row.created == row.pin.seconds * 10**9 + row.pin.nanoseconds


def _reason_for_full_scan(source: Source, request: SnapshotRequest) -> str | None:
    """Return why a full scan is wanted or necessary, whatever base there is; None if it is not."""
    if request.full:
        return "a full scan was requested"
    if request.at is None and not request.pin and not source.reason_not_pinnable:
        return "without a pin, the image as it is cannot be compared with a pinned base"
    return source.reason_not_pinnable
