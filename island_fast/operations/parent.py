"""Which lineage and parent a new snapshot gets, and whether the two can be compared by their tables.

The lineage is the one that is named, else the one whose pin the image holds, else the one that this host
remembers for the image; and the image must be that lineage's (image_of_volume.py). The parent is the newest
live snapshot whose pin is in the image; the new snapshot inherits what the parent's manifest says. The rule
is a table diff where that is sound (docs/format.md, "Pinned base"); otherwise it is a full scan, with the
reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from island_fast.dirtymap import NO_INTERVALS
from island_fast.errors import ConflictError, RefusedError
from island_fast.formats.catalog import SnapshotRow
from island_fast.images.pins import pinned_lineage
from island_fast.images.source import Base, Source
from island_fast.operations.image_of_volume import (
    accept_image,
    describe_image,
    holds_pin,
    is_other_device,
    is_renamed,
)
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
    lineage, or the one whose pin an image holds that is not known here: it was moved, or copied. RefusedError
    if the lineage belongs to another image.
    """
    name = volume
    if name is None and repository.exists:
        pinned, refusal = _pinned_lineage(repository, source)
        if pinned:
            return pinned
        name = _remembered_lineage(repository, source)
        if name is None and refusal:
            raise refusal
    lineage = repository.refreshed_lineage(name or source.path.stem)
    if lineage.exists:
        lineage.require_owner()
        accept_image(lineage, source)
    return lineage


def _pinned_lineage(repository: RepositoryBase, source: Source) -> tuple[Lineage | None, RefusedError | None]:
    """Return the lineage that this host owns, whose valid pin the image holds and whose image it is.

    It is refreshed. If there is none, second is why the image cannot continue a lineage that a pin names.
    """
    refusal: RefusedError | None = None
    names = [pinned_lineage(repository.id, internal.name) for internal in reversed(source.internal_snapshots)]
    for name in dict.fromkeys(filter(None, names)):
        lineage = repository.refreshed_lineage(name)
        if lineage.exists and not lineage.owned_here:
            refusal = refusal or ConflictError(
                f"{source.path} holds a pin of volume {name}, which belongs to {lineage.owner_described}; "
                f"if the image was moved here, run 'island adopt {name}', or if it is a copy, give it a "
                "volume of its own with --volume"
            )
        elif lineage.exists and holds_pin(source, lineage):
            try:
                accept_image(lineage, source)
                return lineage, None
            except RefusedError as error:
                refusal = refusal or error
    return None, refusal


def _remembered_lineage(repository: RepositoryBase, source: Source) -> str | None:
    """Return the lineage that this host remembers for the image, if there is exactly one.

    What a file or device is counts more than its path: two of them can have swapped their names.
    """
    here = describe_image(source)
    images = repository.state.images(repository.id)
    mine = [name for name, known in images.items() if is_renamed(known, here)]
    mine = mine or [
        name for name, known in images.items() if known.path == here.path and not is_other_device(known, here)
    ]
    return mine[0] if len(mine) == 1 else None


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
        return "a table diff compares two pins, and this snapshot takes none"
    return source.reason_not_pinnable
