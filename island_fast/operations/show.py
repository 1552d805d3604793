"""`show` and `list`: what is known of a snapshot, and what deleting it would free."""

from __future__ import annotations

from dataclasses import asdict

from island_fast.errors import DamagedError
from island_fast.formats.catalog import SnapshotRow
from island_fast.operations.delete import _LOG, planned
from island_fast.repository.lineage import Lineage
from island_fast.repository.open import Found
from island_fast.results import Snapshot, SnapshotShown, timestamp

__all__ = ["describe", "show"]


def describe(lineage: Lineage, row: SnapshotRow) -> Snapshot:
    """A snapshot as `list` and `show` tell it."""
    return Snapshot(
        snapshot=row.id,
        lineage=lineage.name,
        parent=row.parent,
        volume=lineage.name,
        label=row.label,
        created=timestamp(row.created),
        volume_size=row.volume_size,
        bytes_stored=row.stored + row.manifest_size,
    )


def show(found: Found) -> SnapshotShown:
    """One snapshot, and what deleting it would free."""
    shown = asdict(describe(found.lineage, found.row))
    try:
        deletion = planned(found.lineage, found.row)
        manifest = found.lineage.manifest(found.row)
    except DamagedError as error:
        _LOG.warning("what deleting it would free cannot be told: %s", error)
        return SnapshotShown(**shown, bytes_unreferenced=None, bytes_freed=None)
    facts = manifest.properties
    return SnapshotShown(
        **shown,
        bytes_unreferenced=deletion.unreferenced,
        bytes_freed=deletion.freed,
        consistency=facts.get("consistency"),
        domain=facts.get("libvirt.domain"),
        disk=facts.get("libvirt.disk"),
        group=manifest.group,
    )
