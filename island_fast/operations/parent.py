"""Which snapshot a new one follows, and whether the two can be compared by their tables.

The parent is the newest live snapshot whose pin is in the image: what its manifest says is inherited. The
rule is a table diff where that is sound (docs/format.md, "Pinned base"), and the reason is told where not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from island_fast.dirtymap import NO_INTERVALS
from island_fast.formats.catalog import SnapshotRow
from island_fast.images.source import Base, Source
from island_fast.repository.lineage import Lineage
from island_fast.repository.local_state import Registration

__all__ = ["Request", "Start", "choose"]


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for: see `Repository.snapshot`."""

    repository: str
    writer: str
    label: str = ""
    pin: bool = True
    at: str | None = None
    full: bool = False
    compress: bool = True
    properties: Mapping[str, str] = field(default_factory=dict)
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """What a snapshot starts from: its parent, and the base of a table diff or why there is none."""

    parent: SnapshotRow | None
    base: Base | None
    why_not: str


def choose(lineage: Lineage, source: Source, request: Request) -> Start:
    """What a snapshot of `source` into `lineage`, refreshed, starts from. Changes nothing."""
    parent, base, why = _parent_and_base(lineage, source, request)
    if parent is not None and base is not None:
        facts = lineage.manifest(parent).properties
        why = _refusal(source, request) or source.reason_unsound(base, facts) or ""
    return Start(parent, None if why else base, why)


def _refusal(source: Source, request: Request) -> str | None:
    """Why no table diff is wanted or possible, whatever base there is."""
    if request.full:
        return "a full scan was asked for"
    if request.at is None and not request.pin and not source.reason_not_pinnable:
        return "without a pin, the image as it is cannot be compared with a pinned base"
    return source.reason_not_pinnable


def _parent_and_base(
    lineage: Lineage, source: Source, request: Request
) -> tuple[SnapshotRow | None, Base | None, str]:
    """The newest live snapshot whose pin is in the image; else a deleted one's and its ancestor."""
    live = lineage.state.live
    for row in reversed(live.values()):  # type: ignore[call-overload]
        if internal := source.find_pinned(row.pin):
            return row, Base(internal, NO_INTERVALS), ""
    for retired in lineage.files.retired():
        row = live.get(retired.parent or "")
        if row and (base := _retired_base(lineage, source, retired, row)):
            return row, base, ""
    newest = lineage.state.newest()
    if newest is None:
        return None, None, _refusal(source, request) or "it is the first snapshot of the volume"
    why = f"the pinned base of snapshot {newest.id[:8]} is not in the image"
    return newest, None, _refusal(source, request) or why


def _retired_base(
    lineage: Lineage, source: Source, deleted: Registration, ancestor: SnapshotRow
) -> Base | None:
    """The pin of a deleted snapshot as base, with the blocks that it wrote after its ancestor."""
    retired = lineage.cached_manifest(deleted.snapshot, deleted.attempt)
    internal = source.find_pinned(retired.pin) if retired else None
    if retired is None or internal is None:
        return None
    inherited = retired.runs_by_key(lineage.numbers)
    present = lineage.manifest(ancestor).runs_by_key(lineage.numbers)
    return Base(internal, inherited.differing(present))
