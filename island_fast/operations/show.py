"""`list` and `show`: what the catalog says of a snapshot, and what deleting it would free."""

from __future__ import annotations

import logging
from dataclasses import asdict

from island_fast.errors import DamagedError
from island_fast.formats.catalog import SnapshotRow
from island_fast.operations.delete import plan_deletion
from island_fast.repository.lineage import Lineage
from island_fast.repository.open import FoundSnapshot
from island_fast.results import Snapshot, SnapshotShown, timestamp

__all__ = ["show", "snapshot_info"]

_LOG = logging.getLogger(__name__)


def show(found: FoundSnapshot) -> SnapshotShown:
    """Return a snapshot, and what deleting it would free: None, with a warning, if damage hides that."""
    info = asdict(snapshot_info(found.lineage, found.row))
    try:
        deletion = plan_deletion(found.lineage, found.row)
        manifest = found.lineage.manifest(found.row)
    except DamagedError as error:
        _LOG.warning("cannot compute what deleting it would free: %s", error)
        return SnapshotShown(**info, bytes_unreferenced=None, bytes_freed=None)
    facts = manifest.properties
    return SnapshotShown(
        **info,
        bytes_unreferenced=deletion.unreferenced,
        bytes_freed=deletion.freed,
        consistency=facts.get("consistency"),
        domain=facts.get("libvirt.domain"),
        disk=facts.get("libvirt.disk"),
        group=manifest.group,
    )


def snapshot_info(lineage: Lineage, row: SnapshotRow) -> Snapshot:
    """Return a snapshot as `list` and `show` present it."""
    return Snapshot(
        snapshot=row.id,
        lineage=lineage.name,
        parent=row.parent,
        volume=lineage.name,
        label=row.label,
        created=timestamp(row.created),
        volume_size=row.volume_size,
        bytes_stored=row.stored + row.manifest_size,
        keep=row.keep,
    )
